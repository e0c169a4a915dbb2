"""Describes an upcycled model in the terms that model families use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moecompile.plan import ExpertsPlan, FFNSite, LayerPlan, Plan, RoutingPlan

_PLACE = re.compile(r"(?P<before>.+)\.(?P<number>\d+)\.(?P<name>\w+)")


@dataclass(frozen=True)
class Refusal:
    """Why a family cannot compute the trained model: a setting, its value, the rule that it breaks."""

    path: str
    value: Any
    rule: str

    def __str__(self) -> str:
        return f"{self.path}={self.value} {self.rule}"


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
