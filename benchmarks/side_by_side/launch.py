"""Starts ranks on this machine, if it may in a network namespace in which only they live, or in two with a link."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nodes import ADDRESSES, INTERFACE, two_nodes

from moecompile.runtime.ranks import free_port

NAMESPACE = "SIDE_BY_SIDE_NAMESPACE"


def enter_namespace() -> None:
    """Starts this program again in a network namespace of its own, once; stays where it is if that is not allowed."""
    if NAMESPACE in os.environ:
        return
    os.environ[NAMESPACE] = "shared"
    up = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if shutil.which("unshare") and subprocess.run([*up, "true"], capture_output=True).returncode == 0:
        os.environ[NAMESPACE] = "own"
        os.execvp(up[0], [*up, sys.executable, *sys.argv])


def launch(
    program: Path, ranks: int, job: dict[str, Any], timeout_s: float = 3000, link_mbit: int | None = None
) -> dict[str, Any]:
    """Runs `program --job JOB --folder FOLDER` on every rank; what rank 0 wrote into `found.json` there.

    Args:
        link_mbit: the ranks are on two nodes that a link of this rate joins, each way; None: on one.

    Raises:
        SystemExit: a rank failed, with the end of its output. RuntimeError: the system does not allow two nodes.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        nodes = (
            [[]]
            if link_mbit is None
            else [["ip", "netns", "exec", name] for name in stack.enter_context(two_nodes(link_mbit))]
        )
        here = ranks // len(nodes)
        place = {"WORLD_SIZE": ranks, "LOCAL_SIZE": here, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": free_port()}
        place["MASTER_ADDR"], place["GLOO_SOCKET_IFNAME"] = (
            ("127.0.0.1", "lo") if link_mbit is None else (ADDRESSES[0], INTERFACE)
        )
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank % here}).items()}
                with open(Path(folder, f"{rank}.log"), "wb") as log:
                    command = [*nodes[rank // here], sys.executable, str(program)]
                    command += ["--job", json.dumps(job | {"nodes": len(nodes)}), "--folder", folder]
                    processes.append(subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log))
            _wait(processes, folder, time.monotonic() + timeout_s)
            return dict(json.loads(Path(folder, "found.json").read_text()))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: list[subprocess.Popen[bytes]], folder: str, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            output = Path(folder, f"{failed[0] if failed else 0}.log").read_text(errors="replace")
            raise SystemExit(f"rank {failed or 'none'} failed, the others were stopped:\n{output[-4000:]}")
        time.sleep(0.2)
    if failed := [rank for rank, process in enumerate(processes) if process.returncode]:
        raise SystemExit(Path(folder, f"{failed[0]}.log").read_text(errors="replace")[-4000:])
