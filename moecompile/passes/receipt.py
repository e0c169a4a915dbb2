"""The step-0 receipt: whether the regions of a model, and the whole model, compute what they did before the rewrite.

Algorithm:
  1. Run the model on the example. Run it again from the same random state, and compare each rewritten region that
     promises equality with its module, on the module's own input (agreement.py). If the outputs of the two forwards
     differ, the model does not repeat itself, and nothing is said of its outputs.
  2. Refuse a region that computes something else.
  3. Put the regions in place and run the model from that state once more. The difference of the outputs is shown, not
     judged: where two experts are nearly as good, rounding in a layer below chooses the other one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.capture import Example, ModuleCall, call_with, is_meta, replace_regions, undisturbed
from moecompile.errors import PassError
from moecompile.match.regions import Region
from moecompile.nn.padding import TokenIds
from moecompile.nn.watch import connect
from moecompile.passes.agreement import Agreement, agreements, difference, unequal_copies
from moecompile.passes.base import registered
from moecompile.passes.run import Graphs
from moecompile.passes.upcycle import step0_reason
from moecompile.plan import FFNSite, LayerPlan
from moecompile.torch_private import tree_leaves

ON_META = "the model is on the meta device"
"""Why a promised equality was not measured."""

_NAMED = 3  # a reason names at most this many layers


@dataclass(frozen=True)
class Receipt:
    """max_abs_diff: of the outputs, if every layer promises equality. reason: why max_abs_diff is None.

    promised_max_abs_diff: if only some layers promise equality, the difference with only those rewritten.
    region_part: the largest difference of a region that promises equality, on the input of its module, as a part of
    what rounding explains. regions_only: the outputs differ by more than rounding in one region makes.
    """

    max_abs_diff: float | None = None
    reason: str | None = None
    promised_max_abs_diff: float | None = None
    region_part: float | None = None
    regions_only: bool = False


class Comparison:
    """Puts rewritten regions into a model and compares.

    Args:
        example: of the model. regions: as captured, by path. planned: the layers of each.

    Attributes:
        notes: for the user.
    """

    def __init__(
        self, example: Example, regions: Mapping[str, Region], planned: Mapping[str, Sequence[LayerPlan]]
    ) -> None:
        self.example, self.regions, self.planned = example, regions, planned
        self.layers = [layer for layers in planned.values() for layer in layers]
        self.reasons = {layer.site.fqn: reason for layer in self.layers if (reason := _reason(layer))}
        self.notes: list[str] = []
        self._found: dict[str, list[Agreement]] = {}
        self._not_wide: dict[str, str] = {}

    def replace(self, model: nn.Module, rewritten: Graphs) -> tuple[nn.Module, Receipt]:
        """Replaces all regions; returns the model and the receipt.

        Raises:
            PassError: a region computes something else although it is promised not to; nothing is replaced.
        """
        promised = {
            path: graph
            for path, graph in rewritten.items()
            if not any(layer.site.fqn in self.reasons for layer in self.planned[path])
        }
        if not promised or is_meta(model):
            reason = self._why() if self.reasons else ON_META if rewritten else None
            return replace_regions(model, rewritten), Receipt(reason=reason)
        # Step 1
        before = _outputs(model, self.example)
        with self._comparing(model, promised):
            own = _largest_difference(before, _outputs(model, self.example))
        self._refuse(promised)  # Step 2
        # Step 3
        model = replace_regions(model, promised)
        diff = _largest_difference(before, _outputs(model, self.example))
        model = replace_regions(model, {path: graph for path, graph in rewritten.items() if path not in promised})
        part = max((each.part for found in self._found.values() for each in found), default=None)
        if own != 0:
            reason = f"not compared: two forwards of the model itself from one random state differ by {own:.3g}"
            return model, Receipt(reason=f"{self._why()}; {reason}" if self.reasons else reason, region_part=part)
        grows = not diff <= _rounding(before)
        if self.reasons:
            return model, Receipt(None, self._why(), diff, part, grows)
        return model, Receipt(diff, None, None, part, grows)

    @contextmanager
    def _comparing(self, model: nn.Module, promised: Graphs) -> Iterator[None]:
        """Compares each region with its module whenever `model` calls the module."""
        is_comparing = False  # a region may lie inside another

        def compare(path: str) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                nonlocal is_comparing
                if is_comparing:
                    return
                is_comparing = True
                try:
                    call = ModuleCall(args, kwargs)
                    found, not_wide = agreements(self.regions[path], promised[path], call, self.planned[path])
                finally:
                    is_comparing = False
                self._found.setdefault(path, []).extend(found)
                if not_wide is not None:
                    self._not_wide[path] = not_wide

            return before

        handles = connect(model, TokenIds, outside=promised.values())
        for path in promised:
            hook = compare(path)
            handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _refuse(self, promised: Graphs) -> None:
        """Raises if a region computes something else; warns if it is a user's pass that may have changed it."""
        for path, graph in promised.items():
            layers = self.planned[path]
            rule = self._broken(path, graph, layers)
            if rule is None:
                continue
            if not (user_passes := [graph_pass.name for graph_pass in registered("rewrite")]):
                raise PassError("rewrite", layers[0].site.fqn, rule)
            warnings.warn(f"{rule}. {', '.join(user_passes)} ran after rewrite", stacklevel=2)
        if self._not_wide:
            path, reason = next(iter(self._not_wide.items()))
            self.notes.append(
                f"{path or 'the model'} does not run in float32, so step 0 is compared in the model's own dtype alone: "
                f"{reason[:200]}"
            )

    def _broken(self, path: str, graph: fx.GraphModule, layers: Sequence[LayerPlan]) -> str | None:
        found = self._found.get(path)
        if found is None:
            return "outputs are promised to stay, but a second forward on the example does not reach this layer"
        failed = next((each for each in found if not each.holds), None)
        if failed is not None:
            return f"outputs on the example are promised to stay but differ by {failed}"
        if (name := unequal_copies(graph, layers)) is not None:
            return f"experts are promised to be copies of the dense FFN, but differ among themselves in {name}"
        return None

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


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Floating-point outputs, from the same random state at every call."""
    handles = connect(model, TokenIds)  # without masks: the dense model has padding in its FFNs too
    with undisturbed(model):
        out = call_with(model, example)
    for handle in handles:
        handle.remove()
    leaves = tree_leaves(dict(out) if hasattr(out, "items") else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Infinity if the outputs have other shapes."""
    if [out.shape for out in before] != [out.shape for out in after]:
        return math.inf
    pairs = zip(before, after, strict=True)
    return max((float(difference(a, b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def _rounding(outputs: Sequence[Tensor]) -> float:
    """Half the digits of the outputs: more than the rounding of a few layers makes."""
    finite = [(out[out.isfinite()].abs(), torch.finfo(out.dtype).eps) for out in outputs]
    return max((float(values.max()) * eps**0.5 for values, eps in finite if values.numel()), default=0.0)
