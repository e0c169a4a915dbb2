"""Lent experts: how even they make the ranks, and what that brings and costs in time.

    python benchmarks/lend.py                 # two ranks on two cores; about four minutes on a quiet machine
    python benchmarks/lend.py --clock cpu     # on a machine that does other things too

Rows: the eight workloads of the public discussion (Megatron-LM issue 7488), drawn by `routing.workload` and assigned as
a compiled model does; rows of the fullest rank over the mean, the largest of eight steps, before and after.

Time: one MoE layer on two ranks, forward and backward, `dispatch=dedup`, random weights and inputs, the same for all.
Four layers take turns, so that what the machine does beside falls on all of them:

balanced       every expert gets the same number of rows; nothing is lent
balanced lend  the same with `dispatch.balance=lend`: what it costs to look
hot            the experts of one rank get three quarters of the rows; nothing is lent
hot lend       the same with `dispatch.balance=lend`

wall: from barrier to barrier. cpu: CPU time of the busier rank's thread, which does not see waiting or other programs.
Writes benchmarks/results/lend.json, and exits with 1 unless the bars hold by the chosen clock.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PORT, STEPS = 29402, 8
RESULTS = Path(__file__).parent / "results" / "lend.json"
LEND = ["dispatch.balance=lend"]
LAYERS = {
    "balanced": ["routing.workload=balanced"],
    "balanced lend": ["routing.workload=balanced", *LEND],
    "hot": ["routing.workload=hot_block"],
    "hot lend": ["routing.workload=hot_block", *LEND],
}
# Workload -> routing.workload, and which experts its block has: one, those of a rank, or one on each rank.
WORKLOADS = {
    "W0 balanced": ("balanced", "one"),
    "W1 hot set": ("hot_block", "one"),
    "W2 hot rank": ("hot_block", "rank"),
    "W3 spread hot": ("hot_spread", "ranks"),
    "W4 source-ragged": ("ragged", "rank"),
    "W5 rank without tokens": ("cold_block", "rank"),
    "W6 rotating hotspot": ("rotating", "rank"),
    "W7 burst": ("burst", "rank"),
}
MESHES = ((2, 2), (4, 3))  # ranks, slots that suffice
MOST_ROWS, MOST_OF_BALANCED, LEAST_GAIN, MOST_COST = 1.05, 1.15, 1.25, 1.02


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run. tokens: of a rank."""

    hidden: int = 512
    width: int = 1024
    experts: int = 8
    top_k: int = 2
    tokens: int = 4096
    rounds: int = 8


# -- rows ------------------------------------------------------------------------------------------------------------


def rows(tokens: int = 2048, experts_per_rank: int = 4, top_k: int = 2) -> list[dict[str, Any]]:
    """Rows of the fullest rank over the mean for every workload, before and after."""
    found = []
    for name in WORKLOADS:
        for num_ranks, slots in MESHES:
            steps = [_fullest(name, num_ranks, slots, step, tokens, experts_per_rank, top_k) for step in range(STEPS)]
            before, after = (max(values) for values in zip(*steps, strict=True))
            found.append({"workload": name, "ranks": num_ranks, "slots": slots, "before": before, "after": after})
    return found


def _fullest(
    name: str, num_ranks: int, slots: int, step: int, tokens: int, experts_per_rank: int, top_k: int
) -> tuple[float, float]:
    import torch

    from moecompile.ops.lending import assign

    kernels, (kind, block) = torch.ops.moecompile, WORKLOADS[name]
    num_experts = num_ranks * experts_per_rank
    size = {"one": 1, "rank": experts_per_rank, "ranks": num_ranks}[block]
    counts = []
    for rank in range(num_ranks):
        key, like = torch.tensor([0, step, rank, 0]), torch.empty(tokens, num_experts)
        ids = kernels.balanced_ids(like, top_k, 1, 1)
        if kind != "balanced":
            scores = kernels.workload_scores(kernels.keyed_uniform(like, key), key, kind, 1.0, size)
            ids = scores.topk(top_k).indices
        counts.append(kernels.count_experts(ids, num_experts))
    counts_rE = torch.stack(counts)
    mean = float(counts_rE.sum()) / num_ranks
    _, _, excess = assign(counts_rE, slots, 1, 0, 0)
    before = counts_rE.sum(0).view(num_ranks, -1).sum(1).max()
    return float(before) / mean, (-(-int(counts_rE.sum()) // num_ranks) + int(excess)) / mean


# -- time ------------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, timeout_s: float = 1200) -> dict[str, Any]:
    """Runs both ranks; what rank 0 found.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    from nodes import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(functools.partial(_start, sizes, folder), 2, folder, timeout_s)


def _start(sizes: Sizes, folder: str, rank: int, log: Any) -> subprocess.Popen[bytes]:
    from moecompile.runtime.ranks import worker_variables

    place = {
        "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": PORT, "LEND": json.dumps(vars(sizes)),
    }  # fmt: skip
    environment = os.environ | worker_variables(1, one_machine=True) | {k: str(v) for k, v in place.items()}
    command = [sys.executable, __file__, "--rank", folder]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_rank(folder: Path) -> None:
    """All layers in turn; rank 0 writes `found.json`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), Sizes(**json.loads(os.environ["LEND"]))
    layers = {name: _layer(sizes, overrides) for name, overrides in LAYERS.items()}
    generator = torch.Generator().manual_seed(rank)
    x, direction = (torch.randn(1, sizes.tokens, sizes.hidden, generator=generator) for _ in range(2))
    wall: dict[str, list[float]] = {name: [] for name in layers}
    cpu: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(sizes.rounds + 1):
        for name in list(layers) if i % 2 else list(reversed(layers)):
            layers[name].zero_grad()
            _new_choices(layers[name], i, rank)
            dist.barrier()
            start, used = time.perf_counter(), time.thread_time()
            layers[name](x.clone().requires_grad_()).backward(direction)
            busiest = torch.tensor(time.thread_time() - used)
            dist.barrier()
            seconds = time.perf_counter() - start
            dist.all_reduce(busiest, dist.ReduceOp.MAX)
            if i:
                wall[name].append(seconds)
                cpu[name].append(float(busiest))
    if rank == 0:
        found = {"sizes": vars(sizes), "wall": wall, "cpu": cpu}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _new_choices(layer: Any, step: int, rank: int) -> None:
    from moecompile.nn import set_random_key

    set_random_key(layer, 0, step, rank)


def _layer(sizes: Sizes, overrides: list[str]) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    import moecompile

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Linear(sizes.hidden, sizes.width, bias=False) for _ in range(2))
            self.down = nn.Linear(sizes.width, sizes.hidden, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
            return out

    torch.manual_seed(0)
    config = [
        f"experts.num_routed={sizes.experts}", "experts.init=random", f"routing.top_k={sizes.top_k}",
        f"routing.hot_experts={sizes.experts // 2}", "mesh.ranks_per_node=2", "dispatch.kind=dedup",
        f"data.seq_len={sizes.tokens}", "data.micro_batch_size=1", "balance=none", *overrides,
    ]  # fmt: skip
    return moecompile.compile_model(FFN(), config, example=torch.zeros(1, 4, sizes.hidden), until="shard")


# -- figures ---------------------------------------------------------------------------------------------------------


def ratios(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Clock -> name -> median over the rounds of one layer's time by another's in the same round."""
    pairs = {
        "hot lend / balanced": ("hot lend", "balanced"),
        "hot / hot lend": ("hot", "hot lend"),
        "balanced lend / balanced": ("balanced lend", "balanced"),
    }
    return {
        clock: {
            name: statistics.median(a / b for a, b in zip(found[clock][one], found[clock][other], strict=True))
            for name, (one, other) in pairs.items()
        }
        for clock in ("wall", "cpu")
    }


def holds(found: dict[str, Any], clock: str = "wall") -> bool:
    """Whether lending is as good as promised."""
    times = ratios(found)[clock]
    return (
        max(row["after"] for row in found["rows"]) <= MOST_ROWS
        and times["hot lend / balanced"] <= MOST_OF_BALANCED
        and times["hot / hot lend"] >= LEAST_GAIN
        and times["balanced lend / balanced"] <= MOST_COST
    )


def report(found: dict[str, Any]) -> str:
    """Both tables."""
    lines = [f"{'rows of the fullest rank over the mean':<40}{'before':>8}{'after':>8}"]
    for row in found["rows"]:
        name = f"{row['workload']}, {row['ranks']} ranks, {row['slots']} slots"
        lines.append(f"{name:<40}{row['before']:>8.2f}{row['after']:>8.3f}")
    lines += ["", f"{'one layer on two ranks':<26}{'wall':>9}{'cpu':>9}"]
    for name in LAYERS:
        wall, cpu = (statistics.median(found[clock][name]) for clock in ("wall", "cpu"))
        lines.append(f"{name:<26}{wall:>7.2f} s{cpu:>7.2f} s")
    by_clock = ratios(found)
    for name, value in by_clock["wall"].items():
        lines.append(f"{name:<26}{value:>9.2f}{by_clock['cpu'][name]:>9.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--tokens", type=int, default=Sizes.tokens, help="of a rank")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which one the bars are about")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write what was measured, as JSON")
    options = parser.parse_args()
    found = {"rows": rows(), **measure(Sizes(rounds=options.rounds, tokens=options.tokens))}
    print(report(found))
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if holds(found, options.clock) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]))
    else:
        main()
