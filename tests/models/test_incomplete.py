"""A folder whose weights are not exactly the model's is refused by name, however it is loaded: in full and sharded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moecompile
from moecompile.checkpoint.folders import SUMS
from moecompile.errors import ConfigError
from moecompile.export import reload
from moecompile.models.build import build_model
from moecompile.models.sharded import ShardedImport
from tests.existing_models import moe_model
from tests.export.runs import scramble, tiny_config, tiny_run
from tests.models.import_job import import_config, write_pretrained

WAYS: dict[str, Callable[[str], nn.Module]] = {
    "full": lambda folder: build_model(import_config(folder, []).model, 0),
    "sharded": lambda folder: ShardedImport(import_config(folder, [])).model,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")


def llama(folder: Path, **changes: Any) -> Path:
    model = build_model(tiny_config("llama", [], changes).model, 0)
    scramble(model)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def mixtral(folder: Path) -> Path:
    moe_model("mixtral").save_pretrained(folder)  # type: ignore[operator]
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2"


def without(*ends: str) -> Callable[[dict[str, Tensor]], object]:
    def edit(weights: dict[str, Tensor]) -> None:
        gone = [name for name in weights if any(end in name for end in ends)]
        assert gone
        for name in gone:
            del weights[name]

    return edit


def renamed(weights: dict[str, Tensor]) -> None:
    weights["model.layers.1.mlp.upp_proj.weight"] = weights.pop(UP)


def narrowed(weights: dict[str, Tensor]) -> None:
    weights[UP] = weights[UP][:-1].clone()


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[dict[str, Tensor]], object], dict[str, str]]] = {
    "a weight": (llama, without(UP), {"both": rf"lacks {re.escape(UP)}\. Use a whole checkpoint of this model\.$"}),
    "a layer": (llama, without("layers.1."), {"both": r"lacks model\.layers\.1\.input_layernorm\.weight, .* more\."}),
    "renamed": (
        llama, renamed,
        {"both": rf"lacks {re.escape(UP)}; holds model\.layers\.1\.mlp\.upp_proj\.weight, which the model does not"},
    ),
    "one too many": (
        llama, lambda weights: weights.update(extra=torch.zeros(2)),
        {"both": r"holds extra, which the model does not have\."},
    ),
    "quantized": (
        llama, lambda weights: weights.update({UP.replace("weight", "weight_scale_inv"): torch.ones(1, 1)}),
        {"full": r"holds .*_scale_inv, which", "sharded": r"8 bits or fewer with scales, .* Use model\.load=full"},
    ),
    "another shape": (llama, narrowed, {"full": rf"holds {re.escape(UP)} as \[", "sharded": rf"{re.escape(UP)} in mod"}),
    "both tied ones": (llama, without("embed_tokens"), {"both": r"lacks .*embed_tokens\.weight"}),
    "an expert": (
        mixtral, without(EXPERT),
        {"full": r"model\.layers\.0\.mlp\.experts\.(gate_up|down)_proj", "sharded": rf"lacks {re.escape(EXPERT)}\.w1"},
    ),
    "half an expert": (
        mixtral, without(f"{EXPERT}.w1"),
        {"full": r"parts of model\.layers\.0\.mlp\.experts\.gate_up_proj are missing", "sharded": rf"lacks {re.escape(EXPERT)}\.w1"},
    ),
    "a router": (mixtral, without("layers.1.block_sparse_moe.gate"), {"both": r"lacks model\.layers\.1\.mlp\.gate\.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_unknown_or_of_another_shape_is_named(case: str, way: str, tmp_path: Path) -> None:
    make, edit, says = CASES[case]
    folder = make(tmp_path / "model")
    WAYS[way](str(folder))
    change(folder, edit)
    with pytest.raises(ConfigError, match=rf"^model\.pretrained={folder}: .*{says.get('both') or says[way]}"):
        WAYS[way](str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_that_is_gone_or_cut_off(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_pretrained(folder, moe_model("mixtral"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=rf"^model\.pretrained={folder}: .*"):
        WAYS[way](str(folder))
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"^model\.pretrained={folder}: .*{shard.name}"):
        WAYS[way](str(folder))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_whole_is_taken(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied embeddings, which lie in no file; half precision; files of other kinds; old buffers."""
    folder = llama(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    change(folder, lambda weights: weights.update({name: tensor.to(dtype) for name, tensor in weights.items()}))
    change(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": str(dtype).removeprefix("torch.")}))
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    (folder / "notes.txt").write_text("something else")
    model = WAYS[way](str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_what_transformers_keeps_in_fp32_is_in_fp32_either_way(tmp_path: Path) -> None:
    moe_model("gpt_oss", dtype=torch.float16).save_pretrained(tmp_path)  # type: ignore[operator]
    full, sharded = ({name: t.dtype for name, t in load(str(tmp_path)).state_dict().items()} for load in WAYS.values())
    assert set(full.values()) == {torch.float16, torch.float32}  # the norms
    assert full == sharded


def quantized(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


class _Hopper:
    """torch, as it is on a machine with an H100."""

    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_weights_in_fp8_become_whole_ones_on_every_machine(
    on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    folder, whole = llama(tmp_path / "model"), dict[str, Tensor]()

    def in_blocks(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "proj" in name]:
            rows, columns = weights[name].shape
            blocks = weights[name].unflatten(1, (columns // 8, 8)).unflatten(0, (rows // 8, 8))
            scales = blocks.abs().amax((1, 3)) / 448
            whole[name] = weights[name]
            weights[name] = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scales

    change(folder, in_blocks)
    quantized(folder, quant_method="fp8", weight_block_size=[8, 8], activation_scheme="dynamic")
    if on_gpu:
        monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.torch", _Hopper())
    model = WAYS["full"](str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear
    assert (model.get_parameter(UP) - whole[UP]).abs().max() < 0.1 * whole[UP].abs().max()
    assert not hasattr(model.config, "quantization_config")  # or an export would say that its weights are in FP8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "modelopt"])
def test_weights_that_stay_quantized_are_refused(method: str, way: str, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    quantized(folder, quant_method=method, bits=4, load_in_4bit=method == "bitsandbytes")
    rule = f"holds weights that are quantized by {method}, which transformers does not make whole ones of"
    with pytest.raises(
        ConfigError, match=rf"^model\.pretrained={folder}: {rule}\. Give a folder with the weights before"
    ):
        WAYS[way](str(folder))


def as_of_the_first_version(folder: Path) -> None:
    """Takes a key from the plan that 0.1.0, which wrote no checksums, did not have."""
    plan = (folder / "plan.yaml").read_text()
    (folder / "plan.yaml").write_text(plan.replace("context_parallel: []\n", ""))


def test_what_was_exported_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", tiny_config("llama", []))
    assert isinstance(moecompile.load_exported(folder), nn.Module)
    save_file({"more": torch.zeros(1)}, folder / "stray.safetensors")
    with pytest.raises(ConfigError, match=r"stray\.safetensors has no entry in checksums\.json"):
        moecompile.load_exported(folder)
    (folder / SUMS).unlink()
    with pytest.raises(ConfigError, match=r"has no checksums\.json, which the version that wrote it"):
        moecompile.load_exported(folder)
    as_of_the_first_version(folder)
    with pytest.raises(
        ConfigError, match=r"^export\.checkpoint=.*stray\.safetensors holds more, which the model does not have"
    ):
        moecompile.load_exported(folder)
    save_file({"model.norm.weight": torch.zeros(1)}, folder / "stray.safetensors")
    with pytest.raises(
        ConfigError, match=r"stray\.safetensors holds model\.norm\.weight, which another file holds too"
    ):
        moecompile.load_exported(folder)
    plain = llama(tmp_path / "plain")
    change(plain, without(UP))
    with pytest.raises(ConfigError, match=rf"^export\.path={plain}: lacks {UP}\. Report this\.$"):
        reload(plain)
