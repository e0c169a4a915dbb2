"""Weight gradients of experts as an op of their own: once for all chunks of the tokens, after their input gradients.

    token = collect_gradients([gate_up, down])      # before anything waits for rows
    y_c   = expert_ffn(x_c, ..., [gate_up], [down], token)     for each chunk c, with detached weights

NOTE on what happens in backward:
  1. The backward of an experts op computes the gradients of its rows alone. What the weight gradients need, it leaves
     with the token, and returns zero as the token's gradient.
  2. The backward of `collect_gradients` takes what was left and multiplies: one product per expert, over the rows of
     all chunks, so that each gradient is written once, whole, and reaches its weight once.
  3. Autograd runs what is ready in the opposite order of the forward, so where the token is made decides when this is.
     Made after dispatches are started and before one is waited for, it is while gradients travel back.
  4. What is left lives as long as the graph: a list that the two nodes share, in no table of the process. It counts
     for one backward. One for other inputs alone (`torch.autograd.grad`) computes no weight gradient, and leaves
     nothing behind for the next. A compiler that traces the backward sees tensors passed on, and no side effect.

Legend: R rows of a chunk, E experts, F and D the widths of a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecompile.errors import MoecompileError
from moecompile.torch_private import backward_number


class Collected:
    """What the experts ops of one forward leave in one backward: kind of op or number of the weight -> tensors."""

    def __init__(self) -> None:
        self._number = -1
        self._left: dict[str | int, list[tuple[Tensor, ...]]] = {}

    def leave(self, kind: str | int, *tensors: Tensor) -> Tensor:
        """Keeps the tensors for `take`. Returns the gradient of the token: a zero."""
        if self._number != backward_number():
            self._number, self._left = backward_number(), {}
        self._left.setdefault(kind, []).append(tensors)
        return tensors[0].new_zeros(())

    def take(self) -> dict[str | int, list[tuple[Tensor, ...]]]:
        """What was left in this backward, and nothing the next time."""
        left, self._left = self._left, {}
        return left if self._number == backward_number() else {}


def collected_by(grad_token: Tensor | None) -> Collected | None:
    """Where an experts op with this token leaves what the weight gradients need; None if none are wanted.

    Raises:
        MoecompileError: the token was not made by `collect_gradients`, or another compiled graph made it.
    """
    if grad_token is None or not grad_token.requires_grad:
        return None
    collected = getattr(grad_token.grad_fn, "collected", None)
    if not isinstance(collected, Collected):
        raise MoecompileError("the token of experts must come from collect_gradients, in the same (compiled) graph")
    return collected


@torch.library.custom_op("moecompile::collect_gradients", mutates_args=())
def collect_gradients(weights: list[Tensor]) -> Tensor:
    """Makes a token, a zero: its backward computes the gradients of these weights for all experts ops that get it.

    Args:
        weights: (E, F, D) each: gate_up and down of `expert_ffn`, or those of `grouped_mm` in the order of its `index`.
    """
    return weights[0].new_zeros(())


@collect_gradients.register_fake
def _(weights: list[Tensor]) -> Tensor:
    return weights[0].new_empty(())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (weights,) = inputs
    ctx.collected, ctx.dtypes = Collected(), [weight.dtype for weight in weights]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> list[Tensor | None]:
    left = ctx.collected.take()
    grads: list[Tensor | None] = [None] * len(ctx.dtypes)
    (needed,) = ctx.needs_input_grad
    if calls := left.pop("expert_ffn", []):
        grads[:] = torch.ops.moecompile.expert_ffn_weight_grad([tensor for call in calls for tensor in call])
    for index, calls in left.items():
        if needed[index]:
            grads[index] = torch.ops.moecompile.grouped_mm_weight_grads(*map(list, zip(*calls, strict=True)))
    # Under autocast rows and products are narrower than the weights.
    return [
        grad.to(dtype) if grad is not None and need else None
        for grad, dtype, need in zip(grads, ctx.dtypes, needed, strict=True)
    ]


collect_gradients.register_autograd(_backward, setup_context=_setup)
