"""What chunks cost the experts: forward and backward on n parts of the rows, beside one call on all of them.

    python benchmarks/chunks.py --output benchmarks/results/chunks.json          # two minutes on one core

`dispatch.overlap=chunks` calls the experts once per chunk: they multiply fewer rows at a time. Weight gradients are
computed afterwards, at once for all chunks (moecompile.ops.collect); with `overlap=shared`, one chunk, too. Nothing is
sent here. CPU time of one thread, all in turn, so that what else the machine does meets all of them; the price per
chunk is (ratio - 1) / chunks. `LEAST_ROWS` and `PRICE` of planner/cost_model/seconds.py come from here: with fewer rows
per expert and chunk the price is higher, with as many it was at most `PRICE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.nn import Experts

D_MODEL, CHUNKS = 512, (1, 2, 4)
# Experts of a rank, their width, rows of each.
SIZES = (
    (8, 512, 1024), (32, 512, 256), (4, 1024, 64), (4, 1024, 256), (4, 1024, 512), (4, 1024, 1024), (4, 1024, 2048),
)  # fmt: skip


class SwiGLU(nn.Module):
    """silu(gate) * up"""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(R, F), (R, F) -> (R, F)"""
        return F.silu(gate) * up


def step(experts: Experts, x: Tensor, direction: Tensor, chunks: int) -> float:
    """CPU seconds of forward and backward with equally many rows for each expert.

    chunks: as the passes `overlap` and `collect` make them: forward of all, then backward of all, and the weight
    gradients once. 0: one call, as in a layer without overlap.
    """
    num_experts, parts = experts.num_experts, [part.detach().requires_grad_() for part in x.chunk(max(1, chunks))]
    rows = parts[0].shape[0]
    source_R, weights_R = torch.arange(rows), torch.ones(rows)
    counts_E = torch.full((num_experts,), rows // num_experts)
    experts.zero_grad()
    start = time.thread_time()
    token = experts.grad_token() if chunks else None
    outputs = [experts(part, counts_E, source_R=source_R, weights_R=weights_R, grad_token=token) for part in parts]
    torch.autograd.backward(outputs, list(direction.chunk(len(parts))))
    return time.thread_time() - start


def measure(rounds: int, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[dict[str, Any]]:
    """A row for each size and number of chunks: medians over rounds, in which all take turns."""
    torch.set_num_threads(1)
    found = []
    for num_experts, d_expert, per_expert in sizes:
        torch.manual_seed(0)
        experts = Experts(D_MODEL, d_expert, num_experts, gated=True, activation=SwiGLU())
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        x, direction = (torch.randn(per_expert * num_experts, D_MODEL) for _ in range(2))
        times: dict[int, list[float]] = {0: [], **{chunks: [] for chunks in CHUNKS}}
        for i in range(rounds + 1):
            for chunks in list(times)[:: 1 if i % 2 else -1]:
                seconds = step(experts, x, direction, chunks)
                if i:
                    times[chunks].append(seconds)
        for chunks in CHUNKS:
            ratio = statistics.median(a / b for a, b in zip(times[chunks], times[0], strict=True))
            size = {"experts": num_experts, "width": d_expert, "rows": per_expert, "chunks": chunks}
            found.append({**size, "ratio": ratio, "price": (ratio - 1) / chunks})
    return found


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where to write what was measured, as JSON")
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(f"{'experts':>7}{'width':>7}{'rows per expert':>17}{'chunks':>8}{'of one call':>13}{'price':>8}")
    for row in rows:
        print(
            f"{row['experts']:>7}{row['width']:>7}{row['rows']:>17}{row['chunks']:>8}{row['ratio']:>13.3f}"
            f"{row['price']:>8.3f}"
        )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
