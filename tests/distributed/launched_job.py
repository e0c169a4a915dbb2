"""A job for the launcher's tests, started by `launch`.

MODE in the environment says what the last rank (or FAILING_RANK) does once all ranks have met (or PHASE=start: before).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from moecompile.errors import ConfigError

_kept: list[object] = []


def main(run_dir: Path) -> None:
    """All ranks sum their numbers; each leaves what it saw in `done_N`, if nothing goes wrong."""
    import torch
    import torch.distributed as dist

    _kept.append(multiprocessing.RLock())  # as a progress bar does: nothing is said of it at the end
    failing = int(os.environ.get("FAILING_RANK") or int(os.environ["WORLD_SIZE"]) - 1)
    if os.environ.get("PHASE") == "start" and int(os.environ["RANK"]) == failing:
        _fail(os.environ["MODE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    mode = os.environ.get("MODE", "succeed")
    print(f"rank {rank}: {'a terminal' if sys.stdout.isatty() else 'no terminal'}", flush=True)
    (run_dir / f"started_{rank}").write_text(f"{os.getpid()}\n{time.time()}")
    if mode == "hang":
        _ignore_signals()
        time.sleep(100)
    if mode == "sleep":
        time.sleep(3)
    if mode == "deaf_peers" and rank != world_size - 1:
        _ignore_signals()
        time.sleep(100)
    if rank == failing:
        _fail(mode)
    dist.all_reduce(total)
    (run_dir / f"done_{rank}").write_text(f"{total.item()} {os.environ.get('OMP_NUM_THREADS')}")


def _fail(mode: str) -> None:
    if mode in ("raise", "deaf_peers"):
        raise ZeroDivisionError("in the middle of it\nsecond line")
    if mode == "mistake":
        raise ConfigError("routing.top_k", 9, "must be at most 8", "Use 8")
    if mode == "exit":
        os._exit(3)
    if mode == "leave":
        sys.exit(0)
    if mode == "late":
        time.sleep(2)  # the others wait in a collective
        raise ZeroDivisionError("in the middle of it")
    if mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def _ignore_signals() -> None:
    """As Lightning does: a Python handler, which never runs while the rank waits in C++."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
