"""Sharded import: on each rank bit for bit what a full load and then sharding gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import make_plan
from tests.distributed.harness import run_distributed_test
from tests.existing_models import moe_model
from tests.export.runs import SEQ, scramble, tiny_config
from tests.models.import_job import compare, import_config, write_pretrained
from tests.placements import random_placement

_EP4, _EP2 = ["mesh=cpu_2x2"], ["mesh=cpu_2x2", "mesh.ep=2"]
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
    }
    return {name: write_pretrained(root / name, model) for name, model in models.items()}


CASES: dict[str, tuple[str, list[str]]] = {
    "sliced ep4": ("llama", [*_EP4, *_SLICED]),
    "sliced ep2": ("llama", [*_EP2, *_SLICED]),
    "mixtral ep4": ("mixtral", _EP4),
    "mixtral ep2": ("mixtral", _EP2),
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
}


def differences(cases: dict[str, tuple[str, list[str]]], folders: dict[str, str]) -> list[dict[str, list[str]]]:
    given = {case: (folders[name], overrides) for case, (name, overrides) in cases.items()}
    return run_distributed_test(compare, 4, given, timeout_s=300)


PLACED = {
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
def test_loading_by_shards_equals_loading_in_full(folders: dict[str, str]) -> None:
    for found in differences(CASES, folders):
        assert found == {case: [] for case in CASES}


@pytest.mark.slow
def test_so_it_does_on_every_mesh_for_every_way_to_fill_experts(folders: dict[str, str]) -> None:
    for found in differences(MORE, folders):
        assert found == {case: [] for case in MORE}
