"""A run that goes on from a checkpoint is the run that was never interrupted, on whatever mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.checkpoint import folders
from moecompile.checkpoint.resume import read_state
from moecompile.checkpoint.tensors import read_tensors, shapes
from moecompile.errors import ConfigError, PlanError
from moecompile.load_history import LoadHistory
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import fields, losses, rows, run

STEPS = 6
# Dropout, jitter and a bias rule: what is random and what has a state. Rows close at other steps than saves do.
COMMON = [
    f"trainer.max_steps={STEPS}", "trainer.save_interval=1", "trainer.keep_last=0", "trainer.log_interval=4",
    "+model.config.attention_dropout=0.1", "routing.jitter=0.02", "balance.losses.global_batch=0.1", "balance.rate=0.01",
]  # fmt: skip
EP4, EP2x2 = ["mesh=cpu_2x2"], ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=flat"]


STOP = "+trainer.callbacks.EarlyStopping={monitor: val_loss, patience: 50, min_delta: 5.0}"  # nothing improves by that


def four_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    out: dict[str, Any] = {"whole": fields(run([*COMMON, *EP4], root / "whole"))}
    out["ep2x2"] = fields(run([*COMMON, *EP2x2, f"trainer.resume={root}/whole/checkpoints/step-1"], root / "ep2x2"))
    return out | {"errors": [refused(change, root / "whole", *what) for change, *what in REFUSED]}


REFUSED: list[tuple[Any, ...]] = [
    (["trainer.resume=auto", "experts.num_routed=32"], PlanError),
    (["trainer.resume=auto", "data.seq_len=16"], ConfigError),
    (["trainer.resume=auto", "trainer.max_steps=5"], ConfigError),
    (["trainer.resume=auto", "trainer.baseline=dense", "data.val_batches=2"], ConfigError),
    (["trainer.resume=null"], ConfigError),
]


def refused(overrides: list[str], run_dir: Path, kind: type[Exception]) -> str:
    try:
        run([*COMMON, *EP4, *overrides], run_dir)
    except kind as error:
        return str(error)
    raise AssertionError(f"{overrides} was not refused")


def two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    resume = f"trainer.resume={root}/ep2x2/checkpoints/step-2"
    return fields(run([*COMMON, "mesh=cpu_1x2", "data.val_batches=2", resume], root / "ep2"))


def one_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    resume = f"trainer.resume={root}/ep2/checkpoints/step-3"
    return fields(run([*COMMON, "mesh=cpu_1", "data.val_batches=4", resume], root / "one"))


def four_again(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    same = [*COMMON, *EP4, STOP, "trainer.val_interval=1"]
    back = fields(run([*same, f"trainer.resume={root}/one/checkpoints/step-4"], root / "back"))
    # The same directory, with more steps: appended; nothing to do: only validated.
    more = [*same, "trainer.resume=auto", "trainer.async_save=false"]
    longer = fields(run([*more, f"trainer.max_steps={STEPS + 2}"], root / "back"))
    finished = fields(run([*more, f"trainer.max_steps={STEPS + 2}", "data.val_batches=2"], root / "back"))
    return {"back": back, "longer": longer, "finished": finished}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resume")
    out = run_distributed_test(four_ranks, 4, str(folder), timeout_s=400)[0]
    out["ep2"] = run_distributed_test(two_ranks, 2, str(folder), timeout_s=200)[0]
    out["one"] = run_distributed_test(one_rank, 1, str(folder), timeout_s=200)[0]
    return folder, out | run_distributed_test(four_again, 4, str(folder), timeout_s=300)[0]


def entries(checkpoint: Path) -> dict[str, Tensor]:
    """All entries, read by one process without a process group."""
    found = {name: torch.empty(shape) for name, shape in shapes(checkpoint).items()}
    read_tensors(checkpoint, found, orders={})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("leg", ["ep2x2", "ep2", "one", "back"])
def test_the_losses_are_those_of_the_whole_run(root: tuple[Path, dict[str, Any]], leg: str) -> None:
    whole = losses(root[0] / "whole")
    assert list(whole) == [1, 4, 6]
    found = losses(root[0] / leg)
    found = {step: loss for step, loss in found.items() if step <= STEPS}
    assert found == pytest.approx(whole, abs=1e-6)
    assert root[1][leg] == pytest.approx(root[1]["whole"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("leg", ["ep2x2", "ep2", "one", "back"])
def test_so_are_weights_biases_and_optimizer(root: tuple[Path, dict[str, Any]], leg: str) -> None:
    expected = entries(root[0] / "whole" / "checkpoints" / f"step-{STEPS}")
    found = entries(root[0] / leg / "checkpoints" / f"step-{STEPS}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    biases = [name for name in expected if name.endswith("correction_bias")]
    assert biases and all(expected[name].abs().sum() > 0 for name in biases)
    assert all(float(expected[name]) == STEPS for name in expected if name.endswith(".step"))


@pytest.mark.slow
def test_reports_go_on(root: tuple[Path, dict[str, Any]]) -> None:
    for run_dir in (root[0] / "whole", root[0] / "ep2x2"):
        assert LoadHistory.read(run_dir / "load.npz").steps == [1, 4, 6]
    whole, resumed = rows(root[0] / "whole"), rows(root[0] / "ep2x2")
    columns = [name for name in whole[0] if name.startswith(("load/", "max_violation", "aux/"))]
    assert len(columns) > 16
    for before, after in zip(whole, resumed, strict=True):
        assert [float(after[c]) for c in columns] == pytest.approx([float(before[c]) for c in columns], rel=1e-5)


@pytest.mark.slow
def test_a_finished_run_takes_more_steps_but_not_fewer(root: tuple[Path, dict[str, Any]]) -> None:
    assert root[1]["longer"]["steps"] == root[1]["finished"]["steps"] == STEPS + 2
    assert list(losses(root[0] / "back")) == [1, 4, 6, 8]
    # The second validates more text, with which its first loss cannot be compared.
    assert root[1]["longer"]["val_loss_first"] == root[1]["back"]["val_loss_first"] is not None
    assert root[1]["finished"]["val_loss_first"] is None
    checkpoints = folders.checkpoints_of(root[0] / "back")
    # Validated after step 5, the best, and 7; what step 6 and 8 were validated with came after they were saved.
    ((stop,),) = [read_state(checkpoints / "step-8").metrics["early_stopping"].values()]
    assert stop["wait_count"] == 1 and 4 < stop["best_score"] < 6
    assert folders.steps(checkpoints) == [5, 6, 7, 8] and folders.latest(checkpoints) == checkpoints / "step-8"


@pytest.mark.slow
def test_what_does_not_fit_is_refused_in_words(root: tuple[Path, dict[str, Any]]) -> None:
    last = root[0] / "whole" / "checkpoints" / f"step-{STEPS}"
    experts, seq_len, steps, others, new = root[1]["errors"]
    assert experts == (
        f"trainer.resume={last}: the checkpoint does not fit this run: "
        "model.layers.1.mlp.experts.num_routed: 16 in the checkpoint, 32 here. Set these as they were, start a new run, or "
        "go on all the same with trainer.allow_changes=[model.layers.1.mlp.experts.num_routed]."
    )
    assert seq_len == (
        f"trainer.resume={last}: the checkpoint does not fit this run: data.seq_len: 32 in the checkpoint, 16 here. "
        "Set these as they were, start a new run, or go on all the same with trainer.allow_changes=[data.seq_len]."
    )
    assert steps == f"trainer.max_steps=5: the checkpoint {last} has 6 steps already. Use 6 or more."
    assert others == (
        "data.val_batches=2: validation is of 14 sequences here and was of 8, so losses before cannot be compared with a "
        "dense model's (trainer.baseline). Give as many micro-batches per rank as make the same sequences, or use "
        "trainer.baseline=none."
    )
    assert new == (
        f"hydra.run.dir={root[0] / 'whole'}: holds the checkpoints of another run. "
        "Go on with that run by trainer.resume=auto, or use another directory."
    )
    assert folders.steps(last.parent) == [1, 2, 3, 4, 5, 6]
