"""Stacked experts that ranks hold in another order than that of their global ids.

Checkpoints, gradients that are compared, and initial values are by global id. A module whose stacks were sharded in
another order says so in its attribute `expert_orders`: name of the parameter -> the expert at each position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moecompile.torch_private import local_block

_ATTRIBUTE = "expert_orders"
Order = tuple[int, ...]


def keep_order(owner: nn.Module, name: str, order: Order) -> None:
    """Says in which order the experts of a parameter of `owner` are; empty: that of their ids."""
    if order:
        setattr(owner, _ATTRIBUTE, {**getattr(owner, _ATTRIBUTE, {}), name: order})


def expert_orders(model: nn.Module) -> dict[str, Order]:
    """Name of each parameter whose experts are not in the order of their ids -> the expert at each position."""
    return {
        f"{path}.{name}" if path else name: order
        for path, module in model.named_modules()
        for name, order in getattr(module, _ATTRIBUTE, {}).items()
    }


def rows_of(order: Sequence[int], num_rows: int) -> list[int]:
    """The global row at each of `num_rows` positions: experts have equally many rows, one after the other."""
    each = num_rows // len(order)
    return [expert * each + row for expert in order for row in range(each)]


def global_rows(tensor: Tensor, order: Order | None) -> Sequence[int]:
    """The global row of each local row; `order` is from `expert_orders`, None if the tensor is not in it."""
    held = local_block(tensor)[0]
    return range(held.start, held.stop) if order is None else rows_of(order, tensor.shape[0])[held]


def runs_of(rows: Sequence[int]) -> list[tuple[int, range]]:
    """(position of the first one, rows) for rows that follow one another."""
    found: list[tuple[int, range]] = []
    for i, row in enumerate(rows):
        if found and found[-1][1].stop == row:
            found[-1] = (found[-1][0], range(found[-1][1].start, row + 1))
        else:
            found.append((i, range(row, row + 1)))
    return found


def by_id(whole: Tensor, order: Order | None) -> Tensor:
    """A whole stack in the order of global ids."""
    if order is None:
        return whole
    return whole[torch.tensor(rows_of(order, whole.shape[0]), device=whole.device).argsort()]
