"""Rules of model families: each takes the form of a trained model and its dense config; None means that it fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moecompile.export.form import MoEForm, Refusal

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
            ("routing.capacity_factor", routing.capacity_factor, not routing.dropless, "drops tokens"),
            ("routing.bias", routing.bias, routing.bias, "gives the router's logits a bias"),
            ("routing.jitter", routing.jitter, routing.jitter > 0, "jitters the router's input alone in training"),
            ("routing.workload", routing.workload, routing.workload != "none", "is a benchmark, not a router"),
            ("experts.shared_routed", True, form.experts.shared_routed, "makes the router weigh the shared expert"),
            ("experts.num_identity", identity, identity > 0, "adds experts without weights"),
            ("the FFN", "bias", site.bias_up or site.bias_down, "is a part of the dense FFN's linears"),
        )
        if broken
    ]


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
            ("the FFN", kind, (kind == "gated") != gated, wrong_kind),
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
