"""What is trained and what is frozen: parameters by kind, counted for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from moecompile.nn import routers_of
from moecompile.nn.adapters import output_heads, own_router, side_of
from moecompile.passes.shard import expert_parameters
from moecompile.plan import ExpertsSite, Plan

KINDS = ("adapters of experts", "adapters of linears", "experts", "routers", "embeddings", "other weights")


def counts_of(model: nn.Module, plan: Plan) -> dict[str, tuple[int, int]]:
    """Kind -> number of its trained and of its frozen parameters, in a compiled model."""
    kinds = kinds_of(model, plan)
    trained, frozen = Counter[str](), Counter[str]()
    for parameter in model.parameters():
        (trained if parameter.requires_grad else frozen)[kinds[parameter]] += parameter.numel()
    return {kind: (trained[kind], frozen[kind]) for kind in KINDS if trained[kind] or frozen[kind]}


def trained_notes(model: nn.Module, plan: Plan) -> list[str]:
    """Two lines for the user with these counts, if a part of a compiled model is frozen."""
    counts = counts_of(model, plan)
    if not any(frozen for _, frozen in counts.values()):
        return []
    return [
        _line("trained", {kind: trained for kind, (trained, _) in counts.items()}),
        _line("frozen", {kind: frozen for kind, (_, frozen) in counts.items()}),
    ]


def _line(what: str, counts: Mapping[str, int]) -> str:
    """`frozen: 1,234 weights (experts 1,000, embeddings 234)`."""
    parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
    return f"{what}: {sum(counts.values()):,} weights ({parts or 'nothing'})"


def kinds_of(model: nn.Module, plan: Plan) -> dict[nn.Parameter, str]:
    """The kind of every parameter of a compiled model."""
    kinds = dict.fromkeys(model.parameters(), "other weights")
    outer = [*output_heads(model), *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    routers: list[nn.Module] = [router for _, router in routers_of(model)]
    for site in (layer.site for layer in plan.layers):
        if isinstance(site, ExpertsSite):
            block = model.get_submodule(site.fqn.rpartition(".")[0])
            routers += [module for _, module in own_router(block, model.get_submodule(site.fqn), site.num_experts)]
    for kind, modules in (("embeddings", outer), ("routers", routers)):
        kinds |= {parameter: kind for module in modules for parameter in module.parameters()}
    stacked = {owner.get_parameter(name) for owner, name in expert_parameters(model)}
    adapters = {parameter for name, parameter in model.named_parameters() if side_of(name)}
    kinds |= dict.fromkeys(adapters, "adapters of linears")
    kinds |= {parameter: "adapters of experts" if parameter in adapters else "experts" for parameter in stacked}
    return kinds
