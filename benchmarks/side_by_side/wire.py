"""Bytes on the wire, counted alike for all: what the ranks' interface sent while all ranks did something.

Only these ranks live in its network namespace (launch.py). On one node it is the loopback interface; of two nodes it is
the link between them, each node's own end. Everything counts, metadata, TCP's headers and acknowledgements included;
what the barriers send is measured as well and subtracted.
"""

from __future__ import annotations

import os
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
        self._interface = os.environ["GLOO_SOCKET_IFNAME"]
        self._idle = 0.0
        self._idle = statistics.median(self.sent_by(lambda: None)[1] for _ in range(20))

    def sent_by(self, action: Callable[[], T]) -> tuple[T, float]:
        """What `action` returns, and the bytes that the interface sent while all ranks did it."""
        dist.barrier()
        before = sent_bytes(self._interface)
        dist.barrier()
        result = action()
        dist.barrier()
        after = sent_bytes(self._interface)
        dist.barrier()  # nobody begins the next step before all have read
        return result, after - before - self._idle

    def check(self, nodes: int) -> float:
        """Counted bytes of an all-to-all, relative to those of its rows that it should count: 1 plus TCP's share."""
        ranks = dist.get_world_size()
        rows = torch.zeros(ranks * 2**20, dtype=torch.uint8)
        _, counted = self.sent_by(lambda: dist.all_to_all_single(torch.empty_like(rows), rows))
        here = ranks // nodes
        others = ranks - here if nodes > 1 else ranks - 1
        return counted / (here * others * 2**20)


def sent_bytes(interface: str) -> int:
    """What this namespace's interface has sent since it is up."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise RuntimeError(f"there is no interface {interface}")
