"""Which of the new weights are trained: they inherit `requires_grad` from the weights that they are made from.

Weights without a source are trained: a router (it starts random, so a frozen one would route at random), the gate of a
shared expert, and randomly initialized experts, in whole (`init=random`) or in part (`init=drop`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from moecompile.errors import PlanError
from moecompile.match.ffn import FFNMatch
from moecompile.match.linears import Linear, attribute
from moecompile.nn import Experts, SharedExperts
from moecompile.plan import FFNSite, LayerPlan, Plan


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
