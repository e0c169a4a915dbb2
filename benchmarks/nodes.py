"""Nodes for benchmarks: network namespaces joined by a link whose rate a token bucket limits. As root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NODES = 2
INTERFACE, MTU = "link0", 9000
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PREFIX = "moenode"


def why_not() -> str:
    """Why two nodes cannot be made here; empty if they can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no {program} (apt-get install iproute2)"
    try:
        with two_nodes(1000):
            return ""
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def two_nodes(rate_mbit: int) -> Iterator[list[str]]:
    """Two namespaces with a link between them; they are gone afterwards, and so are those of runs that were killed.

    Raises:
        RuntimeError: the system does not allow it.
    """
    _remove_left_behind()
    names = [f"{PREFIX}-{os.getpid()}-{node}" for node in range(NODES)]
    try:
        for name in names:
            _ip("netns", "add", name)
        pair = [f"mv{os.getpid() % 10**6}x{node}" for node in range(NODES)]
        _ip("link", "add", pair[0], "type", "veth", "peer", "name", pair[1])
        for name, end, address in zip(names, pair, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name, "name", INTERFACE)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "mtu", str(MTU), "up")
            _ip("-n", name, "link", "set", "lo", "up")
            limit = ("rate", f"{rate_mbit}mbit", "burst", "256kb", "latency", "200ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)  # and with it its end of the link


def _remove_left_behind() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX)):
        if not Path("/proc", name.split("-")[1]).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def run_ranks(
    start: Callable[[int, Any], subprocess.Popen[bytes]], count: int, folder: str, timeout_s: float
) -> dict[str, Any]:
    """Starts ranks and waits for them; what rank 0 wrote to `found.json`.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            with open(Path(folder, f"{rank}.log"), "wb") as log:
                ranks.append(start(rank, log))
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in ranks):
            failed = [i for i, process in enumerate(ranks) if process.poll()]
            if failed or time.monotonic() > deadline:
                output = Path(folder, f"{failed[0] if failed else 0}.log").read_text(errors="replace")
                raise RuntimeError(f"rank {failed or 'none'} ended, the others were stopped:\n{output[-4000:]}")
            time.sleep(0.2)
        return dict(json.loads(Path(folder, "found.json").read_text()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def one_rank_a_node(program: str, port: int, rate_mbit: int, sizes: Any, timeout_s: float) -> dict[str, Any]:
    """Runs `program FOLDER` on both nodes, one rank each; what rank 0 found.

    Args:
        sizes: whose fields the ranks get as JSON, in `SIZES`.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    from moecompile.runtime.ranks import worker_variables

    with two_nodes(rate_mbit) as names, tempfile.TemporaryDirectory() as folder:

        def start(rank: int, log: Any) -> subprocess.Popen[bytes]:
            place = {
                "RANK": rank, "WORLD_SIZE": NODES, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": INTERFACE, "SIZES": json.dumps(vars(sizes)),
            }  # fmt: skip
            environment = os.environ | worker_variables(1, one_machine=False) | {k: str(v) for k, v in place.items()}
            command = ["ip", "netns", "exec", names[rank], sys.executable, program, folder]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

        return run_ranks(start, NODES, folder, timeout_s)
