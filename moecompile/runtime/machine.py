"""Which ranks live on this machine before there is a run directory: one locked file per rank, in the temporary folder.

TMP/moecompile-UID-JOB/rank_N    locked while the process lives; removed when it exits regularly
TMP/moecompile-UID-JOB/reported  a rank has reported the failure
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from moecompile.runtime.logs import is_free, lock
from moecompile.runtime.ranks import Ranks

_OF_A_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_CLAIM_S = 60.0
"""Seconds after which a claim belongs to an earlier job."""


def hold(ranks: Ranks) -> None:
    """Locks the file of this process, which shows that it lives."""
    path = _folder(ranks.master_port) / f"rank_{ranks.rank}"
    with suppress(OSError):  # a full disk: other ranks cannot see that this one lives
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch()
        lock(path, -1 - ranks.rank)


def gone(ranks: Ranks) -> list[int]:
    """Ranks that were started on this machine and have ended, but not regularly."""
    names = sorted(_folder(ranks.master_port).glob("rank_*"))
    return [int(path.name.removeprefix("rank_")) for path in names if is_free(path)]


def claim(ranks: Ranks) -> bool:
    """True for the first rank of this machine that calls it: that rank reports the failure."""
    path = _folder(ranks.master_port) / "reported"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        if time.time() - path.stat().st_mtime < _CLAIM_S:
            return False
        path.touch()
    except OSError:  # the folder is gone or cannot be created: two reports are better than none
        return True
    return True


def release(ranks: Ranks, *, keep_claim: bool) -> None:
    """Removes the file of this process, which exits. keep_claim: so that a later rank does not report again."""
    (_folder(ranks.master_port) / f"rank_{ranks.rank}").unlink(missing_ok=True)
    if ranks.local_rank == 0 and not keep_claim:
        shutil.rmtree(_folder(ranks.master_port), ignore_errors=True)


@functools.cache
def _folder(port: int) -> Path:
    """The folder of a job on this machine, the same for all ranks of a job step or of one launcher."""
    job = [os.environ[name] for name in _OF_A_STEP if name in os.environ]
    if not job:
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
        job = [str(os.getppid()), started]
    return Path(tempfile.gettempdir(), f"moecompile-{os.getuid()}-{'-'.join([*job, str(port)])}")
