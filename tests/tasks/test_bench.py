"""task=bench from the command line: two ranks, what is printed and written; what its config refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from benchmarks.memory import MOST, measured
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.schema import validate
from tests import test_docs
from tests.tasks.test_train import TINY, moecompile


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["cpu_1", "cpu_1x4"])
def test_memory_of_a_recipe_is_what_was_planned(mesh: str, tmp_path: Path) -> None:
    (row,) = measured([f"mixtral_ep {mesh}"], tmp_path, partial(test_docs.run, cwd=tmp_path))  # accumulation or not
    assert abs(row.error) <= MOST, row


@pytest.mark.slow
def test_layers_and_steps_on_two_ranks(tmp_path: Path) -> None:
    words = [*TINY, "task=bench", "mesh=cpu_1x2", "bench.rounds=2", "bench.warmup=1", "hydra.run.dir=out"]
    run = subprocess.run(  # a new Python: how much torch tells is decided when it is imported
        [sys.executable, "-m", "moecompile", *words], cwd=tmp_path, capture_output=True, text=True, timeout=480
    )
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stderr == ""
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    bench = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (result["task"], result["status"], result["world_size"]) == ("bench", "ok", 2)
    assert {key: result[key] for key in ("layers", "step", "device", "threads", "plan_hash")} == {
        key: bench[key] for key in ("layers", "step", "device", "threads", "plan_hash")
    }
    (layer,) = bench["layers"]
    assert layer["sites"] == ["model.layers.1.mlp"] and layer["num_experts"] == 16 and layer["tokens"] == 2 * 32
    assert layer["dense"]["cpu_ms"] > 0 and layer["moe"]["cpu_ms"] > 0 and layer["ratio"] > 0
    assert layer["moe_kept"] > 0 and layer["dense_kept"] > 0
    step = bench["step"]
    assert step["tokens"] == 8 * 32 and step["wall_ms"] > 0
    assert step["tokens_per_second"] == pytest.approx(1e3 * step["tokens"] / step["wall_ms"])
    shares = [step[name] for name in ("exchanges", "experts", "rows")]
    assert all(share > 0 for share in shares) and sum(shares) < 1
    assert step["planned_bytes"] / 2 < step["peak_bytes"] < 1.5 * step["planned_bytes"]
    machine = bench["machine"]
    assert result["machine"] == machine
    assert {(each["kind"], each["ranks"]) for each in machine["exchanges"]} == {
        (kind, 2) for kind in ("all_to_all", "all_gather", "reduce_scatter")
    }
    assert 0.1 <= machine["message_factor"] <= 10
    if 0.1 < machine["message_factor"] < 10:
        assert machine["predicted_cpu_ms"] == pytest.approx(step["cpu_ms"])
    with (tmp_path / "out" / "hardware" / "this_machine.yaml").open() as file:
        written = yaml.safe_load(file)
    assert written == machine["hardware"]
    assert written["host"]["node_us"]["value"] > 0.1 and written["figures"]["latency_us"]["value"] > 1
    select = ["hardware=this_machine", "--config-dir", "out", "mesh=cpu_1x2", "hydra.run.dir=planned"]
    select += ["hardware.host.cores=1"]
    plan = moecompile([*TINY, "task=plan", *select], tmp_path)
    assert plan.returncode == 0, plan.stderr + plan.stdout
    assert "of CPU time" in plan.stdout
    parts = json.loads((tmp_path / "planned" / "result.json").read_text())["step_parts"]
    waiting = 1e3 * parts.pop("waiting for a core")
    assert waiting == pytest.approx(1e3 * sum(parts.values()))  # two ranks on one core
    assert waiting == pytest.approx(machine["predicted_cpu_ms"], rel=0.01)  # the file is rounded
    for text in (
        "us per operation",
        "on 2 ranks",
        "times one alone, so that this step is met",
        "model.layers.1.mlp",
        f"16 x {layer['d_expert']}",
        "tokens on 2 ranks",
        "exchanges",
        "CPU ms, 1 thread",
    ):
        assert text in run.stdout, text
    assert max(map(len, run.stdout.splitlines()[:-1])) <= 80  # the last one has the path
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bench.rounds=0"], "bench.rounds=0: must be at least 1. Use 1 or more."),
        (["bench.warmup=0"], "bench.warmup=0: must be at least 1. Use 1 or more."),
        (["model=deepseek_v3", "model.load=full"], "model.device=meta: model.load=full makes the whole model on every rank, and on this device it has no values. Change that, or use model.device=cpu if it fits into the memory of each rank."),
        (["data.global_batch_size=5"], "data.global_batch_size=5: must be a multiple of data.micro_batch_size * ranks = 4 * 1 = 4. Use 8, or a micro_batch_size that divides 5."),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_config(["task=bench", *overrides]))
    assert str(caught.value) == message
