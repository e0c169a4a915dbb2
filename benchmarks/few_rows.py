"""The products of experts with few rows: our kernel beside torch's, CPU time of one thread.

    python benchmarks/few_rows.py                   6, 16, 48 and 96 rows an expert on average, fp32 and bf16: a minute
    python benchmarks/few_rows.py --rows 24 --rounds 21

64 experts of width 256, hidden size 512, random counts; the two products of forward and the four of backward. Both ways
take turns on the same factors, and their results are compared. `ratio` is the median time of ours relative to torch's,
for which the same call is made with the kernel switched off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from unittest import mock

import torch
from layer import HEAP, HIDDEN
from torch import Tensor

from moecompile.ops.cpu import products
from moecompile.ops.cpu.blocks import Block
from moecompile.ops.cpu.products import Products

EXPERTS, WIDTH = 64, 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest entry


def cases(dtype: torch.dtype, block: Block) -> dict[str, tuple[str, Tensor, Tensor, Tensor]]:
    """Name -> method of `Products`, both factors, and where the result goes."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, hidden, inner = (values(block.end, width) for width in (HIDDEN, WIDTH, 2 * WIDTH))
    gate_up, down = values(EXPERTS, 2 * WIDTH, HIDDEN), values(EXPERTS, HIDDEN, WIDTH)
    return {
        "gate and up": ("transposed", x, gate_up, torch.empty_like(inner)),
        "down": ("transposed", hidden, down, torch.empty_like(x)),
        "gradient of hidden": ("straight", x, down, torch.empty_like(hidden)),
        "gradient of input": ("straight", inner, gate_up, torch.empty_like(x)),
        "gradient of gate and up": ("gradient", inner, x, torch.empty_like(gate_up)),
        "gradient of down": ("gradient", x, hidden, torch.empty_like(down)),
    }


def measure(dtype: torch.dtype, rows: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Product -> milliseconds by torch and by the kernel."""
    chosen = torch.randint(0, EXPERTS, (EXPERTS * rows,), generator=torch.Generator().manual_seed(rows))
    block = Block.whole(torch.bincount(chosen, minlength=EXPERTS))
    found = {}
    for name, (method, a, b, out) in cases(dtype, block).items():
        taken: dict[float, list[float]] = {0: [], float("inf"): []}
        results = []
        for _ in range(rounds):
            for most, times in taken.items():
                with mock.patch.object(products, "_most_rows", lambda dtype, most=most: most):
                    start = time.process_time()
                    getattr(Products(a), method)(block, a, b, out)
                    times.append(1e3 * (time.process_time() - start))
                results = [*results[-1:], out.clone()]
        error = float((results[0].float() - results[1].float()).abs().max() / results[0].float().abs().max())
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"{name}: results differ by {error} of the largest entry")
        found[name] = (statistics.median(taken[0]), statistics.median(taken[float("inf")]))
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=(6, 16, 48, 96))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HEAP.items()):  # libraries read them when they start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    torch.set_num_threads(1)
    native = products.kernels()
    if native is None or not native.has_products:
        raise SystemExit("there is no kernel here: it needs AVX512 and GCC 12")
    print(f"{'type':9} {'rows':>5} {'product':24} {'torch ms':>9} {'ours ms':>9} {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for rows in arguments.rows:
            found = measure(dtype, rows, arguments.rounds)
            found["all"] = tuple(map(sum, zip(*found.values(), strict=True)))  # type: ignore[assignment]
            for name, (theirs, ours) in found.items():
                label = str(dtype).removeprefix("torch.")
                print(f"{label:9} {rows:5} {name:24} {theirs:9.2f} {ours:9.2f} {ours / theirs:6.2f}", flush=True)


if __name__ == "__main__":
    main()
