"""The windows that a run sees, and their order: the same in every arm of a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.runtime.data.batches import TokenWindows, no_targets, permutation
from quality import study
from quality.study import ROWS, SIZES, Unit


class Rows(TokenWindows):
    """Given windows (N, S + 1)."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows.flatten(), rows.shape[1] - 1)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.PADDING:
            return no_targets(self.seq_len)
        row = self.rows[index]
        return {"input_ids": row[:-1], "labels": row[1:]}


def order_of(unit: Unit, num_parent: int, num_branch: int) -> Tensor:
    """The windows that a unit sees, in this order: numbers below `num_parent` are of the parent's part.

    A parent sees its part in an order of its own; every arm of a seed sees the same windows of `branch`; those from
    scratch see both, one after the other. A real model has no parent that saw a part: it sees windows of both.
    """
    if unit.study == "real":
        return _first(permutation(num_parent + num_branch, unit.seed or 0, 0), unit)
    first = permutation(num_parent, study.PARENT_SEED, 0)
    if unit.study == "quality" and unit.seed is None:
        return _first(first, unit)
    then = num_parent + permutation(num_branch, unit.seed or 0, 0)
    if unit.arm not in study.FROM_SCRATCH:
        return _first(then, unit)
    return torch.cat((first[: SIZES[unit.size].parent_steps * ROWS], then))[: unit.steps * ROWS]


def _first(order: Tensor, unit: Unit) -> Tensor:
    if len(order) < unit.steps * ROWS:
        raise SystemExit(f"{unit.name}: {unit.steps * ROWS} windows are asked, more than an epoch of {len(order)}")
    return order[: unit.steps * ROWS]


def in_order(rows: Tensor, order: Tensor, seed: int) -> Rows:
    """A split that moecompile's sampler, which shuffles by the seed, reads in this order."""
    indices = torch.empty(len(order), dtype=torch.int64)
    indices[permutation(len(order), seed, 0)] = order
    return Rows(rows[indices])
