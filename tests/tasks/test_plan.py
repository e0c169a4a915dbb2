"""task=plan: the forecast of a step, in the console and in result.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.planner.cost_model.forecast import forecast_plan, loads_of
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import training_flops
from moecompile.schema import is_described, with_workload
from moecompile.tasks import plan as task


def planned(*overrides: str) -> tuple[nn.Module, Any, Any]:
    config, _ = with_workload(compose_config([*overrides]))
    model = build_model(config.model, config.seed)
    return model, make_plan(model, config, example=example_inputs(model, 16)), config


def test_the_run_directory_has_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task.run(compose_config(["recipe=deepseek_ep", "mesh=cpu_2x2"]), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step_seconds"] == pytest.approx(sum(result["step_parts"].values()))
    tokens = 16 * 128 / 4
    assert result["tokens_per_second_per_rank"] == pytest.approx(tokens / result["step_seconds"])
    assert result["tflops_per_rank"] > 0
    assert 0 < result["mfu"] < 1
    assert [price["name"] for price in result["imbalance"]] == ["balanced", "zipf", "hot"]
    assert None not in result.values()
    shown = capsys.readouterr().out
    for text in ("predicted step", "expert products", "exchange across nodes (communication)", "zipf", "MFU"):
        assert text in shown


def test_a_planned_shape_has_the_parameters_and_operations_of_the_model() -> None:
    """The plan's own count of parameters, and a description by hand."""
    model, plan, _ = planned("recipe=deepseek_ep", "mesh=cpu_2x2")
    shape = shape_of_model(model, plan)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert shape.params_total() == pytest.approx(plan.estimate.params_total, abs=norms)
    assert shape.num_layers == 6
    moe = next(layer for layer in shape.layers if layer.ffn is not None and layer.ffn.experts)
    assert (moe.count, moe.ffn.experts, moe.ffn.top_k, moe.ffn.d_expert) == (5, 16, 4, 128)  # type: ignore[union-attr]
    attention = 128 * (64 + 32 + 16) + 64 * 4 * 32 + 32 * 4 * (16 + 32) + 4 * 32 * 128
    active = 6 * attention + 3 * 128 * 640 + 5 * (5 * 3 * 128 * 128 + 16 * 128) + 128 * 2048
    core = 6 * 2 * 4 * (32 + 32) * (64 + 1) / 2
    assert training_flops(shape, 64) == pytest.approx(3 * (2 * active + core), rel=5e-3)


def test_a_model_of_modules_alone_has_a_shape() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]

    model = nn.Sequential(Block())
    plan = make_plan(model, ["experts.num_routed=4", "routing.top_k=2"], example=(torch.zeros(2, 8),))
    shape = shape_of_model(model, plan)
    assert [layer.mixer for layer in shape.layers] == [None]
    assert shape.params_total() == pytest.approx(4 * 2 * 8 * 32 + 4 * 8, abs=4 * 40)


def test_published_batches_and_what_wins(tmp_path: Path) -> None:
    base = ["model=deepseek_v3", "mesh=h800_256x8"]
    config, notes = with_workload(compose_config(base))
    assert (config.data.seq_len, config.data.micro_batch_size, config.data.global_batch_size) == (4096, 1, 16384)
    assert config.trainer.precision.value == "bf16_params"
    assert notes == ["15,360 sequences are not a whole number of micro-batches on each rank; 16,384 are planned"]
    given, _ = with_workload(compose_config([*base, "data.seq_len=512", "trainer.precision=fp32"]))
    assert given.data.seq_len == 512
    assert given.trainer.precision.value == "fp32"
    described, notes = with_workload(compose_config([*base, "workload=deepseek_v3_dualpipe"]))
    assert is_described(described.workload)
    assert described.data.global_batch_size == 15360
    assert not notes
    nano, notes = with_workload(compose_config(["recipe=mixtral_ep"]))
    assert nano.data == compose_config(["recipe=mixtral_ep"]).data
    assert not notes


def test_faster_links_and_another_stack_change_the_step() -> None:
    overrides = ["recipe=deepseek_ep", "mesh=h100_8"]
    model, plan, config = planned(*overrides)
    shape = shape_of_model(model, plan)
    seconds = forecast_plan(shape, plan, config).seconds

    def other(*more: str) -> float:
        return forecast_plan(shape, plan, with_workload(compose_config([*overrides, *more]))[0]).seconds

    assert other("hardware.intra_node_gb_s=10") > seconds
    assert other("stack.graph=[all]") < seconds
    assert other("trainer.checkpointing=full") > other("trainer.checkpointing=none")
    resent = other("trainer.checkpointing=full", "hardware.intra_node_gb_s=1")
    assert resent > other("trainer.checkpointing=keep_exchanges", "hardware.intra_node_gb_s=1")


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    model, plan, _ = planned("recipe=deepseek_ep", "mesh=cpu_2x2")
    shape = shape_of_model(model, plan)
    for override, text in (
        ("workload.pp=3", "mesh=4: tp * pp * cp = 3 must divide the 4 GPUs. Use a multiple of 3."),
        ("workload.tp=4", "mesh.ep=4: "),
        ("hardware.figures.watts.value=null", "hardware.figures.watts.value=null: is needed to predict"),
        ("stack.dispatcher=pigeon", "stack.dispatcher=pigeon: is not known"),
        (f"workload.load={tmp_path / 'none.csv'}", "is not a file"),
        ("workload.vpp=0", "workload.vpp=0: must be at least 1"),
    ):
        changed = compose_config(["recipe=deepseek_ep", "mesh=cpu_2x2", override, "workload.zero=1"])
        if override == "workload.tp=4":
            assert inputs_of(shape, plan, changed).layout.dp == 1
            continue
        with pytest.raises(ConfigError) as error:
            forecast_plan(shape, plan, changed)
        assert text in str(error.value)
    model, split, twice = planned("recipe=mixtral_ep", "mesh.tp=2", "workload.tp=2")
    with pytest.raises(ConfigError) as error:
        inputs_of(shape_of_model(model, split), split, twice)
    assert str(error.value) == "workload.tp=2: the mesh says 2 already. Set one of them to 1."
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,max_violation/a\n1,0.5\n")
    with pytest.raises(ConfigError, match="it has 1 MoE layers, the plan has 5"):
        loads_of(plan, compose_config(["recipe=deepseek_ep", "mesh=cpu_2x2", f"workload.load={metrics}"]))


@pytest.mark.slow
def test_deepseek_v3_is_planned_at_its_batch_and_as_it_was_trained(tmp_path: Path) -> None:
    base = ["model=deepseek_v3", "mesh=h800_256x8"]
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    task.run(compose_config(base), tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "result.json").read_text())
    assert ours["assumes"]["seq_len"] == 4096
    # Operations per token without prediction of a second token, published: 249.6e9.
    flops = 1e12 * ours["tflops_per_rank"] / ours["tokens_per_second_per_rank"]
    assert flops == pytest.approx(249.6e9, rel=0.01)
    task.run(compose_config([*base, "stack=deepseek_v3", "workload=deepseek_v3_dualpipe"]), tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "result.json").read_text())
    assert theirs["step_seconds"] < ours["step_seconds"]
    assert any("describes" in note for note in theirs["notes"])
