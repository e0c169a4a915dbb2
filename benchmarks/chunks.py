"""What chunks cost the experts: forward and backward on n parts of the rows, beside one call on all of them.

    python benchmarks/chunks.py          # a minute on one core

`dispatch.overlap=chunks` calls the experts once per chunk: they multiply fewer rows at a time, and each call adds to
the gradients of the weights. Nothing is sent here. CPU time of one thread, the two in turn; the price per chunk beyond
the first is (ratio - 1) / (chunks - 1). `LEAST_ROWS` and `PRICE` of moecompile.planner.overlap come from here: with
fewer rows per expert and chunk the price can be most of a call, with as many it was at most `PRICE`.
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

D_MODEL, D_EXPERT, EXPERTS = 512, 1024, 4
ROWS, CHUNKS = (64, 256, 512, 1024, 2048), (2, 4)


class SwiGLU(nn.Module):
    """silu(gate) * up"""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(R, F), (R, F) -> (R, F)"""
        return F.silu(gate) * up


def step(experts: Experts, x: Tensor, direction: Tensor, per_expert: int, chunks: int) -> float:
    """CPU seconds of forward and backward with `per_expert` rows for each expert, in `chunks` calls.

    Several calls are as the passes `overlap` and `collect` make them: forward of all, then backward of all, and the
    weight gradients once. One call is that of a layer without overlap.
    """
    num_experts = experts.num_experts
    rows = per_expert // chunks
    source_R = torch.arange(rows * num_experts)
    counts_E, weights_R = torch.full((num_experts,), rows), torch.ones(rows * num_experts)
    parts = [part.detach().requires_grad_() for part in x.chunk(chunks)]
    experts.zero_grad()
    start = time.thread_time()
    token = experts(collect=True) if chunks > 1 else None
    outputs = [experts(part, counts_E, source_R=source_R, weights_R=weights_R, token=token) for part in parts]
    torch.autograd.backward(outputs, list(direction.chunk(chunks)))
    return time.thread_time() - start


def measure(rounds: int, sizes: tuple[int, ...] = ROWS) -> list[dict[str, Any]]:
    """A row for each number of rows per expert and of chunks: medians over rounds, in which both take turns."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experts = Experts(D_MODEL, D_EXPERT, EXPERTS, gated=True, activation=SwiGLU())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    found = []
    for per_expert in sizes:
        x, direction = (torch.randn(per_expert * EXPERTS, D_MODEL) for _ in range(2))
        for chunks in CHUNKS:
            times: dict[int, list[float]] = {1: [], chunks: []}
            for i in range(rounds + 1):
                for n in (1, chunks) if i % 2 else (chunks, 1):
                    seconds = step(experts, x, direction, per_expert, n)
                    if i:
                        times[n].append(seconds)
            ratio = statistics.median(a / b for a, b in zip(times[chunks], times[1], strict=True))
            found.append({"rows": per_expert, "chunks": chunks, "ratio": ratio, "price": (ratio - 1) / (chunks - 1)})
    return found


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="where to write what was measured, as JSON")
    options = parser.parse_args()
    rows = measure(options.rounds)
    print(f"{'rows per expert':>15}{'chunks':>8}{'of one call':>13}{'price':>8}")
    for row in rows:
        print(f"{row['rows']:>15}{row['chunks']:>8}{row['ratio']:>13.2f}{row['price']:>8.2f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
