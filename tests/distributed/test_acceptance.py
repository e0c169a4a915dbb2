"""A run that is refused, or lost before its first new step, leaves the run in its directory as it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moecompile import rundir
from moecompile.checkpoint import folders
from moecompile.compose import compose_config, save_resolved
from moecompile.errors import MoecompileError
from moecompile.load_history import LoadHistory
from moecompile.report.result import write_result
from moecompile.runtime.module import LanguageModule
from tests.checkpoint.test_sums import flip
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import TINY, losses, run

pytestmark = pytest.mark.slow

STEPS = [
    "mesh=cpu_1x2",
    "trainer.max_steps=6",
    "trainer.save_interval=2",
    "routing.replay=record",
    "trainer.sample_interval=2",
]


def attempt(overrides: Sequence[str], run_dir: Path) -> str:
    """`ran` or the message of one run, in its directory as the command line has it."""
    overrides = [*STEPS, *overrides]
    is_first = dist.get_rank() == 0
    with rundir.held(run_dir) if is_first else nullcontext():
        if is_first:
            save_resolved(compose_config([*TINY, *overrides]), rundir.output_dir(run_dir) / rundir.RESOLVED)
        dist.barrier()
        try:
            run(overrides, run_dir)
        except (MoecompileError, ZeroDivisionError) as error:
            return str(error)
        finally:
            dist.barrier()
            if is_first:
                rundir.discard(run_dir)
            dist.barrier()
        if is_first:
            write_result(run_dir, "train", "tiny", {})
        dist.barrier()
        return "ran"


@contextmanager
def failing(when: Callable[[LanguageModule], bool]) -> Any:
    """A run that ends with an error in a forward."""
    step = LanguageModule.training_step

    def failing_step(self: LanguageModule, *args: Any) -> Any:
        if when(self):
            raise ZeroDivisionError("in the middle of it")
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", failing_step)
        yield


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


REFUSED = {
    "another optimizer": ["optimizer=muon"],
    "routes of another length": ["trainer.max_steps=9"],
    "no such routes": ["routing.replay=recodr", "trainer.resume=auto"],
}


def two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    run_dir, found = root / "run", {}
    earlier = f"trainer.resume={run_dir}/checkpoints/step-2"
    if rank == 0:
        run_dir.mkdir()
    dist.barrier()
    found["first"] = attempt([], run_dir), losses(run_dir)
    before = contents(run_dir)

    def tried(name: str, overrides: Sequence[str]) -> None:
        """The message, and the files that are not what they were."""
        message, now = attempt(overrides, run_dir), contents(run_dir)
        found[name] = message, sorted(key for key in before | now if before.get(key) != now.get(key))
        dist.barrier()

    for name, overrides in REFUSED.items():
        tried(name, [earlier, *overrides])
    shard = run_dir / "checkpoints" / "step-2" / "__1_0.distcp"
    dist.barrier()
    if rank == 0:
        flip(shard)
    dist.barrier()
    before = contents(run_dir)
    tried("a flipped bit", [earlier])
    dist.barrier()
    if rank == 0:
        flip(shard)
    dist.barrier()
    before = contents(run_dir)
    with failing(lambda module: True):
        tried("lost in its first step", [earlier])
    with failing(lambda module: module.trainer.global_step == 3):
        found["lost in its second step"] = attempt([earlier], run_dir)
    found["after that"] = aside(run_dir), LoadHistory.read(run_dir / "load.npz").steps
    found["again"] = attempt(["trainer.resume=auto"], run_dir), losses(run_dir), aside(run_dir)
    found["samples"] = [json.loads(line)["step"] for line in (run_dir / rundir.SAMPLES).read_text().splitlines()]
    found["nothing to compute"] = (
        attempt([earlier, "trainer.max_steps=2", "routing.replay=null"], run_dir),
        losses(run_dir),
        aside(run_dir),
    )
    kept = root / "kept"
    if rank == 0:
        kept.mkdir()
    dist.barrier()
    longer = attempt([f"trainer.resume={run_dir}/replaced-1", "trainer.max_steps=7", "routing.replay=null"], kept)
    found["what is kept goes on"] = longer, losses(kept)
    return found


def aside(run_dir: Path) -> dict[str, list[int]]:
    """Steps of the checkpoints, by folder."""
    return {
        each.relative_to(run_dir).as_posix(): folders.steps(folders.checkpoints_of(each))
        for each in [run_dir, *sorted(run_dir.glob("replaced-*"))]
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results: list[dict[str, Any]] = run_distributed_test(two_ranks, 2, str(tmp_path_factory.mktemp("x")), timeout_s=500)
    return results[0]


MESSAGES = {
    "another optimizer": "the checkpoint does not fit this run: optimizer.model",
    "routes of another length": "/run/routes has routes of another run",
    "no such routes": "routing.replay=recodr: routes.yaml cannot be read",
    "a flipped bit": "__1_0.distcp has the checksum",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_refused_changes_nothing(name: str, found: dict[str, Any]) -> None:
    message, changed = found[name]
    assert MESSAGES[name] in message and changed == []


def test_a_run_that_is_lost_in_its_first_step_changes_nothing(found: dict[str, Any]) -> None:
    assert found["lost in its first step"] == ("in the middle of it", [])


def test_after_the_first_step_later_checkpoints_are_aside(found: dict[str, Any]) -> None:
    assert found["lost in its second step"] == "in the middle of it"
    assert found["after that"] == ({".": [2], "replaced-1": [4, 6]}, [1, 2, 3])
    outcome, again, where = found["again"]
    assert outcome == "ran" and again == pytest.approx(found["first"][1], rel=1e-6)
    assert where == {".": [2, 4, 6], "replaced-1": [4, 6]}
    assert found["samples"] == [2, 2, 4, 4, 6, 6]  # two texts each, and none again at the step that it goes on from


def test_a_run_without_a_step_to_compute_is_one_that_was_asked_for(found: dict[str, Any]) -> None:
    outcome, rows, where = found["nothing to compute"]
    assert outcome == "ran" and sorted(rows) == [1, 2]
    assert where == {".": [2], "replaced-1": [4, 6], "replaced-2": [4, 6]}


def test_what_is_aside_is_a_run_that_goes_on(found: dict[str, Any]) -> None:
    outcome, rows = found["what is kept goes on"]
    assert outcome == "ran" and sorted(rows) == [1, 2, 3, 4, 5, 6, 7]
    assert {step: loss for step, loss in rows.items() if step < 7} == pytest.approx(found["first"][1], rel=1e-6)
