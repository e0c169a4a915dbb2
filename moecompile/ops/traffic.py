"""Counts the bytes that forward exchanges, and the optimizer, send to each rank."""

from __future__ import annotations

import torch.distributed as dist

from moecompile.torch_private import in_backward


class TrafficCounter:
    """Bytes sent per destination rank since the last `take`. Backward and recomputed forwards are not counted."""

    def __init__(self) -> None:
        self._bytes_by_rank: dict[int, int] = {}

    def add(self, group: dist.ProcessGroup, bytes_by_peer: list[int]) -> None:
        """Adds the bytes sent to each peer of `group`, in group order."""
        if in_backward():
            return
        for rank, sent in zip(dist.get_process_group_ranks(group), bytes_by_peer, strict=True):
            self._bytes_by_rank[rank] = self._bytes_by_rank.get(rank, 0) + sent

    def so_far(self) -> dict[int, int]:
        """The bytes sent to each global rank since the last `take`."""
        return dict(self._bytes_by_rank)

    def take(self) -> dict[int, int]:
        """Returns the bytes sent to each global rank (including this one) and resets the counts to zero."""
        taken, self._bytes_by_rank = self._bytes_by_rank, {}
        return taken


traffic = TrafficCounter()
optimizer_traffic = TrafficCounter()
context_traffic = TrafficCounter()
"""Of the exchanges of attention over cp, which are planned and counted apart from those of experts."""


class LookupCounter(TrafficCounter):
    """Bytes of lookups in embedding tables; and of the rows that tokens read, how many were different."""

    def __init__(self) -> None:
        super().__init__()
        self._read = self._different = 0

    def note(self, read: int, different: int) -> None:
        """Adds the ids of one lookup."""
        if not in_backward():
            self._read, self._different = self._read + read, self._different + different

    def take_rows(self) -> tuple[int, int]:
        """Rows that were read, and different ones, since the last call."""
        taken, (self._read, self._different) = (self._read, self._different), (0, 0)
        return taken


lookup_traffic = LookupCounter()
