"""Records the failures of ranks, one file per failed rank, and chooses the one to report.

A rank that fails writes `errors/rank_N.json` (for the launcher) and `errors/rank_N.txt` (the traceback). Its peers then
fail too, because their connections break: the first failure that is not such a consequence is reported.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from moecompile.atomic import write_text
from moecompile.errors import MoecompileError, RankFailure, UserError
from moecompile.rundir import ERRORS, output_dir
from moecompile.runtime.logs import claim_file, gone, log_path
from moecompile.runtime.signals import Stopped

_GLOO = ("gloo/transport", "Application timeout caused pair closure")
"""Parts of gloo's messages for a broken connection, and for a timeout."""

_STOPPED = "stopped"

_GONE = (
    "the process has ended without a message (killed by SIGKILL? the machine may have run out of memory; or its code "
    "left Python by itself)"
)

TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a rank that the launcher ended: by the signal itself, or by the rank's signal thread."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's failure. message: for the user. last_line: of the traceback.

    peer_lost: another rank failed first. timed_out: that rank does not answer, but connections are not broken.
    """

    rank: int
    type: str
    message: str
    exit_code: int
    last_line: str
    time: float
    peer_lost: bool
    timed_out: bool

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of `rank` by `error`."""
        last_line = "".join(traceback.format_exception_only(error)).strip()
        return cls(
            rank=rank,
            type=type(error).__name__,
            message=str(error),
            exit_code=error.exit_code if isinstance(error, MoecompileError) else 1,
            last_line=last_line.splitlines()[0],
            time=time.time(),
            peer_lost=is_peer_lost(error),
            timed_out=is_peer_lost(error) and re.search("time(d )?out", str(error), re.IGNORECASE) is not None,
        )


def errors_dir(run_dir: Path) -> Path:
    """The folder in which the ranks of `run_dir` record failures."""
    return output_dir(run_dir) / ERRORS


def clear(run_dir: Path) -> None:
    """Removes the failures of an earlier run in the same directory, and its logs, which show which ranks live."""
    for path in [*errors_dir(run_dir).glob("*"), *log_path(run_dir, 0).parent.glob("rank_*")]:
        if path.is_file():
            path.unlink()


def keep(run_dir: Path, attempt: int) -> Path:
    """Moves the failures of an attempt into a new folder, and returns it."""
    folder = errors_dir(run_dir) / f"attempt_{attempt}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in errors_dir(run_dir).glob("*"):
        if path.is_file():
            path.rename(folder / path.name)
    return folder


def record(error: BaseException, run_dir: Path, rank: int) -> Failure:
    """Records the failure of `rank`; files are written atomically."""
    failure = Failure.of(error, rank)
    try:
        _write(failure, error, errors_dir(run_dir))
    except FileNotFoundError:  # the run was refused meanwhile
        pass
    except OSError as unwritten:  # the disk is full, which may be why the rank failed
        print(f"rank {rank}: {failure.last_line} ({unwritten})", file=sys.stderr, flush=True)
    return failure


def _write(failure: Failure, error: BaseException, folder: Path) -> None:
    rank = failure.rank
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank}.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    write_text(folder / f"rank_{rank}.json", json.dumps(asdict(failure), indent=1))


def any_recorded(run_dir: Path) -> bool:
    """Whether a rank has recorded a failure."""
    return next(_recorded(run_dir), None) is not None


def record_stop(run_dir: Path, stopped: Stopped) -> None:
    """Records for the launcher that a signal has ended this rank."""
    folder = errors_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _STOPPED, json.dumps((stopped.number, stopped.step, stopped.num_steps)))


def stopped(run_dir: Path) -> Stopped | None:
    """What a rank has recorded, if a signal has ended the ranks."""
    path = errors_dir(run_dir) / _STOPPED
    return Stopped(*json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def claim(run_dir: Path) -> bool:
    """True for the first rank that calls it: without our own launcher, that rank reports the failure."""
    try:
        errors_dir(run_dir).mkdir(exist_ok=True)
        return claim_file(errors_dir(run_dir) / "reported")
    except FileNotFoundError:  # the run was refused, which a rank has reported
        return False
    except OSError:  # a full disk: two reports are better than none
        return True


def others_failed(run_dir: Path, rank: int, world_size: int) -> bool:
    """Whether another rank than `rank` has recorded a failure, or has ended without a record."""
    records = any(failure.rank != rank for failure in _recorded(run_dir))
    return records or any(other != rank for other in gone(run_dir, world_size))


def first_error(run_dir: Path, world_size: int, exit_codes: Mapping[int, int]) -> MoecompileError:
    """The error to raise for a run whose ranks ended with `exit_codes`, in the order in which they ended.

    Without exit codes (in place), only the lock on its log shows that a rank has ended.

    Algorithm:
    1. The first exception that is not about a lost peer.
    2. Else, if a rank has timed out: the ranks without a record hang. (A rank that waits for the one that timed out
       sees a broken connection, and may record its failure first.)
    3. Else the first rank that ended without a record, unless the launcher ended it: killed, or exited by itself.
    4. Else the first lost peer.
    5. Else the first rank that was ended by a signal.
    """
    records = sorted(_recorded(run_dir), key=lambda failure: failure.time)
    if causes := [failure for failure in records if not failure.peer_lost]:
        return to_error(causes[0], run_dir, world_size)  # Step 1
    silent = sorted(set(range(world_size)) - {failure.rank for failure in records})
    lost = [] if exit_codes else [rank for rank in gone(run_dir, world_size) if rank in silent]
    if lost:
        return ended_silently(lost[0], world_size)  # Step 3, in place
    waiting = [failure for failure in records if failure.timed_out]
    if waiting and silent:
        return _hanging(silent, world_size, waiting[0])  # Step 2
    ended = [rank for rank in exit_codes if rank in silent]
    silent_causes = [rank for rank in ended if exit_codes[rank] not in TERMINATED]
    if records and not silent_causes:
        return to_error(records[0], run_dir, world_size)  # Step 4
    if not ended:
        return RankFailure(f"a rank of {world_size} has ended the others without a record")
    rank = (silent_causes or ended)[0]  # Steps 3 and 5
    return RankFailure(f"rank {rank} of {world_size} failed: {_how_it_ended(exit_codes[rank])}")


def ended_silently(rank: int, world_size: int) -> RankFailure:
    """The error for a rank that ended without a record."""
    return RankFailure(f"rank {rank} of {world_size} failed: {_GONE}")


def _hanging(ranks: list[int], world_size: int, waiting: Failure) -> RankFailure:
    names = f"rank {ranks[0]} of {world_size} hangs" if len(ranks) == 1 else (
        f"ranks {', '.join(map(str, ranks))} of {world_size} hang"
    )  # fmt: skip
    return RankFailure(
        f"{names}: rank {waiting.rank} has waited for an answer for trainer.timeout_s ({waiting.last_line})"
    )


def to_error(failure: Failure, run_dir: Path, world_size: int) -> MoecompileError:
    """The exception for `failure` in another process; the rank's traceback is attached as a note."""
    path = errors_dir(run_dir) / f"rank_{failure.rank}.txt"
    error: MoecompileError
    if failure.exit_code == UserError.exit_code:
        error = UserError(failure.message)
    else:
        error = RankFailure(f"rank {failure.rank} of {world_size} failed: {failure.last_line} (see {path})")
    with suppress(OSError):
        error.add_note(path.read_text(encoding="utf-8"))
    return error


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether `error`, or one of its causes, is a broken or timed-out connection to another rank."""
    while error is not None:
        names = {cls.__name__ for cls in type(error).__mro__}
        if "DistError" in names or (isinstance(error, RuntimeError) and any(text in str(error) for text in _GLOO)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _recorded(run_dir: Path) -> Iterator[Failure]:
    for path in errors_dir(run_dir).glob("rank_*.json"):
        try:
            yield Failure(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:  # moved meanwhile
            continue


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    name = next((known.name for known in signal.Signals if known == -exit_code), f"signal {-exit_code}")
    return f"killed by {name}" + " (the machine may have run out of memory)" * (name == "SIGKILL")
