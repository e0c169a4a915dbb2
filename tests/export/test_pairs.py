"""Every pair of the table: what is exported computes what was trained, loaded by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import compose_config
from moecompile.export import FAMILIES
from moecompile.tasks import export as task
from tests.export.runs import tiny_config, tiny_run

_SHARED = [
    "experts.granularity=4",
    "experts.num_shared=1",
    "experts.num_routed=6",
    "experts.init=virtual_group",
    "routing.top_k=3",
]
_SLICES = ["experts.granularity=2", "experts.num_routed=8", "experts.init=virtual_group", "routing.top_k=2"]
_V3 = [*_SHARED, "routing=deepseek_v3", "routing.top_k=3", "balance=bias"]
_GROUPS = ["routing.groups=2", "routing.top_groups=1"]
_FIRST_DENSE, _MIDDLE_DENSE = "experts.layers=1:", "experts.layers=::2"
_GATE, _RAW, _AFTER = "experts.shared_gate=true", "routing.normalize=false", "routing.score=softmax_after_topk"
_SCORES = ["routing.score=sigmoid"]

# dense model, what the config says, family, what its config must say
CASES: list[tuple[str, list[str], str, dict[str, Any]]] = [
    ("llama", [], "mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}),
    ("llama", [*_SLICES, _AFTER], "mixtral", {"intermediate_size": 24}),
    ("mistral", [], "mixtral", {"sliding_window": 8}),
    ("llama", _SHARED, "qwen2_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 12}),
    ("llama", [_MIDDLE_DENSE, _RAW], "qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
    ("qwen2", [*_SHARED, _GATE, _FIRST_DENSE], "qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    ("qwen2", [], "qwen2_moe", {"qkv_bias": True, "shared_expert_intermediate_size": 48}),
    ("qwen3", [*_SLICES, _MIDDLE_DENSE], "qwen3_moe", {"mlp_only_layers": [1], "head_dim": 16}),
    ("qwen3", [_RAW], "qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3", [*_V3, *_GROUPS, _FIRST_DENSE], "dots1", {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    ("qwen3", [*_SCORES, "routing.scale=1.5", "balance=bias"], "dots1", {"n_group": 1, "routed_scaling_factor": 1.5}),
    ("qwen3", [*_SCORES, "balance=quantile"], "dots1", {"n_group": 1}),
    ("olmo2", [], "flex_olmo", {"norm_topk_prob": True}),
    ("olmo2", [*_SLICES, _RAW], "flex_olmo", {"norm_topk_prob": False, "num_experts": 8}),
    ("granite", [], "granitemoe", {"embedding_multiplier": 3.0}),
    ("cohere2", [*_SHARED, _MIDDLE_DENSE], "cohere2_moe", {"num_shared_experts": 1}),
    ("cohere2", [*_SCORES], "cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    ("cohere2", [*_SCORES, _RAW], "cohere2_moe", {"norm_topk_prob": False}),
    ("cohere2", ["routing.score=sigmoid_after_topk"], "cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    (
        "ernie4_5",
        [*_SHARED, _FIRST_DENSE, "balance=bias"],
        "ernie4_5_moe",
        {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    ),
    ("ernie4_5", ["experts.layers=:2"], "ernie4_5_moe", {"moe_layer_end_index": 1, "moe_num_shared_experts": 0}),
    ("hunyuan_v1_dense", _SHARED, "hunyuan_v1_moe", {"moe_topk": 3}),
    ("hunyuan_v1_dense", [], "hunyuan_v1_moe", {"num_experts": 8}),
    ("qwen3_5_text", [*_SHARED, _GATE], "qwen3_5_moe_text", {"num_experts": 6}),
    ("qwen3_5_text", [], "qwen3_5_moe_text", {"shared_expert_intermediate_size": 48}),
    (
        "deepseek_v3",
        [*_V3, *_GROUPS, _FIRST_DENSE],
        "deepseek_v3",
        {"n_group": 2, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    ("deepseek_v3", [*_SCORES, _RAW], "deepseek_v3", {"norm_topk_prob": False, "first_k_dense_replace": 0}),
    (
        "deepseek_v3",
        [*_SHARED, "routing=deepseek_v2", "routing.top_k=3", *_GROUPS, _FIRST_DENSE],
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "topk_group": 1},
    ),
    ("deepseek_v3", [_RAW], "deepseek_v2", {"topk_method": "greedy"}),
    (
        "nemotron_h",
        [*_V3, *_GROUPS, "experts.latent_size=8"],
        "nemotron_h",
        {"moe_latent_size": 8, "moe_shared_expert_intermediate_size": 12, "n_group": 2, "routed_scaling_factor": 2.5},
    ),
    ("nemotron_h", [*_SCORES, "experts.latent_size=8", "experts.layers=1:"], "nemotron_h", {"norm_topk_prob": True}),
    ("nemotron_h", [*_SCORES, _RAW], "nemotron_h", {"moe_latent_size": None}),
]


def exported(run: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Runs task=export in this process; its result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    task.run(compose_config(["task=export", f"export.run={run}", *overrides]), folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _params() -> Iterator[Any]:
    """The first case of each pair is quick to have, the others are slow tests."""
    seen = set()
    for case in CASES:
        pair = (case[0], case[2])
        yield pytest.param(*case, marks=[pytest.mark.slow] if pair in seen else [])
        seen.add(pair)


@pytest.mark.parametrize(("dense", "overrides", "family", "settings"), list(_params()))
def test_a_pair(dense: str, overrides: list[str], family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tiny_config(dense, overrides))
    result = exported(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["model_type"] == family
    assert {key: config.get(key) for key in settings} == settings
    assert result["max_abs_diff"] <= 1e-5


@pytest.mark.parametrize(("full", "window"), [(3, None), (0, 40)])
def test_a_window_that_no_layer_has_is_none(full: int, window: int | None, tmp_path: Path) -> None:
    """The example may be shorter than the window, so its logits would be equal."""
    settings = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": full}
    exported(tiny_run(tmp_path / "run", tiny_config("qwen3", [], settings)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["sliding_window"] == window


def test_every_pair_is_tried() -> None:
    tried = {(dense, family) for dense, _, family, _ in CASES}
    assert tried == {(dense, family.name) for family in FAMILIES for dense in family.sources}
