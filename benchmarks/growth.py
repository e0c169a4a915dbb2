"""How time and memory of MoE layers grow with tokens, experts, top-k, layers and ranks: measured, fitted, plotted.

    python benchmarks/growth.py                 # about four minutes on two idle cores
    python benchmarks/growth.py --rounds 3 --json growth.json --plot growth.svg

Forward and backward of transformers' Mixtral block as moecompile rewrites it, fp32 (bf16 over ranks), hidden size 512,
expert width 256, a new input every round. Along each axis the others stay; sizes take turns, and the median of CPU time
counts (one thread; of several ranks the mean, with gloo's threads). `kept` is what forward keeps
for backward. The exponent of time is the slope of a line through the logarithms.

What must hold: time and memory are linear in tokens and in layers (exponents 0.85 to 1.1, kept memory 0.99 to 1.01).
Each doubling of the experts, at the same FLOPs, adds at most a tenth of the smallest layer's time, beyond one pass over
the weights in forward and two in backward at the speed at which memory is copied. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layer import HEAP, HIDDEN, block
from side_by_side.common import Place, Weights
from side_by_side.common import Size as LayerSize
from side_by_side.launch import launch
from side_by_side.ours import MoecompileLayer
from torch import Tensor, nn

from moecompile import compile_model
from moecompile.bench import kept_bytes

WIDTH, WARM_UP = 256, 2
MOST_PER_DOUBLING = 0.1


@dataclass(frozen=True)
class Size:
    """tokens: per rank."""

    tokens: int = 2048
    experts: int = 32
    top_k: int = 4
    layers: int = 1
    ranks: int = 1


AXES = {
    "tokens": [Size(tokens=n) for n in (512, 1024, 2048, 4096, 8192)],
    "experts": [Size(experts=n) for n in (8, 16, 32, 64, 128, 256)],
    "top_k": [Size(top_k=n) for n in (1, 2, 4, 8)],
    "layers": [Size(tokens=1024, layers=n) for n in (1, 2, 4, 8)],
    "ranks": [Size(ranks=n) for n in (1, 2, 4)],
}


class Stack(nn.Module):
    """MoE layers with residuals."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        blocks = [block(size.experts, size.top_k, WIDTH, torch.float32, "eager") for _ in range(size.layers)]
        self.layers = nn.ModuleList(compile_model(b, example=torch.zeros(1, 4, HIDDEN)) for b in blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def one_rank(sizes: Sequence[Size], rounds: int) -> list[dict[str, Any]]:
    """A row for each size, taking turns."""
    stacks = {size: Stack(size) for size in sizes}
    seconds = _interleaved({s: (lambda x, m=m: m(x), s.tokens, m.zero_grad) for s, m in stacks.items()}, rounds)
    return [
        {
            **asdict(size),
            "cpu_ms": 1e3 * statistics.median(seconds[size]),
            "kept_mib": kept_bytes(lambda m=stack, n=size.tokens: m(_draw(n)), stack.parameters()) / 2**20,
            "weights_mib": sum(p.numel() * p.element_size() for p in stack.parameters()) / 2**20,
        }
        for size, stack in stacks.items()
    ]


def _draw(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, tokens, HIDDEN).to(dtype).requires_grad_()


def _interleaved(
    runs: dict[Size, tuple[Callable[..., Tensor], int, Callable[[], None]]], rounds: int,
    dtype: torch.dtype = torch.float32,
) -> dict[Size, list[float]]:  # fmt: skip
    """size -> CPU seconds of each round. runs: size -> (forward, tokens, what forgets the gradients)."""
    seconds: dict[Size, list[float]] = {size: [] for size in runs}
    for i in range(WARM_UP + rounds):
        for size, (forward, tokens, forget) in runs.items():
            x, direction = _draw(tokens, dtype), torch.randn(1, tokens, HIDDEN).to(dtype)
            forget()
            start = time.process_time()
            forward(x).backward(direction)
            if i >= WARM_UP:
                seconds[size].append(time.process_time() - start)
    return seconds


def run_rank(job: dict[str, Any], folder: Path) -> None:
    """The layer with its experts over all ranks; rank 0 writes the mean of the ranks' medians. Does not return."""
    dist.init_process_group("gloo")
    size = Size(**job["size"])
    place = Place(dist.get_rank(), dist.get_world_size())
    layer_size = LayerSize(size.experts, size.top_k, WIDTH, size.tokens)
    layer = MoecompileLayer(layer_size, Weights.random(layer_size), place)
    torch.manual_seed(place.rank)
    run = layer, size.tokens, layer.module.zero_grad
    seconds = _interleaved({size: run}, job["rounds"], torch.bfloat16)[size]
    mean = torch.tensor(statistics.median(seconds))
    dist.all_reduce(mean)
    if place.rank == 0:
        (folder / "found.json").write_text(json.dumps({**job["size"], "cpu_ms": 1e3 * float(mean) / place.ranks}))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the line through (log x, log y), least squares."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def pass_seconds_per_mib() -> float:
    """How long one pass over memory that is in no cache takes: half of a copy, which reads and writes."""
    source = torch.ones(64 * 2**18)  # 64 MiB
    target, found = torch.empty_like(source), []
    for _ in range(5):
        start = time.process_time()
        target.copy_(source)
        found.append((time.process_time() - start) / 64 / 2)
    return min(found)


def findings(rows: dict[str, list[dict[str, Any]]], pass_s: float) -> list[tuple[str, float, bool]]:
    """(what, figure, whether it is as it must be)."""
    found = []
    for axis in ("tokens", "layers"):
        xs = [row[axis] for row in rows[axis]]
        for what, low, high in (("cpu_ms", 0.85, 1.1), ("kept_mib", 0.99, 1.01)):
            slope = exponent(xs, [row[what] for row in rows[axis]])
            found.append((f"{what} ~ {axis}^", slope, low <= slope <= high))
    passes = 3  # forward reads the weights, backward reads them and writes as much
    rest = [row["cpu_ms"] - 1e3 * passes * pass_s * row["weights_mib"] for row in rows["experts"]]
    doublings = math.log2(rows["experts"][-1]["experts"] / rows["experts"][0]["experts"])
    added = (rest[-1] / rest[0] - 1) / doublings
    found.append(("time added per doubling of experts", added, added <= MOST_PER_DOUBLING))
    return found


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel an axis, time relative to the smallest size, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(rows), figsize=(2.6 * len(rows), 2.6), sharey=True)
    for panel, (axis, found) in zip(panels, rows.items(), strict=True):
        xs = [row[axis] for row in found]
        panel.plot(xs, [row["cpu_ms"] / found[0]["cpu_ms"] for row in found], "o-", label="time")
        if "kept_mib" in found[0]:
            panel.plot(xs, [row["kept_mib"] / found[0]["kept_mib"] for row in found], "s--", label="kept memory")
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=xs, xticklabels=xs)
        panel.minorticks_off()
    panels[0].set(ylabel="x the smallest", yticks=[1, 2, 4, 8, 16], yticklabels=[1, 2, 4, 8, 16])
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, plots; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=int, default=1, help="divide tokens by this, for a quick look")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.job:
        run_rank(given.job, given.folder)
    rows: dict[str, list[dict[str, Any]]] = {}
    for axis, full in AXES.items():
        sizes = [replace(size, tokens=size.tokens // given.scale) for size in full]
        if axis == "ranks":
            jobs = [{"size": asdict(size), "rounds": given.rounds} for size in sizes]
            rows[axis] = [launch(Path(__file__), job["size"]["ranks"], job, timeout_s=300) for job in jobs]
        else:
            rows[axis] = one_rank(sizes, given.rounds)
        for row in rows[axis]:
            kept = f"{row['kept_mib']:9.1f} MiB kept" if "kept_mib" in row else ""
            print(f"{axis:8} {row[axis]:6} {row['cpu_ms']:10.1f} ms {kept}", flush=True)
    found = findings(rows, pass_seconds_per_mib())
    for what, figure, holds in found:
        print(f"{what:34} {figure:6.2f}  {'ok' if holds else 'NOT AS IT MUST BE'}")
    if given.json:
        result = {"rows": rows, "findings": [{"what": w, "figure": f, "holds": h} for w, f, h in found]}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(rows, given.plot)
    return int(not all(holds for *_, holds in found))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in HEAP.items()):  # libraries read them when they start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    sys.exit(main())
