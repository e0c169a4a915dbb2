"""The published sizes: parameters as published, plan and compilation on the meta device."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from benchmarks.forecast.families import shape_of
from moecompile import compose
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.passes.base import count_ops
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import ExpertsSite, Plan
from moecompile.planner.cost_model.shapes import training_flops
from moecompile.schema import Config, validate
from tests.forked import python

REPOSITORY = Path(__file__).parents[2]
FILES = sorted((REPOSITORY / "conf" / "model").glob("*.yaml"))

# Billions, as published or, where only rounded figures are, as our count of the published hyper-parameters confirms
# them: (total, active, whether the active ones hold the input embedding).
PUBLISHED = {
    "deepseek_v3": ("671.0", "37.6", True),
    "deepseek_r1": ("671.0", "37.6", True),
    "deepseek_v2": ("236", "21", False),
    "mixtral_8x7b": ("46.7", "12.9", True),
    "mixtral_8x22b": ("140.6", "39.2", True),
    "qwen3_30b_a3b": ("30.5", "3.35", True),
    "qwen3_235b_a22b": ("235.1", "22.2", True),
    "gpt_oss_20b": ("20.91", "3.61", False),
    "gpt_oss_120b": ("116.83", "5.13", False),
    "olmoe_1b_7b": ("6.92", "1.28", True),
    "switch_base": ("7.4", "0.22", True),
    "nemotron3_nano_30b_a3b": ("31.6", "3.58", True),
    "longcat_flash": ("560", "27", False),
    "deepseek_v4_flash": ("284", "13", False),
    "llama4_scout": ("107.8", "17", True),  # without the tower for images, of 0.9 B
    "llama4_maverick": ("400.7", "17", True),
}
MOE_LAYERS = {
    "deepseek_v3": 58, "deepseek_r1": 58, "deepseek_v2": 59, "mixtral_8x7b": 32, "mixtral_8x22b": 56,
    "qwen3_30b_a3b": 48, "qwen3_235b_a22b": 94, "gpt_oss_20b": 24, "gpt_oss_120b": 36, "olmoe_1b_7b": 16,
    "switch_base": 12, "nemotron3_nano_30b_a3b": 23, "longcat_flash": 28, "deepseek_v4_flash": 43,
    "llama4_scout": 48, "llama4_maverick": 24,
}  # fmt: skip


@cache
def built(name: str) -> tuple[Config, nn.Module, Plan]:
    config = compose_config([f"model={name}", "mesh=h100_8"])
    model = build_model(config.model, config.seed)
    return config, model, make_plan(model, config, example=example_inputs(model, config.data.seq_len))


def agrees(count: int, published: str) -> bool:
    """Within 0.2 %, or rounded to the same digits."""
    digits = len(published.partition(".")[2])
    billions = count / 1e9
    return abs(billions / float(published) - 1) <= 0.002 or f"{billions:.{digits}f}" == published


def test_every_published_file_is_here() -> None:
    published = {path.stem for path in FILES if "published" in yaml.safe_load(path.read_text(encoding="utf-8"))}
    assert published == set(PUBLISHED) == set(MOE_LAYERS)


_QUICK = ("deepseek_v3", "mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b", "gpt_oss_20b")  # others take seconds to build
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in _QUICK)) for name in PUBLISHED]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_that_were_published(name: str) -> None:
    total, active, with_embedding = PUBLISHED[name]
    config, model, plan = built(name)
    assert plan.estimate is not None
    # transformers keeps rows for LongCat-Flash's experts without weights, which nothing reads; the checkpoint has none.
    unused = sum(each.experts.num_identity * 2 * each.site.d_model * each.site.d_ff for each in plan.layers)
    assert plan.estimate.params_total == sum(parameter.numel() for parameter in model.parameters()) - unused
    assert agrees(plan.estimate.params_total, total), plan.estimate.params_total
    embedding = 0 if with_embedding else model.get_input_embeddings().weight.numel()
    if name != "longcat_flash" or in_experts(plan):
        assert agrees(plan.estimate.params_active - embedding, active), plan.estimate.params_active - embedding
    assert config.model.published is not None


def in_experts(plan: Plan) -> bool:
    """Whether experts of the model are identities. Since transformers 5.25 LongCat-Flash's block computes them."""
    return any(layer.experts.num_identity for layer in plan.layers)


@pytest.mark.parametrize("name", NAMES)
def test_every_moe_layer_is_planned_from_the_model(name: str) -> None:
    config, model, plan = built(name)
    assert len(plan.layers) == MOE_LAYERS[name]
    text = {**config.model.config, **vars(model.config)}
    for layer in plan.layers:
        assert isinstance(layer.site, ExpertsSite)
        experts = [text[key] for key in ("n_routed_experts", "num_local_experts", "num_experts") if text.get(key)]
        assert layer.experts.num_routed == experts[0]
        assert layer.routing.top_k == text.get("num_experts_per_tok", text.get("moe_topk", 1))
        assert layer.experts.num_identity == text.get("zero_expert_num", 0) or not in_experts(plan)
        if name.startswith("deepseek") and text.get("n_group"):
            assert (layer.routing.groups, layer.routing.top_groups) == (text["n_group"], text["topk_group"])


@pytest.mark.slow
def test_a_hybrid_is_priced_by_its_layers() -> None:
    """As the published description has them, which is written by hand: scans, attention and experts each on their own."""
    described = yaml.safe_load((REPOSITORY / "benchmarks/published/models.yaml").read_text(encoding="utf-8"))
    theirs = shape_of("nano", described["more"]["nemotron-3-nano"])
    _, model, plan = built("nemotron3_nano_30b_a3b")
    ours = shape_of_model(model, plan)
    assert len(ours.layers) == 3 and {layer.mixer: layer.count for layer in ours.layers} == {
        layer.mixer: layer.count for layer in theirs.layers
    }
    assert [layer.ffn is None for layer in ours.layers] == [layer.mixer is not None for layer in ours.layers]
    assert training_flops(ours, 8192) == pytest.approx(training_flops(theirs, 8192), rel=1e-3)


@pytest.mark.parametrize(("name", "activation"), [("gpt_oss_20b", "clamped"), ("qwen3_30b_a3b", "swiglu")])
def test_what_is_between_products_is_priced_as_it_runs(name: str, activation: str) -> None:
    _, model, plan = built(name)
    layers = shape_of_model(model, plan).layers
    assert {layer.ffn.activation for layer in layers if layer.ffn is not None} == {activation}
    assert {getattr(layer.mixer, "window", None): layer.count for layer in layers} == (
        {128: 12, None: 12} if name == "gpt_oss_20b" else {None: 48}
    )


@pytest.mark.slow
def test_deepseek_r1_has_the_plan_of_deepseek_v3() -> None:
    assert built("deepseek_r1")[2].hash == built("deepseek_v3")[2].hash


@pytest.mark.parametrize(
    "name", ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss_20b", "switch_base"))]
)
def test_it_compiles_without_values(name: str) -> None:
    config = compose_config([f"model={name}", "mesh=h100_8", "dispatch=flat"])
    model = build_model(config.model, config.seed)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len))
    lowered = compiled.graphs["lowered"]
    assert len(lowered) == MOE_LAYERS[name]
    assert all(count_ops(graph_module)["all_to_all"] == 2 for graph_module in lowered.values())
    assert (compiled.step0.max_abs_diff, compiled.step0.reason) == (None, "the model is on the meta device")
    assert all(parameter.is_meta for parameter in model.parameters())


SMALL = [
    "model=deepseek_v3", "data.vocab_size=300", "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8",
    "data.val_batches=2", "data.val_fraction=0.01", "trainer.max_steps=2", "trainer.log_interval=1",
    "trainer.precision=fp32", *(f"model.config.{key}={value}" for key, value in {
        "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
        "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 16,
        "vocab_size": 300, "dtype": "float32",
    }.items()),
]  # fmt: skip


@pytest.mark.slow
def test_deepseek_v3_is_trained_from_the_meta_device(tmp_path: Path) -> None:
    """With fewer layers and small widths: the losses of the model that one process builds, on every mesh."""
    whole = python("-m", "moecompile", *SMALL, "mesh=cpu_1", "model.device=cpu", "hydra.run.dir=whole", cwd=tmp_path)
    runs = ["-m", *SMALL, "mesh=cpu_1,cpu_1x2,cpu_2x2", "hydra.sweep.dir=runs"]
    drawn = python("-m", "moecompile", *runs, cwd=tmp_path)
    assert (whole.returncode, drawn.returncode) == (0, 0), whole.stdout + whole.stderr + drawn.stdout + drawn.stderr
    assert "initial weights: " in drawn.stdout and "initial weights: " not in whole.stdout
    results = [json.loads(file.read_text()) for file in tmp_path.glob("**/result.json")]
    results = [result for result in results if result["task"] == "train"]
    assert sorted(result["world_size"] for result in results) == [1, 1, 2, 4]
    for name in ("loss_first", "loss_last"):
        losses = [result[name] for result in results]
        assert max(losses) - min(losses) < 1e-5, (name, losses)
    assert results[0]["loss_last"] != results[0]["loss_first"]
    export = python("-m", "moecompile", "task=export", "export.run=runs/1", cwd=tmp_path)
    assert export.returncode == 0, export.stdout + export.stderr


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model.load=full"], "model.load=full makes the whole model on every rank"),
        (["trainer.baseline=dense"], "trainer.baseline builds the dense model whole"),
        (["model.architecture=null", "model.factory=json:loads"], "model.factory builds the model whole"),
    ],
)
def test_what_needs_the_whole_model_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.device=meta: {reason}"):
        validate(compose_config(["model=mixtral_8x7b", *overrides]))
    validate(compose_config(["model=mixtral_8x7b"]))
    validate(compose_config(["model=mixtral_8x7b", "task=plan", *overrides]))


def test_presets_for_dense_models_do_not_stop_a_published_one() -> None:
    """Eight experts, the default, do not fit 64 EP ranks; DeepSeek-V3's 256 do."""
    validate(compose_config(["model=deepseek_v3", "task=plan", "mesh=h800_256x8"]))
    with pytest.raises(ConfigError, match=r"experts\.num_routed=8: must be a multiple of mesh\.ep=64"):
        validate(compose_config(["model=deepseek_v3", "task=plan", "mesh=h800_256x8", "experts.sites=dense"]))


def run(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> tuple[str, dict]:
    """(what the command line prints, result.json)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["moecompile", *arguments, "hydra.run.dir=out"])
    from moecompile import tasks

    assert compose.main(tasks.run) == 0
    return capsys.readouterr().out, json.loads((folder / "out" / "result.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_task_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["task=plan", "model=deepseek_v3", "mesh=h800_256x8"]
    printed, result = run(arguments, tmp_path, capsys, monkeypatch)
    words = " ".join(printed.split())
    assert "expert FFN" in printed and "own top-8" in printed and "671B, a token uses 37.6B" in words
    assert "read from the model: experts.num_routed=256 (config: 8), routing.top_k=8 (config: 2)" in words
    note = "each token may use 4 of the 8 expert groups, 1 on each of the 8 nodes of an EP group; a token reaches up"
    assert note in words
    batch = "15,360 sequences are not a whole number of micro-batches on each rank; 16,384 are planned"
    assert result["notes"][0] == batch and len(result["notes"]) == 4
    assert result["notes"][3].endswith("optimizer.bf16_weights=master or stochastic keeps them")
    assert (result["num_rewritten"], result["world_size"]) == (58, 2048)


@pytest.mark.slow
def test_task_compile_writes_alike_layers_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed, result = run(["task=compile", "model=olmoe_1b_7b", "mesh=h100_8"], tmp_path, capsys, monkeypatch)
    assert "step 0 was not compared with the model before: the model is on the meta device" in printed
    assert result["num_rewritten"] == 16
    names = {path.name for path in (tmp_path / "out" / "graphs").glob("*.txt")}
    assert names == {
        f"model.layers.0.mlp.experts.{stage}.txt" for stage in ("captured", "rewritten", "lowered", "fused")
    }


@pytest.mark.slow
def test_compile_time_is_measured_and_linear() -> None:
    """Two gibibytes; four times the layers, about four times the CPU time."""
    rows = []
    for layers in (15, 61):
        command = [sys.executable, "benchmarks/compile_time.py", "--one", "--layers", str(layers)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    assert [row["moe_layers"] for row in rows] == [12, 58]
    assert all(row["peak_gib"] < 2 for row in rows)
    seconds = [row["cpu_seconds"]["compile"] for row in rows]
    assert seconds[1] / seconds[0] < 1.5 * 61 / 15
