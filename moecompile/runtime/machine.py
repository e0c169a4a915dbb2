"""Who is alive on this machine before there is a run directory: one locked file a rank, in the temporary folder.

TMP/moecompile-UID-JOB/rank_N    locked as long as the process lives; gone once it has ended in its own way
TMP/moecompile-UID-JOB/told      somebody has told what went wrong
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

_CLAIM_S = 60.0
"""Seconds after which a claim is of an earlier job."""


def hold(ranks: Ranks) -> None:
    """This process lives."""
    path = _folder(ranks.master_port) / f"rank_{ranks.rank}"
    with suppress(OSError):  # a full disk: less is known of the others
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch()
        lock(path, -1 - ranks.rank)


def gone(ranks: Ranks) -> list[int]:
    """Ranks that have lived on this machine and have not ended in their own way."""
    names = sorted(_folder(ranks.master_port).glob("rank_*"))
    return [int(path.name.removeprefix("rank_")) for path in names if is_free(path)]


def claim(ranks: Ranks) -> bool:
    """True for the first rank of this machine that asks."""
    path = _folder(ranks.master_port) / "told"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        if time.time() - path.stat().st_mtime < _CLAIM_S:
            return False
        path.touch()
    except OSError:  # the folder is gone, or cannot be made: better twice than never
        return True
    return True


def release(ranks: Ranks, *, keep_claim: bool) -> None:
    """This process ends in its own way. keep_claim: a rank that has not even started shall not tell once more."""
    (_folder(ranks.master_port) / f"rank_{ranks.rank}").unlink(missing_ok=True)
    if ranks.local_rank == 0 and not keep_claim:
        shutil.rmtree(_folder(ranks.master_port), ignore_errors=True)


@functools.cache
def _folder(port: int) -> Path:
    """The same for all ranks of a job on a machine: a job step, or the children of one launcher."""
    job = [os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in os.environ]
    if not job:
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
        job = [str(os.getppid()), started]
    return Path(tempfile.gettempdir(), f"moecompile-{os.getuid()}-{'-'.join([*job, str(port)])}")
