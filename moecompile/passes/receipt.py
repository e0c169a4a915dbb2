"""The step-0 receipt: outputs on the example before and after the rewrite, where the plan promises that they agree."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moecompile.capture import Example, call_with, in_mode, is_meta, replace_regions
from moecompile.errors import PassError
from moecompile.nn.padding import TokenIds
from moecompile.nn.watch import connect
from moecompile.passes.base import registered
from moecompile.passes.run import Graphs
from moecompile.passes.upcycle import step0_reason
from moecompile.plan import FFNSite, LayerPlan

ON_META = "the model is on the meta device"
"""Why a promised equality was not measured."""

_NAMED = 3  # a reason names at most this many layers


@dataclass(frozen=True)
class Receipt:
    """max_abs_diff: of the outputs, if every layer promises equality. reason: why max_abs_diff is None.

    promised_max_abs_diff: if only some layers promise equality, the difference with only those rewritten.
    """

    max_abs_diff: float | None = None
    reason: str | None = None
    promised_max_abs_diff: float | None = None


class Comparison:
    """Puts rewritten regions into `model` and measures how its outputs on the example change.

    Args:
        planned: region path -> its layers.
    """

    def __init__(self, model: nn.Module, example: Example, planned: Mapping[str, Sequence[LayerPlan]]) -> None:
        self.example, self.layers = example, [layer for layers in planned.values() for layer in layers]
        self.reasons = {layer.site.fqn: reason for layer in self.layers if (reason := _reason(layer))}
        self.unpromised = {
            path for path, layers in planned.items() if any(layer.site.fqn in self.reasons for layer in layers)
        }
        is_needed = len(self.unpromised) < len(planned) and not is_meta(model)
        self.before = _outputs(model, example) if is_needed else []

    def replace(self, model: nn.Module, rewritten: Graphs) -> tuple[nn.Module, Receipt]:
        """Replaces all regions, first those that promise equal outputs; returns the model and the receipt.

        Raises:
            PassError: outputs change although they are promised to stay; the model is restored first.
        """
        promised = {path: graph for path, graph in rewritten.items() if path not in self.unpromised}
        originals = {path: model.get_submodule(path) for path in promised}
        model = replace_regions(model, promised)
        diff = self._diff(model) if self.before else None
        if diff is not None and not diff <= (bound := self._bound()):
            rule = f"outputs on the example are promised to stay but differ by {diff:.3g}; rounding makes {bound:.3g}"
            if not (user_passes := [graph_pass.name for graph_pass in registered("rewrite")]):
                replace_regions(model, originals)
                raise PassError("rewrite", self._first_promised(), rule)
            warnings.warn(f"{rule}. {', '.join(user_passes)} ran after rewrite", stacklevel=2)
        if not self.reasons:
            reason = ON_META if rewritten and is_meta(model) else None
            return model, Receipt(max_abs_diff=diff, reason=reason)
        rest = {path: graph for path, graph in rewritten.items() if path in self.unpromised}
        return replace_regions(model, rest), Receipt(reason=self._why(), promised_max_abs_diff=diff)

    def _diff(self, model: nn.Module) -> float:
        pairs = zip(self.before, _outputs(model, self.example), strict=True)
        return max((float(_difference(a, b).max()) for a, b in pairs if a.numel()), default=0.0)

    def _first_promised(self) -> str:
        return next(layer.site.fqn for layer in self.layers if layer.site.fqn not in self.reasons)

    def _bound(self) -> float:
        """The largest difference that rounding explains: half the digits of the outputs."""
        finite = [(out[out.isfinite()].abs(), torch.finfo(out.dtype).eps) for out in self.before]
        return max((float(values.max()) * eps**0.5 for values, eps in finite if values.numel()), default=0.0)

    def _why(self) -> str:
        """The first reason, and the layers that have a reason unless all share this one."""
        first, fqns = next(iter(self.reasons.values())), list(self.reasons)
        if len(fqns) == len(self.layers) and len(set(self.reasons.values())) == 1:
            return first
        more = ", ..." if len(fqns) > _NAMED else ""
        named = ", ".join(fqn for fqn in fqns[:_NAMED])
        return f"{first} ({len(fqns)} of {len(self.layers)} layers promise nothing: {named}{more})"


def _reason(layer: LayerPlan) -> str | None:
    if isinstance(layer.site, FFNSite):
        return step0_reason(layer)
    return None if layer.routing.capacity_factor is None else "experts drop the tokens beyond their capacity"


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference; 0 where both are the same infinity or both are NaN."""
    return (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


@torch.no_grad()
def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Floating-point outputs in evaluation mode."""
    handles = connect(model, TokenIds)  # without masks: the dense model has padding in its FFNs too
    with in_mode(model, training=False):
        out = call_with(model, example)
    for handle in handles:
        handle.remove()
    leaves = tree_leaves(dict(out) if hasattr(out, "items") else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
