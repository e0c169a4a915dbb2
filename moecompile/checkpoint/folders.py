"""The checkpoints of a run: names, the latest one, which are kept. Needs no torch.

    RUN/checkpoints/step-20/       complete: DCP's files (.metadata, __RANK_0.distcp), plan.yaml, state.json,
                                   checksums.json
    RUN/checkpoints/step-30.tmp/   being written, or interrupted
    RUN/checkpoints/latest         a link to the newest complete one

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
    """Steps of the complete checkpoints, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*"))
    numbers = sorted(int(match[1]) for match in matches if match)
    return [step for step in numbers if (step_folder(checkpoints, step) / STATE).is_file()]


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; without the link (after a crash at the first one), that of the highest step."""
    link = checkpoints / LATEST
    if (link / STATE).is_file():
        return link.resolve()
    numbers = steps(checkpoints)
    return step_folder(checkpoints, numbers[-1]) if numbers else None


def find(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `trainer.resume` names; for `auto`, the latest of `run_dir`, or None if there is none yet.

    Raises:
        ConfigError: the path is neither a checkpoint nor a run directory with one.
    """
    if resume == AUTO:
        return latest(checkpoints_of(run_dir))
    path = Path(resume)
    if (path / STATE).is_file():
        return path.resolve()
    newest = latest(checkpoints_of(path)) or latest(path)
    if newest is None:
        raise ConfigError(
            "trainer.resume", resume, "there is no whole checkpoint",
            "Give a run directory, one of its checkpoints/step-N, or auto",
        )  # fmt: skip
    return newest.absolute()


def finish(checkpoints: Path, step: int, keep_last: int) -> Path:
    """Makes a complete `step-N.tmp` the latest checkpoint and removes all but the newest `keep_last` (0: keeps all).

    If it is killed at any moment, `latest` still points to a complete checkpoint.
    """
    folder = step_folder(checkpoints, step)
    seal(unfinished(folder))
    publish(unfinished(folder), folder)
    point(checkpoints / LATEST, folder.name)
    for old in steps(checkpoints)[:-keep_last] if keep_last else []:
        _remove(step_folder(checkpoints, old))
    return folder


def forget_after(checkpoints: Path, step: int) -> None:
    """Removes what a run that resumes at `step` will write again: later checkpoints and interrupted ones."""
    for path in checkpoints.glob(f"*{UNFINISHED}"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not (later := [number for number in steps(checkpoints) if number > step]):
        return
    if step_folder(checkpoints, step).is_dir():
        point(checkpoints / LATEST, f"step-{step}")
    for number in later:
        _remove(step_folder(checkpoints, number))


def _remove(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a half-removed folder is not taken for one."""
    shutil.rmtree(folder.rename(unfinished(folder)))
