"""The checkpoints of a run: names, the latest one, what is kept. Needs no torch.

    RUN/checkpoints/step-20/       whole: DCP's files (.metadata, __RANK_0.distcp), plan.yaml, state.json,
                                   checksums.json
    RUN/checkpoints/step-30.tmp/   being written, or cut off while it was
    RUN/checkpoints/latest         a link to the newest whole one

Only rank 0 changes anything here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from moecompile.checkpoint.atomic import UNFINISHED, point, publish, unfinished
from moecompile.checkpoint.sums import seal
from moecompile.errors import ConfigError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE = "state.json"
PLAN = "plan.yaml"
AUTO = "auto"


def checkpoints_of(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / CHECKPOINTS


def step_folder(checkpoints: Path, step: int) -> Path:
    """The checkpoint of an optimizer step."""
    return checkpoints / f"step-{step}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*"))
    numbers = sorted(int(name[1]) for name in found if name)
    return [step for step in numbers if (step_folder(checkpoints, step) / STATE).is_file()]


def latest(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint; without the link (a crash before the first one) the one of the highest step."""
    link = checkpoints / LATEST
    if (link / STATE).is_file():
        return link.resolve()
    found = steps(checkpoints)
    return step_folder(checkpoints, found[-1]) if found else None


def find(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `trainer.resume` names: `auto` is the latest of `run_dir`, None if there is none yet.

    Raises:
        ConfigError: a path that is neither a run directory with a checkpoint nor a checkpoint.
    """
    if resume == AUTO:
        return latest(checkpoints_of(run_dir))
    path = Path(resume)
    if (path / STATE).is_file():
        return path.resolve()
    found = latest(checkpoints_of(path)) or latest(path)
    if found is None:
        raise ConfigError(
            "trainer.resume", resume, "there is no whole checkpoint",
            "Give a run directory, one of its checkpoints/step-N, or auto",
        )  # fmt: skip
    return found.absolute()


def finish(checkpoints: Path, step: int, keep_last: int) -> Path:
    """Makes a complete `step-N.tmp` the latest checkpoint and removes old ones but `keep_last` (0: keeps all).

    Killed at any moment, it leaves `latest` at a whole checkpoint.
    """
    folder = step_folder(checkpoints, step)
    seal(unfinished(folder))
    publish(unfinished(folder), folder)
    point(checkpoints / LATEST, folder.name)
    for old in steps(checkpoints)[:-keep_last] if keep_last else []:
        _remove(step_folder(checkpoints, old))
    return folder


def forget_after(checkpoints: Path, step: int) -> None:
    """Removes what a run that goes on at `step` will write again: later checkpoints, and what was cut off."""
    for path in checkpoints.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not (later := [number for number in steps(checkpoints) if number > step]):
        return
    if step_folder(checkpoints, step).is_dir():
        point(checkpoints / LATEST, f"step-{step}")
    for number in later:
        _remove(step_folder(checkpoints, number))


def _remove(folder: Path) -> None:
    """A folder that is half removed is no checkpoint: it loses its name first."""
    shutil.rmtree(folder.rename(unfinished(folder)))
