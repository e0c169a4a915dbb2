"""Models that are filled by shards: on each rank bit for bit what making the whole model and then sharding it gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moecompile.errors import ConfigError
from moecompile.models import build, initial, sharded
from moecompile.models.build import build_model, example_inputs
from moecompile.models.initial import Keyed, Replayed
from moecompile.models.recorded import NotRecorded
from moecompile.models.sharded import ShardedImport, loads_sharded
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.schema import ModelDevice, ModelInit, ModelLoad
from moecompile.tasks import job
from tests.distributed.harness import run_distributed_test
from tests.existing_models import CONFIGS, VOCAB, moe_model
from tests.export.runs import DENSE, SEQ, scramble, tiny_config
from tests.models.import_job import Source, compare, import_config, memory, write_pretrained
from tests.placements import random_placement
from tests.table_models import qwen4

_EP4, _EP2 = ["mesh=cpu_2x2"], ["mesh=cpu_2x2", "mesh.ep=2"]
_TP = ["mesh=cpu_1x4", "mesh.tp=2", "mesh.ep=2"]
_SLICED = [
    "experts.granularity=3", "experts.num_shared=1", "experts.num_routed=4", "experts.init=virtual_group",
    "experts.layers=1:", "balance=bias",
]  # fmt: skip


def dense(architecture: str, **changes: Any) -> nn.Module:
    model = build_model(tiny_config(architecture, [], changes).model, 0)
    scramble(model)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pretrained")
    models = {
        "llama": dense("llama"),  # tied embeddings
        "qwen2": dense("qwen2"),  # biases in attention
        "gpt_neox": dense("gpt_neox"),  # biases in the FFN
        "mixtral": moe_model("mixtral"),
        "six": moe_model("mixtral", num_local_experts=6),
        "gpt_oss": moe_model("gpt_oss", num_local_experts=6),  # stacked in the files too, transposed, with biases
        "deepseek_v3": moe_model("deepseek_v3"),
        "switch_transformers": moe_model("switch_transformers"),
    }
    return {name: write_pretrained(root / name, model) for name, model in models.items()}


CASES: dict[str, tuple[str, list[str]]] = {
    "sliced ep4": ("llama", [*_EP4, *_SLICED]),
    "sliced ep2": ("llama", [*_EP2, *_SLICED]),
    "mixtral ep4": ("mixtral", _EP4),
    "mixtral ep2": ("mixtral", _EP2),
    "tp": ("mixtral", _TP),
}
MORE: dict[str, tuple[str, list[str]]] = {
    "copied ep4": ("llama", _EP4),
    "replicated": ("llama", [*_EP2, "mesh.dp_replicate=2"]),
    "cut within ep1": ("gpt_neox", ["mesh=cpu_2x2", "mesh.ep=1", "experts.num_routed=6", "experts.init=drop"]),
    "random ep2": ("qwen2", [*_EP2, "experts.init=random", "experts.num_shared=1", "experts.shared_gate=true"]),
    "drop ep4": ("qwen2", [*_EP4, "experts.init=drop"]),
    "expected ep2": ("qwen2", [*_EP2, "experts.weight_scaling=expected", "routing.normalize=false"]),
    "latent ep4": ("llama", [*_EP4, *_SLICED, "experts.latent_size=12", "experts.latent_norm=true"]),
    "latent ep2": ("gpt_neox", [*_EP2, "experts.latent_size=12"]),
    "stored stacks, cut within ep2": ("gpt_oss", _EP2),
    "biases ep4": ("gpt_neox", [*_EP4, "routing.bias=true", "balance=global_batch"]),
    "deepseek ep4": ("deepseek_v3", [*_EP4, "balance=bias"]),
    "deepseek ep2": ("deepseek_v3", [*_EP2, "balance=bias"]),
    "separate experts": ("switch_transformers", _EP2),
    "tp, sliced": ("llama", [*_TP, *_SLICED]),
    "tp, biases": ("gpt_neox", _TP),
    "tp, latent attention": ("deepseek_v3", [*_TP, "balance=bias"]),
}


def dense_settings(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architecture": architecture, "config": {**DENSE[architecture], **changes}}


def moe_settings(architecture: str, init: ModelInit = ModelInit.auto, **changes: Any) -> dict[str, Any]:
    """Without the ids that the family's own vocabulary has."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 32}
    ids = {"eos_token_id": None, "bos_token_id": None}
    settings = {**sizes, **CONFIGS[architecture], **ids, **changes}
    return {"architecture": architecture, "config": settings, "init": init}


def switch_settings() -> dict[str, Any]:
    """Of a model with an encoder, whose sizes have other names."""
    return {"architecture": "switch_transformers", "config": {"vocab_size": VOCAB, **CONFIGS["switch_transformers"]}}


_WIDE = {"intermediate_size": 2304, "hidden_size": 96}  # several blocks of random numbers
DRAWN: dict[str, tuple[Source, list[str]]] = {
    "sliced ep4": (dense_settings("llama"), [*_EP4, *_SLICED, "seed=7"]),
    "moe ep2": (moe_settings("deepseek_v3"), [*_EP2, "balance=bias"]),
    "keyed": (moe_settings("mixtral", ModelInit.keyed, **_WIDE), _EP2),
}
DRAWN_MORE: dict[str, tuple[Source, list[str]]] = {
    "random, frozen padding": (dense_settings("qwen2", pad_token_id=3), [*_EP2, "experts.init=random"]),
    "cut within ep1": (dense_settings("gpt_neox"), ["mesh=cpu_2x2", "mesh.ep=1", "experts.num_routed=6"]),
    "bf16": (moe_settings("deepseek_v3", dtype="bfloat16"), _EP4),
    "replicated": (moe_settings("qwen3_moe"), [*_EP2, "mesh.dp_replicate=2"]),
    "stacks cut within": (moe_settings("gpt_oss", num_local_experts=6), _EP2),
    "adapters": (moe_settings("deepseek_v3"), [*_EP2, "adapters=lora"]),
    "dense and existing": (moe_settings("deepseek_v3"), [*_EP2, "experts.sites=both"]),
    "separate experts": (switch_settings(), _EP4),
    "lent": (moe_settings("mixtral"), [*_EP2, "dispatch.balance=lend"]),
    "an odd vocabulary": (dense_settings("llama", vocab_size=67), _EP4),
    "tp": (moe_settings("mixtral"), _TP),
    "tp, keyed": (moe_settings("mixtral", ModelInit.keyed, **_WIDE), _TP),
    "tp, sliced": (dense_settings("llama"), [*_TP, *_SLICED]),
    "keyed, upcycled": ({**dense_settings("llama", **_WIDE), "init": ModelInit.keyed}, [*_EP4, *_SLICED]),
}


def differences(cases: dict[str, tuple[str, list[str]]], folders: dict[str, str]) -> list[dict[str, list[str]]]:
    given = {case: (folders[name], overrides) for case, (name, overrides) in cases.items()}
    return run_distributed_test(compare, 4, given, timeout_s=300)


PLACED = {
    "placed, separate": ("switch_transformers", [*_EP2, "{file}"]),
    "placed": ("mixtral", [*_EP2, "{file}"]),
    "placed, cut within": ("six", [*_EP2, "{file}"]),
    "placed, sliced": ("llama", [*_EP4, *_SLICED, "{file}"]),
}


@pytest.mark.slow
def test_so_it_does_where_experts_are_placed(folders: dict[str, str], tmp_path: Path) -> None:
    cases = {}
    for case, (name, overrides) in PLACED.items():
        config = import_config(folders[name], overrides[:-1])
        model = build_model(config.model, config.seed)
        plan = make_plan(model, config, example=example_inputs(model, SEQ))
        cases[case] = (name, [*overrides[:-1], random_placement(plan.layers, tmp_path / f"{name}.yaml", 1)])
    for found in differences(cases, folders):
        assert found == {case: [] for case in cases}


@pytest.mark.slow
def test_initial_values_are_those_of_the_whole_model() -> None:
    for found in run_distributed_test(compare, 4, DRAWN, timeout_s=300):
        assert found == {case: [] for case in DRAWN}


@pytest.mark.slow
def test_so_they_are_on_every_mesh() -> None:
    for found in run_distributed_test(compare, 4, DRAWN_MORE, timeout_s=300):
        assert found == {case: [] for case in DRAWN_MORE}


def test_which_models_are_filled_by_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_sharded(source: Source, load: str = "auto", ranks: int = 2) -> bool:
        config = import_config(source, [])
        config.model.load = ModelLoad(load)
        return loads_sharded(config, ranks)

    drawn, factory = dense_settings("llama"), {"factory": "tests.tiny:tiny_llama"}
    assert not is_sharded(drawn) and is_sharded(drawn, "sharded") and not is_sharded(drawn, "sharded", ranks=1)
    assert is_sharded("folder") and not is_sharded("folder", "full") and not is_sharded("folder", ranks=1)
    assert not is_sharded(factory) and not is_sharded({"package": "some-package"}, "sharded")
    assert is_sharded({**drawn, "device": ModelDevice.meta}, ranks=1)
    monkeypatch.setattr(sharded, "SMALL", 1000)
    assert is_sharded(drawn) and not is_sharded(drawn, "full") and not is_sharded(factory)


@pytest.mark.parametrize("init", ["replay", "keyed"])
def test_what_stands_in_for_a_model_runs(init: str) -> None:
    """Its code divides by buffers, which are no weights."""
    config = qwen4(f"model.init={init}")
    importing, whole = ShardedImport(config), build_model(config.model, config.seed)
    made = importing.stand_in()
    buffers = dict(whole.named_buffers())
    assert any("vocab_sizes" in name for name in buffers)
    assert all(torch.equal(value, buffers[name]) for name, value in made.named_buffers())
    assert made(**example_inputs(made, SEQ)).logits.isfinite().all()
    again = importing.whole().state_dict()
    if init == "replay":
        assert all(torch.equal(value, again[name]) for name, value in whole.state_dict().items())


def test_large_models_are_keyed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = import_config(dense_settings("llama"), [])
    assert isinstance(ShardedImport(config).weights, Replayed)
    whole = build_model(config.model, config.seed).state_dict()
    monkeypatch.setattr(build, "MOST_REPLAYED", 1000)
    assert isinstance(ShardedImport(config).weights, Keyed)
    assert not any(
        torch.equal(value, whole[name])
        for name, value in build_model(config.model, 0).named_parameters()
        if value.ndim > 1
    )


@pytest.mark.parametrize(
    ("error", "source", "reason"),
    [
        (None, {"factory": "tests.tiny:tiny_llama"}, "model.factory builds it with code of its own"),
        (NotRecorded("its code is odd"), dense_settings("llama"), "its code is odd"),
    ],
)
def test_what_cannot_be_filled_by_shards_is_made_whole_and_says_so(
    error: Exception | None, source: Source, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def refuse(*_: Any) -> None:
        raise error or AssertionError

    monkeypatch.setattr(initial, "record", refuse)
    monkeypatch.setattr(job, "dist", SimpleNamespace(get_world_size=lambda: 2, get_rank=lambda: 0))
    config = import_config(source, [])
    config.model.load = ModelLoad.sharded
    assert job._importing(config) is None
    assert (
        capsys.readouterr().out == f"model.load=sharded is not possible, every rank makes the whole model: {reason}\n"
    )
    config.model.device = ModelDevice.meta
    with pytest.raises(
        ConfigError, match=f"^model.device=meta: ranks cannot make .* alone: {reason}. Use model.device=cpu"
    ):
        job._importing(config)


def test_shards_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_MEMINFO", tmp_path / "meminfo")
    config = import_config(dense_settings("llama"), [])
    importing = ShardedImport(config)
    compiled = compile_with_report(importing.model, config, example=example_inputs(importing.model, SEQ))
    (tmp_path / "meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:   100 kB\n")
    with pytest.raises(
        ConfigError, match=r"^mesh.ranks_per_node=1: each rank gets 0.0 GiB of weights, and has 0.0 GiB"
    ):
        importing.fill(compiled)
    (tmp_path / "meminfo").write_text("MemAvailable:   1000000 kB\n")
    importing.fill(compiled)


@pytest.mark.slow
def test_a_rank_never_has_more_than_its_shards_and_a_layer() -> None:
    """Of a model with layers of 52 MiB; made whole and then sharded, it takes twice the model."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    source, tiny = (
        {"architecture": "mixtral", "vocab_size": 512, "hidden_size": width, "intermediate_size": 2 * width,
         "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, **experts}
        for width in (512, 64)
    )  # fmt: skip
    layer = 4 * 512 * (8 * 3 * 1024 + 4 * 512)
    for found in run_distributed_test(memory, 2, json.dumps(source), json.dumps(tiny), timeout_s=300):
        assert 6 * layer < found["model"] < 7 * layer
        assert found["peak"] < found["shard"] + layer + 16 * 2**20, found


@pytest.mark.slow
def test_loading_by_shards_equals_loading_in_full(folders: dict[str, str]) -> None:
    for found in differences(CASES, folders):
        assert found == {case: [] for case in CASES}


@pytest.mark.slow
def test_so_it_does_on_every_mesh_for_every_way_to_fill_experts(folders: dict[str, str]) -> None:
    for found in differences(MORE, folders):
        assert found == {case: [] for case in MORE}
