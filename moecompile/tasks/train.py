"""task=train: compiles the model and trains it on every rank of the mesh."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from moecompile import plan as plans
from moecompile.errors import PlanError
from moecompile.models import build_model, example_inputs
from moecompile.pipeline import Compiled, compile_with_report
from moecompile.report.console import print_result
from moecompile.report.heatmap import write_heat_map
from moecompile.report.result import write_result
from moecompile.runtime.data import TextData, TokenWindows, load_data, unigram_entropy
from moecompile.runtime.history import LoadHistory
from moecompile.runtime.launch import launch
from moecompile.runtime.objective import data_for
from moecompile.runtime.process_group import init_process_group
from moecompile.runtime.saving import LOAD_HISTORY
from moecompile.runtime.training import Outcome, train
from moecompile.schema import Config, mesh_spec
from moecompile.tasks.show import show_compiled, step0_fields


def run(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place where ranks exist already."""
    launch(
        mesh_spec(config.mesh).world_size,
        run_dir,
        module="moecompile.tasks.worker",
        threads=config.trainer.threads_per_rank,
        timeout_s=config.trainer.timeout_s,
        max_restarts=config.trainer.max_restarts,
    )


def run_rank(config: Config, run_dir: Path) -> None:
    """One rank: data, model, compilation, training, result."""
    start = time.perf_counter()
    init_process_group(config)
    rank = dist.get_rank()
    data = load_data(config.data, run_dir, rank=rank, barrier=dist.barrier)
    model = build_model(config.model, config.seed)
    data = data_for(model, data, config)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len))
    check_same_plan(compiled.plan)
    console = Console(soft_wrap=False)
    if rank == 0:
        show_compiled(compiled, run_dir, console)
    dist.barrier()
    outcome = train(compiled.model, compiled.plan, config, data, run_dir)
    if rank == 0:
        result = _result(config, compiled, outcome, data, time.perf_counter() - start)
        if compiled.plan.layers:
            write_heat_map(LoadHistory.read(run_dir / LOAD_HISTORY), run_dir / "load.png", title=config.name)
        write_result(run_dir, result)
        # Where nothing was dropped there is nothing to say about it.
        print_result({**result, "drop_rate_last": result["drop_rate_last"] or None, "run_dir": run_dir}, console)


def check_same_plan(plan: plans.Plan) -> None:
    """All ranks must hold the same plan.

    Raises:
        PlanError: they do not.
    """
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, plan.hash)
    if len(set(hashes)) > 1:
        raise PlanError(
            "plan.hash", hashes, "ranks made different plans", "Give all ranks the same config and versions"
        )


def _result(config: Config, compiled: Compiled, outcome: Outcome, data: TextData, seconds: float) -> dict[str, Any]:
    plan = compiled.plan
    predicted = plan.estimate.bytes_per_token_per_layer if plan.estimate else None
    measured = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    return {
        "task": "train",
        "recipe": config.name,
        "status": "ok",
        "seconds": seconds,
        "world_size": plan.mesh.world_size,
        "plan_hash": plan.hash,
        "num_rewritten": len(plan.layers),
        **measured,
        "bytes_per_token_per_layer": _plain(outcome.bytes_per_token_per_layer),
        "bytes_per_token_per_layer_predicted": _plain(predicted),
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "unigram_entropy": _unigram_entropy(config, data),
        **step0_fields(compiled),
    }


def _plain(traffic: plans.Traffic | None) -> dict[str, float] | None:
    return dataclasses.asdict(traffic) if traffic else None


def _unigram_entropy(config: Config, data: TextData) -> float | None:
    """What token counts alone reach; None for targets that are not the text's own tokens."""
    if not isinstance(data.train, TokenWindows) or not isinstance(data.val, TokenWindows):
        return None
    return unigram_entropy(torch.cat((data.train.tokens, data.val.tokens)), config.data.vocab_size)
