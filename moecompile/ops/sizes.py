"""Sizes that values decide, of results under fake tensors: how many rows an exchange brings, how many are kept.

While code is traced nobody knows them, and each is a new symbol. A rehearsal (moecompile.runtime.rehearsal) says how
full ranks are, and then each of these ops has a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moecompile.torch_private import memory_of


@dataclass(kw_only=True)
class Load:
    """How many rows a rank sends, receives and computes.

    sent: (experts, parts among which they are) -> rows sent to all parts for one row that a rank has. assigned:
    experts of a layer with identities, or whose experts choose tokens -> assignments to an expert for one that is given
    (others: all). received: process group of an exchange -> rows received for one that is sent (others: 1). fullest:
    rows of this rank's experts over the mean of all ranks. different: of so many ids of a table with so many rows, how
    many are different. on_gpu: whether ops are those of a GPU. meanwhile: bytes that the last op made and freed as it
    ran, at their most before its results were made, and beside them.
    """

    sent: Mapping[tuple[int, int], float] = field(default_factory=dict)
    assigned: Mapping[int, float] = field(default_factory=dict)
    received: Mapping[str, float] = field(default_factory=dict)
    fullest: float = 1.0
    different: Callable[[int, int], float] = lambda num_ids, num_rows: num_ids
    on_gpu: bool = False
    meanwhile: tuple[int, int] = (0, 0)
    _given: dict[tuple[int, int, int], tuple[Tensor, int]] = field(default_factory=dict)

    def rows_sent(self, num_rows: int, num_experts: int, num_parts: int) -> int:
        """Rows that `num_rows` become when each is sent once to every part that has one of its experts."""
        return round(num_rows * self.sent[num_experts, num_parts])

    def kept(self, num_assignments: int, num_experts: int) -> int:
        """Assignments to an expert."""
        return round(num_assignments * self.assigned.get(num_experts, 1.0))

    def brought(self, num_rows: int, table: Tensor, column: int, reverse: bool, axis: str) -> int:
        """Rows that an exchange of `num_rows` brings; on the way back, those that were sent."""
        key = (memory_of(table), int(table.storage_offset()), column)
        if reverse:
            return self._given[key][1]
        self._given[key] = (table, num_rows)  # keeps the table, so that no other one gets its address
        return round(num_rows * self.received.get(axis, 1.0))

    def asked(self, table: Tensor, num_rows: int | None = None) -> int:
        """Rows of an embedding table that a rank asks for, and as many that it is asked for: ids are spread evenly.

        Args:
            table: the split sizes of the lookup. num_rows: None: those that were said before.
        """
        key = (memory_of(table), int(table.storage_offset()), 0)
        if num_rows is not None:
            self._given[key] = (table, num_rows)
        return self._given[key][1]

    def computed(self, num_assignments: int, num_experts: int, num_ranks: int) -> int:
        """Of the assignments of all ranks, those to experts of this one."""
        return round(self.kept(num_assignments, num_experts) / num_ranks * self.fullest)


_loads: list[Load] = []


@contextmanager
def under(load: Load) -> Iterator[None]:
    """Ops have the sizes of this load."""
    _loads.append(load)
    try:
        yield
    finally:
        _loads.pop()


def current() -> Load:
    """The load that sizes are of.

    Raises:
        IndexError: there is none.
    """
    return _loads[-1]


def on_gpu() -> bool:
    """Whether the ranks whose sizes are said have a GPU."""
    return bool(_loads) and _loads[-1].on_gpu


def meanwhile(before: int, beside: int) -> None:
    """For a fake kernel: `Load.meanwhile`."""
    current().meanwhile = before, beside


def meanwhile_of_last() -> tuple[int, int]:
    """`Load.meanwhile` of the op that has just run; without a load nothing is known."""
    if not _loads:
        return 0, 0
    found, _loads[-1].meanwhile = _loads[-1].meanwhile, (0, 0)
    return found


def size(known: Callable[[Load], int]) -> int | torch.SymInt:
    """For a fake kernel: the size under the load, or a new symbol."""
    if _loads:
        return known(_loads[-1])
    symbol: torch.SymInt = torch.library.get_ctx().new_dynamic_size()
    return symbol
