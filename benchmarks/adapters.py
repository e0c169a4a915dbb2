"""Adapters of experts as products of rows, beside adding them to the weights first: docs/decisions/0020.

    python benchmarks/adapters.py

One projection, forward and backward, fp32, one thread; CPU time of the thread, medians of alternating runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import moecompile.ops  # noqa: F401  (registers the ops)

RUNS, RANK = 5, 16
SIZES = ((8, 4096), (64, 4096), (64, 512))  # experts, rows
D_IN, D_OUT = 256, 512


def variants(num_experts: int, rows: int) -> dict[str, Callable[[], Tensor]]:
    """The frozen projection alone, with its adapters on rows, and with its adapters added to the weight."""

    def times(rows: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = torch.ops.moecompile.grouped_mm(rows, [weight], counts_E, None, 0)
        return out

    weight_EOI = torch.randn(num_experts, D_OUT, D_IN) * 0.02
    a_ErI = (torch.randn(num_experts, RANK, D_IN) * 0.02).requires_grad_()
    b_EOr = (torch.randn(num_experts, D_OUT, RANK) * 0.02).requires_grad_()
    x_RI = torch.randn(rows, D_IN, requires_grad=True)
    counts_E = torch.full((num_experts,), rows // num_experts)
    return {
        "frozen": lambda: times(x_RI, weight_EOI),
        "rows": lambda: times(x_RI, weight_EOI) + 2 * times(times(x_RI, a_ErI), b_EOr),
        "weights": lambda: times(x_RI, torch.baddbmm(weight_EOI, b_EOr, a_ErI, alpha=2.0)),
    }


def main() -> None:
    """Prints milliseconds."""
    torch.set_num_threads(1)
    for num_experts, rows in SIZES:
        seconds: dict[str, list[float]] = {}
        made = variants(num_experts, rows)
        for _ in range(RUNS):
            for name, forward in made.items():
                start = time.thread_time()
                forward().sum().backward()
                seconds.setdefault(name, []).append(time.thread_time() - start)
        found = ", ".join(f"{name} {median(times) * 1e3:.1f} ms" for name, times in seconds.items())
        print(f"{num_experts} experts, {rows} rows, rank {RANK}: {found}")


if __name__ == "__main__":
    main()
