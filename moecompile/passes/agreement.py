"""Whether a rewritten region computes what its module computes: both on one recorded call, row by row.

Algorithm (docs/decisions/0036-a-receipt-by-regions.md derives the bound):
  1. Run module and replacement on the call, in the arithmetic of the model.
  2. Run the captured graph and the replacement with weights and arguments in fp32, if the model has fewer digits:
     rounding then makes about a millionth, and a percent of an error in one weight matrix is seen. If some of a model's
     own experts got no token, run both again with other expert ids.
  3. Run the captured graph with every weight up or down by a few roundings, at random. How far its outputs move says
     how much of a rounding reaches them.
     This is left out if the differences are explained without.
  4. Compare norms of rows. Rounding explains 2 sqrt(depth) unit (answer + size): `answer` is the move of step 3 for a
     change of 1, `size` the norm of the row, and `unit` the largest relative error of one rounding. (In fp16 also what
     the distance of its smallest numbers makes.)

A row is the last dim of an output.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture import ModuleCall, fresh_arguments, outputs_of
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch
from moecompile.match.linears import Linear, attribute
from moecompile.match.regions import Region
from moecompile.nn import Experts
from moecompile.passes.base import experts_calls
from moecompile.plan import FFNSite, LayerPlan
from moecompile.torch_private import own_buffers, own_parameters, tree_leaves, tree_map_only

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
    wide, reason = torch.promote_types(narrow, torch.float32), None
    with _exact_products():
        runs = _Runs(region, call, layers, wide)
        try:
            exact, got = runs.of_module(), runs.of(replacement)  # Step 2
        except Exception as error:  # a kernel or a cast in the model that is for one dtype alone
            reason, wide = f"{type(error).__name__}: {error}", narrow
            runs = _Runs(region, call, layers, narrow)
            exact, got = runs.of_module(), runs.of(replacement)
        outputs = {wide: _flat(exact, got, exact)}
        if narrow != wide:
            own = outputs_of(region.module, call), outputs_of(replacement, call)  # Step 1
            outputs[narrow] = list(zip(*own, exact[0], strict=True))
        found = _compared(outputs, None, region, layers)  # Step 4
        if not all(each.holds for each in found):
            found = _compared(outputs, runs.answers(exact), region, layers)  # Steps 3 and 4
    return found, reason


def unequal_copies(replacement: fx.GraphModule, layers: Sequence[LayerPlan]) -> str | None:
    """A weight in which experts that were made as copies of one dense FFN differ; None: there is none.

    A call does not say this: it reaches only the experts that it chooses.
    """
    for layer, node in zip(layers, experts_calls(replacement), strict=False):
        experts = replacement.get_submodule(str(node.target))
        if not isinstance(layer.site, FFNSite) or not isinstance(experts, Experts):
            continue
        for name, stack in experts.named_parameters(recurse=False):
            slices = layer.experts.virtual_group
            by_slice = stack.detach().unflatten(0, (slices, -1) if layer.routing.even_groups else (-1, slices))
            first, *others = by_slice.transpose(0, 1) if layer.routing.even_groups else by_slice
            if not all(torch.equal(other, first) for other in others):
                return f"{node.target}.{name}"
    return None


# -- Steps 2 and 3 ----------------------------------------------------------------------------------------------------


class _Runs:
    """Runs of a call, and of others that reach the other experts, with weights and arguments in one dtype."""

    def __init__(self, region: Region, call: ModuleCall, layers: Sequence[LayerPlan], dtype: torch.dtype) -> None:
        # The graph of a model's own experts calls them, and their hooks would run, which belong to what replaces them.
        is_called = isinstance(next(iter(region.matches.values())), ExpertsMatch)
        self.graph: nn.Module = region.module if is_called else region.graph
        self.dtype, self.stored = dtype, _as_stored(region, layers)
        self.device = next(region.module.parameters()).device.type
        calls = [fresh_arguments(each) for each in (call, *_to_others(region, call))]
        self.calls = [ModuleCall(*tree_map_only(Tensor, self._cast, arguments)) for arguments in calls]

    def of_module(self) -> _Outputs:
        """By its captured graph, in which weights are found by name; a model's own experts by themselves."""
        return self._outputs(self.graph, self._exact)

    def of(self, replacement: fx.GraphModule) -> _Outputs:
        """Of what replaces the module."""
        return self._outputs(replacement, self._cast)

    def answers(self, exact: _Outputs) -> list[Tensor]:
        """For each output of all calls: its move for a change of 1, the root of the mean square over all moves."""
        change, generator = _STEPS * torch.finfo(self.dtype).eps, torch.Generator().manual_seed(0)

        def moved(value: Tensor) -> Tensor:
            is_weight = isinstance(value, nn.Parameter)
            return _moved(self._exact(value), change, generator) if is_weight else self._exact(value)

        numbers = max(1, sum(output.numel() for output in exact[0] if output.is_floating_point()))
        moves = [self._outputs(self.graph, moved) for _ in range(min(_MOST_MOVES, math.ceil(_FEW / numbers)))]
        return [
            torch.stack([difference(output, own) / change for output in outputs]).square().mean(0).sqrt()
            for own, *outputs in _flat(exact, *moves)
        ]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, self.dtype)) if _is_computed_in(value.dtype) else value

    def _exact(self, value: Tensor) -> Tensor:
        return self.stored[id(value)](self._cast(value)) if id(value) in self.stored else self._cast(value)

    def _outputs(self, module: nn.Module, change: _Change) -> _Outputs:
        with torch.no_grad(), torch.autocast(self.device, enabled=False), _changed(module, change):
            return [outputs_of(module, each) for each in self.calls]


def _flat(*outputs: _Outputs) -> list[tuple[Tensor, ...]]:
    """The outputs of all calls, those of several runs side by side."""
    return [each for calls in zip(*outputs, strict=True) for each in zip(*calls, strict=True)]


@contextlib.contextmanager
def _changed(module: nn.Module, change: _Change) -> Iterator[None]:
    """Puts changed weights and buffers in the place of those of `module`."""
    kept = [
        (registry, name, value)
        for owner in module.modules()
        for registry in (own_parameters(owner), own_buffers(owner))
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
        factor = experts.virtual_group / layer.routing.scale
        if not isinstance(match, FFNMatch) or factor == 1:
            continue
        down = match.down
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


def _compared(
    outputs: Mapping[torch.dtype, Sequence[tuple[Tensor, ...]]],
    answers: Sequence[Tensor] | None,
    region: Region,
    layers: Sequence[LayerPlan],
) -> list[Agreement]:
    """One agreement for each arithmetic.

    Args:
        outputs: dtype -> of the module, of its replacement, and of the module in the widest dtype.
        answers: for the outputs in that dtype; None: they are not needed to explain the differences.
    """
    longest = max((max(weight.shape[-2:]) for weight in region.module.parameters() if weight.dim() > 1), default=1)
    # Weights in a latent width are new, and rounded to the dtype of the model.
    new = [max(outputs, key=_eps)] if any(layer.experts.latent_size is not None for layer in layers) else []
    depth = sum(_ROUNDINGS + layer.routing.top_k for layer in layers)
    found = []
    for dtype, of_dtype in outputs.items():
        unit = max(_unit(each, longest) for each in (dtype, *new))
        worst = Agreement(difference=0.0, bound=1.0, dtype=dtype)
        for k, (own, other, exact) in enumerate(of_dtype):
            if own.is_floating_point() and own.numel():
                answer = torch.zeros_like(exact) if answers is None else answers[k]
                least = math.sqrt(longest * own.shape[-1] if own.dim() else longest) * _smallest(dtype)
                bounds = [_FACTOR * math.sqrt(depth) * rounding for rounding in (unit, least)]
                row = _worst_row(own, other, exact, answer, bounds, dtype)
                worst = worst if row.part <= worst.part or math.isnan(worst.part) else row
        found.append(worst)
    return found


def _worst_row(
    own: Tensor, new: Tensor, exact: Tensor, answer: Tensor, roundings: Sequence[float], dtype: torch.dtype
) -> Agreement:
    """The row that is farthest from the module's. roundings: of 1 of answer and size, and of the smallest numbers."""
    sizes, answers = _rows(exact), _rows(answer)
    sizes, answers = sizes.maximum(sizes.median()), answers.maximum(answers.square().mean().sqrt())
    differences, bounds = _rows(difference(own, new), finite=False), roundings[0] * (sizes + answers) + roundings[1]
    i = int(torch.where(differences == 0, 0.0, differences / bounds).argmax())  # of a NaN, if there is one
    scale = float(sizes[i]) or 1.0
    return Agreement(difference=float(differences[i]) / scale, bound=float(bounds[i]) / scale, dtype=dtype)


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
    tensors = [tensor for tensor in (*module.parameters(), *given) if _is_computed_in(tensor.dtype)]
    kinds = {tensor.device.type for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return max(dtypes, key=_eps)


def _unit(dtype: torch.dtype, longest: int) -> float:
    """The largest relative error of one rounding; or, if it is larger, the usual one of a sum of `longest` products.

    Sums are made in fp32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps, math.sqrt(longest) * torch.finfo(wide).eps) / 2


def _smallest(dtype: torch.dtype) -> float:
    """The distance of the smallest numbers, which have no relative error: of weight in fp16 alone."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _is_computed_in(dtype: torch.dtype) -> bool:
    """Not fp8, a form of storage."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


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
