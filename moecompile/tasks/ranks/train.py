"""A rank of task=train: compiles the model and trains it."""

from __future__ import annotations

import dataclasses
import gc
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from moecompile import plan as plans
from moecompile import waiting
from moecompile.errors import ConfigError
from moecompile.load_history import LOAD_HISTORY, LoadHistory
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import Compilation
from moecompile.planner.memory import reason_not_counted
from moecompile.report.baseline import compare, curves, flops_for_same_loss
from moecompile.report.console import print_baseline, print_data, print_result, print_warnings
from moecompile.report.heatmap import write_heat_map
from moecompile.report.page import try_report
from moecompile.report.page.read import metric_rows
from moecompile.report.result import write_result
from moecompile.report.warnings import early_warnings, run_warnings, status_of
from moecompile.rundir import BASELINE, output_dir
from moecompile.runtime.data import TextData, TokenWindows, num_ids, unigram_entropy
from moecompile.runtime.groups import init_process_group
from moecompile.runtime.training import Outcome, train, train_dense
from moecompile.runtime.weight_groups import for_dense
from moecompile.schema import Baseline, Config
from moecompile.tasks.data import data_fields, with_steps
from moecompile.tasks.forecast import flops_per_token, outline, shape_of, write_forecast
from moecompile.tasks.job import load_job
from moecompile.tasks.ranks.bench_machine import this_machine
from moecompile.tasks.show import show_compiled, show_weight_groups, step0_fields


def run_rank(config: Config, run_dir: Path) -> None:
    """Runs one rank: data, model, compilation, training, result."""
    init_process_group(config)
    rank, console = dist.get_rank(), Console(soft_wrap=False)
    if rank == 0:
        waiting.show("building and compiling the model", line=False)
    job = load_job(config, run_dir)
    of_data = data_fields(job.data, config)
    if rank == 0:
        waiting.done()
        print_data(of_data, console)
        waiting.show("compiling the model", line=False)
    before = outline(job.model) if rank == 0 else None
    refused = _refused(config, job.model)
    machine = this_machine(job, config)
    priced = config if machine is None else dataclasses.replace(config, hardware=machine)
    compiled, data = job.compile(config), job.data
    shape = shape_of(before, compiled.plan)
    waiting.done()
    _check_baseline(config, compiled.plan, refused)
    flops = flops_per_token(before, compiled.plan, config.data.seq_len)
    dense_steps = _dense_steps(config, flops)
    if rank == 0:
        show_compiled(compiled, output_dir(run_dir), console)
    groups = show_weight_groups(compiled.model, config, console if rank == 0 else None)
    if rank == 0:
        print_warnings(early_warnings(compiled.plan, config), console)
    materialize = job.materialize(compiled)
    write_forecast(shape, compiled.plan, priced, run_dir)
    dist.barrier()
    outcome = train(
        compiled.model, compiled.plan, config, data, run_dir, materialize, partial(try_report, run_dir, "train")
    )
    fields = {**_fields(compiled, outcome, data), **of_data, **groups}
    del job, compiled.model, materialize
    if config.trainer.baseline is not Baseline.none:
        of_dense = _baseline(with_steps(config, dense_steps), compiled.plan, data, run_dir)
        fields["baseline"] = {**of_dense, "flops_per_token": flops[1]}
        fields["flops_per_token"] = flops[0]
    fields["warnings"] = [*of_data["data_warnings"], *run_warnings(fields, compiled.plan, config)]
    if rank == 0:
        write_forecast(shape, compiled.plan, priced, run_dir, run_dir / LOAD_HISTORY)
        _write(config, fields, run_dir, console)


def _write(config: Config, fields: dict[str, Any], run_dir: Path, console: Console) -> None:
    """Writes the heat map of the load and `result.json`, and prints the summary."""
    if fields["num_rewritten"]:
        write_heat_map(LoadHistory.read(run_dir / LOAD_HISTORY), run_dir / "load.png", title=config.name)
    if "baseline" in fields:
        ours, dense = (curves(metric_rows(folder)) for folder in (run_dir, run_dir / BASELINE))
        fields["baseline"]["compared"] = compare(fields, ours, dense)
        fields["baseline"]["flops_for_same_loss"] = flops_for_same_loss(fields, ours, dense)
    result = write_result(run_dir, "train", config.name, fields, status=status_of(fields))
    # A drop rate of 0 is not printed.
    print_result({**result, "drop_rate_last": result["drop_rate_last"] or None, "run_dir": run_dir}, console)
    if "baseline" in result:
        print_baseline(result, console)
    print_warnings(result["warnings"], console)


def _refused(config: Config, dense: nn.Module) -> ConfigError | None:
    """Why the optimizer cannot train the dense model of a baseline, which is asked before its weights are experts."""
    if config.trainer.baseline is not Baseline.none:
        try:
            for_dense(dense, config.optimizer)
        except ConfigError as error:
            return error
    return None


def _check_baseline(config: Config, plan: plans.Plan, refused: ConfigError | None) -> None:
    """Refuses a dense model before the compiled one is trained. refused: what `_refused` returned."""
    kind = config.trainer.baseline
    if kind is not Baseline.none and plan.pipeline is not None:
        raise ConfigError(
            "trainer.baseline", kind.value, "the dense model is not cut into stages",
            "Use trainer.baseline=none, or no stages (mesh.pp=1, pipeline.schedule=auto)",
        )  # fmt: skip
    existing = [layer.site.fqn for layer in plan.layers if isinstance(layer.site, plans.ExpertsSite)]
    if kind is not Baseline.none and existing:
        raise ConfigError(
            "trainer.baseline", kind.value, f"{existing[0]} has experts already, so there is no dense model",
            "Use trainer.baseline=none",
        )  # fmt: skip
    if refused is not None:
        raise ConfigError(
            "trainer.baseline", kind.value,
            f"the dense model cannot be trained: {refused.path}={refused.value}: {refused.rule}",
            "Use trainer.baseline=none, or change that",
        )  # fmt: skip


def _dense_steps(config: Config, flops: tuple[float | None, float | None]) -> int:
    """Steps of the dense model; all ranks call it, and the first one's FLOPs count.

    Raises:
        ConfigError: they are not known.
    """
    steps = [config.trainer.max_steps]
    if config.trainer.baseline is Baseline.dense_flops:
        own, dense = flops
        steps = [round(steps[0] * own / dense) if own and dense else 0]
        dist.broadcast_object_list(steps, src=0)
    if not steps[0]:
        raise ConfigError(
            "trainer.baseline", "dense_flops", "the model cannot be copied without values, by which FLOPs are counted",
            "Use trainer.baseline=dense",
        )  # fmt: skip
    return steps[0]


def _baseline(config: Config, plan: plans.Plan, data: TextData, run_dir: Path) -> dict[str, Any]:
    """Trains the dense model on the same data, after the memory of the compiled model has been freed."""
    gc.collect()  # Lightning's objects refer to each other
    if dist.get_rank() == 0:
        for_steps = f"for {config.trainer.max_steps:,} steps, with the same data, optimizer and ranks"
        print(f"\nbaseline: the dense model, {for_steps}", flush=True)
    model = build_model(config.model, config.seed)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    example = example_inputs(model, config.data.seq_len)
    outcome = train_dense(model, plan, config, data, run_dir, example=example)
    names = ("steps", "loss_first", "loss_last", "val_loss_first", "val_loss", "tokens_per_second")
    measured = {name: getattr(outcome, name) for name in names}
    return {"kind": "dense", "params_total": num_params, "params_active": num_params, **measured}


def _fields(compiled: Compilation, outcome: Outcome, data: TextData) -> dict[str, Any]:
    """The fields of result.json of a training run, without the baseline."""
    plan = compiled.plan
    predicted = plan.estimate.bytes_per_token_per_layer if plan.estimate else None
    of_optimizer = plan.estimate.optimizer_bytes_per_step if plan.estimate else None
    lookups = plan.estimate.lookup_bytes if plan.estimate and outcome.lookup_bytes is not None else None
    gathers = of_optimizer is not None and of_optimizer.intra_node + of_optimizer.inter_node > 0
    measured = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    return {
        "world_size": plan.mesh.world_size,
        "plan_hash": plan.hash,
        "num_rewritten": len(plan.layers),
        "params_total": plan.estimate.params_total if plan.estimate else None,
        "params_active": plan.estimate.params_active if plan.estimate else None,
        "layers_not_counted": reason_not_counted(plan.estimate.largest) if plan.estimate else "",
        **measured,
        "bytes_per_token_per_layer": _plain(outcome.bytes_per_token_per_layer),
        "bytes_per_token_per_layer_predicted": _plain(predicted),
        "optimizer_bytes_per_step": _plain(outcome.optimizer_bytes_per_step if gathers else None),
        "optimizer_bytes_per_step_predicted": _plain(of_optimizer if gathers else None),
        "lookup_bytes_predicted": None if lookups is None else lookups.forward,
        "lookup_share_predicted": None if lookups is None else lookups.share,
        "checkpoint": str(outcome.checkpoint) if outcome.checkpoint else None,
        "unigram_entropy": _unigram_entropy(data),
        **step0_fields(compiled),
    }


def _plain(traffic: plans.Traffic | None) -> dict[str, float] | None:
    return dataclasses.asdict(traffic) if traffic else None


def _unigram_entropy(data: TextData) -> float | None:
    """Entropy of the token frequencies, nats; None if the targets are not the text's own tokens."""
    if not isinstance(data.train, TokenWindows) or not isinstance(data.val, TokenWindows):
        return None
    return unigram_entropy(torch.cat((data.train.tokens, data.val.tokens)), num_ids(data.tokenizer))
