"""The checks that compare the trace of N ranks with that of one process. Pure functions without communication.

In float32, the rounding error of this processor is measured, as the difference of the reference to float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moecompile.verify.diagnosis import Difference, difference

if TYPE_CHECKING:
    from moecompile.verify.job import Trace

# -- two sets of tensors -----------------------------------------------------------------------------------------------


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry of `wanted`; 0 if both are zero everywhere, infinite for NaN."""
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    error = difference / scale if scale else difference
    return math.inf if math.isnan(error) else error  # `max` over several would lose a NaN


def worst(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over all tensors, and the name of its tensor.

    Raises:
        KeyError: a tensor is on one side only, such as a missing gradient.
    """
    if lost := sorted(got.keys() ^ wanted.keys()):
        raise KeyError(f"on one side only: {lost}")
    return max((relative_error(got[name], wanted[name]), name) for name in wanted)


# -- two traces --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. error: compared with the tolerance; relative to the largest entry of the reference, or a count if
    the name says so. where: the name of the tensor with the error.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    where: str = ""

    def row(self) -> dict[str, Any]:
        """The entry in result.json and certificate.json."""
        # The key max_abs_err is kept for programs that read it; its value is relative, or a count.
        return {
            "name": self.name,
            "max_abs_err": self.error,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "where": self.where,
        }


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative errors. Adam's quotient makes weights less exact than gradients. None: weights are not compared,
    because the quotient turns the rounding error of a tiny gradient into a full step.
    """

    outputs: float
    grads: float
    norm: float
    weights: float | None


TOLERANCES = {
    torch.float64: Tolerance(outputs=1e-10, grads=1e-10, norm=1e-10, weights=1e-8),
    torch.float32: Tolerance(outputs=2e-5, grads=2e-5, norm=1e-5, weights=None),
}
# Both sides round in different orders: the error between them may be this many times the error of one process.
_TIMES_ROUNDING, _MOST_ROUNDING = 8.0, 1e-3
# Both sides round at different places (partial sums on the wire). A wrong factor or a missing part is still detected.
BF16 = Tolerance(outputs=0.0, grads=0.15, norm=1e-2, weights=None)
_NORM_OF_EIGHT_BITS, _LESS_THAN_A_FACTOR = 3e-2, 0.45  # of two, or a half
# Gradients with no larger entry may be pure rounding error; relative to the largest entry of all gradients.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3}
_CLASSES = ("experts", "router", "dense")


def same_batches(got: Trace, wanted: Trace) -> Check:
    """Checks that the micro-batches of all ranks are those of one process, in order."""
    return count("micro-batches that differ", _differing(got.inputs, wanted.inputs))


def distinct_batches(got: Trace) -> Check:
    """Checks that no two micro-batches have the same tokens: EP peers must get different data."""
    return count("micro-batches seen twice", sum(torch.equal(a, b) for a, b in combinations(got.inputs, 2)))


def compare(got: Trace, wanted: Trace, dtype: torch.dtype, exact: Trace | None = None) -> list[Check]:
    """Every check of one dtype. exact: the reference in float64, from which rounding errors are measured."""
    tolerance, label = TOLERANCES[dtype], str(dtype).removeprefix("torch.")
    flips = sum(int((a != b).any(1).sum()) for a, b in _pairs(got.routes, wanted.routes))
    routes = count(f"{label}: routes that differ", flips)
    if flips and dtype is torch.float32:
        # Rounding decides near ties, and further checks would compare different functions. float64 has checked them.
        return [Check(name=f"{routes.name} by rounding", error=flips, tolerance=flips, passed=True)]
    noise = _rounding(got, wanted, dtype)
    if exact is not None:
        tolerance = _with_rounding(tolerance, wanted, exact, noise)
    checks = [
        routes,
        _held(f"{label}: outputs", _numbered(got.outputs, wanted.outputs), tolerance.outputs),
        *_step_checks(got, wanted, label, tolerance, noise),
    ]
    biases = [name for name in wanted.weights if name.endswith("correction_bias")]
    if biases:
        pairs = {n: (got.weights[n], wanted.weights[n]) for n in biases}
        checks.append(_held(f"{label}: correction bias", pairs, tolerance.outputs))
    if noise:
        where = f"{min(noise)}: zero in exact arithmetic, not compared"
        name = f"{label}: gradients of rounding alone"
        checks.append(Check(name=name, error=len(noise), tolerance=len(noise), passed=True, where=where))
    if idle := _idle(wanted):
        where = f"expert {idle[0][1]} of MoE layer {idle[0][0]}: its gradients are zero on both sides, right or wrong"
        name = f"{label}: experts that no token chose"
        checks.append(Check(name=name, error=len(idle), tolerance=len(idle), passed=True, where=where))
    if tolerance.weights is not None:
        moved = [{n: w for n, w in side.weights.items() if n not in noise} for side in (got, wanted)]
        error, where = worst(*moved)
        checks.append(_check(f"{label}: weights after {len(wanted.losses)} steps", error, tolerance.weights, where))
    checks.append(_round_trip(got, label))
    return checks


def _with_rounding(tolerance: Tolerance, wanted: Trace, exact: Trace, ignored: Collection[str]) -> Tolerance:
    """`tolerance`, raised to this processor's measured rounding error, up to a limit that still detects real errors."""
    grads = {n: (wanted.grads[n], exact.grads[n]) for n in wanted.grads.keys() & exact.grads.keys() - set(ignored)}
    norms = _numbered(_tensors(wanted.norms), _tensors(exact.norms[: len(wanted.norms)]))
    return replace(
        tolerance,
        outputs=with_room(tolerance.outputs, _numbered(wanted.outputs, exact.outputs).values()),
        grads=with_room(tolerance.grads, grads.values()),
        norm=with_room(tolerance.norm, norms.values()),
    )


def with_room(least: float, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """A tolerance that leaves room for the rounding error of one process, the difference within the pairs."""
    rounding = max((relative_error(a, b) for a, b in pairs), default=0.0)
    return max(least, min(_TIMES_ROUNDING * rounding, _MOST_ROUNDING))


def as_far_as_rounding(wanted: Trace, unrounded: Trace) -> Tolerance:
    """With rows in eight bits rounding to bf16 decides which way some numbers go, so ranks may be twice as far from the
    reference as it is from one that does not round. What must be exact is compared in float64.
    """
    pairs = ((wanted.grads[n], unrounded.grads[n]) for n in wanted.grads.keys() & unrounded.grads.keys())
    rounding = max((relative_error(a, b) for a, b in pairs), default=0.0)
    most = max(BF16.grads, min(2 * rounding, _LESS_THAN_A_FACTOR))
    return replace(BF16, grads=most, norm=_NORM_OF_EIGHT_BITS)


def compare_narrow(got: Trace, wanted: Trace, label: str, tolerance: Tolerance = BF16) -> list[Check]:
    """Checks of one step in which both sides round to bf16; the reference replayed the choices of the ranks."""
    flips = f"{label}: tokens that rounding alone would route elsewhere"
    return [
        Check(name=flips, error=wanted.flips, tolerance=wanted.flips, passed=True),
        *_step_checks(got, wanted, label, tolerance, _rounding(got, wanted, torch.bfloat16)),
        _round_trip(got, label),
    ]


def _rounding(got: Trace, wanted: Trace, dtype: torch.dtype) -> set[str]:
    """Weights whose gradient is only rounding error on both sides, such as the bias of a key, which softmax cancels.

    They have no relative error, and Adam makes a full step in the direction of the rounding error.
    """
    sizes = [
        {name: float(grad.abs().max()) if grad.numel() else 0.0 for name, grad in side.grads.items()}
        for side in (got, wanted)
    ]
    bound = ROUNDING[dtype] * max(sizes[1].values(), default=0.0)
    return {name for name in sizes[0].keys() & sizes[1].keys() if all(0 < size[name] <= bound for size in sizes)}


def _idle(wanted: Trace) -> list[tuple[int, int]]:
    """(MoE layer, expert) of each expert without a token in any step."""
    layers = len(wanted.loads) // len(wanted.losses)
    sums = [torch.stack(wanted.loads[i::layers]).sum(0) for i in range(layers)]
    return [(i, expert) for i, load in enumerate(sums) for expert in torch.where(load == 0)[0].tolist()]


def _step_checks(got: Trace, wanted: Trace, label: str, tolerance: Tolerance, ignored: Collection[str]) -> list[Check]:
    """Checks of losses, gradients except those in `ignored`, norms and loads."""
    lost = sorted(got.grads.keys() ^ wanted.grads.keys())
    checks = [
        _held(f"{label}: loss", _numbered(_tensors(got.losses), _tensors(wanted.losses)), tolerance.norm),
        count(f"{label}: gradients on one side only", len(lost), ", ".join(lost[:3])),
    ]
    for kind in _CLASSES:
        names = [name for name in wanted.grads if _class_of(name) == kind and name in got.grads and name not in ignored]
        if names:
            axes = got.expert_axes if kind == "experts" else got.dense_axes
            differences = {
                n: difference(got.held[n], wanted.grads[n].double().flatten(), axes, tolerance.grads) for n in names
            }
            checks.append(explained(f"{label}: gradients of {kind}", differences, tolerance.grads)[0])
    norms = _numbered(_tensors(got.norms), _tensors(wanted.norms))
    checks.append(_held(f"{label}: gradient norm", norms, tolerance.norm))
    checks.append(count(f"{label}: expert loads that differ", _differing(got.loads, wanted.loads)))
    return checks


def _round_trip(got: Trace, label: str) -> Check:
    error, where = worst(got.restored, got.saved)
    return _check(f"{label}: checkpoint round trip", error, 0.0, where)


def _held(name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], most: float) -> Check:
    error, where = max(((relative_error(a, b), key) for key, (a, b) in pairs.items()), default=(0.0, "nothing"))
    return _check(name, error, most, where)


def _class_of(name: str) -> str:
    parts = name.split(".")
    return next((kind for kind in ("experts", "router") if kind in parts), "dense")


def _differing(got: list[Tensor], wanted: list[Tensor]) -> int:
    """Number of entries that differ between two lists, or are in one of them only."""
    differing = sum(not torch.equal(a, b) for a, b in zip(got, wanted, strict=False))
    return differing + abs(len(got) - len(wanted))


def _pairs(got: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [pair for name in wanted for pair in zip(got[name], wanted[name], strict=True)]


def _numbered(got: list[Tensor], wanted: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"{i}": pair for i, pair in enumerate(zip(got, wanted, strict=True))}


def _tensors(values: list[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def explained(
    name: str, differences: Mapping[str, Difference], tolerance: float
) -> tuple[Check, list[tuple[str, Difference]]]:
    """One check of many values, which says of the worst what it is; and those that differ, the worst first."""
    wrong = sorted(((key, each) for key, each in differences.items() if each.text), key=lambda pair: -pair[1].error)
    worst_key, error = max(((key, d.error) for key, d in differences.items()), key=lambda p: p[1], default=("", 0.0))
    where = f"{wrong[0][0]}: {wrong[0][1].text}{_more(len(wrong) - 1)}" if wrong else worst_key
    return Check(name=name, error=error, tolerance=tolerance, passed=not wrong, where=where), wrong


def _more(number: int) -> str:
    return f"; {number} more" if number else ""


def counted(check: str, numbers: Counter[str]) -> Check:
    """A check that passes if nothing is counted; it names what has most."""
    named = [name for name, number in numbers.most_common() if number]
    return count(check, numbers.total(), f"{named[0]}{_more(len(named) - 1)}" if named else "")


def count(name: str, number: int, where: str = "") -> Check:
    """A check that passes if `number` is 0."""
    return Check(name=name, error=number, tolerance=0, passed=number == 0, where=where)


def _check(name: str, error: float, tolerance: float, where: str) -> Check:
    return Check(name=name, error=error, tolerance=tolerance, passed=error <= tolerance, where=where)
