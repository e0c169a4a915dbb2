"""Compares N ranks with one process and says, check by check, whether they agree.

Algorithm:
  1. Every rank makes the plan; all must hold the same hash.
  2. All ranks train a few steps (ranks.py); rank 0 runs the same micro-batches in one process (reference.py). This is
     done in each arithmetic: float64, then one step of float32 and of the config's own where it rounds to bf16.
  3. Rank 0 compares: batches, outputs, routes, loss, every gradient, norm, balance, weights, checkpoint. In float32 the
     rounding of the processor at hand is measured: what one process makes of it, against itself in float64. Where both
     sides round to bf16, routers of the reference choose what those of the ranks chose.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.models.build import build_model, pretrained_folder
from moecompile.plan import Plan, on_one_process
from moecompile.runtime.data import TextData, load_data, train_loader
from moecompile.runtime.objective import data_for
from moecompile.schema import Config, Precision, WireDtype
from moecompile.verify.compare import relative_error, worst
from moecompile.verify.job import Batch, Trace, build, noiseless_plan, uneven
from moecompile.verify.ranks import run_ranks
from moecompile.verify.reference import run_reference


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. error: what is held against the tolerance, relative to the largest entry of what was compared, or
    a count where the name says so. where: the name of the tensor that it occurs in.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    where: str = ""

    def row(self) -> dict[str, Any]:
        """As result.json and certificate.json have it."""
        # Programs read the key max_abs_err; what it holds is relative, or a count.
        return {
            "name": self.name,
            "max_abs_err": self.error,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "where": self.where,
        }


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative errors. Adam's quotient makes weights less exact than the gradients that they come from; None:
    they are not compared, as the quotient makes a whole step of a tiny gradient's rounding.
    """

    outputs: float
    grads: float
    norm: float
    weights: float | None


@dataclass(frozen=True, kw_only=True)
class Mode:
    """An arithmetic in which both sides run.

    dtype: of the stored weights. config: with its precision. is_narrow: whether something is rounded to bf16.
    """

    label: str
    dtype: torch.dtype
    config: Config
    is_narrow: bool = False


TOLERANCES = {
    torch.float64: Tolerance(outputs=1e-10, grads=1e-10, norm=1e-10, weights=1e-8),
    torch.float32: Tolerance(outputs=2e-5, grads=2e-5, norm=1e-5, weights=None),
}
# Both sides round, in another order: the error between them may be so many times that of one process.
_TIMES_ROUNDING, _MOST_ROUNDING = 8.0, 1e-3
# Both sides round, at other places: partial sums on the wire, and what follows. A factor or a lost part would show.
BF16 = Tolerance(outputs=0.0, grads=0.15, norm=1e-2, weights=None)
# Largest entry of a gradient that may be rounding alone, relative to the largest entry of all gradients.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3}
_CLASSES = ("experts", "router", "dense")


def certify(config: Config, run_dir: Path) -> tuple[list[Check], Plan]:
    """Runs both sides in every arithmetic that the config names; every rank calls it, rank 0 gets the checks."""
    rank = dist.get_rank()
    checks = _plan_checks(noiseless_plan(config))  # Step 1
    folder = pretrained_folder(config.model)
    data = load_data(config.data, run_dir, rank=rank, barrier=dist.barrier, model_folder=folder)
    data = data_for(build_model(config.model, config.seed), data, config)
    exact: Trace | None = None
    for mode in modes(config):
        plan = noiseless_plan(mode.config)
        trace = run_ranks(build(mode.config, plan, mode.dtype), plan, mode.config, data, run_dir / mode.label)
        if rank == 0:  # Step 2
            reference = run_reference(
                build(mode.config, on_one_process(plan), mode.dtype), mode.config, _all_batches(mode.config, data),
                trace.choices if mode.is_narrow else None,
            )  # fmt: skip
            checks += [] if len(checks) > 1 else [_batches(trace, reference), _distinct(trace)]  # Step 3
            if mode.is_narrow:
                checks += compare_narrow(trace, reference, mode.label)
            else:
                checks += compare(trace, reference, mode.dtype, exact)
                exact = reference if mode.dtype is torch.float64 else exact
        dist.barrier()
    return checks, noiseless_plan(config)


def modes(config: Config) -> list[Mode]:
    """Every arithmetic to run in: exact ones with nothing rounded, then what the config asks for where it rounds."""
    exact = copy.deepcopy(config)
    exact.trainer.precision, exact.dispatch.wire_dtype = Precision.fp32, WireDtype.auto
    found: list[Mode] = []
    for dtype in _dtypes(config):
        of_mode = copy.deepcopy(exact)
        if found:
            of_mode.trainer.max_steps = 1  # later steps would amplify rounding; float64 has made them
        found.append(Mode(label=str(dtype).removeprefix("torch."), dtype=dtype, config=of_mode))
    if config.trainer.precision is not Precision.fp32 or config.dispatch.wire_dtype is WireDtype.bf16:
        narrow = copy.deepcopy(config)
        narrow.trainer.max_steps = 1
        label = config.trainer.precision.value
        label = "bf16 wire" if config.trainer.precision is Precision.fp32 else label
        found.append(Mode(label=label, dtype=torch.float32, config=narrow, is_narrow=True))
    return found


def compare(got: Trace, wanted: Trace, dtype: torch.dtype, exact: Trace | None = None) -> list[Check]:
    """Every check of one dtype. exact: the reference in float64, by which rounding is known."""
    tolerance, label = TOLERANCES[dtype], str(dtype).removeprefix("torch.")
    flips = sum(int((a != b).any(1).sum()) for a, b in _pairs(got.routes, wanted.routes))
    routes = _count(f"{label}: routes that differ", flips)
    if flips and dtype is torch.float32:
        # Near ties are decided by rounding; what follows would compare different functions. float64 decides.
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
    if tolerance.weights is not None:
        moved = [{n: w for n, w in side.weights.items() if n not in noise} for side in (got, wanted)]
        error, where = worst(*moved)
        checks.append(_check(f"{label}: weights after {len(wanted.losses)} steps", error, tolerance.weights, where))
    checks.append(_round_trip(got, label))
    return checks


def _with_rounding(tolerance: Tolerance, wanted: Trace, exact: Trace, ignored: Collection[str]) -> Tolerance:
    """Room for what this processor rounds: measured, and never so much that a lost part or a factor would pass."""

    def room(least: float, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
        rounding = max((relative_error(a, b) for a, b in pairs.values()), default=0.0)
        return max(least, min(_TIMES_ROUNDING * rounding, _MOST_ROUNDING))

    grads = {n: (wanted.grads[n], exact.grads[n]) for n in wanted.grads.keys() & exact.grads.keys() - set(ignored)}
    norms = _numbered(_tensors(wanted.norms), _tensors(exact.norms[: len(wanted.norms)]))
    return replace(
        tolerance,
        outputs=room(tolerance.outputs, _numbered(wanted.outputs, exact.outputs)),
        grads=room(tolerance.grads, grads),
        norm=room(tolerance.norm, norms),
    )


def compare_narrow(got: Trace, wanted: Trace, label: str) -> list[Check]:
    """Checks of one step in which both sides round to bf16; the reference was told what to choose."""
    told = f"{label}: tokens that rounding alone would route elsewhere"
    return [
        Check(name=told, error=wanted.flips, tolerance=wanted.flips, passed=True),
        *_step_checks(got, wanted, label, BF16, _rounding(got, wanted, torch.bfloat16)),
        _round_trip(got, label),
    ]


def _rounding(got: Trace, wanted: Trace, dtype: torch.dtype) -> set[str]:
    """Weights whose gradient is zero but for rounding, on both sides: a key's bias, for one, which softmax cancels.

    They have no relative error, and Adam makes a full step in the direction of the rounding.
    """
    sizes = [
        {name: float(grad.abs().max()) if grad.numel() else 0.0 for name, grad in side.grads.items()}
        for side in (got, wanted)
    ]
    bound = _ROUNDING[dtype] * max(sizes[1].values(), default=0.0)
    return {name for name in sizes[0].keys() & sizes[1].keys() if all(0 < size[name] <= bound for size in sizes)}


def _step_checks(got: Trace, wanted: Trace, label: str, tolerance: Tolerance, ignored: Collection[str]) -> list[Check]:
    """Losses, gradients but the `ignored`, norms and loads."""
    lost = sorted(got.grads.keys() ^ wanted.grads.keys())
    checks = [
        _held(f"{label}: loss", _numbered(_tensors(got.losses), _tensors(wanted.losses)), tolerance.norm),
        _count(f"{label}: gradients on one side only", len(lost), ", ".join(lost[:3])),
    ]
    for kind in _CLASSES:
        names = [name for name in wanted.grads if _class_of(name) == kind and name in got.grads and name not in ignored]
        if names:
            pairs = {n: (got.grads[n], wanted.grads[n]) for n in names}
            checks.append(_held(f"{label}: gradients of {kind}", pairs, tolerance.grads))
    norms = _numbered(_tensors(got.norms), _tensors(wanted.norms))
    checks.append(_held(f"{label}: gradient norm", norms, tolerance.norm))
    checks.append(_count(f"{label}: expert loads that differ", _differing(got.loads, wanted.loads)))
    return checks


def _round_trip(got: Trace, label: str) -> Check:
    error, where = worst(got.restored, got.weights)
    return _check(f"{label}: checkpoint round trip", error, 0.0, where)


def _held(name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], most: float) -> Check:
    error, where = max(((relative_error(a, b), key) for key, (a, b) in pairs.items()), default=(0.0, "nothing"))
    return _check(name, error, most, where)


def _dtypes(config: Config) -> list[torch.dtype]:
    chosen = config.verify.dtype.value
    return [torch.float64, torch.float32] if chosen == "both" else [getattr(torch, chosen)]


def _all_batches(config: Config, data: TextData) -> list[Batch]:
    loader = train_loader(
        data.train, config.data, seed=config.seed, rank=0, world_size=1, num_steps=config.trainer.max_steps
    )
    return [uneven(batch, i, config) for i, batch in enumerate(loader)]


def _plan_checks(plan: Plan) -> list[Check]:
    hashes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, plan.hash)
    return [_count("ranks with another plan", sum(found != plan.hash for found in hashes), plan.hash)]


def _batches(got: Trace, wanted: Trace) -> Check:
    """The micro-batches of all ranks are those of one process, in order."""
    return _count("micro-batches that differ", _differing(got.inputs, wanted.inputs))


def _distinct(got: Trace) -> Check:
    """No two micro-batches hold the same tokens: EP peers must not be fed alike."""
    return _count("micro-batches seen twice", sum(torch.equal(a, b) for a, b in combinations(got.inputs, 2)))


def _class_of(name: str) -> str:
    parts = name.split(".")
    return next((kind for kind in ("experts", "router") if kind in parts), "dense")


def _differing(got: list[Tensor], wanted: list[Tensor]) -> int:
    """How many of two lists differ, entries that one of them lacks included."""
    differing = sum(not torch.equal(a, b) for a, b in zip(got, wanted, strict=False))
    return differing + abs(len(got) - len(wanted))


def _pairs(got: Mapping[str, list[Tensor]], wanted: Mapping[str, list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [pair for name in wanted for pair in zip(got[name], wanted[name], strict=True)]


def _numbered(got: list[Tensor], wanted: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"{i}": pair for i, pair in enumerate(zip(got, wanted, strict=True))}


def _tensors(values: list[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def _count(name: str, found: int, where: str = "") -> Check:
    return Check(name=name, error=found, tolerance=0, passed=found == 0, where=where)


def _check(name: str, error: float, tolerance: float, where: str) -> Check:
    return Check(name=name, error=error, tolerance=tolerance, passed=error <= tolerance, where=where)
