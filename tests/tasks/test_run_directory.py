"""A run directory belongs to one run: whoever is refused there leaves every byte as it was."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moecompile import rundir
from tests.distributed.resume_job import TINY
from tests.forked import Program, python

REPOSITORY = Path(__file__).parents[2]
RUN = [*TINY, "trainer.max_steps=2", "trainer.save_interval=1", "mesh=cpu_1x2"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def moecompile(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return python(*before, "-m", "moecompile", *arguments, cwd=REPOSITORY)


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
        assert rundir.place(tmp_path) == tmp_path
        rundir.accept(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_accepted_replaces_what_was_there(tmp_path: Path) -> None:
    for folder in ("logs", "errors"):
        (tmp_path / folder).mkdir()
    for name in ("resolved.yaml", "logs/rank_3.log", "errors/rank_0.json", "result.json", "metrics.csv"):
        (tmp_path / name).write_text("old")
    with rundir.held(tmp_path):
        place = rundir.place(tmp_path)
        assert place == tmp_path / rundir.PENDING
        (place / "logs").mkdir()
        (place / "logs" / "rank_0.log").write_text("new")
        (place / "resolved.yaml").write_text("new")
        assert (tmp_path / "resolved.yaml").read_text() == "old"
        rundir.accept(tmp_path)
        assert rundir.place(tmp_path) == tmp_path
    found = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"resolved.yaml": "new", "logs/rank_0.log": "new", "metrics.csv": "old"}


def test_what_a_killed_run_left_is_not_accepted_later(tmp_path: Path) -> None:
    (tmp_path / rundir.PENDING).mkdir()
    (tmp_path / rundir.PENDING / "resolved.yaml").write_text("of a killed run")
    with rundir.held(tmp_path):
        assert not any(rundir.place(tmp_path).iterdir())
        rundir.accept(tmp_path)
    assert list(tmp_path.iterdir()) == []
