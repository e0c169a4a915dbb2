"""Whether a rewritten region computes what its module computes: both on one recorded call, row by row.

Algorithm (docs/decisions/0036-a-receipt-by-regions.md derives the bound):
  1. Run module and replacement on the call, in the arithmetic of the model.
  2. Run the captured graph and the replacement with weights and arguments in fp32, if the model has fewer digits:
     rounding then makes about a millionth, and a percent of an error in one weight matrix is seen. If some of a model's
     own experts got no token, run both again with other expert ids.
  3. Run the captured graph with every weight up or down by a few roundings, at random. How far its outputs move says
     how much of a rounding reaches them.
  4. Compare norms of rows. Rounding explains 2 sqrt(depth) unit (answer + size): `answer` is the move of step 3 for a
     change of 1, `size` the norm of the row, and `unit` the largest relative error of one rounding.

A row is the last dim of an output.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from moecompile.capture import ModuleCall, fresh_arguments, outputs_of
from moecompile.match.experts import ExpertsMatch
from moecompile.match.linears import Linear, attribute
from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Region
from moecompile.nn import Experts
from moecompile.passes.base import experts_calls
from moecompile.plan import FFNSite, LayerPlan

_FACTOR = 2.0
_ROUNDINGS = 8  # of a token in one layer, beside the sum over its experts
_FEW, _MOST_MOVES = 64, 8  # outputs of fewer numbers are moved again: some of them may happen to stay
_STEPS = 8  # of eps: close to rounding, so that an activation with steps answers as it does to rounding

_Outputs = list[list[Tensor]]  # of each call
_Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well a replacement agrees with its module: the worst row in one arithmetic.

    difference: norm of the difference, over that of the row or, if larger, of the median row. bound: what rounding
    explains of it.
    """

    difference: float
    bound: float
    dtype: torch.dtype

    @property
    def holds(self) -> bool:
        """False also if the difference is no number."""
        return self.difference <= self.bound

    @property
    def part(self) -> float:
        """The difference as a part of the bound."""
        if not self.bound:
            return math.inf if self.difference else 0.0
        return self.difference / self.bound

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.difference:.2g} of their size in {name}, and rounding makes {self.bound:.2g}"


def agreements(
    region: Region, replacement: fx.GraphModule, call: ModuleCall, layers: Sequence[LayerPlan]
) -> tuple[list[Agreement], str | None]:
    """Compares what replaces the module of a region with the module.

    Args:
        region: as captured. call: of its module. layers: of the region.

    Returns:
        Agreements in the model's arithmetic and in fp32; and why the region does not run in fp32, if it does not.
    """
    narrow = _narrowest(region.module, call)
    wide = torch.promote_types(narrow, torch.float32)
    reason = None
    with _exact_products():
        own, new = outputs_of(region.module, call), outputs_of(replacement, call)  # Step 1
        try:
            exact, got, moved = _runs(region, replacement, call, layers, wide)  # Steps 2 and 3
        except Exception as error:  # a kernel or a cast in the model that is for one dtype alone
            reason, wide = f"{type(error).__name__}: {error}", narrow
            exact, got, moved = _runs(region, replacement, call, layers, narrow)
    # Step 4
    longest = max((max(weight.shape[-2:]) for weight in region.module.parameters() if weight.dim() > 1), default=1)
    units = {wide: _unit(wide, longest), narrow: _unit(narrow, longest)}
    if any(layer.experts.latent_size is not None for layer in layers):
        units[wide] = units[narrow]  # projected weights are new, and rounded to the dtype of the model
    depth = sum(_ROUNDINGS + layer.routing.top_k for layer in layers)
    factors = {dtype: _FACTOR * math.sqrt(depth) * unit for dtype, unit in units.items()}
    answers = [
        _answers(each, its_moved, _change(wide))
        for each, its_moved in zip(exact, zip(*moved, strict=True), strict=True)
    ]
    of_calls = (row for each in zip(exact, got, exact, answers, strict=True) for row in zip(*each, strict=True))
    return [
        _worst(zip(own, new, exact[0], answers[0], strict=True), factors[narrow], narrow),
        _worst(of_calls, factors[wide], wide),
    ], reason


def unequal_copies(replacement: fx.GraphModule, layers: Sequence[LayerPlan]) -> str | None:
    """A weight in which experts that were made as copies of one dense FFN differ; None: there is none.

    A call does not say this: it reaches only the experts that it chooses.
    """
    for layer, node in zip(layers, experts_calls(replacement), strict=False):
        experts = replacement.get_submodule(str(node.target))
        if not isinstance(layer.site, FFNSite) or not isinstance(experts, Experts):
            continue
        for name, stack in experts.named_parameters(recurse=False):
            first, *others = stack.detach().unflatten(0, (-1, layer.experts.virtual_group))
            if not all(torch.equal(other, first) for other in others):
                return f"{node.target}.{name}"
    return None


# -- Steps 2 and 3 ----------------------------------------------------------------------------------------------------


def _runs(
    region: Region, replacement: fx.GraphModule, call: ModuleCall, layers: Sequence[LayerPlan], dtype: torch.dtype
) -> tuple[_Outputs, _Outputs, list[_Outputs]]:
    """Outputs of the captured graph, of its replacement, and of the captured graph whenever weights are moved."""

    def cast(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value

    def exact(value: Tensor) -> Tensor:
        return stored[id(value)](cast(value)) if id(value) in stored else cast(value)

    def moved(value: Tensor) -> Tensor:
        is_weight = isinstance(value, nn.Parameter)
        return _moved(exact(value), _change(dtype), generator) if is_weight else exact(value)

    stored, generator = _as_stored(region, layers), torch.Generator().manual_seed(0)
    device = next(region.module.parameters()).device.type
    calls = [
        ModuleCall(*tree_map_only(Tensor, cast, fresh_arguments(each))) for each in (call, *_to_others(region, call))
    ]

    def outputs(module: nn.Module, change: _Change) -> _Outputs:
        with torch.no_grad(), torch.autocast(device, enabled=False), _changed(module, change):
            return [outputs_of(module, each) for each in calls]

    own = outputs(region.graph, exact)
    numbers = max(1, sum(output.numel() for output in own[0] if output.is_floating_point()))
    moves = [outputs(region.graph, moved) for _ in range(min(_MOST_MOVES, math.ceil(_FEW / numbers)))]
    return own, outputs(replacement, cast), moves


@contextlib.contextmanager
def _changed(module: nn.Module, change: _Change) -> Iterator[None]:
    """Puts changed weights and buffers in the place of those of `module`."""
    kept = [
        (registry, name, value)
        for owner in module.modules()
        for registry in (owner._parameters, owner._buffers)
        for name, value in registry.items()
        if value is not None and value.is_floating_point()
    ]
    made: dict[int, Tensor] = {}
    try:
        for registry, name, value in kept:
            if id(value) not in made:
                new = change(value).detach()
                made[id(value)] = nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new
            registry[name] = made[id(value)]  # type: ignore[assignment]
        yield
    finally:
        for registry, name, value in kept:
            registry[name] = value  # type: ignore[assignment]


def _to_others(region: Region, call: ModuleCall) -> list[ModuleCall]:
    """Calls of the captured graph that reach the experts that `call` does not; none for a dense FFN."""
    match = next(iter(region.matches.values()))
    if not isinstance(match, ExpertsMatch):
        return []
    given = inspect.signature(region.module.forward).bind(*call.args, **call.kwargs).arguments
    hidden, ids, weights = (given[name] for name in match.call.arguments)
    chosen = ids.flatten(0, -2).sum(0).nonzero() if match.call.one_hot else ids
    is_reached = torch.isin(torch.arange(match.num_experts, device=ids.device), chosen.flatten())
    experts, num_slots = is_reached.int().argsort(stable=True), ids.shape[0] * ids.shape[1]
    calls = []
    for start in range(0, match.num_experts - int(is_reached.sum()), max(1, num_slots)):
        slots = torch.arange(start, start + num_slots, device=ids.device) % match.num_experts
        others = experts[slots].view(ids.shape[:2])
        others = F.one_hot(others, ids.shape[-1]) if match.call.one_hot else others
        calls.append(ModuleCall((hidden, others.to(ids.dtype), weights), {}))
    return calls


def _as_stored(region: Region, layers: Sequence[LayerPlan]) -> dict[int, _Change]:
    """By id of a dense weight: what it is once experts hold it times a factor, rounded."""
    found: dict[int, _Change] = {}
    for layer in layers:
        match, experts = region.matches[layer.site.fqn], layer.experts
        if not isinstance(match, FFNMatch):
            continue
        down, factor = match.down, experts.virtual_group / layer.routing.scale
        first = experts.num_shared * experts.d_expert if experts.is_sliced else 0  # the shared slices have no factor
        weight = attribute(region.graph, down.weight)
        found[id(weight)] = partial(_columns_as_stored, down=down, first=first, factor=factor, dtype=weight.dtype)
        if down.bias is not None and not first:
            bias = attribute(region.graph, down.bias)
            found[id(bias)] = partial(_times_as_stored, factor=factor, dtype=bias.dtype)
    return found


def _columns_as_stored(wide: Tensor, down: Linear, first: int, factor: float, dtype: torch.dtype) -> Tensor:
    new = wide.clone()
    own = new.T if down.transposed else new
    own = own if down.rows is None else own[down.rows]
    own[:, first:] = _times_as_stored(own[:, first:], factor, dtype)
    return new


def _times_as_stored(wide: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (wide * factor).to(dtype).to(wide.dtype) / factor


def _moved(weight: Tensor, change: float, generator: torch.Generator) -> Tensor:
    """Each row and each column up or down by a part of itself."""
    for dim in range(max(0, weight.dim() - 2), weight.dim()):
        signs = torch.randint(0, 2, (weight.shape[dim],), generator=generator).to(weight) * 2 - 1
        weight = weight * (1 + change * signs).view(-1, *(1,) * (weight.dim() - 1 - dim))
    return weight


# -- Step 4 -----------------------------------------------------------------------------------------------------------


def _answers(exact: Sequence[Tensor], moved: Sequence[Sequence[Tensor]], change: float) -> list[Tensor]:
    """Of each output: its move for a change of 1, the root of its mean square over all moves."""
    return [
        torch.stack([difference(output, own) / change for output in outputs]).square().mean(0).sqrt()
        for own, *outputs in zip(exact, *moved, strict=True)
    ]


def _worst(outputs: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], factor: float, dtype: torch.dtype) -> Agreement:
    """The row that is farthest from its module's.

    Args:
        outputs: of the module, of its replacement, of the captured graph in fp32, and its answer to a change of 1.
        factor: of answer and size in the bound.
    """
    worst = Agreement(difference=0.0, bound=factor, dtype=dtype)
    for own, new, exact, answer in outputs:
        if not own.is_floating_point() or not own.numel():
            continue
        sizes, answers = _rows(exact), _rows(answer)
        sizes, answers = sizes.maximum(sizes.median()), answers.maximum(answers.square().mean().sqrt())
        differences, bounds = _rows(difference(own, new), finite=False), factor * (sizes + answers)
        i = int(torch.where(differences == 0, 0.0, differences / bounds).argmax())  # of a NaN, if there is one
        scale = float(sizes[i]) or 1.0
        found = Agreement(difference=float(differences[i]) / scale, bound=float(bounds[i]) / scale, dtype=dtype)
        worst = worst if found.part <= worst.part or math.isnan(worst.part) else found
    return worst


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in fp32 or wider; 0 where both are the same infinity or both are NaN."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) - b.to(wide)).masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)


def _rows(output: Tensor, *, finite: bool = True) -> Tensor:
    """Norms of the rows. finite: what is no number counts as 0."""
    rows = output.to(torch.promote_types(output.dtype, torch.float32))
    rows = rows.reshape(-1, rows.shape[-1]) if rows.dim() else rows.reshape(1, 1)
    norms: Tensor = torch.linalg.vector_norm(rows.nan_to_num(0.0, 0.0, 0.0) if finite else rows, dim=-1)
    return norms


def _narrowest(module: nn.Module, call: ModuleCall) -> torch.dtype:
    """The dtype with the fewest digits in which `module` computes."""
    given = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    tensors = [tensor for tensor in (*module.parameters(), *given) if tensor.is_floating_point()]
    kinds = {tensor.device.type for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _unit(dtype: torch.dtype, longest: int) -> float:
    """The largest relative error of one rounding; or, if it is larger, the usual one of a sum of `longest` products.

    Sums are made in fp32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, math.sqrt(longest) * torch.finfo(wide).eps) / 2


def _change(dtype: torch.dtype) -> float:
    return _STEPS * torch.finfo(dtype).eps


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Products of fp32 have all their digits (no TF32)."""
    libraries: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)
    backends = [library.matmul for library in libraries]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
