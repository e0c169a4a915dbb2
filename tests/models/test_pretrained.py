"""What a folder lacks, holds twice or in another shape is an error that names it, before any value is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompile.errors import ConfigError
from moecompile.export.huggingface import reload
from moecompile.models.build import build_empty, build_model
from moecompile.models.pretrained import Pretrained
from moecompile.models.stored import Stored
from moecompile.schema import ModelConfig
from moecompile.tasks.inputs import check_folder
from tests.existing_models import moe_model
from tests.families import needs
from tests.models.import_job import write_pretrained
from tests.models.test_sharded import dense
from tests.table_models import TABLE, qwen4

EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"  # of DeepSeek-V3, with 8 experts in layer 1
MIXTRAL = "model.layers.0.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    for name in ("mixtral", "deepseek_v3", "gpt_oss"):
        write_pretrained(root / name, moe_model(name))
    write_pretrained(root / "llama", dense("llama"))
    return root


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Callable[[str, Callable[[dict[str, Tensor]], None]], Path]:
    """A saved model in one file, changed."""

    def copy(name: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        tensors: dict[str, Tensor] = {}
        for file in sorted((saved / name).glob("*.safetensors")):
            tensors |= load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((saved / name / "config.json").read_text())
        return tmp_path

    return copy


def opened(folder: Path) -> Pretrained:
    stored = Stored(folder)
    return Pretrained(stored, build_empty(ModelConfig(pretrained=str(folder)), stored.dtype()))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "llama"])
def test_every_weight_is_read_as_transformers_loads_it(name: str, saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = opened(saved / name)
    loaded = AutoModelForCausalLM.from_pretrained(saved / name).state_dict()
    assert loaded.keys() == weights.shapes.keys()
    for key, tensor in loaded.items():
        assert torch.equal(weights.whole(key), tensor), key
        assert torch.equal(torch.cat([part for _, part in weights.read(key, range(1, 3))]), tensor[1:3]), key


@pytest.mark.parametrize(
    ("name", "stack", "dim"),
    [("mixtral", "gate_up_proj", 1), ("mixtral", "down_proj", 2), ("gpt_oss", "gate_up_proj", 2)],
)
def test_of_a_cut_expert_only_its_part_is_read(
    name: str, stack: str, dim: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In thirds, one of which has rows of gate and of up."""
    weights, read, key = opened(saved / name), list[int](), f"model.layers.0.mlp.experts.{stack}"
    whole, stored = weights.whole(key), weights.stored.read

    def reading(*where: Any) -> Tensor:
        read.append((part := stored(*where)).numel())
        return part

    monkeypatch.setattr(weights.stored, "read", reading)
    within = [slice(0, size) for size in whole.shape[1:]]
    for third in range(3):
        size = whole.shape[dim] // 3
        within[dim - 1] = slice(third * size, (third + 1) * size)
        wanted = whole[(slice(1, 3), *within)]
        assert torch.equal(torch.cat([part for _, part in weights.read(key, range(1, 3), tuple(within))]), wanted)
        assert sum(read) == wanted.numel()
        read.clear()


def test_only_the_experts_that_are_asked_for_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, read = opened(saved / "deepseek_v3"), []
    whole = weights.stored.read
    monkeypatch.setattr(weights.stored, "read", lambda name, *rows: read.append(name) or whole(name, *rows))
    assert [rows for rows, _ in weights.read("model.layers.1.mlp.experts.down_proj", range(4, 6))] == [
        range(4, 5), range(5, 6)
    ]  # fmt: skip
    assert read == [f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (4, 5)]


def test_of_a_table_that_is_stored_in_parts_only_the_rows_that_are_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = qwen4(base=100, split_ngram_parts=7)
    model: Any = build_model(config.model, 0)
    write_pretrained(tmp_path, model)
    weights, name, read = opened(tmp_path), TABLE, list[int]()
    whole, stored = model.state_dict()[name], weights.stored.read
    assert sum("ngram_embedding.shard" in key for key in weights.stored.tensors) == 7
    assert torch.equal(weights.whole(name), whole)

    def reading(*where: Any) -> Tensor:
        read.append((part := stored(*where)).numel())
        return part

    monkeypatch.setattr(weights.stored, "read", reading)
    for rows in (range(0, 3), range(100, 400), range(len(whole) - 5, len(whole)), range(7, 7)):
        parts = list(weights.read(name, rows))
        assert [row for own, _ in parts for row in own] == list(rows)
        assert torch.equal(torch.cat([whole[:0], *(part for _, part in parts)]), whole[rows.start : rows.stop])
    assert sum(read) == (3 + 300 + 5) * whole.shape[1]


@pytest.mark.parametrize("rows", [0, -1])
def test_a_part_of_a_table_that_is_missing_or_cut_off(rows: int, tmp_path: Path) -> None:
    """Its rows would be whatever is in memory."""
    model: Any = build_model(qwen4(base=100, split_ngram_parts=7).model, 0)
    write_pretrained(tmp_path, model)
    part = next(name for name in opened(tmp_path).stored.tensors if "ngram_embedding.shard_3" in name)
    file = opened(tmp_path).stored.tensors[part].file
    tensors = load_file(file)
    tensors[part] = tensors[part][:rows].clone()
    if not rows:
        del tensors[part]
    save_file(tensors, file, metadata={"format": "pt"})
    rule = (
        rf"ngram_embedding\.shard_.* make \[\d+, \d+\] of {TABLE}, the model needs \[{len(model.state_dict()[TABLE])},"
    )
    with pytest.raises(ConfigError, match=rule):
        opened(tmp_path)


_BROKEN: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
    ("deepseek_v3", lambda t: t.pop(EXPERT), f"lacks {EXPERT}: model.layers.1.mlp.experts.down_proj has 8 experts. Use a whole checkpoint."),
    ("mixtral", lambda t: t.pop(MIXTRAL), f"lacks {MIXTRAL}: model.layers.0.mlp.experts.gate_up_proj has 4 experts. Use a whole checkpoint."),
    ("mixtral", lambda t: t.update({MIXTRAL: t[MIXTRAL][:-1].clone()}), f"{MIXTRAL} in model.safetensors is [47, 32], the model needs [48, 32]. Use a whole checkpoint, or correct config.json."),
    ("deepseek_v3", lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), f"{EXPERT} in model.safetensors is [16, 32], the model needs [32, 16]. Use a whole checkpoint, or correct config.json."),
    ("mixtral", lambda t: t.update({MIXTRAL.replace(".2.", ".4."): t[MIXTRAL].clone()}), f"{MIXTRAL.replace('.2.', '.4.')} is one expert too many: model.layers.0.mlp.experts.gate_up_proj has 4. Correct config.json."),
    ("mixtral", lambda t: t.update({MIXTRAL.replace("block_sparse_moe", "mlp"): t[MIXTRAL].clone()}), f"{MIXTRAL} and {MIXTRAL.replace('block_sparse_moe', 'mlp')} are the same expert. Remove one of them."),
    ("gpt_oss", lambda t: t.update({k: v[:3].clone() for k, v in t.items() if k.endswith("layers.0.mlp.experts.down_proj")}), "model.layers.0.mlp.experts.down_proj in model.safetensors is [3, 48, 32], the model needs [4, 48, 32]. Use a whole checkpoint, or correct config.json."),
    ("deepseek_v3", lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "lacks model.layers.1.mlp.gate.e_score_correction_bias. Use a whole checkpoint of this model."),
    ("llama", lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight. Use a whole checkpoint of this model."),
    ("llama", lambda t: t.pop("model.embed_tokens.weight"), "lacks model.embed_tokens.weight. Use a whole checkpoint of this model."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), _BROKEN)
def test_what_is_wrong_is_named(
    name: str, change: Callable[[dict[str, Tensor]], None], message: str, copied: Callable[..., Path]
) -> None:
    folder = copied(name, change)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'model.pretrained={folder}: {message}')}$"):
        opened(folder)


def test_all_experts_of_another_shape(copied: Callable[..., Path]) -> None:
    def narrower(tensors: dict[str, Tensor]) -> None:
        tensors.update(
            {
                k: v[:, :-1].clone()
                for k, v in tensors.items()
                if ".0.block_sparse_moe.experts." in k and k.endswith("w2.weight")
            }
        )

    with pytest.raises(
        ConfigError,
        match=r"experts\.0\.w2\.weight \(model\.safetensors\) and the other experts make .*down_proj \[4, 32, 47\], the model has \[4, 32, 48\]",
    ):
        opened(copied("mixtral", narrower))


def test_an_expert_in_two_files(copied: Callable[..., Path]) -> None:
    folder = copied("deepseek_v3", lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    save_file({EXPERT: torch.zeros(32, 16)}, folder / "more.safetensors")
    with pytest.raises(
        ConfigError, match=rf"{re.escape(EXPERT)} is in first\.safetensors and in more\.safetensors\. Remove one"
    ):
        opened(folder)


def test_a_whole_file_beside_an_older_index(saved: Path, copied: Callable[..., Path]) -> None:
    folder = copied("mixtral", lambda tensors: tensors["model.norm.weight"].fill_(7.0))
    old = [shutil.copy(file, folder) for file in (saved / "mixtral").glob("model*") if file.name != "model.safetensors"]
    assert any(name.endswith("index.json") for name in map(str, old))  # as save_pretrained leaves them
    assert Stored(folder).read("model.norm.weight").unique().tolist() == [7.0]
    whole = build_model(ModelConfig(pretrained=str(folder)), 0)
    assert whole.state_dict()["model.norm.weight"].unique().tolist() == [7.0]
    for name in map(Path, old):
        if name.suffix == ".safetensors":
            name.unlink()
    check_folder(folder)


def test_a_file_that_was_cut_off(copied: Callable[..., Path]) -> None:
    folder = copied("mixtral", lambda tensors: None)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ConfigError, match=r"model\.pretrained=.*: model\.safetensors cannot be read: .*\. Copy it again\."
    ):
        opened(folder)


def test_a_file_that_the_index_names_and_that_is_not_there(saved: Path, copied: Callable[..., Path]) -> None:
    folder = copied("mixtral", lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00009.safetensors")
    index = {"weight_map": {MIXTRAL: "model-00009-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"names model-00009-of-00009\.safetensors, which is not there\. Copy it too\."
    ):
        opened(folder)


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a', '{"metadata": {}}', "[]", '{"weight_map": {"a": 3}}', "version 1"]
)
def test_an_index_that_was_cut_off_or_is_none(text: str, copied: Callable[..., Path]) -> None:
    folder = copied("mixtral", lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"^model\.pretrained=.*: model\.safetensors\.index\.json cannot be read: .*\. Copy it again\.$",
    ):
        opened(folder)


def test_a_folder_without_safetensors(copied: Callable[..., Path]) -> None:
    folder = copied("mixtral", lambda tensors: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no safetensors\. Save the model with save_pretrained\."):
        opened(folder)


def test_a_class_that_other_families_use_reads_the_config_of_the_folder(tmp_path: Path) -> None:
    """Param2-MoE is saved by GLM-4.5's class, which would take its own defaults: rotary embeddings of half a head."""
    needs("param2moe")
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 32,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("param2moe", **sizes)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(8).view(1, 8)
    for loaded in (build_model(ModelConfig(pretrained=str(tmp_path)), 0).eval(), reload(tmp_path).eval()):
        assert type(loaded.config) is type(model.config)
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
