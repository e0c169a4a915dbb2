"""MoE blocks that scale what their experts read, called like all others (Llama 4).

transformers' block gives every expert all tokens, times a score that is 0 but for the chosen ones: E T rows. Inside
`standard_calls` it gives its experts what those of other families get: tokens, the ids that its router has chosen, and
their scores. The experts scale the rows that they read, f(w x) in place of w f(x), and block and experts return and
differentiate to the same values, but for rows of zeros that are not computed. Weights, their names, and what the block
returns stay.

Source: transformers, models/llama4/modeling_llama4.py (Llama4TextMoe).

Legend: B sequences, S tokens of one, T tokens of all, D model dim, E experts. Each token has one expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.capture import Example, ModuleCall, call_with, in_mode, is_meta, undisturbed
from moecompile.capture.record import form_of
from moecompile.torch_private import tree_leaves

_PARTS = ("experts", "router", "shared_expert")


class ScaledInputBlock(nn.Module):
    """Mixed into the class of a block."""

    top_k: int
    hidden_dim: int
    experts: nn.Module
    router: nn.Module
    shared_expert: nn.Module

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> what the shared and the routed experts return, (T, D), and the router's logits, (T, E)."""
        x_TD = hidden_states.reshape(-1, self.hidden_dim)
        _, logits_TE = self.router(x_TD)
        chosen_T1, ids_T1 = torch.topk(logits_TE, self.top_k, dim=1)
        scores_T1 = torch.sigmoid(chosen_T1.float()).to(chosen_T1.dtype)
        out_TD: Tensor = self.shared_expert(x_TD)
        return out_TD + self.experts(x_TD, ids_T1, scores_T1), logits_TE


class ScaledInputExperts(nn.Module):
    """Mixed into the class of stacked experts; for the proof of what replaces them, one expert at a time."""

    is_transposed = is_concatenated = scales_input = True  # the first two as classes of transformers declare them
    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, 1), (T, 1) -> (T, D)."""
        scaled_TD, _ = scale_input(hidden_states, top_k_weights)
        out_TD = torch.zeros_like(scaled_TD)
        for expert in range(self.num_experts):
            tokens = (top_k_index[:, 0] == expert).nonzero()[:, 0]
            gate, up = (scaled_TD[tokens] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            out_TD = out_TD.index_add(0, tokens, (up * self.act_fn(gate)) @ self.down_proj[expert])
        return out_TD


class ScaleInput(nn.Module):
    """`scale_input` in the graph of a region."""

    def forward(self, hidden_TD: Tensor, weights_T1: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scaled_TD and weights_T1."""
        return scale_input(hidden_TD, weights_T1)


def scale_input(hidden_TD: Tensor, weights_T1: Tensor) -> tuple[Tensor, Tensor]:
    """What experts read, and the weights of one with which their outputs are summed."""
    return hidden_TD * weights_T1.to(hidden_TD.dtype), torch.ones_like(weights_T1)


@contextmanager
def standard_calls(model: nn.Module, example: Example) -> Iterator[None]:
    """Inside, blocks call their experts like all others. Those whose experts were replaced do so for good.

    A block that returns something else so, on its call in a forward of the example, is left as it is. Without values,
    on the meta device, none is tried.
    """
    given = [_Given(block, experts) for block in model.modules() if (experts := _experts_of(block)) is not None]
    calls = _calls(model, given, example) if given and not is_meta(model) else {}
    given = [each for each in given if each.put(calls.get(each.block))]
    try:
        yield
    finally:
        for each in given:
            each.take_back()


class _Given:
    """A block whose classes are changed."""

    def __init__(self, block: Any, experts: nn.Module) -> None:
        self.block, self.experts, self.kinds = block, experts, (type(block), type(experts))

    def put(self, call: tuple[ModuleCall, Any] | None) -> bool:
        """Whether it returns what it did in this call; else it is as before."""
        self.block.__class__ = _mixed(ScaledInputBlock, self.kinds[0])
        self.experts.__class__ = _mixed(ScaledInputExperts, self.kinds[1])
        if call is None or _agree(self.block, *call):
            return True
        self.take_back()
        return False

    def take_back(self) -> None:
        """Undoes `put`, unless the experts were replaced."""
        self.experts.__class__ = self.kinds[1]
        if self.block.experts is self.experts:
            self.block.__class__ = self.kinds[0]


def _calls(model: nn.Module, given: list[_Given], example: Example) -> dict[nn.Module, tuple[ModuleCall, Any]]:
    """What blocks were called with first in a forward, and what they returned; empty if the model does not run."""
    found = dict[nn.Module, tuple[ModuleCall, Any]]()

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.setdefault(block, (ModuleCall(args, kwargs), output))

    handles = [each.block.register_forward_hook(note, with_kwargs=True) for each in given]
    try:
        with undisturbed(model):
            call_with(model, example)
    except Exception:  # capture says why
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _agree(block: nn.Module, call: ModuleCall, wanted: Any) -> bool:
    """Whether a block returns this, within rounding."""
    with in_mode(block, training=False):
        got = block.forward(*call.args, **call.kwargs)
    return form_of(got) == form_of(wanted) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= torch.finfo(b.dtype).eps ** 0.5 * float(b.abs().max())
        for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True)
    )


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _mixed(first: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """A class of both, the same one for blocks that are alike."""
    if (first, kind) not in _made:
        _made[first, kind] = type(kind.__name__, (first, kind), {"__module__": kind.__module__})
    return _made[first, kind]


def _experts_of(block: nn.Module) -> nn.Module | None:
    """The experts of a block of transformers' Llama 4 that uses one expert for a token; None: it is no such block."""
    if not type(block).__module__.startswith("transformers.models.llama4.") or getattr(block, "top_k", 0) != 1:
        return None
    experts, *others = (getattr(block, part, None) for part in _PARTS)
    if not isinstance(experts, nn.Module) or None in others:
        return None
    return experts if len(inspect.signature(experts.forward).parameters) == 1 else None
