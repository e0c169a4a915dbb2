"""The start of every task that trains on ranks: data, model, compilation, and the same plan on all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moecompile import plan as plans
from moecompile.errors import CaptureError, ConfigError, PlanError
from moecompile.export.huggingface import export_notes
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.models.chat import load_chat_template
from moecompile.models.packing import check_packing
from moecompile.models.recorded import NotRecorded
from moecompile.models.sharded import ShardedImport, loads_sharded
from moecompile.models.source import source_model
from moecompile.passes.receipt import ON_META
from moecompile.passes.same_weights import ranks_that_differ
from moecompile.passes.trained import rounding_notes
from moecompile.pipeline import Compilation, compile_with_report
from moecompile.planner.given import given_plan
from moecompile.report.text import NOT_COMPARED
from moecompile.rundir import output_dir
from moecompile.runtime.data import TextData, load_data
from moecompile.runtime.objective import data_for
from moecompile.schema import Config, DataKind, ExpertInit, ModelDevice, RowLayout


@dataclass(kw_only=True)
class Job:
    """A model before compilation, and its data. importing: set if each rank makes only its own shards."""

    model: nn.Module
    data: TextData
    importing: ShardedImport | None

    def compile(self, config: Config) -> Compilation:
        """Compiles the model; all ranks call it.

        Raises:
            PlanError: the ranks made different plans.
        """
        try:
            compiled = self._compiled(config)
        except CaptureError as error:
            if self.importing is None:
                raise
            _say_whole(config, str(error))
            self.importing, self.model = None, source_model(config)
            compiled = self._compiled(config)
        if self.importing is not None and compiled.step0.reason == ON_META:
            reason = f"{NOT_COMPARED}the model is sharded over the ranks; task=compile compares in one process"
            compiled.step0 = dataclasses.replace(compiled.step0, reason=reason)
        if self.importing is not None and self.importing.note is not None:
            compiled.notes.append(self.importing.note)
        compiled.notes += [*rounding_notes(self.model, config), *export_notes(self.model, compiled.plan, config)]
        check_same_plan(compiled.plan)
        return compiled

    def _compiled(self, config: Config) -> Compilation:
        example = example_inputs(self.model, config.data.seq_len)
        return compile_with_report(self.model, config, example=example, plan=given_plan(config))

    def materialize(self, compiled: Compilation) -> Callable[[torch.device], None] | None:
        """The function that fills the shards if ranks make only their own; None: they have values already."""
        if self.importing is not None:
            return partial(self.importing.fill, compiled)
        compiled.regions.clear()  # they refer to whole weights, of which this rank will keep a shard
        return None


def _say_whole(config: Config, reason: str) -> None:
    """Says on rank 0 why ranks do not make their shards alone.

    Raises:
        ConfigError: the model is on the meta device, so there is no other way.
    """
    if config.model.device is ModelDevice.meta:
        fix = "Use model.device=cpu if it fits into the memory of each rank"
        raise ConfigError("model.device", "meta", f"ranks cannot make their shards of this model alone: {reason}", fix)
    if dist.get_rank() == 0:
        text = "model.load=sharded is not possible, every rank makes the whole model"
        print(f"{text}: {reason[:200]}", flush=True)


def load_job(config: Config, run_dir: Path) -> Job:
    """Loads data and model of this rank; all ranks call it."""
    folder = pretrained_folder(config.model)
    data = load_data(
        config.data, output_dir(run_dir), rank=dist.get_rank(), barrier=dist.barrier, model_folder=folder,
        seed=config.seed, chat_template=load_chat_template,
    )  # fmt: skip
    importing = _importing(config)
    model = source_model(config) if importing is None else importing.model
    data = data_for(model, data, config)
    if config.data.kind is DataKind.sft and config.data.layout is RowLayout.pack:
        check_packing(model, config.model.name)
    return Job(model=model, data=data, importing=importing)


def _importing(config: Config) -> ShardedImport | None:
    """What fills the shards of this rank, if it makes only these."""
    if not loads_sharded(config, dist.get_world_size()):
        return None
    try:
        if config.experts.init is not ExpertInit.widen:
            return ShardedImport(config)
        reason = "experts.init=widen copies whole weights"
    except NotRecorded as error:
        reason = str(error)
    _say_whole(config, reason)
    return None


def check_same_plan(plan: plans.Plan) -> None:
    """Checks that all ranks have the same plan.

    Raises:
        PlanError: the plans differ.
    """
    if different := ranks_that_differ(plan.hash):
        rule, fix = f"ranks {different} made other plans than rank 0", "Give all ranks the same config and versions"
        raise PlanError("plan.hash", plan.hash, rule, fix)
