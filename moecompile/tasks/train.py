"""task=train: compiles the model and trains it on every rank of the mesh."""

from __future__ import annotations

import dataclasses
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from moecompile import plan as plans
from moecompile.errors import ConfigError, PlanError
from moecompile.models import build_model, example_inputs
from moecompile.pipeline import Compiled, compile_with_report
from moecompile.report.console import print_result
from moecompile.report.result import write_result
from moecompile.runtime.data import TextData, load_data, unigram_entropy
from moecompile.runtime.launch import launch
from moecompile.runtime.training import Outcome, train
from moecompile.schema import Config, mesh_spec
from moecompile.tasks.show import show_compiled


def run(config: Config, run_dir: Path) -> None:
    """Starts one process per rank, or runs in place where ranks exist already."""
    launch(
        mesh_spec(config.mesh).world_size,
        run_dir,
        module="moecompile.tasks.worker",
        threads=config.trainer.threads_per_rank,
        timeout_s=config.trainer.timeout_s,
    )


def run_rank(config: Config, run_dir: Path) -> None:
    """One rank: data, model, compilation, training, result."""
    start = time.perf_counter()
    torch.set_num_threads(config.trainer.threads_per_rank)
    _init_process_group(config)
    rank = dist.get_rank()
    data = load_data(config.data, run_dir, rank=rank, barrier=dist.barrier)
    model = build_model(config.model, config.seed)
    _check_vocabulary(model, config)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len))
    check_same_plan(compiled.plan)
    console = Console(soft_wrap=False)
    if rank == 0:
        show_compiled(compiled, run_dir, console)
    dist.barrier()
    outcome = train(compiled.model, compiled.plan, config, data, run_dir)
    if rank == 0:
        result = _result(config, compiled, outcome, data, time.perf_counter() - start)
        write_result(run_dir, result)
        print_result({**result, "run_dir": run_dir}, console)


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


def _check_vocabulary(model: torch.nn.Module, config: Config) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and size < config.data.vocab_size:
        raise ConfigError(
            "data.vocab_size",
            config.data.vocab_size,
            f"the model {config.model.name} has embeddings for {size} tokens",
            f"Use at most {size}",
        )


def _init_process_group(config: Config) -> None:
    """gloo or NCCL, before the Trainer, which then uses this group: the tokenizer needs a barrier first."""
    cuda = config.mesh.device == "cuda" or (config.mesh.device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.trainer.timeout_s))


def _result(config: Config, compiled: Compiled, outcome: Outcome, data: TextData, seconds: float) -> dict[str, Any]:
    plan = compiled.plan
    predicted = plan.estimate.bytes_per_token_per_layer if plan.estimate else None
    tokens = torch.cat((data.train.tokens, data.val.tokens))
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
        "unigram_entropy": unigram_entropy(tokens, config.data.vocab_size),
        "step0_max_abs_diff": compiled.step0_max_abs_diff,
        "step0_reason": compiled.step0_reason,
    }


def _plain(traffic: plans.Traffic | None) -> dict[str, float] | None:
    return dataclasses.asdict(traffic) if traffic else None
