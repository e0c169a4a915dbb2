"""Every entry of a model's weights, found again by its value in whatever a rank holds.

Algorithm:
  1. All floating-point entries of the model are moved until no two are equal, and none is zero, in float32 too.
  2. Then an entry's value is its name. Whoever cuts, stacks, fuses, transposes, renames or pads the weights moves
     values without a change, so for each entry that a rank holds, the entry of the model is known without being told.

Legend: R ranks, N entries of a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.torch_private import local_part

_SPREAD, _LEAST = 0.1, 0.02
NOWHERE, PADDING = -1, -2


@torch.no_grad()
def make_distinct(model: nn.Module, seed: int) -> None:
    """Adds noise to every floating-point weight, in place, after which no two entries of the model are equal.

    The noise has a tenth of the weight's root mean square, 0.02 at least, so weights that begin equal (experts that are
    copies, norms) have gradients that tell them apart. Values are those of float32, whatever the type of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    flat = torch.cat([_moved(weight, generator) for weight in weights])
    while True:
        bits, order = flat.view(torch.int32).sort()  # equal numbers lie together, and integers are sorted by radix
        ordered = bits.view(torch.float32)
        is_free = ordered != 0
        is_free[1:] &= ordered[1:] != ordered[:-1]
        again = order[~is_free]
        if not len(again):
            break
        flat[again] = flat[again] * (1 + 1e-3 * torch.rand(len(again), generator=generator)) + 1e-6
    for weight, values in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(values.view_as(weight))


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    values = weight.detach().double().cpu().flatten()
    size = max(_SPREAD * float(values.square().mean().sqrt()) if len(values) else 0.0, _LEAST)
    return (values + size * torch.randn(values.shape, generator=generator, dtype=torch.float64)).float()


class Entries:
    """The entries of a model whose values are distinct, numbered over all weights in the order of `named_parameters`.

    weights: name -> (first number, shape).
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights: dict[str, tuple[int, torch.Size]] = {}
        values, first = [], 0
        for name, weight in model.named_parameters():
            if weight.is_floating_point():
                self.weights[name] = (first, weight.shape)
                values.append(weight.detach().double().cpu().flatten())
                first += weight.numel()
        self.total = first
        self._flat = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The bits of all values in order, which sort faster than the values, and their numbers."""
        bits, numbers = self._flat.view(torch.int64).sort()
        return bits, numbers

    def locate(self, local: Tensor) -> Tensor:
        """The number of each entry of `local`, flat; NOWHERE if no entry has this value, PADDING where it is zero."""
        values = local.detach().double().cpu().flatten()
        if not self.total or not len(values):
            return torch.full(values.shape, NOWHERE)
        first = int(self._nearest(values[:1]))
        if torch.equal(self._flat[first : first + len(values)], values):  # most shards lie as in the model
            return torch.arange(first, first + len(values))
        numbers = self._nearest(values)
        found = torch.where(self._flat[numbers] == values, numbers, NOWHERE)
        return torch.where(values == 0, PADDING, found)

    def _nearest(self, values: Tensor) -> Tensor:
        """The numbers of the entries that have these values, and of any others where none has."""
        bits, numbers = self._sorted
        return numbers[torch.searchsorted(bits, values.view(torch.int64)).clamp(max=self.total - 1)]

    def parts(self, numbers: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The weights that a tensor has entries of: name, which of the tensor's, which of the weight's, flat."""
        names = [name for name, (_, shape) in self.weights.items() if shape.numel()]
        firsts = torch.tensor([self.weights[name][0] for name in names])
        of_weight = torch.where(numbers >= 0, torch.bucketize(numbers, firsts, right=True) - 1, NOWHERE)
        for index in of_weight.unique().tolist():
            if index >= 0:
                (here,) = torch.where(of_weight == index)
                yield names[index], here, numbers[here] - firsts[index]


class Places:
    """Where ranks have the entries of a model's weights.

    Args:
        numbers_R: by rank, name of a tensor -> `Entries.locate` of it.
    """

    def __init__(self, entries: Entries, numbers_R: Sequence[Mapping[str, Tensor]]) -> None:
        self.entries, self.numbers_R = entries, numbers_R
        # Weight of the model -> by rank: name of a tensor that holds some of it, which of its entries, which of the
        # weight's.
        self.parts: dict[str, list[list[tuple[str, Tensor, Tensor]]]] = {
            name: [[] for _ in numbers_R] for name in entries.weights
        }
        for rank, tensors in enumerate(numbers_R):
            for name, numbers in tensors.items():
                for weight, here, there in entries.parts(numbers):
                    self.parts[weight][rank].append((name, here, there))

    def held(self, weight: str, values_R: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
        """What each rank has of a weight, (R, N) float64: NaN where it has nothing, infinite where it is not finite.

        Args:
            values_R: by rank, name of a tensor -> its entries, such as gradients or values of a later step.
        """
        _, shape = self.entries.weights[weight]
        held_RN = torch.full((len(values_R), shape.numel()), float("nan"), dtype=torch.float64)
        for rank, parts in enumerate(self.parts[weight]):
            for name, here, there in parts:
                values = values_R[rank].get(name)
                if values is not None:
                    held_RN[rank, there] = finite(values.double().flatten()[here])
        return held_RN

    def faults(self) -> dict[str, Counter[str]]:
        """What must be empty -> number of entries by name: the ranks have all entries of the model, each rank an entry
        once, and nothing else.
        """
        lost, twice, foreign = Counter[str](), Counter[str](), Counter[str]()
        for weight, by_rank in self.parts.items():
            _, shape = self.entries.weights[weight]
            times_RN = torch.zeros(len(by_rank), shape.numel(), dtype=torch.long)
            for times_N, parts in zip(times_RN, by_rank, strict=True):
                for _, _, there in parts:
                    times_N += torch.bincount(there, minlength=len(times_N))
            lost[weight] += int((times_RN.sum(0) == 0).sum())
            twice[weight] += int((times_RN > 1).sum())
        for rank, tensors in enumerate(self.numbers_R):
            for name, numbers in tensors.items():
                foreign[f"{name} on rank {rank}"] += int((numbers == NOWHERE).sum())
        return {
            "entries of weights that no rank has": +lost,
            "entries that a rank has twice": +twice,
            "entries that are not the model's": +foreign,
        }


def finite(values: Tensor) -> Tensor:
    """What is not a number becomes infinite: NaN stands for what a rank does not hold."""
    return values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))


def local_gradient(weight: Tensor, grad: Tensor | None) -> Tensor | None:
    """This rank's part of a gradient, cut as the weight is; flat. Ranks that share the weight call it together."""
    if grad is None:
        return None
    if isinstance(weight, DTensor) and isinstance(grad, DTensor) and grad.placements != weight.placements:
        grad = grad.redistribute(placements=weight.placements)
    return local_part(grad).detach().flatten().clone()
