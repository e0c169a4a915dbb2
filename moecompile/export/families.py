"""Model families of transformers that an upcycled model can become: their configs, weight names and rules.

An export to each family below was loaded again and compared (docs/use/export.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moecompile.errors import ConfigError
from moecompile.export import rules
from moecompile.export.form import MoEForm, Refusal
from moecompile.export.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Names:
    """Names of the parts of an MoE block in a family; `block` is relative to the layer, all others to the block.

    bias: the router's correction bias. shared: the shared expert; gate: the weight of its gate. shared_always: the
    family always has one, so it gets a silent one if the plan has none. bias_row: the bias is (1, E), not (E,). latent:
    the projections down to the latent width and up from it.
    """

    block: str = "mlp"
    router: str = "gate.weight"
    bias: str | None = None
    bias_row: bool = False
    shared: str | None = None
    gate: str | None = None
    shared_always: bool = False
    latent: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. sources: dense model types that share everything outside of the FFN with it.

    settings: config keys that the dense model's config lacks, or that mean something else there. gated: whether its
    experts have a gate.
    """

    name: str
    sources: tuple[str, ...]
    settings: Callable[[MoEForm, Any], dict[str, Any]]
    rules: tuple[Rule, ...]
    names: Names = field(default_factory=Names)
    gated: bool = True

    def refusals(self, form: MoEForm, dense: Any) -> list[Refusal]:
        """Why the family cannot compute what `form` does; empty if it can."""
        refusals = (rule(form, dense) for rule in self.rules)
        inside = rules.parts(form, gated=self.gated, latent=self.names.latent is not None)
        return [*rules.common(form, dense), *inside, *(refusal for refusal in refusals if refusal is not None)]


def families_of(dense: Any, requested: str | None) -> list[Family]:
    """The families that a dense model can become, in the order of the table; only `requested`, unless it is None.

    Args:
        dense: the dense model's config.

    Raises:
        ConfigError: there is none.
    """
    architecture = str(dense.model_type)
    possible = [family for family in FAMILIES if architecture in family.sources]
    families = [family for family in possible if requested in (None, family.name)]
    if not families:
        names = " or ".join(family.name for family in possible)
        raise no_pair(requested, f"{architecture} becomes {names}" if possible else f"{architecture} is in no pair")
    return families


def choose_family(families: list[Family], form: MoEForm, dense: Any, requested: str | None) -> Family:
    """The first of `families` that computes what `form` does.

    Raises:
        ConfigError: none does; names the settings that rule out each.
    """
    refused = {family.name: family.refusals(form, dense) for family in families}
    suitable = next((family for family in families if not refused[family.name]), None)
    if suitable is None:
        reasons = "; ".join(f"{name}, because {' and '.join(map(str, refusals))}" for name, refusals in refused.items())
        raise no_pair(requested, f"this {dense.model_type} cannot become {reasons}")
    return suitable


def no_pair(requested: str | None, rule: str) -> ConfigError:
    """The error that no family computes the trained model: with the rule, the known pairs, and an alternative."""
    path, value = ("export.format", "huggingface") if requested is None else ("export.family", requested)
    return ConfigError(path, value, rule, f"Use export.format=native; pairs are {pairs()}")


def pairs() -> str:
    """`llama, mistral -> mixtral; qwen3 -> qwen3_moe; ...`."""
    return "; ".join(f"{', '.join(family.sources)} -> {family.name}" for family in FAMILIES)


def _mixtral(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_local_experts": form.experts.num_routed,
        "num_experts_per_tok": form.routing.top_k,
        "intermediate_size": form.experts.d_expert,
    }


def _qwen3_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_experts": form.experts.num_routed,
        "num_experts_per_tok": form.routing.top_k,
        "moe_intermediate_size": form.experts.d_expert,
        "norm_topk_prob": form.routing.sums_to_scale,
        "mlp_only_layers": form.dense_layers,
        "decoder_sparse_step": 1,
    }


def _qwen2_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {**_qwen3_moe(form, dense), "qkv_bias": dense.model_type == "qwen2", **_shared_width(form)}


def _qwen3_5_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_experts": form.experts.num_routed,
        "num_experts_per_tok": form.routing.top_k,
        "moe_intermediate_size": form.experts.d_expert,
        **_shared_width(form),
    }


def _shared_width(form: MoEForm) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": form.experts.d_shared or form.experts.d_expert}


def _deepseek(form: MoEForm, dense: Any) -> dict[str, Any]:
    groups, top_groups = form.groups
    return {
        "n_routed_experts": form.experts.num_routed,
        "n_shared_experts": form.experts.num_shared or 1,
        "num_experts_per_tok": form.routing.top_k,
        "moe_intermediate_size": form.experts.d_expert,
        "first_k_dense_replace": len(form.dense_layers),
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": form.routing.sums_to_scale,
        "routed_scaling_factor": form.routing.scale,
    }


def _deepseek_v2(form: MoEForm, dense: Any) -> dict[str, Any]:
    method = "group_limited_greedy" if form.groups[0] > 1 else "greedy"
    return {**_deepseek(form, dense), "topk_method": method}


def _nemotron_h(form: MoEForm, dense: Any) -> dict[str, Any]:
    kinds = ["moe" if i in form.layers else kind for i, kind in enumerate(dense.layers_block_type)]
    settings = _deepseek(form, dense)
    del settings["first_k_dense_replace"]
    return {
        **settings,
        "layers_block_type": kinds,
        "moe_shared_expert_intermediate_size": form.experts.d_shared or form.experts.d_expert,
        "moe_latent_size": form.experts.latent_size,
    }


def _flex_olmo(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_experts": form.experts.num_routed,
        "num_experts_per_tok": form.routing.top_k,
        "intermediate_size": form.experts.d_expert,
        "norm_topk_prob": form.routing.sums_to_scale,
    }


def _cohere2_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    kinds = ["sparse" if i in form.layers else "dense" for i in range(form.num_layers)]
    return {
        **_flex_olmo(form, dense),
        "expert_selection_fn": form.score,
        "num_shared_experts": form.experts.num_shared,
        "shared_expert_combination_strategy": "sum",
        "mlp_layer_types": kinds,
        "prefix_dense_intermediate_size": dense.intermediate_size,
    }


def _ernie4_5_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "moe_num_experts": form.experts.num_routed,
        "moe_k": form.routing.top_k,
        "moe_intermediate_size": form.experts.d_expert,
        "moe_num_shared_experts": form.experts.num_shared,
        "moe_layer_start_index": form.layers[0],
        "moe_layer_end_index": form.layers[-1],
        "moe_layer_interval": 1,
    }


def _hunyuan(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_experts": form.experts.num_routed,
        "moe_topk": form.routing.top_k,
        "intermediate_size": form.experts.d_expert,
    }


_PLAIN = (rules.unscaled, rules.ungrouped)
_SOFTMAX = (rules.softmax, rules.no_correction_bias, *_PLAIN)
_MIXTRAL = (rules.every_layer, *_SOFTMAX, rules.normalized, rules.no_shared)
_SIGMOID = (rules.dense_layers_first, rules.sigmoid, rules.groups_by_top2, rules.shared_ungated)
_QWEN_SHARED = Names(shared="shared_expert", gate="shared_expert_gate.weight", shared_always=True)
_DEEPSEEK = Names(bias="gate.e_score_correction_bias", shared="shared_experts", shared_always=True)

# If several are suitable, the first is used.
FAMILIES: tuple[Family, ...] = (
    Family(name="mixtral", sources=("llama", "mistral"), settings=_mixtral, rules=_MIXTRAL),
    Family(
        name="qwen2_moe", sources=("qwen2", "llama"), settings=_qwen2_moe, rules=_SOFTMAX, names=_QWEN_SHARED,
    ),
    Family(
        name="qwen3_moe", sources=("qwen3",), settings=_qwen3_moe,
        rules=(*_SOFTMAX, rules.no_shared, rules.same_window_everywhere),
    ),
    Family(name="dots1", sources=("qwen3",), settings=_deepseek, rules=_SIGMOID, names=_DEEPSEEK),
    Family(
        name="flex_olmo", sources=("olmo2",), settings=_flex_olmo,
        rules=(rules.every_layer, *_SOFTMAX, rules.no_shared),
    ),
    Family(
        name="granitemoe", sources=("granite",), settings=_mixtral, rules=_MIXTRAL,
        names=Names(block="block_sparse_moe", router="router.weight"),
    ),
    Family(
        name="cohere2_moe", sources=("cohere2",), settings=_cohere2_moe,
        rules=(
            rules.softmax_or_sigmoid, rules.no_correction_bias, *_PLAIN, rules.normalized_softmax, rules.shared_ungated,
        ),
        names=Names(shared="shared_experts"),
    ),
    Family(
        name="ernie4_5_moe", sources=("ernie4_5",), settings=_ernie4_5_moe,
        rules=(rules.one_run_of_layers, rules.softmax, rules.normalized, *_PLAIN, rules.shared_ungated),
        names=Names(bias="gate.moe_statics.e_score_correction_bias", bias_row=True, shared="shared_experts"),
    ),
    Family(
        name="hunyuan_v1_moe", sources=("hunyuan_v1_dense",), settings=_hunyuan,
        rules=(rules.every_layer, *_SOFTMAX, rules.normalized, rules.shared_ungated, rules.shared_like_routed),
        names=Names(router="gate.wg.weight", shared="shared_mlp", shared_always=True),
    ),
    Family(
        name="qwen3_5_moe_text", sources=("qwen3_5_text",), settings=_qwen3_5_moe,
        rules=(rules.every_layer, *_SOFTMAX, rules.normalized), names=_QWEN_SHARED,
    ),
    Family(name="deepseek_v3", sources=("deepseek_v3",), settings=_deepseek, rules=_SIGMOID, names=_DEEPSEEK),
    Family(
        name="deepseek_v2", sources=("deepseek_v3",), settings=_deepseek_v2,
        rules=(
            rules.dense_layers_first, rules.softmax, rules.not_normalized, rules.no_correction_bias,
            rules.groups_by_max, rules.shared_ungated,
        ),
        names=Names(shared="shared_experts", shared_always=True),
    ),
    Family(
        name="nemotron_h", sources=("nemotron_h",), settings=_nemotron_h, gated=False,
        rules=(rules.sigmoid, rules.groups_by_top2, rules.shared_ungated),
        names=Names(
            block="mixer", bias="gate.e_score_correction_bias", shared="shared_experts", shared_always=True,
            latent=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
        ),
    ),
)  # fmt: skip
