"""Model families of transformers that an upcycled model can become: their configs, weight names and rules.

A rule takes the form of a trained model and its dense config; None means that it fits. An export to each family below
was loaded again and compared (docs/use/export.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moecompile.errors import ConfigError
from moecompile.plan import ExpertsPlan, FFNSite, LayerPlan, Plan, RoutingPlan

# -- a trained model in the terms of families --------------------------------------------------------------------------


_PLACE = re.compile(r"(?P<before>.+)\.(?P<number>\d+)\.(?P<name>\w+)")


@dataclass(frozen=True)
class Refusal:
    """Why a family cannot compute the trained model: a setting, its value (None: it is no setting), the rule that it
    breaks.
    """

    path: str
    value: Any
    rule: str

    def __str__(self) -> str:
        return f"{self.path} {self.rule}" if self.value is None else f"{self.path}={self.value} {self.rule}"


@dataclass(frozen=True, kw_only=True)
class MoEForm:
    """The MoE layers of a model, which all have the same settings.

    before, name: the FFN of layer i is the module `before.i.name`. layers: indices of the layers with experts, out of
    num_layers. site: of the first one. rule: of the balance.
    """

    before: str
    name: str
    layers: tuple[int, ...]
    num_layers: int
    site: FFNSite
    experts: ExpertsPlan
    routing: RoutingPlan
    rule: str

    @property
    def bias(self) -> bool:
        """Whether the choice depends on a correction bias."""
        return self.rule != "none"

    @property
    def dense_layers(self) -> list[int]:
        """Indices of the layers that stayed dense."""
        return [i for i in range(self.num_layers) if i not in self.layers]

    @property
    def score(self) -> str:
        """`softmax` or `sigmoid`, also for one of the chosen logits; another score as it is called."""
        return self.routing.score.removesuffix("_after_topk")

    @property
    def groups(self) -> tuple[int, int]:
        """(groups, top groups); (1, 1) without a group limit."""
        limited = self.routing.top_groups < self.routing.groups
        return (self.routing.groups, self.routing.top_groups) if limited else (1, 1)

    def block(self, layer: int, name: str) -> str:
        """Path of the MoE block of `layer`, for a family that names it `name`."""
        return f"{self.before}.{layer}.{name}"


def form_of(plan: Plan, num_layers: int) -> MoEForm | str:
    """The form of a plan that upcycles dense FFNs, or why it has none: families have one setting for all layers."""
    first = plan.layers[0]
    places = [_PLACE.fullmatch(layer.site.fqn) for layer in plan.layers]
    for layer, place in zip(plan.layers, places, strict=True):
        if not _is_own(layer, place, places[0]):
            return f"{layer.site.fqn or 'the model'} is not one layer's own dense FFN"
        if _function(layer) != _function(first):
            return f"{layer.site.fqn} and {first.site.fqn} differ in experts, routing or balance.rule"
    place = places[0]
    assert place is not None and isinstance(first.site, FFNSite)
    return MoEForm(
        before=place["before"],
        name=place["name"],
        layers=tuple(sorted(int(match["number"]) for match in places if match)),
        num_layers=num_layers,
        site=first.site,
        experts=first.experts,
        routing=first.routing,
        rule=first.balance.rule,
    )


def _is_own(layer: LayerPlan, place: re.Match[str] | None, first: re.Match[str] | None) -> bool:
    if place is None or first is None or not isinstance(layer.site, FFNSite):
        return False
    return place["before"] == first["before"] and place["name"] == first["name"]


def _function(layer: LayerPlan) -> tuple[Any, ...]:
    """What a layer computes, wherever its weights come from."""
    experts = layer.experts
    sizes = (experts.num_routed, experts.num_shared, experts.d_expert, experts.shared_gate, experts.shared_routed)
    latent = (experts.num_identity, experts.latent_size, experts.latent_norm)
    return sizes, latent, layer.routing, layer.balance.has_bias


# -- rules -------------------------------------------------------------------------------------------------------------


Rule = Callable[[MoEForm, Any], Refusal | None]


def common(form: MoEForm, dense: Any) -> list[Refusal]:
    """Refusals for settings that no family supports."""
    routing, site = form.routing, form.site
    identity = form.experts.num_identity
    return [
        Refusal(path, value, rule)
        for path, value, broken, rule in (
            ("routing.choice", routing.choice, routing.choice == "expert", "lets experts choose tokens"),
            ("routing.choice", routing.choice, routing.choice == "hash", "chooses by a hash of the token id"),
            ("routing.norm", routing.norm, routing.norm, "norms the router's input"),
            ("routing.expert_scale", routing.expert_scale, routing.expert_scale, "scales the weights of each expert"),
            ("routing.even_groups", True, routing.even_groups, "lets a token choose as many experts of every group"),
            ("routing.capacity_factor", routing.capacity_factor, not routing.dropless, "drops tokens"),
            ("routing.bias", routing.bias, routing.bias, "gives the router's logits a bias"),
            ("routing.jitter", routing.jitter, routing.jitter > 0, "jitters the router's input alone in training"),
            ("routing.workload", routing.workload, routing.workload != "none", "is a benchmark, not a router"),
            ("experts.shared_routed", True, form.experts.shared_routed, "makes the router weigh the shared expert"),
            ("experts.num_identity", identity, identity > 0, "adds experts without weights"),
            ("the dense FFN", None, site.bias_up or site.bias_down, "has linears with a bias"),
        )
        if broken
    ]


def refuse_drops(plan: Plan, requested: str | None) -> None:
    """Refuses existing experts with a capacity of ours: in transformers they would compute what they drop here.

    Raises:
        ConfigError: there are some. That no token of the example is dropped says nothing.
    """
    for layer in plan.layers:
        if (factor := layer.routing.capacity_factor) is not None:
            raise no_pair(requested, f"routing.capacity_factor={factor} drops tokens of {layer.site.fqn}")


def parts(form: MoEForm, *, gated: bool, latent: bool) -> list[Refusal]:
    """Refusals for parts of the experts that a family has otherwise.

    Args:
        gated: whether its experts have a gate. latent: whether they may work in a latent width.
    """
    kind, size, norm = form.site.kind, form.experts.latent_size, form.experts.latent_norm
    wrong_kind = "has no gate" if gated else "has a gate"
    return [
        Refusal(path, value, rule)
        for path, value, broken, rule in (
            ("the dense FFN", None, (kind == "gated") != gated, wrong_kind),
            ("experts.latent_size", size, size is not None and not latent, "makes experts work in a latent width"),
            ("experts.latent_norm", norm, norm and latent, "puts a norm before the projection up"),
        )
        if broken
    ]


def every_layer(form: MoEForm, dense: Any) -> Refusal | None:
    """All layers have experts."""
    kept = form.dense_layers
    return Refusal("experts.layers", f"all but {kept}", "leaves layers dense") if kept else None


def dense_layers_first(form: MoEForm, dense: Any) -> Refusal | None:
    """Layers that stay dense come first."""
    kept = form.dense_layers
    if kept == list(range(len(kept))):
        return None
    return Refusal("experts.layers", f"all but {kept}", "leaves layers dense that are not the first ones")


def one_run_of_layers(form: MoEForm, dense: Any) -> Refusal | None:
    """Layers with experts are consecutive."""
    if form.layers[-1] - form.layers[0] + 1 == len(form.layers):
        return None
    return Refusal("experts.layers", list(form.layers), "is not one run of layers")


def softmax(form: MoEForm, dense: Any) -> Refusal | None:
    """Scores are a softmax."""
    return None if form.score == "softmax" else Refusal("routing.score", form.score, "is not softmax")


def sigmoid(form: MoEForm, dense: Any) -> Refusal | None:
    """Scores are sigmoids, to which a correction bias is added."""
    score = form.routing.score
    return None if score == "sigmoid" else Refusal("routing.score", score, "is not sigmoid")


def softmax_or_sigmoid(form: MoEForm, dense: Any) -> Refusal | None:
    """Scores are a softmax or sigmoids."""
    known = form.score in ("softmax", "sigmoid")
    return None if known else Refusal("routing.score", form.routing.score, "is neither softmax nor sigmoid")


def normalized(form: MoEForm, dense: Any) -> Refusal | None:
    """Weights of a token sum to a constant."""
    return (
        None
        if form.routing.sums_to_scale
        else Refusal("routing.normalize", False, "does not normalise routing weights")
    )


def normalized_softmax(form: MoEForm, dense: Any) -> Refusal | None:
    """As `normalized`, if scores are a softmax."""
    return normalized(form, dense) if form.score == "softmax" else None


def not_normalized(form: MoEForm, dense: Any) -> Refusal | None:
    """Weights are the scores themselves."""
    return Refusal("routing.normalize", True, "normalises routing weights") if form.routing.sums_to_scale else None


def unscaled(form: MoEForm, dense: Any) -> Refusal | None:
    """Weights are not scaled."""
    scale = form.routing.scale
    return None if scale == 1.0 else Refusal("routing.scale", scale, "scales routing weights")


def ungrouped(form: MoEForm, dense: Any) -> Refusal | None:
    """Tokens are not limited to some groups."""
    groups, top_groups = form.groups
    return (
        None if groups == 1 else Refusal("routing.top_groups", top_groups, f"limits a token to some of {groups} groups")
    )


def groups_by_top2(form: MoEForm, dense: Any) -> Refusal | None:
    """Groups are ranked by their two best experts."""
    groups, _ = form.groups
    if groups > 1 and form.routing.group_score != "top2":
        return Refusal("routing.group_score", form.routing.group_score, "is not top2")
    if form.experts.num_routed // groups < 2:
        return Refusal("routing.groups", groups, "leaves a group with one expert, and groups are ranked by two")
    return None


def groups_by_max(form: MoEForm, dense: Any) -> Refusal | None:
    """Groups are ranked by their best expert."""
    groups, _ = form.groups
    if groups > 1 and form.routing.group_score != "max":
        return Refusal("routing.group_score", form.routing.group_score, "is not max")
    return None


def no_correction_bias(form: MoEForm, dense: Any) -> Refusal | None:
    """The router has no correction bias."""
    rule = "shifts the choice of experts by a correction bias"
    return Refusal("balance.rule", form.rule, rule) if form.bias else None


def no_shared(form: MoEForm, dense: Any) -> Refusal | None:
    """There is no shared expert."""
    count = form.experts.num_shared
    return Refusal("experts.num_shared", count, "adds a shared expert") if count else None


def shared_ungated(form: MoEForm, dense: Any) -> Refusal | None:
    """A shared expert has no gate."""
    gate = form.experts.shared_gate
    return Refusal("experts.shared_gate", True, "gives the shared expert a gate") if gate else None


def shared_like_routed(form: MoEForm, dense: Any) -> Refusal | None:
    """A shared expert is as wide as a routed one."""
    count = form.experts.num_shared
    return Refusal("experts.num_shared", count, "makes the shared expert wider than others") if count > 1 else None


def same_window_everywhere(form: MoEForm, dense: Any) -> Refusal | None:
    """Sliding windows are the same in all layers."""
    kinds = set(getattr(dense, "layer_types", None) or [])
    return Refusal("model.config.layer_types", sorted(kinds), "mixes kinds of attention") if len(kinds) > 1 else None


# -- families ----------------------------------------------------------------------------------------------------------


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
        inside = parts(form, gated=self.gated, latent=self.names.latent is not None)
        return [*common(form, dense), *inside, *(refusal for refusal in refusals if refusal is not None)]


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


def _qwen_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {
        "num_experts": form.experts.num_routed,
        "num_experts_per_tok": form.routing.top_k,
        "moe_intermediate_size": form.experts.d_expert,
        "norm_topk_prob": form.routing.sums_to_scale,
        "mlp_only_layers": form.dense_layers,
        "decoder_sparse_step": 1,
    }


def _qwen3_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    """A window of qwen3 is that of some layers, perhaps of none; that of qwen3_moe is that of all."""
    windows = "sliding_attention" in dense.layer_types
    return {
        **_qwen_moe(form, dense),
        "use_sliding_window": windows,
        "sliding_window": dense.sliding_window if windows else None,
    }


def _qwen2_moe(form: MoEForm, dense: Any) -> dict[str, Any]:
    return {**_qwen_moe(form, dense), "qkv_bias": dense.model_type == "qwen2", **_shared_width(form)}


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
        "rope_parameters": dense.rope_parameters,  # they are read, but the keys of before are declared
        "rope_theta": dense.rope_parameters["rope_theta"],
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


_PLAIN = (unscaled, ungrouped)
_SOFTMAX = (softmax, no_correction_bias, *_PLAIN)
_MIXTRAL = (every_layer, *_SOFTMAX, normalized, no_shared)
_SIGMOID = (dense_layers_first, sigmoid, groups_by_top2, shared_ungated)
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
        rules=(*_SOFTMAX, no_shared, same_window_everywhere),
    ),
    Family(name="dots1", sources=("qwen3",), settings=_deepseek, rules=_SIGMOID, names=_DEEPSEEK),
    Family(
        name="flex_olmo", sources=("olmo2",), settings=_flex_olmo,
        rules=(every_layer, *_SOFTMAX, no_shared),
    ),
    Family(
        name="granitemoe", sources=("granite",), settings=_mixtral, rules=_MIXTRAL,
        names=Names(block="block_sparse_moe", router="router.weight"),
    ),
    Family(
        name="cohere2_moe", sources=("cohere2",), settings=_cohere2_moe,
        rules=(
            softmax_or_sigmoid, no_correction_bias, *_PLAIN, normalized_softmax, shared_ungated,
        ),
        names=Names(shared="shared_experts"),
    ),
    Family(
        name="ernie4_5_moe", sources=("ernie4_5",), settings=_ernie4_5_moe,
        rules=(one_run_of_layers, softmax, normalized, *_PLAIN, shared_ungated),
        names=Names(bias="gate.moe_statics.e_score_correction_bias", bias_row=True, shared="shared_experts"),
    ),
    Family(
        name="hunyuan_v1_moe", sources=("hunyuan_v1_dense",), settings=_hunyuan,
        rules=(every_layer, *_SOFTMAX, normalized, shared_ungated, shared_like_routed),
        names=Names(router="gate.wg.weight", shared="shared_mlp", shared_always=True),
    ),
    Family(
        name="qwen3_5_moe_text", sources=("qwen3_5_text",), settings=_qwen3_5_moe,
        rules=(every_layer, *_SOFTMAX, normalized), names=_QWEN_SHARED,
    ),
    Family(name="deepseek_v3", sources=("deepseek_v3",), settings=_deepseek, rules=_SIGMOID, names=_DEEPSEEK),
    Family(
        name="deepseek_v2", sources=("deepseek_v3",), settings=_deepseek_v2,
        rules=(
            dense_layers_first, softmax, not_normalized, no_correction_bias,
            groups_by_max, shared_ungated,
        ),
        names=Names(shared="shared_experts", shared_always=True),
    ),
    Family(
        name="nemotron_h", sources=("nemotron_h",), settings=_nemotron_h, gated=False,
        rules=(sigmoid, groups_by_top2, shared_ungated),
        names=Names(
            block="mixer", bias="gate.e_score_correction_bias", shared="shared_experts", shared_always=True,
            latent=("fc1_latent_proj.weight", "fc2_latent_proj.weight"),
        ),
    ),
)  # fmt: skip
