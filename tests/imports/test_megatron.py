"""Public configs of Megatron-Core: what is read of each, against values that were read from the files by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import conf_dir
from moecompile.errors import ConfigError
from moecompile.imports import Caller, Row, read_draft
from moecompile.models.build import build_model, config_of
from moecompile.schema import ModelConfig, ModelDevice
from tests.imports.published import MEGATRON, draft, of, write

EXPECTED: dict[str, dict[str, Any]] = {
    # name: model, nodes x ranks, and the layout and software that the file says
    "mixtral_8x22b_tp2pp8ep8": {
        "model": "mixtral_8x22b", "mesh": (16, 8), "ep": 8, "tp": 2, "pp": 8, "vpp": 1, "etp": 2, "zero": 1,
        "global_batch_size": 256, "dispatcher": "alltoall", "bits": 16, "recompute": [],
        "losses": {"micro_batch": 0.01}, "lr": 1.2e-5, "max_steps": 150,
    },
    "mixtral_8x7b_tp2pp4ep8vpp8": {
        "model": "mixtral_8x7b", "mesh": (8, 8), "ep": 8, "tp": 2, "pp": 4, "vpp": 8, "etp": 1, "zero": 1,
        "global_batch_size": 256, "dispatcher": "alltoall", "bits": 16, "max_steps": 200,
    },
    "mixtral_8x7b_tp2pp4ep4": {
        "model": "mixtral", "mesh": (8, 8), "ep": 4, "tp": 2, "pp": 4, "vpp": 1, "etp": 2, "global_batch_size": 1024,
        "lr": 3e-4, "min_lr_ratio": 0.1, "warmup_steps": 3814,
    },
    "deepseekv3_proxy": {
        "model": "deepseek_v3", "mesh": (8, 8), "ep": 16, "tp": 2, "pp": 4, "vpp": 2, "etp": 1, "mtp": 1,
        "dispatcher": "deepep", "losses": {"sequence": 1e-4}, "rule": "bias", "rate": 1e-3,
    },
    "deepseek_v3_modelzoo": {
        "model": "deepseek_v3", "mesh": (128, 8), "ep": 64, "tp": 1, "pp": 16, "vpp": 1, "etp": 1,
        "global_batch_size": 8192, "dispatcher": "deepep", "bits": 16, "rule": "bias",
    },
    "deepseek_v3_gb200": {
        "model": "deepseek_v3", "mesh": (4, 64), "ep": 64, "tp": 1, "pp": 4, "vpp": 4, "mtp": 1, "hardware": "gb200",
        "dispatcher": "hybridep", "bits": 8, "graph": ["attn", "router", "preprocess"], "recompute": ["mlp"],
        "moment_bits": 16,
    },
    "mixtral_8x22b_modelzoo": {
        "model": "mixtral_8x22b", "mesh": (16, 8), "ep": 8, "tp": 2, "pp": 8, "etp": 1, "dispatcher": "alltoall",
    },
    "qwen3_235b_modelzoo": {
        "model": "qwen3_235b_a22b", "mesh": (32, 8), "ep": 32, "tp": 2, "pp": 8, "vpp": 4, "dispatcher": "deepep",
        "losses": {"micro_batch": 1e-3},
    },
    "qwen3_30b_modelopt": {
        "model": "qwen3_30b_a3b", "mesh": (2, 8), "ep": 8, "tp": 1, "zero": 0, "recompute": ["moe"],
        "global_batch_size": 16,
    },
    "qwen3_30b_slime": {"model": "qwen3_30b_a3b", "mesh": (4, 8), "ep": 8, "dispatcher": "alltoall", "precision": "bf16_params"},
}  # fmt: skip


BLOCK: dict[str, str | None] = {"recompute_granularity": "full", "recompute_method": "block"}


def flat(found: Any) -> dict[str, Any]:
    """The values of a draft by their last key."""
    model = found.model if isinstance(found.model, str) else found.model["architecture"]
    values: dict[str, Any] = {"model": model, "mesh": found.mesh, "ep": found.ep, "hardware": found.hardware}
    for group in (found.workload, found.stack, *found.values.values()):
        values |= group
    return values


@pytest.mark.parametrize("config", MEGATRON, ids=lambda config: config["name"])
def test_public_configs(config: dict[str, Any], tmp_path: Path) -> None:
    found = draft(config, tmp_path)
    expected = EXPECTED[config["name"]]
    assert {key: flat(found)[key] for key in expected} == expected
    assert not [row for row in found.rows if row.kind == "unknown"]
    told = {row.key for row in found.rows if row.key.startswith("--")}
    assert {f"--{key}" for key in config["flags"]} <= told  # no flag is dropped silently


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # 32 x (attention 41,943,040 + 8 x 176,160,768 + router 32,768 + norms 8,192) + 2 x 256,000 x 4,096 + 4,096
        ("mixtral_8x7b_tp2pp4ep4", 48_537_800_704),
        # 14 x (latent attention 187,107,328 + norms 14,336) + 3 x 396,361,728 dense + 11 x (65 x 44,040,192 + router
        # 458,752) + 2 x 256,000 x 7,168 + 7,168
        ("deepseekv3_proxy", 38_972_595_200),
    ],
)
def test_widths_of_models_that_are_not_shipped(name: str, parameters: int, tmp_path: Path) -> None:
    model = draft(of(name), tmp_path).model
    assert isinstance(model, dict)
    built = build_model(
        ModelConfig(name=name, architecture=model["architecture"], config=model["config"], device=ModelDevice.meta), 0
    )
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "changed", "key", "value"),
    [  # where transformers has another default: queries with a latent, heads of 64
        ("deepseekv3_proxy", {"q_lora_rank": None}, "q_lora_rank", None),
        ("deepseek_v3_gb200", {"q_lora_rank": None}, "q_lora_rank", None),  # so it is not model=deepseek_v3
        ("mixtral_8x7b_tp2pp4ep4", {"quick_geglu": "true", "kv_channels": "128"}, "head_dim", 128),
        ("mixtral_8x7b_tp2pp4ep4", {"quick_geglu": "true", "kv_channels": None}, "head_dim", 128),
    ],
)
def test_none_of_a_script_is_not_the_default_of_transformers(
    name: str, changed: dict[str, str | None], key: str, value: object, tmp_path: Path
) -> None:
    model = draft(of(name), tmp_path, **changed).model
    assert isinstance(model, dict) and model["config"][key] == value
    built = config_of(ModelConfig(name=name, architecture=model["architecture"], config=model["config"]))
    assert getattr(built, key) == value


@pytest.mark.parametrize(
    ("name", "changed", "key", "value"),
    [
        ("mixtral_8x22b_tp2pp8ep8", {"expert_model_parallel_size": "4"}, "ep", 4),
        ("mixtral_8x22b_tp2pp8ep8", {"expert_tensor_parallel_size": "1"}, "etp", 1),
        # the first 3 of the 7 layers of each of 8 stages
        ("mixtral_8x22b_tp2pp8ep8", BLOCK | {"recompute_num_layers": "3"}, "recompute_share", round(3 / 7, 4)),
        ("mixtral_8x22b_tp2pp8ep8", BLOCK | {"recompute_num_layers": "7"}, "recompute", ["full"]),
        ("mixtral_8x22b_tp2pp8ep8", BLOCK | {"recompute_method": "uniform"}, "recompute", ["full"]),
        ("mixtral_8x22b_tp2pp8ep8", {"context_parallel_size": "2"}, "cp", 2),
        ("mixtral_8x22b_tp2pp8ep8", {"use_distributed_optimizer": None}, "zero", 0),
        ("mixtral_8x22b_tp2pp8ep8", {"num_layers_per_virtual_pipeline_stage": "1"}, "vpp", 7),
        ("mixtral_8x22b_tp2pp8ep8", {"moe_token_dispatcher_type": None}, "dispatcher", "allgather"),
        (
            "mixtral_8x22b_tp2pp8ep8",
            {"moe_router_load_balancing_type": "global_aux_loss"},
            "losses",
            {"global_batch": 0.01},
        ),
        ("mixtral_8x22b_tp2pp8ep8", {"moe_expert_capacity_factor": "1.25"}, "capacity_factor", 1.25),
        ("mixtral_8x22b_tp2pp8ep8", {"moe_z_loss_coeff": "1e-3"}, "z", None),
        ("mixtral_8x22b_tp2pp8ep8", {"ffn_hidden_size": "8192"}, "model", "mixtral"),
        ("deepseek_v3_gb200", {"fp8_format": None, "fp8_recipe": None}, "bits", 16),
        ("deepseek_v3_gb200", {"recompute_modules": "moe_act mla_up_proj"}, "recompute", ["moe_act", "mla_up_proj"]),
        ("deepseek_v3_gb200", {"recompute_granularity": "full"}, "recompute", ["full"]),
        ("deepseek_v3_gb200", {"moe_flex_dispatcher_backend": "deepep"}, "dispatcher", "deepep"),
        ("deepseek_v3_gb200", {"overlap_moe_expert_parallel_comm": "true"}, "overlap", True),
        ("deepseek_v3_gb200", {"cuda_graph_scope": "full_iteration"}, "graph", ["all"]),
        ("deepseek_v3_gb200", {"exp_avg_dtype": "fp32"}, "moment_bits", 32),
        ("deepseek_v3_gb200", {"moe_router_score_function": "softmax"}, "model", "deepseek_v2"),
        ("qwen3_30b_slime", {"num_experts": "64"}, "model", "qwen3_moe"),
    ],
)
def test_one_flag_changes_one_thing(
    name: str, changed: dict[str, str | None], key: str, value: object, tmp_path: Path
) -> None:
    before, after = flat(draft(of(name), tmp_path)), flat(draft(of(name), tmp_path, **changed))
    if key == "z":
        assert after["losses"]["z"] == 1e-3 and "z" not in before["losses"]
        return
    assert after[key] == value != before.get(key)


def test_flags_without_effect(tmp_path: Path) -> None:
    same = BLOCK | {"recompute_num_layers": "0", "moe_layer_freq": "1", "fp8_recipe": "delayed"}
    found = [flat(draft(of("mixtral_8x22b_tp2pp8ep8"), tmp_path, **changed)) for changed in ({}, same)]
    assert found[0] == found[1] and found[0]["model"] == "mixtral_8x22b"


@pytest.mark.parametrize(
    ("changed", "expected", "assumed"),
    [
        ({}, {"clip_norm": 1.0, "betas": [0.9, 0.95], "weight_decay": 0.1, "min_lr_ratio": 0.1}, []),
        ({"clip_grad": "0"}, {"clip_norm": None}, []),
        ({"adam_beta1": "0", "weight_decay": "0"}, {"betas": [0.0, 0.95], "weight_decay": 0.0}, []),
        ({"adam_beta1": None, "adam_beta2": None}, {"betas": [0.9, 0.999]}, ["--adam-beta2 0.999"]),
        ({"weight_decay": None}, {"weight_decay": 0.01}, ["--weight-decay 0.01"]),
        ({"min_lr": None}, {"min_lr_ratio": 0.0}, ["--min-lr 0.0"]),
        ({"lr_decay_style": "constant", "min_lr": None}, {"min_lr_ratio": 1.0}, []),
    ],
)
def test_the_optimizer(
    changed: dict[str, str | None], expected: dict[str, Any], assumed: list[str], tmp_path: Path
) -> None:
    found = draft(of("mixtral_8x22b_tp2pp8ep8"), tmp_path, **changed)
    assert {key: found.values["optimizer"][key] for key in expected} == expected
    keys = ("--adam-beta2", "--weight-decay", "--min-lr")
    assert [f"{row.key} {row.value}" for row in found.rows if row.kind == "assumed" and row.key in keys] == assumed


def test_names_of_the_command_line() -> None:
    def read(**names: str) -> dict[str, Any]:
        path = Path(__file__).parents[2] / "docs" / "examples" / "megatron_qwen3.sh"
        return flat(read_draft("megatron", str(path), Caller(names=names, conf=conf_dir(), ranks=(2, 8))))

    found = read(EP="4", lr="2e-4", recompute_method="uniform", SLURM_NNODES="2", NUM_NODES="2")
    assert (found["ep"], found["lr"]) == (4, 2e-4)  # a variable of the script, a flag that the script has
    for name in ("EPP", "lrr", "Lr"):
        with pytest.raises(ConfigError, match=f"^set.{name}=4: is no name that the file leaves open, and no key that"):
            read(**{name: "4"})


PLAIN = {
    "num_layers": "8", "hidden_size": "64", "num_attention_heads": "4", "num_experts": "8", "swiglu": "true",
    "vocab_size": "96", "seq_length": "128", "bf16": "true",
}  # fmt: skip


def test_names_that_a_file_uses(tmp_path: Path) -> None:
    yaml, script = tmp_path / "plain.yaml", tmp_path / "plain.sh"
    lines = [f"  {key}: {value}" for key, value in PLAIN.items()]
    yaml.write_text("\n".join(["ENV_VARS:", "  DEBUG: ${DEBUG_LEVEL}", "MODEL_ARGS:", *lines, "  fp8: hybrid"]))
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in PLAIN.items())
    script.write_text(f"batch=$((8 * nodes))\npretrain {flags} --global-batch-size $batch\n")

    def read(path: Path, **names: str) -> dict[str, Any]:
        return flat(read_draft("megatron", str(path), Caller(names=names, conf=conf_dir(), ranks=(2, 8))))

    assert [read(yaml, **names)["bits"] for names in ({"DEBUG_LEVEL": "1"}, {"fp8": "null"})] == [8, 16]
    assert read(script, nodes="4")["global_batch_size"] == 32
    with pytest.raises(ConfigError, match=r"^set\.node=4: is no name"):
        read(script, nodes="4", node="4")


def test_experts_in_every_layer_are_the_default(tmp_path: Path) -> None:
    shared = {"moe_shared_expert_intermediate_size": "1536"}
    changes = (shared, shared | {"moe_layer_freq": "1"}, shared | {"moe_layer_freq": "([0]*1+[1]*47)"})
    drafts = [draft(of("qwen3_30b_slime"), tmp_path, **changed) for changed in changes]
    assert [flat(found)["model"] for found in drafts] == ["qwen2_moe", "qwen2_moe", "glm4_moe"]
    model = drafts[0].model
    assert isinstance(model, dict)
    config = {**model["config"], "num_hidden_layers": 1}
    built = build_model(ModelConfig(name="one", architecture="qwen2_moe", config=config, device=ModelDevice.meta), 0)
    assert dict(built.named_parameters())["model.layers.0.self_attn.q_proj.weight"].shape == (32 * 128, 2048)


def test_an_unknown_flag_is_listed(tmp_path: Path) -> None:
    found = draft(of("qwen3_30b_slime"), tmp_path, moe_of_tomorrow="7")
    (row,) = (row for row in found.rows if row.kind == "unknown")
    assert row == Row(kind="unknown", key="--moe-of-tomorrow", value="7", text="not known here, so nothing was made of it", line=30)  # fmt: skip


def test_what_does_not_count_is_said(tmp_path: Path) -> None:
    config = of("mixtral_8x7b_tp2pp4ep4")
    path = write(config, tmp_path)
    text = path.read_text()
    path.write_text(text.replace("--bf16", "--bf16 --fp16 --seed 1 --seed 2"))
    assert path.read_text() != text
    caller = Caller(names=config.get("set", {}), conf=conf_dir(), ranks=(8, 8))
    rows = read_draft("megatron", str(path), caller).rows
    (of_fp16,) = (row for row in rows if row.key == "--fp16")
    assert of_fp16.text == "beside --bf16, which counts here; Megatron-Core refuses both"
    (twice,) = (row for row in rows if "given twice" in row.text)
    assert (twice.key, twice.value) == ("--seed", "2")
    assert twice.text.startswith("given twice, before as 1 (line ")


def test_a_line_for_each_flag(tmp_path: Path) -> None:
    config = of("mixtral_8x7b_tp2pp4ep4")
    path, rows = write(config, tmp_path), draft(config, tmp_path).rows
    lines = path.read_text().splitlines()
    for row in rows:
        if row.line is not None:
            assert row.key in lines[row.line - 1], row


@pytest.mark.parametrize(
    ("name", "changed", "text"),
    [
        ("qwen3_235b_modelzoo", {"seq_length": "${SEQ_LEN}${LENGTH}"},
         "has no value for LENGTH, which --seq-length (line 75) needs. Give set.LENGTH=VALUE"),
        ("qwen3_30b_slime", {"num_layers": "$(cat layers)"}, "give the flag itself, for example set.num_layers=32"),
        ("qwen3_30b_slime", {"num_experts": None}, "trains a dense model: it has no --num-experts"),
        ("qwen3_30b_slime", {"num_layers": None}, "has no arguments of Megatron-Core for a model"),
        ("qwen3_30b_slime", {"moe_layer_freq": "([1]*47)"}, "is for 47 layers, and --num-layers is 48"),
        ("qwen3_30b_slime", {"moe_router_topk": "200"}, "is more than --num-experts 128"),
        ("qwen3_30b_slime", {"num_query_groups": "four"}, "must be a whole number"),
        ("mixtral_8x7b_tp2pp4ep4", {"hidden_size": "2048", "num_attention_heads": "40", "kv_channels": None},
         "must divide --hidden-size 2048, without --kv-channels. Correct one of them, or give set.kv_channels=VALUE"),
        ("mixtral_8x7b_tp2pp4ep4", {"num_query_groups": "5"}, "must divide --num-attention-heads 32"),
        ("qwen3_30b_slime", {"swiglu": None}, "experts without a gate are of no model type here"),
        ("mixtral_8x22b_tp2pp8ep8", {"expert_model_parallel_size": "3"}, "must divide --num-experts 8"),
        ("mixtral_8x22b_tp2pp8ep8", {"global_batch_size": "255"}, "must be a multiple of micro-batch * replicas = 8"),
        ("mixtral_8x22b_tp2pp8ep8", {"pipeline_model_parallel_size": "3"}, "runs on 128 GPUs, which tp * pp * cp = 6 must divide"),
        ("deepseek_v3_gb200", {"recompute_modules": "everything"}, "everything is not known. Known are core_attn, moe"),
        ("mixtral_8x7b_tp2pp4ep4", {"tokenizer_model": "own", "ffn_hidden_size": "64"}, "Give set.vocab_size=VALUE"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, changed: dict[str, str | None], text: str, tmp_path: Path) -> None:
    config = of(name)
    if "tokenizer_model" in changed:
        config = {**config, "set": {}}
    with pytest.raises(ConfigError) as error:
        draft(config, tmp_path, **changed)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("launch", "mesh"),
    [
        ({"nodes": 4, "ntasks-per-node": 8}, (4, 8)),
        ({"nodes": 2, "ntasks-per-node": 1, "gres": "gpu:8"}, (2, 8)),
        ({"nodes": 2, "gpus-per-node": "h100:4", "ntasks-per-node": 1}, (2, 4)),
    ],
)
def test_ranks_of_a_batch_job(launch: dict[str, object], mesh: tuple[int, int], tmp_path: Path) -> None:
    config = {key: value for key, value in of("qwen3_30b_modelopt").items() if key != "ranks"}
    assert draft({**config, "launch": launch}, tmp_path).mesh == mesh


def test_sizes_that_are_no_sizes(tmp_path: Path) -> None:
    for flag in ("pipeline_model_parallel_size", "num_attention_heads", "num_experts", "micro_batch_size"):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}=0: must be at least 1"):
            draft(of("mixtral_8x22b_tp2pp8ep8"), tmp_path, **{flag: "0"})


def test_ranks_are_asked_for(tmp_path: Path) -> None:
    config = {key: value for key, value in of("qwen3_30b_slime").items() if key != "ranks"}
    with pytest.raises(ConfigError, match="does not say on how many GPUs it runs"):
        draft(config, tmp_path)
