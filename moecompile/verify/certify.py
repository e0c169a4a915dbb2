"""Compares N ranks with one process and says, check by check, whether they agree.

Algorithm:
  1. Every rank makes the plan; all must hold the same hash.
  2. All ranks train a few steps (ranks.py); rank 0 runs the same micro-batches in one process (reference.py).
  3. Rank 0 compares: batches, outputs, routes, loss, every gradient, norm, balance, weights, checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.models import build_model, pretrained_folder
from moecompile.plan import Plan
from moecompile.runtime.data import TextData, load_data, train_loader
from moecompile.runtime.objective import data_for
from moecompile.schema import Config
from moecompile.verify.compare import relative_error, worst
from moecompile.verify.job import Batch, Trace, build, noiseless_plan, on_one_process, uneven
from moecompile.verify.ranks import run_ranks
from moecompile.verify.reference import run_reference


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. max_abs_err: the error that is held against the tolerance, relative to the largest entry of what
    was compared (a count where the name says so). where: the name of the tensor that it occurs in.
    """

    name: str
    max_abs_err: float
    tolerance: float
    passed: bool
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest relative errors. Adam's quotient makes weights less exact than the gradients that they come from."""

    outputs: float
    grads: float
    norm: float
    weights: float


TOLERANCES = {
    torch.float64: Tolerance(outputs=1e-10, grads=1e-10, norm=1e-10, weights=1e-8),
    torch.float32: Tolerance(outputs=2e-5, grads=2e-5, norm=1e-5, weights=1e-3),
}
_CLASSES = ("experts", "router", "dense")


def certify(config: Config, run_dir: Path) -> tuple[list[Check], Plan]:
    """Runs both sides in every dtype that the config names; every rank calls it, rank 0 gets the checks."""
    rank = dist.get_rank()
    plan = noiseless_plan(config)  # Step 1
    checks = _plan_checks(plan)
    folder = pretrained_folder(config.model)
    data = load_data(config.data, run_dir, rank=rank, barrier=dist.barrier, model_folder=folder)
    data = data_for(build_model(config.model, config.seed), data, config)
    for dtype in _dtypes(config):
        trace = run_ranks(build(config, plan, dtype), plan, config, data, run_dir / str(dtype).removeprefix("torch."))
        if rank == 0:  # Step 2
            reference = run_reference(build(config, on_one_process(plan), dtype), config, _all_batches(config, data))
            checks += [] if len(checks) > 1 else [_batches(trace, reference), _distinct(trace)]  # Step 3
            checks += compare(trace, reference, dtype)
        dist.barrier()
    return checks, plan


def compare(got: Trace, wanted: Trace, dtype: torch.dtype) -> list[Check]:
    """Every check of one dtype."""
    tolerance, label = TOLERANCES[dtype], str(dtype).removeprefix("torch.")
    checks: list[Check] = []
    flips = sum(int((a != b).any(1).sum()) for a, b in _pairs(got.routes, wanted.routes))
    routes = _count(f"{label}: routes that differ", flips)
    if flips and dtype is torch.float32:
        # Near ties are decided by rounding; what follows would compare different functions. float64 decides.
        return [Check(name=f"{routes.name} by rounding", max_abs_err=flips, tolerance=flips, passed=True)]
    checks.append(routes)

    def held(name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], most: float) -> None:
        error, where = max(((relative_error(a, b), key) for key, (a, b) in pairs.items()), default=(0.0, "nothing"))
        checks.append(_check(f"{label}: {name}", error, most, where))

    held("outputs", _numbered(got.outputs, wanted.outputs), tolerance.outputs)
    held("loss", _numbered(_tensors(got.losses), _tensors(wanted.losses)), tolerance.norm)
    lost = sorted(got.grads.keys() ^ wanted.grads.keys())
    checks.append(_count(f"{label}: gradients on one side only", len(lost), ", ".join(lost[:3])))
    for kind in _CLASSES:
        names = [name for name in wanted.grads if _class_of(name) == kind and name in got.grads]
        if names:
            held(f"gradients of {kind}", {n: (got.grads[n], wanted.grads[n]) for n in names}, tolerance.grads)
    held("gradient norm", _numbered(_tensors(got.norms), _tensors(wanted.norms)), tolerance.norm)
    checks.append(_count(f"{label}: expert loads that differ", _differing(got.loads, wanted.loads)))
    biases = [name for name in wanted.weights if name.endswith("correction_bias")]
    if biases:
        held("correction bias", {n: (got.weights[n], wanted.weights[n]) for n in biases}, tolerance.outputs)
    error, where = worst(got.weights, wanted.weights)
    checks.append(_check(f"{label}: weights after {len(wanted.losses)} steps", error, tolerance.weights, where))
    error, where = worst(got.restored, got.weights)
    checks.append(_check(f"{label}: checkpoint round trip", error, 0.0, where))
    return checks


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
    return Check(name=name, max_abs_err=found, tolerance=0, passed=found == 0, where=where)


def _check(name: str, error: float, tolerance: float, where: str) -> Check:
    return Check(name=name, max_abs_err=error, tolerance=tolerance, passed=error <= tolerance, where=where)
