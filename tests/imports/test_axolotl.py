"""Ten examples of axolotl, as published: what is read of each, against values that were read from the files by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import conf_dir
from moecompile.errors import ConfigError
from moecompile.imports import Caller, Draft, read_draft
from moecompile.models.build import build_model
from moecompile.schema import ModelConfig, ModelDevice

FOLDER = Path(__file__).parent / "axolotl"

EXPECTED: dict[str, dict[str, Any]] = {
    # file: model, and what follows on two nodes of eight ranks, or on the ranks that the file says
    "mixtral.yml": {
        "model": "mixtral_8x7b", "seq_len": 4096, "global_batch_size": 32, "zero": 1, "kind": "lora", "rank": 32, "alpha": 16,
        "dropout": 0.05, "dense": "*", "experts": None, "checkpointing": "full",
    },
    "mixtral_22.yml": {"model": "mixtral_8x22b", "seq_len": 8000, "global_batch_size": 16, "zero": 3, "lr": 1e-4},
    "qwen3_30ba3b_ep_fft_4gpu.yaml": {
        "model": "qwen3_30b_a3b", "mesh": (1, 4), "ep": 4, "seq_len": 2048, "global_batch_size": 4, "max_steps": 50,
    },
    "qwen3_30ba3b_ep_fsdp_fft_4gpu.yaml": {"model": "qwen3_30b_a3b", "mesh": (1, 4), "ep": 2, "zero": 3, "lr": 5e-6},
    "gpt-oss-20b-fft-fsdp2.yaml": {
        "model": "gpt_oss_20b", "seq_len": 4096, "global_batch_size": 32, "zero": 3, "min_lr_ratio": 1.0,
    },
    "gpt-oss-120b-fft-fsdp2-offload.yaml": {"model": "gpt_oss_120b", "mesh": (2, 8), "global_batch_size": 32, "lr": 2e-5},
    "fft-fsdp-16b.yaml": {"model": "deepseek_v2", "seq_len": 2048, "global_batch_size": 128, "zero": 3, "weight_decay": 0.0},
    "glm-45-air-qlora.yaml": {
        "model": "glm4_moe", "micro_batch_size": 2, "global_batch_size": 64, "rank": 16, "alpha": 8,
        "dense": "*.self_attn.?_proj",
    },
    "qwen2-moe-lora.yaml": {"model": "qwen2_moe", "seq_len": 1024, "global_batch_size": 64, "rank": 32},
    "qlora_deepspeed.yaml": {"model": "jamba", "seq_len": 4096, "global_batch_size": 64, "zero": 1, "rank": 8, "lr": 1e-5},
}  # fmt: skip
SAYS_RANKS = (
    "qwen3_30ba3b_ep_fft_4gpu.yaml",
    "qwen3_30ba3b_ep_fsdp_fft_4gpu.yaml",
    "gpt-oss-120b-fft-fsdp2-offload.yaml",
)


def read(path: Path, *, ranks: tuple[int, int] | None = (2, 8), **names: str) -> Draft:
    return read_draft("axolotl", str(path), Caller(names=names, conf=conf_dir(), ranks=ranks))


def flat(found: Draft) -> dict[str, Any]:
    model = found.model["architecture"] if isinstance(found.model, dict) else found.model
    values: dict[str, Any] = {"model": model, "ep": found.ep}
    for group in (found.workload, *found.values.values()):
        values |= group
    return values | {"mesh": found.mesh}


@pytest.mark.parametrize("name", EXPECTED)
def test_public_configs(name: str) -> None:
    found = read(FOLDER / name, ranks=None if name in SAYS_RANKS else (2, 8))
    assert {key: flat(found)[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert not [row for row in found.rows if row.kind == "unknown"]
    lines = (FOLDER / name).read_text().splitlines()
    for row in found.rows:
        if row.line is not None:
            assert row.key.rpartition(".")[2] in lines[row.line - 1], row


@pytest.mark.parametrize(
    ("name", "billions"),  # counted in benchmarks/published/published.yaml, and Jamba's model card: 52B
    [("fft-fsdp-16b.yaml", 15.706), ("glm-45-air-qlora.yaml", 106.852), ("qwen2-moe-lora.yaml", 14.316), ("qlora_deepspeed.yaml", 51.6)],
)  # fmt: skip
def test_models_that_are_not_shipped(name: str, billions: float) -> None:
    model = read(FOLDER / name).model
    assert isinstance(model, dict)
    built = build_model(
        ModelConfig(name=name, architecture=model["architecture"], config=model["config"], device=ModelDevice.meta), 0
    )
    assert sum(parameter.numel() for parameter in built.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"expert_parallel_size": "4"}, "ep", 4),
        ({"tensor_parallel_size": "2"}, "tp", 2),
        ({"context_parallel_size": "2"}, "cp", 2),
        ({"gradient_accumulation_steps": "3"}, "global_batch_size", 48),
        ({"sequence_len": "1024"}, "seq_len", 1024),
        ({"deepspeed": "deepspeed_configs/zero1.json"}, "zero", 1),
        ({"gradient_checkpointing": "false"}, "checkpointing", "none"),
        ({"base_model": "Qwen/Qwen3-235B-A22B"}, "model", "qwen3_235b_a22b"),
        ({"optimizer": "muon"}, "kind", "muon"),
    ],
)
def test_one_key_changes_one_thing(change: dict[str, str], key: str, value: object) -> None:
    path = FOLDER / "qwen3_30ba3b_ep_fsdp_fft_4gpu.yaml"
    before, after = flat(read(path)), flat(read(path, **change))
    assert after[key] == value != before.get(key)


def test_checkpoints_that_are_offloaded() -> None:
    assert flat(read(FOLDER / "mixtral.yml", gradient_checkpointing="yes"))["checkpointing"] == "full"
    with pytest.raises(
        ConfigError, match=r"gradient_checkpointing=half: is not known\. Known are true, false, offload"
    ):
        read(FOLDER / "mixtral.yml", gradient_checkpointing="half")
    found = read(FOLDER / "mixtral.yml", gradient_checkpointing="offload")
    assert flat(found)["checkpointing"] == "full"
    assert [row.text for row in found.rows if (row.kind, row.value) == ("assumed", "offload")] == [
        "no equal here: inputs of layers stay on the GPU"
    ]


@pytest.mark.parametrize(
    ("changes", "expected", "assumed"),
    [  # mixtral.yml has no max_steps, warmup_ratio=0.1, cosine, weight_decay=0.0; axolotl's schema and trainer builder
        ({}, {"min_lr_ratio": 0.0, "betas": [0.9, 0.999], "warmup_steps": None}, "0.1 of the steps"),
        ({"max_steps": "400"}, {"warmup_steps": 40}, None),
        ({"max_steps": "400", "warmup_ratio": "null"}, {"warmup_steps": 12}, "at most 100 steps"),
        ({"max_steps": "400", "warmup_steps": "0.25"}, {"warmup_steps": 100}, None),
        ({"max_steps": "400", "warmup_steps": "0"}, {"warmup_steps": 0}, None),
        ({"max_steps": "400", "warmup_steps": "1000"}, {"warmup_steps": 400}, None),
        ({"warmup_steps": "10"}, {"warmup_steps": 10}, None),
        ({"warmup_steps": "1000"}, {"warmup_steps": None}, "the file does not say its steps"),
        ({"cosine_min_lr_ratio": "0.2"}, {"min_lr_ratio": 0.2}, "0.1 of the steps"),
        ({"lr_scheduler": "constant"}, {"min_lr_ratio": 1.0}, "0.1 of the steps"),
        ({"weight_decay": "null", "adam_beta2": "0.95"}, {"weight_decay": 0.0, "betas": [0.9, 0.95]}, "0.1 of the steps"),
    ],
)  # fmt: skip
def test_the_schedule(changes: dict[str, str], expected: dict[str, object], assumed: str | None) -> None:
    found = read(FOLDER / "mixtral.yml", **changes)
    assert {key: found.values["optimizer"].get(key) for key in expected} == expected
    warmup = [row.text for row in found.rows if row.kind == "assumed" and "warm" in row.key]
    assert len(warmup) == (assumed is not None) and all(str(assumed) in text for text in warmup), warmup


@pytest.mark.parametrize(
    ("names", "dense", "experts"),
    [
        ({"lora_target_linear": "true"}, "*", None),
        ({"lora_target_parameters": "mlp.experts.down_proj"}, None, "*"),
        ({"lora_target_linear": "true", "lora_target_parameters": "mlp.experts.down_proj"}, "*", "*"),
        ({"lora_target_linear": "false", "lora_target_parameters": "mlp.experts.down_proj"}, None, "*"),
        ({"lora_target_linear": "true", "lora_target_modules": "q_proj v_proj"}, "*", None),
        ({"lora_target_modules": "q_proj v_proj"}, "*.self_attn.?_proj", None),
    ],
)
def test_what_gets_adapters(names: dict[str, str], dense: str | None, experts: str | None) -> None:
    values = flat(read(FOLDER / "qwen3_30ba3b_ep_fft_4gpu.yaml", adapter="lora", **names))
    assert (values["dense"], values["experts"]) == (dense, experts)


@pytest.mark.parametrize(
    ("names", "key", "value", "assumed"),
    [
        ({}, "seq_len", 512, "sequence_len 512"),
        ({}, "precision", "bf16_params", "bf16 auto"),
        ({"fp16": "false"}, "precision", "bf16_params", "bf16 auto"),
        ({"bf16": "false", "fp16": "true"}, "precision", "bf16_params", None),
        ({"bf16": "false", "fp16": "false"}, "precision", "fp32", "precision fp32"),
    ],
)
def test_defaults_are_those_of_axolotl(
    names: dict[str, str], key: str, value: object, assumed: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 1\n")
    found = read(path, **names)
    assert found.workload[key] == value
    rows = [f"{row.key} {row.value}" for row in found.rows if row.kind == "assumed"]
    assert assumed in rows or (assumed is None and not {"bf16 auto", "precision fp32"} & set(rows))
    assert not [row for row in found.rows if row.key in names and row.kind == "unknown"]


def test_an_unknown_key_is_listed_and_on_the_command_line_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixtral.yml"
    path.write_text((FOLDER / path.name).read_text() + "\nof_tomorrow: 1\n")
    assert [row.key for row in read(path).rows if row.kind == "unknown"] == ["of_tomorrow"]
    with pytest.raises(
        ConfigError, match=r"^set\.of_tomorrow=1: is no name that the file leaves open, and no key that"
    ):
        read(FOLDER / path.name, of_tomorrow="1")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("base_model: me/mine\nmicro_batch_size: 1\n", "whose widths are not known here, and nothing is downloaded"),
        ("micro_batch_size: 1\n", "is no config of axolotl"),
        ("- a\n", "is no mapping of keys to values"),
        ("a: [\n", "is not valid YAML"),
        ("base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: x\n", "micro_batch_size=x: must be a whole number"),
        ("base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 1\nadapter: dora\n", "is not known. Known are lora, qlora"),
        ("base_model: Qwen/Qwen3-30B-A3B\nmicro_batch_size: 1\nexpert_parallel_size: 3\n", "has sizes of 3 ranks"),
    ],
)
def test_what_is_refused(text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(path)
    assert rule in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "a.sh").write_text("")
    with pytest.raises(ConfigError, match=r"is no file of axolotl: these end in \.yaml, \.yml. Use from=megatron"):
        read(tmp_path / "a.sh")
