"""Ten public configs of torchtitan: four in TOML by their settings, six functions of its registries, as published."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.compose import conf_dir
from moecompile.errors import ConfigError
from moecompile.imports import Caller, Draft, read_draft
from moecompile.models.build import build_model
from moecompile.schema import ModelConfig, ModelDevice
from tests.imports.test_axolotl import flat

HERE = Path(__file__).parent
TOML: list[dict[str, Any]] = yaml.safe_load((HERE / "torchtitan.yaml").read_text())["configs"]

OF_TOML: dict[str, dict[str, Any]] = {
    "deepseek_v3_671b": {
        "model": "deepseek_v3", "ep": 1, "seq_len": 4096, "micro_batch_size": 4, "global_batch_size": 1024, "zero": 3, "lr": 2.2e-4,
        "warmup_steps": 2000, "max_steps": 10000, "checkpointing": "auto",
    },
    "llama4_17bx16e": {
        "model": "llama4_text", "tp": 8, "etp": 8, "micro_batch_size": 8, "global_batch_size": 64, "checkpointing": "full",
        "min_lr_ratio": 0.1,
    },
    "llama4_17bx128e": {
        "model": "llama4_text", "tp": 8, "pp": 4, "vpp": 1, "micro_batch_size": 1, "global_batch_size": 16, "seq_len": 8192,
    },
    "gpt_oss_20b": {"model": "gpt_oss_20b", "seq_len": 4096, "global_batch_size": 64, "checkpointing": "full", "eps": 1e-8},
}  # fmt: skip
OF_REGISTRIES: dict[str, dict[str, Any]] = {
    # on two nodes of eight ranks
    "deepseek_v3/deepseek_v3_16b": {
        "model": "deepseek_v2", "ep": 8, "seq_len": 4096, "micro_batch_size": 4, "global_batch_size": 64, "lr": 2.2e-4,
        "kind": "flat", "checkpointing": "auto", "max_steps": 1000,
    },
    "deepseek_v3/deepseek_v3_671b": {"model": "deepseek_v3", "ep": 2, "warmup_steps": 2000, "min_lr_ratio": 0.1, "global_batch_size": 64},
    "deepseek_v3/deepseek_v3_671b_float8": {"model": "deepseek_v3", "ep": 2, "bits": 8, "dispatcher": "alltoall"},
    "qwen3/qwen3_30b_a3b": {"model": "qwen3_30b_a3b", "ep": 1, "micro_batch_size": 2, "global_batch_size": 32, "checkpointing": "full"},
    "gpt_oss/gpt_oss_20b": {"model": "gpt_oss_20b", "seq_len": 8192, "micro_batch_size": 1, "checkpointing": "full", "lr": 8e-4},
    "gpt_oss/gpt_oss_120b": {"model": "gpt_oss_120b", "seq_len": 8192, "global_batch_size": 16, "max_steps": 10000},
}  # fmt: skip


def toml(sections: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of nested mappings; JSON's literals are TOML's."""
    text = ""
    for name, section in sections.items():
        values = {key: value for key, value in section.items() if not isinstance(value, dict)}
        text += f"[{prefix}{name}]\n" * bool(values) + "".join(
            f"{key} = {json.dumps(value)}\n" for key, value in values.items()
        )
        text += toml({key: value for key, value in section.items() if isinstance(value, dict)}, f"{prefix}{name}.")
    return text


def read(path: Path, *, ranks: tuple[int, int] | None = (2, 8), **names: str) -> Draft:
    return read_draft("torchtitan", str(path), Caller(names=names, conf=conf_dir(), ranks=ranks))


def values(found: Draft) -> dict[str, Any]:
    return (found.stack if isinstance(found.stack, dict) else {}) | flat(found) | found.values.get("dispatch", {})


@pytest.mark.parametrize("config", TOML, ids=lambda config: config["name"])
def test_public_configs_in_toml(config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / f"{config['name']}.toml"
    path.write_text(toml(config["toml"]))
    nodes, ranks = map(int, config["ranks"].split("x"))
    found = read(path, ranks=(nodes, ranks))
    assert {key: values(found)[key] for key in OF_TOML[config["name"]]} == OF_TOML[config["name"]]
    assert not [row for row in found.rows if row.kind == "unknown"]
    lines = path.read_text().splitlines()
    for row in found.rows:
        if row.line is not None:
            assert lines[row.line - 1].startswith(row.key.rpartition(".")[2]), row


@pytest.mark.parametrize("name", OF_REGISTRIES)
def test_public_configs_in_python(name: str) -> None:
    folder, _, function = name.partition("/")
    before = set(sys.modules)
    found = read(HERE / "torchtitan" / folder / "config_registry.py", config=function)
    assert {key: values(found)[key] for key in OF_REGISTRIES[name]} == OF_REGISTRIES[name]
    assert found.name == function
    assert not [row for row in found.rows if row.kind == "unknown"]
    assert "torchtitan" not in set(sys.modules) - before


@pytest.mark.parametrize(("name", "billions"), [("llama4_17bx16e", 107.77), ("llama4_17bx128e", 400.7)])
def test_models_that_are_not_shipped(name: str, billions: float, tmp_path: Path) -> None:
    config = next(each for each in TOML if each["name"] == name)
    path = tmp_path / "a.toml"
    path.write_text(toml(config["toml"]))
    model = read(path, ranks=tuple(map(int, config["ranks"].split("x")))).model
    assert isinstance(model, dict)
    built = build_model(
        ModelConfig(name=name, architecture=model["architecture"], config=model["config"], device=ModelDevice.meta), 0
    )
    assert sum(parameter.numel() for parameter in built.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"parallelism_expert_parallel_degree": "4"}, "ep", 4),
        ({"parallelism_pipeline_parallel_degree": "2"}, "pp", 2),
        ({"training_local_batch_size": "3"}, "micro_batch_size", 3),
        ({"training_global_batch_size": "128"}, "global_batch_size", 128),
        ({"activation_checkpoint_mode": "none"}, "checkpointing", "none"),
        ({"model_converters": "float8"}, "bits", 8),
    ],
)
def test_one_key_changes_one_thing(change: dict[str, str], key: str, value: object) -> None:
    path = HERE / "torchtitan" / "gpt_oss" / "config_registry.py"
    before = values(read(path, config="gpt_oss_20b"))
    assert values(read(path, config="gpt_oss_20b", **change))[key] == value != before.get(key)


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # torchtitan's dataclasses: 200 steps of warm-up, a linear fall to 0, lr 8e-4, 10,000 steps
        ("", {"warmup_steps": 200, "min_lr_ratio": 0.0, "lr": 8e-4, "max_steps": 10_000, "betas": None}),
        ("steps=50\n", {"warmup_steps": 50, "max_steps": 50}),
        ("[optimizer]\nbeta2=0.99\n", {"betas": [0.9, 0.99]}),
        ("[lr_scheduler]\nwarmup_steps=7\nlr_min=0.3\n", {"warmup_steps": 7, "min_lr_ratio": 0.3}),
    ],
)
def test_the_schedule(text: str, expected: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"[model]\nname='gpt_oss'\nflavor='20b'\n[training]\nseq_len=64\n{text}")
    found = values(read(path))
    assert {key: found.get(key) for key in expected} == expected


def test_betas_of_a_registry(tmp_path: Path) -> None:
    path = tmp_path / "config_registry.py"
    optimizer = "default_adamw(lr=3e-4, betas=(0.8, 0.99))"
    path.write_text(
        f"def f():\n    return Trainer.Config(model_spec=m('20b'), training=T(seq_len=64), optimizer={optimizer})\n"
    )
    assert values(read(path, config="f", model_name="gpt_oss"))["betas"] == [0.8, 0.99]
    with pytest.raises(ConfigError, match="must be two numbers"):
        read(path, config="f", model_name="gpt_oss", optimizer_betas="0.9")


@pytest.mark.parametrize(
    ("ending", "text", "checkpointing", "assumed"),
    [
        ("toml", "", "auto", "selective"),
        ("toml", "[activation_checkpoint]\nmode='none'\n", "none", None),
        ("toml", "[activation_checkpoint]\nmode='full'\n", "full", None),
        ("py", "", "auto", "selective"),
        ("py", "activation_checkpoint=None", "none", None),
        ("py", "activation_checkpoint=FullAC.Config()", "full", None),
    ],
)
def test_checkpointing_is_selective_by_default(
    ending: str, text: str, checkpointing: str, assumed: str | None, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(
        f"[model]\nname='gpt_oss'\nflavor='20b'\n[training]\nseq_len=64\n{text}"
        if ending == "toml"
        else f"def f():\n    return Trainer.Config(model_spec=m('20b'), training=T(seq_len=64), {text})\n"
    )
    found = read(path, model_name="gpt_oss", **({} if ending == "toml" else {"config": "f"}))
    assert found.values["trainer"]["checkpointing"] == checkpointing
    rows = {row.key: row.value for row in found.rows if row.kind == "assumed"}
    assert rows.get("activation_checkpoint.mode") == assumed


@pytest.mark.parametrize(
    ("ending", "text", "rule"),
    [
        ("toml", "a = [", "is not valid TOML"),
        ("toml", "[model]\nname = 'x'\n", "it has no settings of training"),
        (
            "toml",
            "[model]\nname='llama3'\nflavor='8B'\n[training]\nseq_len=1\n",
            "has the model llama3 8B, whose widths are not known",
        ),
        ("py", "def f(:", "is not valid Python"),
        ("py", "def f():\n    return Trainer.Config()\n", "has several configs. Give set.config=NAME, one of f"),
        (
            "toml",
            "[model]\nname='gpt_oss'\nflavor='20b'\n[training]\nseq_len=1\n[parallelism]\ntensor_parallel_degree=3\n",
            "has sizes of 3 ranks",
        ),
    ],
)
def test_what_is_refused(ending: str, text: str, rule: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(path)
    assert rule in str(error.value)


def test_a_job_in_toml_has_no_other_configs(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[training]\nseq_len=1\n")
    with pytest.raises(ConfigError, match=r"^set\.config=mine: is no name"):
        read(path, config="mine")
