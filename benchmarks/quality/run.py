"""Does upcycling pay, and how? Runs the studies of `PLAN.md`, in pieces: units without a result are run, one by one.

    python benchmarks/quality/run.py                    # goes on where it stopped: about 18 hours on two idle cores
    python benchmarks/quality/run.py --list             # what is done, what is missing, and the hours that it takes
    python benchmarks/quality/run.py --hours 2 --jobs 2 # begins no unit after two hours; two at a time
    python benchmarks/quality/run.py --study real       # a real model: SmolLM2-135M, after `make real-models`
    python benchmarks/quality/run.py --study layout     # the second study: does the layout change the result?
    python benchmarks/quality/tables.py                 # tables and pictures of what is there

Several processes can work side by side: a unit is taken by a lock. Each runs in a process of its own with one thread
(a real model: with two), goes on from its last checkpoint if it was ended (8 in a run), and leaves
`curves/NAME.json`, which is never overwritten. Weights of parents, checkpoints and logs are in `runs/quality`; where
parents are missing they are made again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # modules are named quality.*

from moecompile.runtime.ranks import worker_variables
from quality import study
from quality.study import FOLDER, OtherSettings, Unit, hash_of_parent

WAIT_S = 10.0  # until a unit is looked for again, if all that can be run are running elsewhere

# -- which unit is next ---------------------------------------------------------------------------------------------


def missing(units: Sequence[Unit], folder: Path = study.CURVES) -> list[Unit]:
    """What has to be run, in order: units without a result, and parents whose weights one of those needs.

    Raises:
        OtherSettings: a result is of other settings.
    """
    undone = [unit for unit in units if study.read(unit, folder) is None]
    needed = {unit.parent for unit in undone if unit.parent and hash_of_parent(unit.parent) is None}
    return [unit for unit in units if unit in undone or unit in needed]


def why_not(unit: Unit, folder: Path = study.CURVES) -> str | None:
    """Why a unit cannot be run on this machine; None: it can be, or its parent is still missing."""
    if unit.parent is None or (found := hash_of_parent(unit.parent)) is None:
        return None
    other = study.differs(unit, found, study.read_all(unit.study, folder))
    if other is None:
        return None
    return (
        f"{unit.name} would begin with other weights of {unit.parent.name} ({found[:8]}) than {other}, and arms "
        f"of a seed are compared from the same weights. Bring {FOLDER / 'parents'} from the machine of {other}, "
        f"or delete the curves of this size, domain and seed"
    )


@contextmanager
def taken(unit: Unit) -> Iterator[int | None]:
    """The lock of a unit, as a file that its process inherits; None: another process has it."""
    path = FOLDER / "locks" / unit.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file.fileno()


class Worker:
    """Takes units until none is left or the time is over. One a job; they share `failed`, `said` and `stop`."""

    def __init__(self, units: Sequence[Unit], hours: float | None, folder: Path = study.CURVES) -> None:
        self.units, self.folder = units, folder
        self.until = None if hours is None else time.monotonic() + 3600 * hours
        self.failed: set[Unit] = set()
        self.said: set[str] = set()
        self.stop: Exception | None = None

    def work(self) -> None:
        """Runs one unit after the other."""
        try:
            while self.stop is None and (self.until is None or time.monotonic() < self.until):
                found = self._one()
                if found is None:
                    return
                if not found:
                    time.sleep(WAIT_S)
        except Exception as error:  # said by the thread that waits
            self.stop = error

    def _one(self) -> bool | None:
        """Runs the first unit that can be run; False: all are running elsewhere; None: there is none."""
        left = False
        for unit in missing(self.units, self.folder):
            if unit in self.failed or unit.parent in self.failed:
                continue
            if reason := why_not(unit, self.folder):
                if unit.name not in self.said:
                    self.said.add(unit.name)
                    print(reason, file=sys.stderr, flush=True)
                continue
            left = True
            if unit.parent is not None and hash_of_parent(unit.parent) is None:
                continue  # it is being made
            with taken(unit) as lock:
                if lock is not None and unit in missing(self.units, self.folder):
                    if not self.run(unit, lock):
                        self.failed.add(unit)
                    return True
        return False if left else None

    def run(self, unit: Unit, lock: int) -> bool:
        """Runs a unit in a process of its own and says how it ended."""
        log = FOLDER / "logs" / f"{unit.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = worker_variables(unit.threads, one_machine=True)  # what ranks of moecompile run with
        environ = {**os.environ, **variables, "PYTHONPATH": str(study.REPOSITORY)}
        command = [sys.executable, __file__, "--unit", unit.name, "--study", unit.study]
        start = time.monotonic()
        with log.open("w") as output:
            done = subprocess.run(command, stdout=output, stderr=output, env=environ, pass_fds=[lock])
        minutes = (time.monotonic() - start) / 60
        if done.returncode:
            last = log.read_text().strip().splitlines()[-1:]
            print(f"{unit.name}: failed after {minutes:.1f} min, {log}: {' '.join(last)}", file=sys.stderr, flush=True)
            return False
        print(f"{time.strftime('%m-%d %H:%M')} {unit.name}: {minutes:.1f} min", flush=True)
        return True


# -- a unit ---------------------------------------------------------------------------------------------------------


def run_unit(unit: Unit, folder: Path = study.CURVES) -> None:
    """Runs a unit in this process and writes its result; a parent that is made again keeps the result that it has."""
    if unit.study == "layout":
        from quality import layouts

        result = layouts.run(unit)
    else:
        from quality import unit as one

        result = one.run(unit)
    _write_result(unit, result, folder)
    shutil.rmtree(study.unfinished(unit), ignore_errors=True)


def _write_result(unit: Unit, result: dict[str, Any], folder: Path) -> None:
    path = folder / unit.path.name
    if path.exists() and "weights_hash" in result:
        if json.loads(path.read_text())["weights_hash"] == result["weights_hash"]:
            return
        path = path.with_suffix(f".{result['weights_hash'][:8]}.json")  # of another processor
        print(f"{unit.name}: its weights are not those of the recorded run; the result is {path}", flush=True)
        if path.exists():
            return
    write(path, result)


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as a whole; an existing one is not overwritten.

    Raises:
        FileExistsError: there is one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(result.items())]
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    try:
        os.link(partial, path)
    finally:
        partial.unlink()


# -- the command line -----------------------------------------------------------------------------------------------


def show(units: Sequence[Unit]) -> None:
    """Prints what is done, running and missing, and the hours that are predicted on one core."""
    undone = missing(units)
    for unit in units:
        with taken(unit) as lock:
            state = "running" if lock is None else "missing" if unit in undone else "done"
        print(f"{state:8} {unit.hours:6.2f} h  {unit.name}")
    left = sum(unit.hours for unit in undone)
    print(f"{len(units) - len(undone)} of {len(units)} done; {left:.1f} hours of one core are left")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("quality", "real", "layout"), default="quality")
    parser.add_argument("--list", action="store_true", help="says what is done and missing, and runs nothing")
    parser.add_argument("--hours", type=float, help="no unit is begun after so many hours")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time, of one thread each")
    parser.add_argument("--unit", help="runs this one, in this process")
    given = parser.parse_args()
    units = study.units(given.study)
    try:
        if given.unit:
            run_unit(next(unit for unit in units if unit.name == given.unit))
            return 0
        if given.list:
            show(units)
            return 0
        worker = Worker(units, given.hours)
        threads = [threading.Thread(target=worker.work) for _ in range(given.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if worker.stop is not None:
            raise worker.stop
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if worker.failed or worker.said else 0


if __name__ == "__main__":
    sys.exit(main())
