"""task=import: what it plans is the recipe that it writes, and the command line has the last word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError, DoesNotFit
from moecompile.imports.composed import with_import
from moecompile.plan import load
from moecompile.schema import Config, validate
from moecompile.tasks import import_config
from moecompile.tasks import plan as plan_task

TINY = """#!/bin/bash
GPUS_PER_NODE=8
NNODES=1
python pretrain_gpt.py --num-layers 4 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-experts 8 \\
    --moe-router-topk 2 --swiglu --untie-embeddings-and-output-weights --vocab-size 512 --seq-length 128 \\
    --micro-batch-size 1 --global-batch-size 64 --bf16 --use-distributed-optimizer --moe-token-dispatcher-type alltoall \\
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --pipeline-model-parallel-size 2 \\
    --expert-model-parallel-size 4 --train-iters 30 --moe-of-tomorrow 1
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.sh"
    path.write_text(TINY)
    return path


def imported(script: Path, *overrides: str) -> Config:
    words = ["task=import", "from=megatron", f"file={script}", *overrides]
    alone = compose_config(words)
    config = with_import(alone, words)
    validate(config)
    return config


def result(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return body


@pytest.mark.slow
def test_the_recipes_are_what_was_planned(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    import_config.run(imported(script), run)
    found, shown = result(run), capsys.readouterr().out
    assert (found["imported"], found["runs"], found["source"]) == ("tiny", "tiny_runs", "megatron")
    assert [row["key"] for row in found["rows"]["unknown"]] == ["--moe-of-tomorrow"]
    assert "unknown: nothing was made of these (1)" in shown and f"--config-dir {run} recipe=tiny_runs" in shown
    again = tmp_path / "again"
    again.mkdir()
    plan_task.run(compose_config(["task=plan", "recipe=tiny"], [run]), again)
    assert {key: result(again)[key] for key in ("plan_hash", "step_seconds", "described_memory_bytes")} == {
        key: found[key] for key in ("plan_hash", "step_seconds", "described_memory_bytes")
    }
    runs = compose_config(["recipe=tiny_runs"], [run])
    validate(runs)
    best = load(run / "search" / "plan.yaml")
    assert (runs.mesh.ep, runs.data.global_batch_size, runs.trainer.max_steps) == (best.mesh.ep, 64, 30)
    assert runs.workload.pp == 1 and runs.stack.name == "runtime" and runs.balance.losses.micro_batch == 0.01


def test_the_command_line_wins(script: Path) -> None:
    plain = imported(script)
    assert (plain.mesh.ep, plain.workload.pp, plain.mesh.num_nodes, plain.hardware.name) == (4, 2, 1, "h100")
    assert plain.stack.dispatcher == "alltoall" and plain.workload.zero == 1
    changed = imported(script, "mesh.ep=2", "workload.pp=1", "hardware=b200", "set.num_layers=6", "mesh=h100_2x8")
    assert (changed.mesh.ep, changed.workload.pp, changed.mesh.num_nodes) == (2, 1, 2)
    assert changed.model.config["num_hidden_layers"] == 6


def test_a_layout_that_does_not_fit(script: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit):
        import_config.run(imported(script, "task.require_fit=true", "hardware.memory_gib=0.001"), tmp_path)
    assert result(tmp_path)["described_fits"] == "no" and result(tmp_path)["runs"] is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["task=import"], "from=null: task=import needs the system whose config it reads"),
        (["task=import", "from=megatron"], "file=null: task=import needs a file"),
        (["task=import", "from=megatron", "file=none.sh"], "file=none.sh: there is no such file"),
        (["task=import", "from=megatron", "file=none.sh", "recipe=mixtral_ep"], "recipe=mixtral_ep: has no effect"),
        (["task=import", "from=nemo", "file=none.sh"], "imported.source=nemo: there is no such choice"),
    ],
)
def test_what_is_refused(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_import(compose_config(words), words)
    assert text in str(error.value)
