"""A rank of task=rehearse, which no other rank answers: `python -m moecompile.tasks.ranks.rehearse RUN_DIR RANK`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from moecompile import plan as plans
from moecompile.compose import RESOLVED, load_resolved
from moecompile.errors import MoecompileError
from moecompile.models.build import build_empty, example_inputs, pretrained_folder
from moecompile.models.initial import materialise
from moecompile.models.source import source_structure
from moecompile.models.stored import Stored
from moecompile.named_code import VARIABLE, from_launcher, load_plugins, named_in
from moecompile.pipeline import compile_with_report
from moecompile.plan import Plan
from moecompile.planner.given import FILE
from moecompile.rundir import output_dir
from moecompile.runtime.rehearsal import Rehearsal, load_of, rehearse
from moecompile.schema import Config, ModelDevice, accumulation_steps, with_workload
from moecompile.torch_private import fake_group

FOLDER = "rehearsed"
"""Of the run directory: what each rank has seen."""


def structure_of(config: Config) -> nn.Module:
    """The model on the meta device.

    Raises:
        ConfigError: it cannot be built there.
    """
    folder = pretrained_folder(config.model)
    if folder is not None:
        return build_empty(config.model, Stored(folder).dtype())
    return source_structure(
        dataclasses.replace(config, model=dataclasses.replace(config.model, device=ModelDevice.meta))
    )


def shortened(config: Config, plan: Plan) -> Config:
    """The config of the step that is rehearsed: of one step, and of no more micro-batches than that needs."""
    number = min(config.rehearse.micro_batches, accumulation_steps(config, plan.mesh))
    batch = config.data.micro_batch_size * plan.mesh.num_batches * number
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, global_batch_size=batch),
        trainer=dataclasses.replace(config.trainer, max_steps=1, progress_bar=False),
    )


def result_of(run_dir: Path, rank: int) -> Path:
    """Where a rank writes what it has seen, or why it could not."""
    return output_dir(run_dir) / FOLDER / f"rank-{rank}.json"


def rehearsed(config: Config, plan: Plan, rank: int, fullest: float, run_dir: Path) -> Rehearsal:
    """Makes this process a rank of the plan's mesh, compiles the model and rehearses a step.

    Args:
        fullest: rows of the rank's experts over the mean.
    """
    fake_group(rank, plan.mesh.world_size)
    model = structure_of(config)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len), plan=plan)
    compiled.regions.clear()
    return rehearse(
        compiled.model, plan, shortened(config, plan), rank, load_of(plan, fullest), run_dir,
        materialize=partial(materialise, compiled.model),
    )  # fmt: skip


def main(run_dir: Path, rank: int, fullest: float) -> dict[str, Any]:
    """Rehearses the rank of the config and plan in a run directory."""
    config = load_resolved(output_dir(run_dir) / RESOLVED, named=from_launcher(os.environ.get(VARIABLE)))
    load_plugins(config.plugins)
    config, _ = with_workload(config)
    plan = plans.load(output_dir(run_dir) / FILE, named=named_in(config))
    return dataclasses.asdict(rehearsed(config, plan, rank, fullest, run_dir))


if __name__ == "__main__":
    path = result_of(Path(sys.argv[1]), int(sys.argv[2]))
    try:
        found = main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    except MoecompileError as error:
        found = {"error": str(error)}
    path.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)
