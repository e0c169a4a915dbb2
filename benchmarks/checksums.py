"""What it costs to be sure: checksums of checkpoints, and the comparison of weights over ranks.

    python benchmarks/checksums.py                  # two ranks with 256 MiB each: a minute
    python benchmarks/checksums.py --mib 64 --ranks 4 --rounds 15

    save      a checkpoint with the sums of its files, beside one whose files are not summed
    load      with the sums checked, beside unchecked
    compare   the weights that every rank begins with, beside a broadcast from rank 0 (what DDP does at this place)
    hash      what `compare` computes of them, beside a copy in memory

Save and load are those of `moecompile.checkpoint`, of one DTensor that is sharded over the ranks: files are written,
synced and renamed, and read from the page cache. Both ways take turns. `CPU` is the mean over ranks, with their
threads; `wall` that of the slowest rank; both the median of the rounds, in ms. Writes into TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from side_by_side.launch import launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moecompile.checkpoint import folders
from moecompile.checkpoint.folders import whole_folder
from moecompile.checkpoint.tensors import read_tensors, write_tensors
from moecompile.passes.same_weights import check_same_weights, tensor_hash

ROW = 1024  # entries of a row of a weight, 4 KiB
Times = tuple[float, float]  # CPU ms, wall ms


def measure(folder: Path, mib: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each cost, on all ranks of the process group that is there. mib: of each rank's part."""
    rows = mib * 2**20 // (4 * ROW)
    first, every = dist.get_rank() == 0, init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = DTensor.from_local(torch.randn(rows, ROW), every, [Shard(0)])
    whole = nn.Linear(ROW, rows, bias=False)
    nn.init.constant_(whole.weight, 0.5)
    copy = torch.empty_like(whole.weight)

    def save(name: str) -> None:
        with whole_folder(folder / name, is_first_rank=first, barrier=dist.barrier) as unfinished:
            write_tensors(unfinished, {"model.weight": sharded}, orders={})

    def save_unsummed() -> None:
        with mock.patch.object(folders, "file_sum", lambda path: "00000000 0"):
            save("unsummed")

    def load() -> None:
        read_tensors(folder / "summed", {"model.weight": sharded}, orders={})

    def load_unchecked() -> None:
        with mock.patch.object(folders, "check", lambda *_, **__: None):
            load()

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "save": (lambda: save("summed"), save_unsummed),
        "load": (load, load_unchecked),
        "compare": (lambda: check_same_weights(whole), lambda: dist.broadcast(whole.weight.detach(), src=0)),
        "hash": (lambda: tensor_hash(whole.weight.detach()), lambda: copy.copy_(whole.weight.detach())),
    }
    return [_row(what, *(_over_ranks(times) for times in _in_turn(pair, rounds))) for what, pair in ways.items()]


def _in_turn(ways: Sequence[Callable[[], object]], rounds: int) -> list[list[Times]]:
    """Of each way, its times on this rank; the first round warms up."""
    found: list[list[Times]] = [[] for _ in ways]
    for _ in range(1 + rounds):
        for way, times in zip(ways, found, strict=True):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            times.append((1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)))
    return [times[1:] for times in found]


def _over_ranks(times: list[Times]) -> Times:
    """The medians of the rounds: CPU time as the mean over ranks, the clock of the slowest rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, times)
    rounds = list(zip(*everyone, strict=True))
    cpu = statistics.median(statistics.mean(rank[0] for rank in ranks) for ranks in rounds)
    return cpu, statistics.median(max(rank[1] for rank in ranks) for ranks in rounds)


def _row(what: str, ours: Times, beside: Times) -> dict[str, Any]:
    (cpu, wall), (beside_cpu, beside_wall) = ours, beside
    return {
        "what": what, "cpu_ms": cpu, "beside_cpu_ms": beside_cpu, "cpu_ratio": cpu / beside_cpu,
        "wall_ms": wall, "beside_wall_ms": beside_wall, "wall_ratio": wall / beside_wall,
    }  # fmt: skip


def run_rank(job: dict[str, Any], folder: Path) -> None:
    """One rank; the first one writes `found.json`. Does not return."""
    dist.init_process_group("gloo")
    rows = measure(folder, job["mib"], job["rounds"])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps({"rows": rows}))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of each rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.job:
        run_rank(given.job, given.folder)
    found = launch(Path(__file__), given.ranks, {"mib": given.mib, "rounds": given.rounds}, timeout_s=600)
    print(f"{given.ranks} ranks with {given.mib} MiB each")
    print(f"{'':9}{'CPU ms':>9}{'beside':>9}{'ratio':>7}{'wall ms':>10}{'beside':>9}{'ratio':>7}")
    for row in found["rows"]:
        cpu = f"{row['cpu_ms']:9.1f}{row['beside_cpu_ms']:9.1f}{row['cpu_ratio']:7.2f}"
        wall = f"{row['wall_ms']:10.1f}{row['beside_wall_ms']:9.1f}{row['wall_ratio']:7.2f}"
        print(f"{row['what']:9}{cpu}{wall}")


if __name__ == "__main__":
    sys.exit(main())
