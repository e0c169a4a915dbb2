"""Compares training on N ranks with training in one process, and returns the result of each check.

Algorithm:
  1. Every rank makes the plan; all must have the same hash.
  2. All ranks train a few steps (ranks.py); rank 0 runs the same micro-batches in one process (reference.py). This is
     done in each precision: float64, then one step of float32, and one of the config's precision if it uses bf16.
  3. Rank 0 compares (checks.py): batches, outputs, routes, loss, every gradient, norm, balance, weights, checkpoint.
     In bf16, the reference replays the expert ids that the ranks chose. With `routing.replay`, both sides replay
     experts that are drawn. Rows in eight bits are rounded in the reference too (narrow_rows.py), but not in float32,
     where other roundings decide which way a number goes.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.mesh import Part
from moecompile.models.build import pretrained_folder
from moecompile.models.chat import load_chat_template
from moecompile.models.packing import check_packing
from moecompile.models.source import source_model
from moecompile.plan import WIRE_FORMATS, Plan, on_one_process
from moecompile.runtime.data import TextData, load_data, train_loader
from moecompile.runtime.objective import data_for
from moecompile.schema import Config, DataKind, Precision, RowLayout, WireDtype, mesh_spec
from moecompile.verify.checks import (
    BF16,
    Check,
    as_far_as_rounding,
    compare,
    compare_narrow,
    count,
    counted,
    distinct_batches,
    same_batches,
)
from moecompile.verify.job import Batch, Trace, build, drawn_routes, noiseless_plan, uneven
from moecompile.verify.narrow_rows import round_rows, separate, unrounded
from moecompile.verify.ranks import run_ranks
from moecompile.verify.reference import run_reference


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A precision in which both sides run.

    dtype: of the stored weights. config: with this precision. is_narrow: whether something is rounded to bf16; else
    what is rounded is rows in eight bits alone.
    """

    label: str
    dtype: torch.dtype
    config: Config
    is_narrow: bool = False


def certify_config(config: Config, run_dir: Path) -> tuple[list[Check], Plan]:
    """Runs both sides in every precision of the config. Every rank calls it; rank 0 returns the checks."""
    rank = dist.get_rank()
    planned = noiseless_plan(config)
    config = _with_wire(config, planned)
    checks = _plan_checks(planned)  # Step 1
    folder = pretrained_folder(config.model)
    data = load_data(
        config.data, run_dir, rank=rank, barrier=dist.barrier, model_folder=folder, seed=config.seed,
        chat_template=load_chat_template,
    )  # fmt: skip
    model = source_model(config)
    data = data_for(model, data, config)
    if config.data.kind is DataKind.sft and config.data.layout is RowLayout.pack:
        check_packing(model, config.model.name)
    exact: Trace | None = None
    for mode in modes(config):
        plan = planned if mode.config == config else noiseless_plan(mode.config)
        plan = plan if mode.is_narrow else unrounded(plan)
        trace = run_ranks(build(mode.config, plan, mode.dtype), plan, mode.config, data, run_dir / mode.label)
        if rank == 0:  # Step 2
            alone, batches = build(mode.config, _alone(plan), mode.dtype), _all_batches(mode.config, data)
            round_rows(alone, plan.layers)
            choices = _drawn(alone, mode.config, batches) or (trace.choices if mode.is_narrow else None)
            by_rows = {each.weight: each.by_rows for each in plan.lookups if each.by_rows}
            reference = run_reference(alone, mode.config, batches, choices, by_rows)
            if len(checks) == 1:  # Step 3
                assert trace.places is not None
                checks += [counted(name, numbers) for name, numbers in trace.places.faults().items()]
                checks += [same_batches(trace, reference), distinct_batches(trace)]
            if mode.is_narrow:
                tolerance = BF16
                if any(layer.dispatch.wire.narrow for layer in plan.layers):
                    plain = build(mode.config, _alone(plan), mode.dtype)
                    tolerance = as_far_as_rounding(
                        reference, run_reference(plain, mode.config, batches, choices, by_rows)
                    )
                checks += compare_narrow(trace, reference, mode.label, tolerance)
            else:
                checks += compare(trace, reference, mode.dtype, exact)
                exact = reference if mode.dtype is torch.float64 else exact
        dist.barrier()
    return checks, planned


def _with_wire(config: Config, plan: Plan) -> Config:
    """The config with the format of rows that was chosen."""
    if config.dispatch.wire_dtype is not WireDtype.fp8_if_faster:
        return config
    narrow = next(filter(None, (layer.dispatch.wire.narrow for layer in plan.layers)), WireDtype.auto.value)
    return dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, wire_dtype=WireDtype(narrow)))


def _alone(plan: Plan) -> Plan:
    return separate(on_one_process(plan), plan)


def modes(config: Config) -> list[Mode]:
    """The precisions to run in: first without casts to bf16, then that of the config if it has some."""
    exact, wire = copy.deepcopy(config), config.dispatch.wire_dtype
    exact.trainer.precision, exact.dispatch.wire_dtype = Precision.fp32, WireDtype.auto
    chosen: list[Mode] = []
    for dtype in _dtypes(config):
        of_mode = copy.deepcopy(exact)
        if dtype is torch.float64 and WIRE_FORMATS[wire.value].narrow:
            of_mode.dispatch.wire_dtype = wire
        if chosen:
            of_mode.trainer.max_steps = 1  # later steps would amplify rounding errors; float64 runs them
        chosen.append(Mode(label=str(dtype).removeprefix("torch."), dtype=dtype, config=of_mode))
    if config.trainer.precision is not Precision.fp32 or wire not in (WireDtype.auto, WireDtype.fp32):
        narrow = copy.deepcopy(config)
        narrow.trainer.max_steps = 1
        label = config.trainer.precision.value
        label = f"{wire.value} wire" if config.trainer.precision is Precision.fp32 else label
        chosen.append(Mode(label=label, dtype=torch.float32, config=narrow, is_narrow=True))
    return chosen


def _dtypes(config: Config) -> list[torch.dtype]:
    name = config.verify.dtype.value
    return [torch.float64, torch.float32] if name == "both" else [getattr(torch, name)]


def _all_batches(config: Config, data: TextData) -> list[Batch]:
    loader = train_loader(
        data.train, config.data, seed=config.seed, rank=0, world_size=1, num_steps=config.trainer.max_steps,
        multiple=mesh_spec(config.mesh).size(Part.SEQUENCE),  # the same rows as on the ranks
    )  # fmt: skip
    return [uneven(batch, i, config) for i, batch in enumerate(loader)]


def _drawn(model: nn.Module, config: Config, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Layer -> what each micro-batch of step 0 replays."""
    found: dict[str, list[Tensor]] = {}
    for i, batch in enumerate(batches[: len(batches) // config.trainer.max_steps]):
        for name, ids in drawn_routes(model, config, batch, i).items():
            found.setdefault(name, []).append(ids)
    return found


def _plan_checks(plan: Plan) -> list[Check]:
    hashes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, plan.hash)
    return [count("ranks with another plan", sum(other != plan.hash for other in hashes), plan.hash)]
