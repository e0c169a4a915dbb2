"""A run directory belongs to one run: whoever is refused there leaves every byte as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moecompile import rundir
from moecompile.errors import ConfigError
from tests.distributed.resume_job import TINY
from tests.forked import Program, python
from tests.killed import killed_at

REPOSITORY = Path(__file__).parents[2]
RUN = [*TINY, "trainer.max_steps=2", "trainer.save_interval=1", "mesh=cpu_1x2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def moecompile(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python(*before, "-m", "moecompile", *arguments, cwd=REPOSITORY)


CONFIG = "".join(f"{group}:\n  name: x\n" for group in ("task", "model", "experts", "mesh", "trainer"))
"""What every version's resolved.yaml has."""


def contents(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


REFUSED = {
    "other experts": (["experts.num_routed=32", "trainer.resume=auto"], "experts.num_routed: 16 in the checkpoint, 32 here"),
    "no resume": ([], "holds the checkpoints of another run"),
    "another task": (["task=plan"], "holds the checkpoints of another run"),
    "a config that is refused": (["mesh.ep=3", "trainer.resume=auto"], "mesh.ep=3: must divide"),
    "a key that is not there": (["mesh.epp=3"], "mesh.epp=3: there is no such key"),
}  # fmt: skip


@pytest.mark.slow
def test_a_refused_run_changes_nothing_and_the_old_one_can_be_exported(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    here = f"hydra.run.dir={run_dir}"
    began = time.monotonic()
    first = subprocess.run(  # a new Python, whose imports take time
        [sys.executable, "-m", "moecompile", *RUN, here], cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )
    assert first.returncode == 0, first.stderr
    wall = time.monotonic() - began
    assert first.stdout.startswith("deepseek_ep: train on 2 ranks, loading torch ...\n")
    assert 0.8 * wall < json.loads((run_dir / "result.json").read_text())["seconds"] < wall  # imports count, too
    before = contents(run_dir)
    assert {"resolved.yaml", "plan.yaml", "result.json", "logs/rank_1.log", "tokenizer.json"} <= before.keys()
    for name, (overrides, message) in REFUSED.items():
        refused = moecompile(*RUN, here, *overrides)
        assert refused.returncode == 2 and message in refused.stderr, (name, refused.stderr)
        assert contents(run_dir) == before, name
    in_place = moecompile(*RUN, here, *REFUSED["other experts"][0], before=tuple(TORCHRUN))
    assert in_place.stderr.count(REFUSED["other experts"][1]) == 1, in_place.stderr
    assert contents(run_dir) == before
    with rundir.held(run_dir):  # as another run that is under way
        second = moecompile(*RUN, here, "trainer.resume=auto", "trainer.max_steps=4")
        rundir.discard(run_dir)
    assert second.returncode == 2
    assert second.stderr == (
        f"error: hydra.run.dir={run_dir}: another run is writing there. Wait for it, or use another directory.\n"
    )
    assert contents(run_dir) == before
    _killed_before_it_is_accepted(run_dir)
    kept = {name: value for name, value in contents(run_dir).items() if not name.startswith(rundir.PENDING)}
    assert kept == before
    exported = moecompile("task=export", f"export.run={run_dir}", f"hydra.run.dir={tmp_path / 'exported'}")
    assert exported.returncode == 0, exported.stderr
    longer = moecompile(*RUN, here, "trainer.resume=auto", "trainer.max_steps=3")
    assert longer.returncode == 0, longer.stderr
    assert not (run_dir / rundir.PENDING).exists() and (run_dir / "checkpoints" / "step-3").is_dir()


def _killed_before_it_is_accepted(run_dir: Path) -> None:
    words = ["-m", "moecompile", *RUN, "trainer.resume=auto", "experts.num_routed=32"]
    with Program(*words, f"hydra.run.dir={run_dir}", cwd=REPOSITORY) as process:
        deadline = time.monotonic() + 300
        while not (run_dir / rundir.PENDING / "logs" / "rank_1.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)


# -- without a run ---------------------------------------------------------------------------------------------------


def test_an_empty_directory_is_written_at_once(tmp_path: Path) -> None:
    with rundir.held(tmp_path):
        assert rundir.output_dir(tmp_path) == tmp_path
        rundir.accept(tmp_path)
    assert list(tmp_path.iterdir()) == []


def a_run(folder: Path) -> Path:
    for name in ("logs", "errors"):
        (folder / name).mkdir(parents=True)
    for name in ("plan.yaml", "logs/rank_3.log", "errors/rank_0.json", "result.json", "metrics.csv"):
        (folder / name).write_text("old")
    (folder / "resolved.yaml").write_text(CONFIG)
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


BEFORE = {"resolved.yaml": CONFIG, "plan.yaml": "new", "logs/rank_0.log": "new", "metrics.csv": "old"}


@contextmanager
def pending(run_dir: Path) -> Iterator[Path]:
    with rundir.held(run_dir):
        place = rundir.output_dir(run_dir)
        assert place == run_dir / rundir.PENDING
        (place / "logs").mkdir()
        (place / "logs" / "rank_0.log").write_text("new")
        (place / "plan.yaml").write_text("new")
        yield place


def test_what_is_accepted_replaces_what_was_there(tmp_path: Path) -> None:
    with pending(a_run(tmp_path)):
        assert (tmp_path / "plan.yaml").read_text() == "old"
        rundir.accept(tmp_path)
        assert rundir.output_dir(tmp_path) == tmp_path
    assert files_of(tmp_path) == BEFORE


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_it_is_accepted_it_is_whole_for_the_next_one(moment: int, tmp_path: Path) -> None:
    """Before the first change it is the run before, else this one; what is left to move is moved by the next run."""
    before = files_of(a_run(tmp_path / "run"))
    with pending(tmp_path / "run"), killed_at(moment, (Path, "rename"), (Path, "replace")):
        rundir.accept(tmp_path / "run")
    with rundir.held(tmp_path / "run"):
        rundir.discard(tmp_path / "run")
    assert files_of(tmp_path / "run") == (before if moment == 0 else BEFORE)


def test_what_a_killed_run_left_is_not_accepted_later(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text(CONFIG)
    (tmp_path / rundir.PENDING).mkdir()
    (tmp_path / rundir.PENDING / "result.json").write_text("of a killed run")
    with rundir.held(tmp_path):
        assert not any(rundir.output_dir(tmp_path).iterdir())
        rundir.accept(tmp_path)
    assert files_of(tmp_path) == {"resolved.yaml": CONFIG}


# -- folders that are something else ---------------------------------------------------------------------------------

OURS: dict[str, dict[str, str]] = {
    "an empty folder": {},
    "the root of a volume": {"lost+found/.": "", ".hydra/config.yaml": ""},
    "that of a batch job which somebody wrote": {"slurm-7.out": "", "job.sbatch": ""},
    "a run": {"resolved.yaml": CONFIG, "notes.txt": "of the user"},
    "checkpoints that were copied": {"checkpoints/step-3/state.json": "{}"},
    "killed before it had a config": {"overrides.txt": "recipe=deepseek_ep\n+model.config.x={a: 1}\n~data.cache"},
    "killed before it had a config, without overrides": {"overrides.txt": ""},
    "the same, and another one was killed there": {"overrides.txt": "seed=1", ".pending/x": "", ".pending-7/x": ""},
}
THEIRS: dict[str, dict[str, str]] = {
    "a project": {"errors/mine.txt": "", "logs/mine.txt": "", "graphs/a.svg": "", ".pending-1/x": "", "plan.yaml": "x"},
    "another resolved.yaml": {"resolved.yaml": "task: mine\nmodel: mine\n"},
    "another overrides.txt": {"overrides.txt": "Things to override: all of them\n"},
    "an export": {"resolved.yaml": CONFIG, "model-00001-of-00001.safetensors": ""},
    "checkpoints of another program": {"checkpoints/step-3.tmp/x": "", "checkpoints/epoch=1.ckpt": ""},
}


def written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/."):
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", OURS)
def test_a_run_directory_is_recognised(name: str, tmp_path: Path) -> None:
    with rundir.held(written(tmp_path / "folder", OURS[name])):
        rundir.accept(tmp_path / "folder")
    kept = {path: text for path, text in OURS[name].items() if path[-1] != "." and not path.startswith(".pending")}
    assert files_of(tmp_path / "folder") == kept


@pytest.mark.parametrize("name", THEIRS)
def test_a_folder_with_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    before = contents(written(tmp_path / "folder", THEIRS[name]))
    with (
        pytest.raises(ConfigError, match=r"^hydra\.run\.dir=.*/folder: holds .*, and no run\."),
        rundir.held(tmp_path / "folder"),
    ):
        pass
    assert contents(tmp_path / "folder") == before


@pytest.mark.slow
def test_every_task_leaves_a_folder_alone_and_says_what_is_there(tmp_path: Path) -> None:
    """As the command line does it, which has the same door for all of them; a sweep has another one."""
    folder = written(tmp_path / "folder", THEIRS["a project"])
    before = contents(folder)
    refused = moecompile("task=plan", *TINY, f"hydra.run.dir={folder}")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: hydra.run.dir={folder}: holds .pending-1, errors, graphs and 2 more, and no run. Use a new directory, "
        "or an empty one.\n",
    )
    swept = moecompile("-m", "task=plan", *TINY, "seed=0,1", f"hydra.sweep.dir={folder}")
    assert swept.returncode == 2 and f"error: hydra.sweep.dir={folder}: holds .pending-1, errors" in swept.stderr
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("key", "where", "reason"),
    [
        ("hydra.run.dir", "file/below", "Not a directory"),
        ("hydra.run.dir", "/proc/nowhere", "No such file or directory"),  # where root may not write, either
        ("hydra.sweep.dir", "file/below", "Not a directory"),
    ],
)
def test_a_directory_that_cannot_be_made_is_one_message(key: str, where: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["-m"] if key == "hydra.sweep.dir" else []
    refused = moecompile(*flags, "task=plan", f"{key}={tmp_path / where}")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"error: {key}={tmp_path / where}: cannot be created: {reason}")
    assert refused.stderr.endswith(" Give another directory.\n")
