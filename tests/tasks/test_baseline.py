"""trainer.baseline=dense: the dense model beside the compiled one, with the same tokens, in one run."""

from __future__ import annotations

import gc
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from moecompile.checkpoint import folders
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.models.build import build_model, example_inputs
from moecompile.models.source import source_model
from moecompile.nn import Experts
from moecompile.plan import Plan
from moecompile.report.baseline import verdict
from moecompile.report.page.read import metric_rows
from moecompile.runtime import training
from moecompile.runtime.data import TextData, load_data, train_loader, val_loader
from moecompile.schema import Config
from moecompile.tasks import job
from moecompile.tasks.ranks import train
from tests.distributed.harness import run_distributed_test
from tests.forked import Program, python
from tests.tasks.test_train import moecompile, result_of
from tests.tiny import SHORT

LLAMA = [
    "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2", "data.vocab_size=300", "data.seq_len=32",
    "data.micro_batch_size=2", "data.global_batch_size=8", "data.val_batches=2", "data.val_fraction=0.01",
    "trainer.max_steps=4", "optimizer.warmup_steps=2", "optimizer.lr=0.01", "optimizer.clip_norm=0.5", SHORT,
]  # fmt: skip


def plain_training(folder: Path) -> tuple[float, float]:
    """Validation loss before and after, by a loop in plain PyTorch over the two ranks' micro-batches in one process."""
    config = compose_config(LLAMA)
    data = load_data(config.data, folder, rank=0, barrier=lambda: None)
    model, o = build_model(config.model, config.seed), config.optimizer
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten())

    @torch.no_grad()
    def validate() -> float:
        batches = [b for rank in range(2) for b in val_loader(data.val, config.data, rank=rank, world_size=2)]
        return float(sum(loss_of(batch) for batch in batches) / len(batches))

    first, steps = validate(), config.trainer.max_steps
    loaders = [
        iter(train_loader(data.train, config.data, seed=config.seed, rank=rank, world_size=2)) for rank in range(2)
    ]
    for step in range(steps):
        for loader in loaders:
            for _ in range(2):
                (loss_of(next(loader)) / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        progress = max(0, step - 2) / (steps - 2)
        factor = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in adam.param_groups:
            group["lr"] = o.lr * factor
        adam.step()
        adam.zero_grad()
    return first, validate()


@pytest.mark.slow
def test_the_dense_model_is_trained_beside(tmp_path: Path) -> None:
    run = moecompile(["mesh=cpu_1x2", *LLAMA, "trainer.baseline=dense", "hydra.run.dir=out"], tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    result = result_of(tmp_path / "out")
    dense = result["baseline"]
    first, last = plain_training(tmp_path)
    assert dense["val_loss_first"] == pytest.approx(first, abs=1e-6)
    assert dense["val_loss"] == pytest.approx(last, abs=1e-5)
    assert last < first - 0.1  # so the two differ from each other and from no training
    assert result["val_loss_first"] == pytest.approx(first, abs=1e-5)
    assert abs(result["val_loss"] - dense["val_loss"]) > 1e-5  # it is another model by then
    assert (dense["kind"], dense["steps"], dense["params_active"]) == ("dense", 4, dense["params_total"])
    assert result["params_total"] > result["params_active"] > dense["params_total"]
    folder = tmp_path / "out"
    assert (folder / "baseline" / "metrics.csv").is_file() and not (folder / "baseline" / "checkpoints").exists()
    assert (folder / "checkpoints" / "step-4").is_dir()
    (table,) = [line for line in run.stdout.splitlines() if line.startswith("validation, nats per token, step 4")]
    assert table.split()[-2:] == [f"{result['val_loss']:.4f}", f"{last:.4f}"]
    speeds = result["tokens_per_second"], dense["tokens_per_second"]
    timed = min(speeds) >= max(speeds) / 8  # else the slower one had no row of its four by then: a loaded machine
    assert [each["at"] for each in dense["compared"]] == ["steps", "FLOPs", *["time"] * timed]
    per_weight = (
        result["flops_per_token"] / 6 / result["params_active"],
        dense["flops_per_token"] / 6 / dense["params_active"],
    )
    assert all(
        0.5 < share < 1.2 for share in per_weight
    )  # 6 a weight that a token uses; attention more, embeddings none
    said = " ".join(run.stdout.split())
    assert str(verdict(result)) in said and str(verdict(result)) in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_baseline_that_was_ended_goes_on(tmp_path: Path) -> None:
    """The next attempt trains no step of the MoE, and of the dense model those that are missing: to the same loss."""
    words = [*LLAMA, "mesh=cpu_1", "trainer.baseline=dense", "trainer.max_steps=60", "trainer.log_interval=1"]
    words = ["-m", "moecompile", *words, "trainer.calibrate=never", "trainer.progress_bar=true"]
    whole = python(*words, "hydra.run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = Program(*words, "hydra.run.dir=out", cwd=tmp_path, merged=True)
    for line in process.stdout:
        if line.startswith("baseline:"):
            break
    for line in process.stdout:
        if line.startswith("step 2/"):
            os.kill(process.pid, signal.SIGUSR1)
            break
    said, _ = process.communicate(120)
    checkpoints = tmp_path / "out" / "baseline" / "checkpoints"
    (step,) = folders.steps(checkpoints)
    assert 2 <= step < 60 and f"ended by SIGUSR1: step {step} is saved" in said
    again = python(*words, "hydra.run.dir=out", "trainer.resume=auto", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"going on from step {step} of " in again.stdout and not checkpoints.exists()
    results = [result_of(tmp_path / name) for name in ("whole", "out")]
    for name in ("steps", "loss_first", "loss_last", "val_loss_first", "val_loss"):
        wanted, got = (result["baseline"][name] for result in results)
        assert got == pytest.approx(wanted, rel=1e-6), name
    rows = [metric_rows(tmp_path / name / "baseline") for name in ("whole", "out")]
    steps = [[row["step"] for row in each if "loss" in row] for each in rows]
    assert steps[0] == steps[1] == list(range(1, 61))


@pytest.mark.parametrize(
    ("saved", "overrides", "goes_on"),
    [
        (3, ["trainer.resume=auto"], True),
        (5, ["trainer.resume=auto"], False),  # of dense_flops, with fewer experts now
        (3, [], False),  # another run's
        (None, ["trainer.resume=auto"], False),
    ],
)
def test_a_dense_model_goes_on_from_an_attempt_of_its_run(
    saved: int | None, overrides: list[str], goes_on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    if saved is not None:
        folder = folders.step_folder(folders.checkpoints_of(tmp_path / "baseline"), saved)
        folder.mkdir(parents=True)
        (folder / folders.STATE).touch()
        monkeypatch.setattr(training, "read_state", lambda _: SimpleNamespace(step=saved))
    config = compose_config([*LLAMA, *overrides])
    assert training._goes_on(config, tmp_path, tmp_path / "baseline") is goes_on
    assert folders.checkpoints_of(tmp_path / "baseline").exists() is goes_on


@pytest.mark.slow
def test_a_model_that_is_moe_already_has_no_dense_one(tmp_path: Path) -> None:
    mixtral = ["model.architecture=mixtral", "+model.config.num_local_experts=4"]
    run = moecompile([*LLAMA, *mixtral, "trainer.baseline=dense"], tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip().endswith(
        "error: trainer.baseline=dense: model.layers.0.mlp.experts has experts already, so there is no dense model. "
        "Use trainer.baseline=none."
    )


def test_without_flops_there_is_no_run_of_equal_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    config = compose_config([*LLAMA, "trainer.baseline=dense_flops"])
    assert train._dense_steps(config, (3.0, 2.0)) == 6
    with pytest.raises(ConfigError) as caught:
        train._dense_steps(config, (None, None))
    assert str(caught.value) == (
        "trainer.baseline=dense_flops: the model cannot be copied without values, by which FLOPs are counted. Use "
        "trainer.baseline=dense."
    )


def test_settings_for_experts_and_routers_are_left_out_of_the_dense_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups = "optimizer.groups=[{match: '*experts*', kind: muon}, {match: '*norm*'}, {match: '*q_proj*', lr_scale: 2}]"
    config = compose_config([*LLAMA, "trainer.baseline=dense", "optimizer=muon", groups, "routing.replay=record"])
    seen: list[Config] = []
    monkeypatch.setattr(training, "train", lambda model, plan, config, data, folder: seen.append(config))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    model, data = build_model(config.model, config.seed), TextData(*[Any] * 3)  # type: ignore[arg-type]
    like = Plan(mesh=MeshSpec(), layers=(), reductions=())
    assert train._refused(config, model) is None
    training.train_dense(model, like, config, data, tmp_path, example=example_inputs(model, 32))
    assert seen[0].routing.replay is None
    assert [group.match for group in seen[0].optimizer.groups] == ["*norm*", "*q_proj*"]
    assert len(config.optimizer.groups) == 3 and config.routing.replay == "record"


def test_a_dense_model_that_cannot_be_trained_is_refused_before_the_first_step() -> None:
    """Experts have the only matrices that Muon would step."""
    groups = "optimizer.groups=[{match: '*experts*'}, {match: '*_proj.weight', kind: adamw}]"
    config = compose_config([*LLAMA, "trainer.baseline=dense", "optimizer=muon", groups])
    model = build_model(config.model, config.seed)
    with pytest.raises(ConfigError) as caught:
        train._check_baseline(config, Plan(mesh=MeshSpec(), layers=(), reductions=()), train._refused(config, model))
    assert str(caught.value) == (
        "trainer.baseline=dense: the dense model cannot be trained: optimizer.kind=muon: no matrix of a hidden layer is "
        "trained with it. Use trainer.baseline=none, or change that."
    )
    model.requires_grad_(False)
    assert "no weight is trained" in str(train._refused(config, model))


@pytest.mark.slow
def test_the_compiled_model_makes_room_for_the_dense_one(tmp_path: Path) -> None:
    (alive,) = run_distributed_test(_experts_alive_when_a_model_is_built, 1, str(tmp_path), timeout_s=120)
    assert alive == [0, 0]  # before the first model, and before the dense one
    result = result_of(tmp_path)
    own, dense = result["flops_per_token"], result["baseline"]["flops_per_token"]
    assert result["steps"] == 4 and result["baseline"]["steps"] == round(4 * own / dense) > 4
    (at_flops,) = [each for each in result["baseline"]["compared"] if each["at"] == "FLOPs"]
    assert at_flops["steps"] == [4, result["baseline"]["steps"]]
    assert at_flops["val_loss"] == [result["val_loss"], result["baseline"]["val_loss"]]  # each at its end


def _experts_alive_when_a_model_is_built(rank: int, world_size: int, folder: str) -> list[int]:
    alive: list[int] = []

    def counted(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def build(*arguments: Any) -> nn.Module:
            held = [found for found in gc.get_objects() if type(found) is Experts]  # graphs to be shown: empty shells
            alive.append(sum(len(list(experts.parameters())) for experts in held))
            return make(*arguments)

        return build

    job.source_model, train.build_model = counted(source_model), counted(build_model)  # type: ignore[attr-defined]
    train.init_process_group = lambda config: None  # type: ignore[attr-defined]  # the harness has one
    train.run_rank(compose_config([*LLAMA, "data.global_batch_size=2", "trainer.baseline=dense_flops"]), Path(folder))
    return alive
