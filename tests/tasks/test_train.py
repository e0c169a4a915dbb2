"""The main job through the command line: real text, real ranks, everything that a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moecompile import plan as plans
from moecompile.bench import hardware_config
from moecompile.load_history import LoadHistory
from moecompile.tasks.ranks import bench_machine
from tests.forked import python

TINY = [
    "recipe=deepseek_ep", "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "data.vocab_size=300",
    "model.config.intermediate_size=80", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
    "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8", "data.val_batches=2",
    "data.val_fraction=0.01", "trainer.max_steps=3", "trainer.log_interval=1",
]  # fmt: skip


def moecompile(
    arguments: list[str], folder: Path, *, timeout_s: float = 480, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m moecompile` in `folder`, as a user would run it."""
    return python("-m", "moecompile", *arguments, cwd=folder, timeout_s=timeout_s, environ=variables)


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded


def losses_of(folder: Path) -> list[float]:
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [float(row["loss"]) for row in rows if row["loss"]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job on four ranks."""
    folder = tmp_path_factory.mktemp("run")
    words = [*TINY, "hydra.run.dir=again", "trainer.calibrate=always"]
    run = moecompile(words, folder, MOECOMPILE_MACHINE_DIR=str(folder / "machine"))
    assert run.returncode == 0, run.stderr + run.stdout
    (folder / "stdout.txt").write_text(run.stdout)
    return folder / "again"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One multirun over three world sizes, the last one that of `run_dir`."""
    folder = tmp_path_factory.mktemp("sweep")
    run = moecompile(["-m", *TINY, "mesh=cpu_1,cpu_1x2,cpu_2x2", "hydra.sweep.dir=swept"], folder)
    assert run.returncode == 0, run.stderr + run.stdout
    return folder, run.stdout


def test_a_run_leaves_what_it_promises(run_dir: Path) -> None:
    folder = run_dir
    result = result_of(folder)
    assert {k: result[k] for k in ("task", "recipe", "status", "world_size", "num_rewritten", "steps")} == {
        "task": "train", "recipe": "deepseek_ep", "status": "ok", "world_size": 4, "num_rewritten": 1, "steps": 3,
    }  # fmt: skip
    assert result["step0_max_abs_diff"] < 1e-5
    assert result["val_loss"] < result["val_loss_first"]
    plan = plans.load(folder / "plan.yaml")
    assert plan.hash == result["plan_hash"]
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "resolved.yaml",
        "plan.yaml",
        "result.json",
        "metrics.csv",
        "tensorboard",
        "graphs",
        "tokenizer.json",
        "load.npz",
        "load.png",
        "overrides.txt",
        "forecast.json",
        "report.html",
    }
    assert list((folder / "tensorboard").glob("events*"))
    graphs = {path.name for path in (folder / "graphs").iterdir()}
    stages = ("captured", "rewritten", "lowered", "fused")
    assert graphs == {f"model.layers.1.mlp.{stage}.{kind}" for stage in stages for kind in ("txt", "svg")}
    assert Path(result["checkpoint"], ".metadata").is_file()


def test_the_forecast_of_a_report_is_of_this_machine(run_dir: Path) -> None:
    """Measured once, and kept; two nodes are one machine, whose cores are shared. The plan has `laptop` all the same."""
    (kept,) = (run_dir.parent / "machine").glob("*.yaml")
    assert f"for the report's forecast: {kept}" in (run_dir.parent / "stdout.txt").read_text()
    forecast = json.loads((run_dir / "forecast.json").read_text())
    assert forecast["hardware"] == "this_machine"
    cores = len(os.sched_getaffinity(0))
    waiting = forecast["step_parts"]["waiting for a core"]
    assert waiting == pytest.approx(max(0, 4 / cores - 1) / max(1, 4 / cores) * forecast["step_seconds"])
    plan = plans.load(run_dir / "plan.yaml")
    assert plan.estimate is not None and plan.estimate.assumes is not None
    assert plan.estimate.assumes.hardware == "laptop"
    content = bench_machine.read_kept(kept)
    assert content is not None and hardware_config(content).host.one_machine
    for broken in ("", "name: x", "host: {cores: [1}", "host: 3\nfigures: {}"):
        kept.with_name("broken").write_text(broken)
        assert bench_machine.read_kept(kept.with_name("broken")) is None


def rows_of(folder: Path) -> list[dict[str, str]]:
    """Rows of training; validation has rows of its own."""
    return [row for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines()) if row["loss"]]


def test_every_row_says_what_each_layer_did(run_dir: Path) -> None:
    """3 rows of 8 x 32 tokens, top-4 of 16 experts, one of two nodes each."""
    folder = run_dir
    rows, path = rows_of(folder), "model.model.layers.1.mlp.router"
    history = LoadHistory.read(folder / "load.npz")
    assert (history.steps, history.layers) == ([1, 2, 3], [path])
    for row, load in zip(rows, history.loads, strict=True):
        counts = [int(row[f"load/{path}/{expert:02d}"]) for expert in range(16)]
        assert counts == load[0].tolist() and sum(counts) == 8 * 32 * 4
        assert float(row[f"max_violation/{path}"]) == pytest.approx(max(counts) / 64 - 1)
        assert float(row["max_violation"]) == pytest.approx(max(counts) / 64 - 1)
        nodes = [int(row[f"node_tokens/{path}/{node}"]) for node in range(2)]
        assert sum(nodes) == 8 * 32 and float(row[f"nodes_per_token/{path}"]) == 1.0
        assert 0 < float(row[f"entropy/{path}"]) <= math.log(16) + 1e-6
        assert float(row[f"drop_rate/{path}"]) == 0.0 and float(row["grad_norm"]) > 0
    result = result_of(folder)
    assert result["max_violation_last"] == pytest.approx(float(rows[-1]["max_violation"]))
    assert result["max_violation_mean_last"] == pytest.approx(result["max_violation_last"])  # one layer, one step
    assert (result["drop_rate_last"], result["nodes_per_token_last"]) == (0.0, 1.0)
    assert result["entropy_last"] == pytest.approx(float(rows[-1][f"entropy/{path}"]))


T5 = [
    "model=t5_nano", "data.objective=span_corruption", "experts.layers='1::2'", "experts.num_routed=4",
    "routing.top_k=1", "routing.normalize=false", "routing.capacity_factor=1.0", "balance.losses.micro_batch=0.01",
    "balance.losses.z=0.001", "mesh=cpu_2x2", "mesh.ep=2", "model.config.d_model=32", "model.config.d_ff=64",
    "data.vocab_size=300", "data.seq_len=32", "data.micro_batch_size=4", "data.global_batch_size=32",
    "data.val_batches=1", "data.val_fraction=0.01", "optimizer.lr=0.01", "optimizer.warmup_steps=3",
    "trainer.max_steps=20", "trainer.log_interval=5", "hydra.run.dir=t5",
]  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A T5 with every other FFN made of Switch's experts: top-1, capacity, auxiliary losses."""
    folder = tmp_path_factory.mktemp("t5")
    run = moecompile(T5, folder)
    assert run.returncode == 0, run.stderr + run.stdout
    return folder / "t5", run.stdout


@pytest.mark.slow
def test_an_encoder_decoder_model_learns(t5: tuple[Path, str]) -> None:
    result = result_of(t5[0])
    assert (result["num_rewritten"], result["steps"]) == (4, 20)
    assert result["val_loss"] < result["val_loss_first"] - 0.5
    assert result["loss_last"] < result["loss_first"] - 0.5
    assert result["unigram_entropy"] is None  # the targets are spans with sentinels, not the text
    layers = LoadHistory.read(t5[0] / "load.npz").layers
    assert [layer.split(".")[1] for layer in layers] == ["encoder"] * 2 + ["decoder"] * 2


@pytest.mark.slow
def test_drops_and_auxiliary_losses_are_reported(t5: tuple[Path, str]) -> None:
    """Also that columns that come late, such as val_loss, break no row."""
    folder, output = t5
    rows, result = rows_of(folder), result_of(folder)
    assert [int(row["step"]) for row in rows] == [1, 5, 10, 15, 20]
    for row in rows:
        # The losses of four layers that are about even are 4 x 0.01 x 1; z is the square of a log-sum-exp of 4 logits.
        assert 0.039 < float(row["aux/micro_batch"]) < 0.16
        assert float(row["aux/z"]) > 0
        rates = [float(value) for name, value in row.items() if name.startswith("drop_rate/")]
        assert len(rates) == 4 and 0 < float(row["drop_rate"]) < 1
        assert min(rates) <= float(row["drop_rate"]) <= max(rates)
    assert 0 < result["drop_rate_last"] < 1
    assert "drops " in output and "MaxVio" in output
    lines = [line for line in output.splitlines() if line.startswith("step 5/20")]
    assert len(lines) == 1 and "%" in lines[0]


@pytest.mark.slow
def test_counted_bytes_are_of_the_planned_order(sweep: tuple[Path, str]) -> None:
    """The plan assumes uniform routing; a fresh router is not far from it, and no link class is mistaken."""
    result = result_of(sweep[0] / "swept" / "2")
    counted, predicted = result["bytes_per_token_per_layer"], result["bytes_per_token_per_layer_predicted"]
    for link in ("intra_node", "inter_node"):
        assert 0.3 * predicted[link] < counted[link] < 1.5 * predicted[link]
    one_node = result_of(sweep[0] / "swept" / "1")["bytes_per_token_per_layer"]
    assert one_node["inter_node"] == 0 and one_node["intra_node"] > 0
    assert result_of(sweep[0] / "swept" / "0")["bytes_per_token_per_layer"] == {"intra_node": 0, "inter_node": 0}


@pytest.mark.slow
def test_meshes_train_the_same_function(sweep: tuple[Path, str]) -> None:
    one, two, four = (losses_of(sweep[0] / "swept" / str(i)) for i in range(3))
    assert len(one) == 3
    assert two == pytest.approx(one, rel=1e-5)
    assert four == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_seed_decides_everything(sweep: tuple[Path, str], run_dir: Path) -> None:
    first, second = sweep[0] / "swept" / "2", run_dir
    assert losses_of(first) == losses_of(second)
    assert result_of(first)["val_loss"] == result_of(second)["val_loss"]


@pytest.mark.slow
def test_objectives_must_fit(tmp_path: Path) -> None:
    run = moecompile([*TINY, "mesh=cpu_1x2", "data.objective=span_corruption"], tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: data.objective=span_corruption: the model deepseek_nano has no encoder and")


def test_vocabularies_must_fit(tmp_path: Path) -> None:
    run = moecompile([*TINY, "mesh=cpu_1x2", "model.config.vocab_size=100"], tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: data.vocab_size=300: the model deepseek_nano has embeddings for 100 tokens.")


@pytest.mark.slow
def test_a_multirun_ends_with_one_table(sweep: tuple[Path, str]) -> None:
    folder, output = sweep
    assert sorted(p.name for p in (folder / "swept").iterdir() if p.is_dir()) == ["0", "1", "2"]
    assert sorted(p.name for p in folder.iterdir()) == ["swept"]
    assert (folder / "swept" / "sweep.csv").is_file()
    assert output.count("job  overrides") == 1


@pytest.mark.slow
def test_under_torchrun_every_rank_uses_one_directory(tmp_path: Path) -> None:
    run = python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "moecompile", *TINY, "mesh=cpu_1x2",
        "trainer.max_steps=1", "trainer.progress_bar=false", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr + run.stdout
    assert len(list(tmp_path.rglob("result.json"))) == 1
    assert len(list(tmp_path.rglob("resolved.yaml"))) == 1
    assert run.stdout.count("mesh  ") == 1  # rank 0 alone prints the plan


def test_under_torchrun_a_mistake_is_told_once(tmp_path: Path) -> None:
    run = python(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "moecompile", *TINY, "mesh.ep=3", cwd=tmp_path
    )
    assert run.returncode != 0
    assert run.stderr.count("error: mesh.ep=3: must divide the world size") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_that_only_the_model_shows_is_one_message(tmp_path: Path) -> None:
    """Raised on every rank, told once; exit code 2, no traceback."""
    run = moecompile([*TINY, "mesh=cpu_1x2", "model.config.intermediate_size=81"], tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip() == (
        "error: experts.granularity=5: must divide d_ff=81 of model.layers.1.mlp. Use a divisor of 81."
    )


@pytest.mark.slow
def test_the_demo_begins_to_learn(tmp_path: Path) -> None:
    """Thirty of its steps, on two ranks: validation is below the unigram entropy of the text."""
    demo = [
        "recipe=deepseek_ep",
        "mesh=cpu_1x2",
        "trainer.max_steps=30",
        "hydra.run.dir=demo",
        "trainer.progress_bar=false",
    ]
    run = moecompile(demo, tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    result = result_of(tmp_path / "demo")
    assert result["val_loss"] < result["unigram_entropy"] - 0.15
    assert result["val_loss"] < result["val_loss_first"] - 1.3


@pytest.mark.nightly
def test_the_demo_learns(tmp_path: Path) -> None:
    """The recipe as it is: validation far below the unigram entropy of the text, and no layer with idle experts."""
    # Two to three minutes alone; three times that beside two other tests.
    run = moecompile(
        ["recipe=deepseek_ep", "hydra.run.dir=demo", "trainer.progress_bar=false"], tmp_path, timeout_s=900
    )
    assert run.returncode == 0, run.stderr + run.stdout
    result = result_of(tmp_path / "demo")
    assert result["val_loss"] < result["unigram_entropy"] - 1.1
    assert result["val_loss"] < result["val_loss_first"] - 1.5
    assert result["max_violation_last"] <= 0.5  # of the worst layer
