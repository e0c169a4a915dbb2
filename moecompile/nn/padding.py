"""Padding is no token: finds the padding mask of a forward, and gives it to every MoE layer.

A hook on the model reads the mask from the arguments of its call; the layers below never get it. Each MoE layer holds a
`TokenMask`, which returns it for the tokens of that layer.

Legend: B sequences, S tokens of a sequence, T = B S tokens, K top-k.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.errors import MoecompileError
from moecompile.nn.context import Positions
from moecompile.torch_private import in_backward

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"
_INVERTED = "src_key_padding_mask"  # of torch's own layers: true where padding is
_PACKED = ("cu_seq_lens_q", "cu_seqlens")  # ends of the sequences of a pack; what comes after the last is padding


class Padding:
    """The masks of one model's current forward: argument name -> bool mask, true where a token is real.

    They are known only while the model runs. A layer that is computed again in backward gets those of the last forward
    with gradients; `during` gives it those of another one.
    """

    def __init__(self) -> None:
        self.now: dict[str, Tensor] | None = None
        self.last: dict[str, Tensor] = {}
        self.is_used = True  # whether a layer was computed again with `last`
        self.positions: Positions | None = None  # those of this rank, if positions are split over ranks
        self.recomputes: Callable[[], bool] = lambda: False
        self._outer: list[dict[str, Tensor] | None] = []  # a model may call a model
        self._is_masked = False  # whether the current forward has masks

    def mask(self, name: str) -> Tensor | None:
        """The mask of an argument; None: every token is real."""
        if self.now is not None:
            return self.now.get(name)
        if not in_backward():
            return None
        self.is_used = True
        return self.last.get(name)

    def start(self, masks: dict[str, Tensor]) -> None:
        """A forward begins. Without masks of its own it has those of the forward around it.

        Raises:
            MoecompileError: an earlier forward with another mask still has to be computed again.
        """
        self._outer.append(self.now)
        self.now = masks or self.now or {}
        if masks:
            self._is_masked = True
            self._begin(masks)

    def end(self) -> None:
        """The forward is over."""
        self.now = self._outer.pop()
        if not self._outer:
            if not self._is_masked:
                self._begin({})
            self._is_masked = False

    def _begin(self, masks: dict[str, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        if not self.is_used and self.recomputes() and _differ(masks, self.last):
            raise MoecompileError(
                "two forwards with different padding before a backward, under the model's own checkpointing: "
                "it could not tell them apart when it computes layers again. Call backward in between, or use "
                "ExpertParallelStrategy's checkpointing"
            )
        self.last, self.is_used = masks, not masks

    @contextmanager
    def during(self, masks: dict[str, Tensor] | None) -> Iterator[None]:
        """These masks are in use inside, as `now` was at another time."""
        before, self.now = self.now, masks
        try:
            yield
        finally:
            self.now = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        memo[id(self)] = copied = Padding()  # masks belong to forwards of this model
        return copied

    def __reduce__(self) -> tuple[type[Padding], tuple[()]]:
        return Padding, ()


class TokenMask(nn.Module):
    """Which tokens of a layer are real. `watch_padding` connects it to the model; until then, all are."""

    padding: Padding | None = None
    argument = ENCODER

    def forward(self, x: Tensor) -> Tensor | None:
        """x (B, S, D) or (T, D) -> (T,) bool; None: every token is real.

        Raises:
            MoecompileError: the mask of the model's call does not fit the tokens that reach this layer.
        """
        mask = None if self.padding is None else self.padding.mask(self.argument)
        if mask is None or self.padding is None:
            return None
        num_tokens, positions = x.shape[:-1].numel(), self.padding.positions
        if mask.dim() == 1:  # ends of packed sequences
            first = 0 if positions is None else num_tokens * positions.index
            return torch.arange(first, first + num_tokens, device=x.device) < mask[-1]
        mask = mask if positions is None else positions.cut(mask, 1)
        per_sequence = num_tokens // max(1, mask.shape[0])
        if per_sequence * mask.shape[0] != num_tokens or per_sequence > mask.shape[1]:
            raise MoecompileError(
                f"{self.argument} {tuple(mask.shape)} does not fit the {num_tokens} tokens that reach an MoE layer, so "
                "its padding cannot be found. Compile with data.mask_padding=never"
            )
        # With a cache the mask also covers earlier tokens, to the left of these.
        return mask[:, mask.shape[1] - per_sequence :].reshape(-1)


class MaskRouting(nn.Module):
    """Takes padding out of the choices of the model's own router: no expert (the id `num_experts`), weight 0.

    Args:
        num_experts: that the ids count.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns ids and weights."""
        return without_padding(ids_TK, weights_TK, real_T, self.num_experts)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts"


def without_padding(
    ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Ids and weights in which padding has no expert (the id num_experts) and the weight 0."""
    if real_T is None:
        return ids_TK, weights_TK
    padding_T1 = ~real_T.unsqueeze(1)
    return ids_TK.masked_fill(padding_T1, num_experts), weights_TK.masked_fill(padding_T1, 0.0)


class MaskRows(nn.Module):
    """Zeros the outputs of padding."""

    def forward(self, y: Tensor, real_T: Tensor | None) -> Tensor:
        """y (B, S, D) or (T, D)."""
        return y if real_T is None else y.masked_fill(~real_T.view(*y.shape[:-1], 1), 0.0)


class _Finder:
    """The hook before a forward: reads the masks from the arguments."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.padding.start(masks_of(model, args, kwargs))


class _Warner:
    """The hook of a model that routes padding like tokens: warns at its first training forward that has some."""

    def __init__(self) -> None:
        self.left = 20  # forwards that are looked at: each look waits for the device

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self.left or not model.training:
            return
        padded = [name for name, mask in masks_of(model, args, kwargs).items() if mask.dim() == 2 and not mask.all()]
        self.left = 0 if padded else self.left - 1
        if padded:
            warnings.warn(
                f"{padded[0]} has padding, which is routed, sent and counted like tokens: compile with an example that "
                "has this argument, or with data.mask_padding=always",
                stacklevel=2,
            )


class _Forgetter:
    """The hook after a forward."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, *_: Any) -> None:
        self.padding.end()


def masks_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The padding masks among the arguments of a call of `model`, by argument."""
    given = dict(kwargs)
    if args:
        names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        given.update(zip(names, args, strict=False))
    masks: dict[str, Tensor] = {}
    for name in (ENCODER, DECODER):
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # masks of more dims say who sees whom, not what is padding
            masks[name] = mask != 0
    mask = given.get(_INVERTED)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool:
        masks[ENCODER] = ~mask
    for name in _PACKED:
        if isinstance(given.get(name), Tensor):
            masks.setdefault(ENCODER, given[name])
    return masks


def watch_padding(model: nn.Module) -> None:
    """Connects the `TokenMask`s of a compiled model to the calls of `model`, and of models inside it.

    A model without any warns once if it is trained with padding.
    """
    masks = {path: module for path, module in model.named_modules() if isinstance(module, TokenMask)}
    if not masks:
        model.register_forward_pre_hook(_Warner(), with_kwargs=True)
        return
    padding = Padding()
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for path, mask in masks.items():
        mask.padding = padding
        mask.argument = DECODER if both and "decoder" in path.split(".") else ENCODER
    padding.recomputes = _Recomputes(model)
    for module in model.modules():
        if module is model or _takes(module, DECODER if both else ENCODER):
            module.register_forward_pre_hook(_Finder(padding), with_kwargs=True)
            module.register_forward_hook(_Forgetter(padding), always_call=True)


def _takes(module: nn.Module, argument: str) -> bool:
    """Whether it is a model itself that takes a padding mask (the base model of a language model)."""
    if not hasattr(module, "config") or not any(isinstance(part, TokenMask) for part in module.modules()):
        return False
    return {"input_ids", argument} <= inspect.signature(module.forward).parameters.keys()


class _Recomputes:
    """Whether layers of a model of transformers compute again in backward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())


def padding_of(model: nn.Module) -> Padding | None:
    """What `watch_padding` connected; None: nothing."""
    return next((module.padding for module in model.modules() if isinstance(module, TokenMask)), None)


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        mask.shape != other[name].shape or not torch.equal(mask, other[name]) for name, mask in one.items()
    )
