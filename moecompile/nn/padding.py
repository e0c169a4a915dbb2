"""Padding is no token: what the MoE layers of a model are told of its call, which is its padding mask, and token ids.

A hook on the model reads the mask from the arguments of its call (watch.py); the layers below never get it. Each MoE
layer holds a `TokenMask`, which returns it for the tokens of that layer, and `TokenIds` if a hash of the ids chooses
its experts.

Legend: B sequences, S tokens of a sequence, T = B S tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.errors import MoecompileError
from moecompile.nn.context import Positions
from moecompile.torch_private import in_backward

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"
IDS = "input_ids"


class Padding:
    """The masks of one model's current forward: argument name -> bool mask, true where a token is real. Token ids too.

    They are known only while the model runs. A layer that is computed again in backward gets those of the last forward
    with gradients; `during(masks)` uses those of another batch.
    """

    def __init__(self) -> None:
        self.now: dict[str, Tensor] | None = None
        self.last: dict[str, Tensor] = {}
        self.is_used = True  # whether a layer was computed again with `last`
        self.positions: Positions | None = None  # those of this rank, if positions are split over ranks
        self.recomputes: Callable[[], bool] = lambda: False
        self.is_cached = False  # whether the current forward has a cache: then masks are of earlier tokens too
        self._outer: list[tuple[dict[str, Tensor] | None, bool]] = []  # a model may call a model
        self._is_masked = False  # whether the current forward has masks

    def mask(self, name: str) -> Tensor | None:
        """The mask of an argument; None: every token is real."""
        if self.now is not None:
            return self.now.get(name)
        if not in_backward():
            return None
        self.is_used = True
        return self.last.get(name)

    def start(self, masks: dict[str, Tensor], *, is_cached: bool = False) -> None:
        """A forward begins. Without masks of its own it has those of the forward around it; without ids, its ids.

        Raises:
            MoecompileError: an earlier forward with another mask still has to be computed again.
        """
        self._outer.append((self.now, self.is_cached))
        self.is_cached = is_cached or (self.is_cached and not masks.keys() - {IDS})
        around = self.now or {}
        if masks.keys() - {IDS}:
            around = {name: ids for name, ids in around.items() if name == IDS}
        self.now = {**around, **masks}
        if masks:
            self._is_masked = True
            self._begin(self.now)

    def end(self) -> None:
        """The forward is over."""
        self.now, self.is_cached = self._outer.pop()
        if not self._outer:
            if not self._is_masked:
                self._begin({})
            self._is_masked = False

    def _begin(self, masks: dict[str, Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        if not self.is_used and self.recomputes() and _differ(masks, self.last):
            raise MoecompileError(
                "two forwards with different padding or token ids before a backward, under the model's own "
                "checkpointing: it could not tell them apart when it computes layers again. Call backward in between, "
                "or use ExpertParallelStrategy's checkpointing"
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


class ReadsCall(nn.Module):
    """A part of a layer that gets what the model's call was given. `watch_padding` connects it to the model."""

    padding: Padding | None = None


class TokenMask(ReadsCall):
    """Which tokens of a layer are real; all are until it is connected."""

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
        if not are_of_mask(x.shape[:-1], mask.shape, is_cached=self.padding.is_cached):
            raise MoecompileError(
                f"{self.argument} {tuple(mask.shape)} does not fit the {num_tokens} tokens {tuple(x.shape[:-1])} that "
                "reach an MoE layer, so its padding cannot be found. Compile with data.mask_padding=never"
            )
        # With a cache the mask also covers earlier tokens, to the left of these.
        return mask[:, mask.shape[1] - num_tokens // mask.shape[0] :].reshape(-1)


def are_of_mask(tokens: Sequence[int], mask: Sequence[int], *, is_cached: bool = False) -> bool:
    """Whether tokens (B, S) or (T,) are those of a mask (B, S); with a cache they may be its last ones."""
    batch, length = mask
    each, rest = divmod(prod(tokens), max(1, batch))
    return not rest and (len(tokens) == 1 or tokens[0] == batch) and (each == length or (is_cached and each < length))


class TokenIds(ReadsCall):
    """The ids of a layer's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, D) or (T, D) -> (T,).

        Raises:
            MoecompileError: the model's call has no token ids, or they are not those of the tokens of this layer.
        """
        ids = None if self.padding is None else self.padding.mask(IDS)
        if ids is None or self.padding is None:
            raise MoecompileError(
                "a hash of token ids chooses experts, and the model was not called with any: give it input_ids, not "
                "embeddings, or use routing.choice=token"
            )
        positions = self.padding.positions
        ids = ids if positions is None else positions.cut(ids, 1)
        if ids.numel() != x.shape[:-1].numel() or (x.dim() > 2 and x.shape[0] != ids.shape[0]):
            raise MoecompileError(
                f"{tuple(ids.shape)} token ids are not those of the {x.shape[:-1].numel()} tokens that reach an MoE "
                "layer whose experts a hash of them chooses. Use routing.choice=token"
            )
        return ids.reshape(-1)


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


def padding_of(model: nn.Module) -> Padding | None:
    """What `watch_padding` connected; None: nothing."""
    return next((module.padding for module in model.modules() if isinstance(module, ReadsCall)), None)


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() != other.keys() or any(
        mask.shape != other[name].shape or not torch.equal(mask, other[name]) for name, mask in one.items()
    )
