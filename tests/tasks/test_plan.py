"""task=plan: the forecast of a step, in the console and in result.json."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError, DoesNotFit
from moecompile.load_history import LoadHistory
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Recomputed
from moecompile.planner.cost_model.forecast import forecast_plan, loads_of, step_of
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import training_flops
from moecompile.planner.traffic import PACKING_BYTES
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


def test_rows_in_eight_bits_are_forecast_with_the_time_to_pack_them() -> None:
    """A number there and back has 24.25 of 32 bits; what packs it moves memory."""
    found = {}
    for wire in ("bf16", "fp8"):
        model, plan, config = planned(
            "recipe=mixtral_ep", "mesh=cpu_2x2", "hardware=h100", "trainer.precision=bf16_mixed",
            f"dispatch.wire_dtype={wire}",
        )  # fmt: skip
        found[wire] = inputs_of(shape_of_model(model, plan), plan, config)
    wide, narrow = found.values()
    assert (wide.software.row_bits, wide.software.packing) == (16, 0)
    assert (narrow.software.row_bits, narrow.software.packing) == (8.25, 2 * PACKING_BYTES)
    before, after = map(step_of, (wide, narrow))
    for name in ("exchange within the node", "exchange across nodes"):
        assert after[name] < before[name]
    assert after["memory passes"] > before["memory passes"]


def test_the_last_line_says_whether_it_fits_and_the_exit_code_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the line adds is planned by the same command, and fits."""
    base = ["recipe=mixtral_ep", "mesh=cpu_2x2", "trainer.checkpointing=none", "task.require_fit=true"]

    def last(name: str, *words: str) -> tuple[str, dict[str, Any]]:
        (tmp_path / name).mkdir()
        try:
            task.run(compose_config([*base, *words]), tmp_path / name)
        except DoesNotFit as error:
            assert (error.exit_code, error.reported) == (1, True)
            name += "/failed"
        result = json.loads((tmp_path / name.removesuffix("/failed") / "result.json").read_text())
        assert name.endswith("/failed") == (result["fits"] != "yes")
        return capsys.readouterr().out.splitlines()[-1], result

    line, result = last("fits")
    assert line.startswith("fits: ") and " of 4 GiB" in line
    assert result["memory_bytes_per_rank"]["total"] < result["memory_bytes_uneven"]
    assert result["expected_load"] == result["imbalance"][1]["p50_load"] > 1  # one truth
    assert result["expected_from"] == "zipf, the median layer"
    needed = result["memory_bytes_per_rank"]["total"] / 2**30
    limit = f"hardware.memory_gib={0.9 * needed}"
    line, result = last("small", limit)
    assert line.startswith("DOES NOT FIT: ")
    change = line.partition("; add: ")[2]
    assert change == result["remedies"][0]["change"]
    line, result = last("again", limit, *change.split())
    assert line.startswith("fits: ")
    line, result = last("even", f"hardware.memory_gib={1.001 * needed}")
    assert line.startswith("FITS ONLY IF THE LOAD IS EVEN: ") and result["fits"] == "if even"


def test_a_given_load_is_the_load_to_be_expected(tmp_path: Path) -> None:
    """The 99th percentile of a run, which balances less than zipf here."""
    _, plan, _ = planned("recipe=mixtral_ep", "mesh=cpu_2x2")
    history = LoadHistory()
    history.add(1, {layer.site.fqn: [9, *[1] * 7] for layer in plan.layers})
    history.save(tmp_path / "load.npz")
    _, given, _ = planned("recipe=mixtral_ep", "mesh=cpu_2x2", f"workload.load={tmp_path / 'load.npz'}")
    assert given.estimate.expected_load == pytest.approx(10 / 4)
    assert given.estimate.expected_from == "load.npz, 99th percentile of layers and steps"
    assert given.estimate.memory_bytes_uneven > plan.estimate.memory_bytes_uneven


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
    none, half, full = (other("stack.recompute=[full]", f"stack.recompute_share={share}") for share in (0.05, 0.5, 1.0))
    assert none == other("stack.recompute=[]") < half < full == other("stack.recompute=[full]")  # of six layers
    # What the stack says holds, whatever a plan with checkpointing=budget repeats of single layers.
    layer = Recomputed(parts=("layer",), sends=True, modules=("",), layers=(shape.places[0][0],))
    plan = replace(plan, recomputed=(layer,))
    assert other("stack.recompute=[]") == none < other()


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    model, plan, plan_config = planned("recipe=deepseek_ep", "mesh=cpu_2x2")
    shape = shape_of_model(model, plan)
    for override, text in (
        ("workload.pp=3", "mesh=4: tp * pp * cp = 3 must divide the 4 GPUs. Use a multiple of 3."),
        ("workload.tp=4", "mesh.ep=4: "),
        ("hardware.figures.watts.value=null", "hardware.figures.watts.value=null: is needed to predict"),
        ("stack.dispatcher=pigeon", "stack.dispatcher=pigeon: is not known"),
        (f"workload.load={tmp_path / 'none.csv'}", "is not a file"),
        ("workload.vpp=0", "workload.vpp=0: must be at least 1"),
        ("stack.recompute_share=0.5", "stack.recompute_share=0.5: has no effect without stack.recompute. Give stack"),
    ):
        changed = compose_config(["recipe=deepseek_ep", "mesh=cpu_2x2", override, "workload.zero=1"])
        if override == "workload.tp=4":
            assert inputs_of(shape, plan, changed).layout.dp == 1
            continue
        with pytest.raises(ConfigError) as error:
            forecast_plan(shape, plan, changed)
        assert text in str(error.value)
    model, split, twice = planned("recipe=mixtral_ep", "mesh.tp=2", "workload.tp=2")
    further = replace(plan_config, workload=replace(plan_config.workload, mtp=1))
    assert is_described(further.workload) and not is_described(plan_config.workload)
    *others, last = inputs_of(shape, plan, further).model.layers
    assert tuple(others) == shape.layers
    assert (last.count, last.mtp, last.ffn) == (1, True, shape.layers[-1].ffn)
    with pytest.raises(ConfigError) as error:
        inputs_of(shape_of_model(model, split), split, twice)
    assert str(error.value) == "workload.tp=2: the mesh says 2 already. Set one of them to 1."
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,max_violation/a\n1,0.5\n")
    with pytest.raises(ConfigError, match="it has 1 MoE layers, the plan has 5"):
        loads_of(plan, compose_config(["recipe=deepseek_ep", "mesh=cpu_2x2", f"workload.load={metrics}"]), 4)


@pytest.mark.slow
def test_deepseek_v3_is_planned_at_its_batch_and_as_it_was_trained(tmp_path: Path) -> None:
    default = ["model=deepseek_v3", "mesh=h800_256x8"]
    kept = ["trainer.checkpointing=keep_exchanges", "trainer.reduce=last", "trainer.gather=layer"]
    base = [*default, *kept]
    for name in ("default", "ours", "theirs"):
        (tmp_path / name).mkdir()
    task.run(compose_config(default), tmp_path / "default")
    fits = json.loads((tmp_path / "default" / "result.json").read_text())
    assert (fits["fits"], fits["checkpointing"], fits["remedies"]) == ("yes", "full", [])
    assert fits["memory_bytes_per_rank"]["total"] == pytest.approx(21.76 * 2**30, rel=0.001)  # rehearsed: 20.4
    task.run(compose_config(base), tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "result.json").read_text())
    assert ours["assumes"]["seq_len"] == 4096
    # Operations per token without prediction of a second token, published: 249.6e9.
    flops = 1e12 * ours["tflops_per_rank"] / ours["tokens_per_second_per_rank"]
    assert flops == pytest.approx(249.6e9, rel=0.01)
    task.run(compose_config([*base, "stack=deepseek_v3", "workload=deepseek_v3_dualpipe"]), tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "result.json").read_text())
    assert theirs["step_seconds"] < ours["step_seconds"]
    (tmp_path / "changed").mkdir()
    task.run(compose_config([*base, *ours["remedies"][0]["change"].split()]), tmp_path / "changed")
    changed = json.loads((tmp_path / "changed" / "result.json").read_text())
    assert (ours["fits"], changed["fits"]) == ("no", "yes")
    assert ours["largest"] == "fp32, not sharded, over 8 micro-batches"
    assert any("describes" in note for note in theirs["notes"])
    assert (theirs["described_fits"], theirs["remedies"]) == ("if even", [])
    assert theirs["described_memory_bytes"] < 74.5 * 2**30 < theirs["described_memory_bytes_uneven"]


SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 256, "num_hidden_layers": 4,
    "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 512,
    "n_group": 4, "topk_group": 2, "q_lora_rank": 32, "kv_lora_rank": 16,
}  # fmt: skip


def test_what_is_offered_is_of_the_model_that_was_given(tmp_path: Path) -> None:
    """Not of one with the recipe's `experts.layers`: a layer of experts that is not planned is whole on every rank."""
    words = [
        "recipe=deepseek_ep", "model=deepseek_v3", *(f"model.config.{name}={size}" for name, size in SMALL.items()),
        "mesh=cpu_1x4", "hardware=laptop", "hardware.memory_gib=0.3", "data.seq_len=512", "data.micro_batch_size=8",
        "data.global_batch_size=32",
    ]  # fmt: skip
    task.run(compose_config(words), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["fits"], result["remedies"][0]["change"]) == ("no", "trainer.checkpointing=budget")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.ep=16"],
        ["mesh.ep=search"],
        ["mesh.pp=4", "mesh.ep=4", "data.micro_batch_size=2", "data.global_batch_size=128"],
    ],
    ids=" ".join,
)
def test_changes_that_are_offered_were_planned(mesh: list[str], tmp_path: Path) -> None:
    """Whoever adds one gets the seconds that stand beside it, and a plan that fits as well."""
    given = ["model=qwen3_30b_a3b", "mesh=h100_2x8", "data.seq_len=4096", *mesh]

    def planned(name: str, *overrides: str) -> Any:
        (tmp_path / name).mkdir()
        kept = [each for each in given if each.partition("=")[0] not in {one.partition("=")[0] for one in overrides}]
        task.run(compose_config([*kept, *overrides]), tmp_path / name)
        return json.loads((tmp_path / name / "result.json").read_text())

    before = planned("before")
    offered = [change for change in before["changes"] if not change["change"].startswith("stack.")]
    assert offered and any("pipeline.layout=" in change["change"] for change in offered) == ("mesh.pp=4" in mesh)
    for i, change in enumerate(offered):
        after = planned(str(i), *shlex.split(change["change"]))
        assert after["step_seconds"] == pytest.approx(change["seconds"], rel=1e-9)
        assert after["step_seconds"] < 0.99 * before["step_seconds"]
        assert after["fits"] == change["fits"] == "yes"
