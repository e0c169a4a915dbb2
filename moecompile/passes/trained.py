"""Which of the new weights are trained: they inherit `requires_grad` from the weights that they are made from.

Weights without a source are trained: a router (it starts random, so a frozen one would route at random), the gate of a
shared expert, and randomly initialized experts, in whole (`init=random`) or in part (`init=drop`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from moecompile.errors import PlanError
from moecompile.match.ffn import FFNMatch
from moecompile.match.linears import Linear, attribute
from moecompile.nn import Experts, SharedExperts, routers_of
from moecompile.nn.adapters import output_heads, own_router, side_of
from moecompile.passes.shard import expert_parameters
from moecompile.plan import ExpertsSite, FFNSite, LayerPlan, Plan
from moecompile.schema import AdapterKind, Bf16Weights, Config


def keep_frozen(
    experts: Experts, shared: SharedExperts | None, root: nn.Module, match: FFNMatch, layer: LayerPlan
) -> None:
    """Freezes weights that are copies or slices of frozen weights of the FFN in `root`.

    Raises:
        PlanError: gate and up become one weight, but only one of them is trained.
    """
    if layer.experts.init in ("random", "drop"):
        return
    freeze_stack(experts, [root], match, layer.site.fqn)
    if shared is None:
        return
    ins = (shared.up_proj,) if shared.gate_proj is None else (shared.gate_proj, shared.up_proj)
    for new, old in (*zip(ins, match.ins, strict=True), (shared.down_proj, match.down)):
        new.weight.requires_grad_(attribute(root, old.weight).requires_grad)
        if new.bias is not None and old.bias is not None:
            new.bias.requires_grad_(attribute(root, old.bias).requires_grad)


def freeze_stack(experts: Experts, owners: Sequence[nn.Module], match: FFNMatch, fqn: str) -> None:
    """Freezes stacked weights that are made from frozen weights of the FFNs in `owners`."""
    kinds: list[tuple[str, Iterable[Linear], str]] = [
        (experts.in_name, match.ins, "weight"), (f"{experts.in_name}_bias", match.ins, "bias"),
        ("down_proj", [match.down], "weight"), ("down_proj_bias", [match.down], "bias"),
    ]  # fmt: skip
    for name, linears, kind in kinds:
        new: nn.Parameter | None = getattr(experts, name)
        paths = [path for linear in linears if (path := getattr(linear, kind))]
        trained = {path for path in paths for owner in owners if attribute(owner, path).requires_grad}
        frozen = {path for path in paths for owner in owners if not attribute(owner, path).requires_grad}
        if new is None or not frozen:
            continue
        if trained:
            raise PlanError(
                f"{fqn or 'the model'}.{name}", "requires_grad",
                f"is made from weights of which some are trained ({min(trained)}) and some are frozen ({min(frozen)})",
                "Train or freeze all of them, or leave this FFN as it is (experts.match)",
            )  # fmt: skip
        new.requires_grad_(False)


def frozen_notes(model: nn.Module, plan: Plan) -> list[str]:
    """Notes for the user if parts of a model that is about to be rewritten are frozen."""
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    if not frozen or not any(isinstance(layer.site, FFNSite) for layer in plan.layers):
        return []
    total = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"{frozen:,} of the model's {total:,} weights are frozen. Experts that are made from frozen weights stay "
        "frozen; new routers (and reinitialized experts) are trained"
    ]


def rounding_notes(model: nn.Module, config: Config) -> list[str]:
    """A note for the user if the steps of an optimizer of ours are rounded to bf16."""
    if config.optimizer.bf16_weights is not Bf16Weights.nearest or config.adapters.kind is not AdapterKind.none:
        return []
    rounded = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16)
    what = "are bf16, and steps are rounded to it, so that small ones are lost"
    how = "optimizer.bf16_weights=master or stochastic keeps them"
    return [f"{rounded:,} trained weights {what}; {how}"] if rounded else []


# -- what is trained and what is frozen, counted for the user ----------------------------------------------------------

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
            choices = site.num_experts + site.num_identity
            routers += [module for _, module in own_router(block, model.get_submodule(site.fqn), choices)]
    for kind, modules in (("embeddings", outer), ("routers", routers)):
        kinds |= {parameter: kind for module in modules for parameter in module.parameters()}
    stacked = {owner.get_parameter(name) for owner, name in expert_parameters(model)}
    adapters = {parameter for name, parameter in model.named_parameters() if side_of(name)}
    kinds |= dict.fromkeys(adapters, "adapters of linears")
    kinds |= {parameter: "adapters of experts" if parameter in adapters else "experts" for parameter in stacked}
    return kinds
