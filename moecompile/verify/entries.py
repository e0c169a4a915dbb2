"""Every entry of a model's weights, found again by its value in whatever a rank holds.

Algorithm:
  1. All floating-point entries of the model are moved until no two are equal, and none is zero, in float32 too.
  2. Then an entry's value is its name. Whoever cuts, stacks, fuses, transposes, renames or pads the weights moves
     values without a change, so for each entry that a rank holds, the entry of the model is known without being told.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

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
    while (again := _repeated(flat)).numel():
        flat[again] = flat[again] * (1 + 1e-3 * torch.rand(len(again), generator=generator)) + 1e-6
    for weight, values in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.copy_(values.view_as(weight))


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    values = weight.detach().double().cpu().flatten()
    size = max(_SPREAD * float(values.square().mean().sqrt()) if len(values) else 0.0, _LEAST)
    return (values + size * torch.randn(values.shape, generator=generator, dtype=torch.float64)).float()


def _repeated(flat: Tensor) -> Tensor:
    """Indices of entries that are zero, or equal to another one that is not among them."""
    ordered, order = flat.sort(stable=True)
    is_repeated = ordered == 0
    is_repeated[1:] |= ordered[1:] == ordered[:-1]
    return order[is_repeated]


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
        self._ordered, self._order = torch.cat(values).sort() if values else (torch.zeros(0), torch.zeros(0).long())

    def locate(self, local: Tensor) -> Tensor:
        """The number of each entry of `local`, flat; NOWHERE if no entry has this value, PADDING where it is zero."""
        values = local.detach().double().cpu().flatten()
        if not self.total:
            return torch.full(values.shape, NOWHERE)
        index = torch.searchsorted(self._ordered, values).clamp_(max=self.total - 1)
        found = torch.where(self._ordered[index] == values, self._order[index], NOWHERE)
        return torch.where(values == 0, PADDING, found)

    def parts(self, numbers: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The weights that a tensor has entries of: name, which of the tensor's, which of the weight's, flat."""
        for name, (first, shape) in self.weights.items():
            here = ((numbers >= first) & (numbers < first + shape.numel())).nonzero().flatten()
            if len(here):
                yield name, here, numbers[here] - first
