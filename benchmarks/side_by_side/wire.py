"""Bytes on the wire, counted alike for all: what the loopback interface sent while all ranks did something.

Only these ranks live in its network namespace (launch.py). Everything counts, metadata, TCP's headers and
acknowledgements included; what the barriers send is measured as well and subtracted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Counter:
    """All ranks make one, and ask it at the same time."""

    def __init__(self) -> None:
        self._idle = 0.0
        self._idle = statistics.median(self.sent_by(lambda: None)[1] for _ in range(20))

    def sent_by(self, action: Callable[[], T]) -> tuple[T, float]:
        """What `action` returns, and the bytes that all ranks together sent while they did it."""
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        result = action()
        dist.barrier()
        after = loopback_bytes()
        dist.barrier()  # nobody begins the next step before all have read
        return result, after - before - self._idle

    def check(self) -> float:
        """Counted bytes of an all-to-all, relative to those of its rows that leave a rank: 1 plus TCP's share."""
        ranks = dist.get_world_size()
        rows = torch.zeros(ranks * 2**20, dtype=torch.uint8)
        _, counted = self.sent_by(lambda: dist.all_to_all_single(torch.empty_like(rows), rows))
        return counted / (ranks * (ranks - 1) * 2**20)


def loopback_bytes() -> int:
    """What this namespace's loopback interface has sent since it is up."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("there is no loopback interface")
