"""Ranks that train a tiny DeepSeek through `moecompile.runtime.training.train`, as the command line does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from moecompile.checkpoint.resume import resumed
from moecompile.compose import compose_config
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.data import load_data
from moecompile.runtime.training import Outcome, train
from tests.tiny import SHORT

TINY = [
    "recipe=deepseek_ep", "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "data.vocab_size=300",
    "trainer.checkpointing=keep_exchanges",
    "model.config.intermediate_size=80", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
    "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8", "data.val_batches=1",
    "data.val_fraction=0.01", "trainer.progress_bar=false", "trainer.log_interval=1", "optimizer.warmup_steps=2",
    "optimizer.lr=0.01", SHORT,
]  # fmt: skip


def run(
    overrides: Sequence[str], run_dir: Path, change: Callable[[nn.Module], None] = lambda model: None, *,
    base: Sequence[str] = TINY,
) -> Outcome:  # fmt: skip
    """One run on the ranks that are there. change: what is done to the compiled model before it trains."""
    config = resumed(compose_config([*base, *overrides]), run_dir)
    if dist.get_rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    data = load_data(config.data, run_dir, rank=dist.get_rank(), barrier=dist.barrier)
    model = build_model(config.model, config.seed)
    model = compile_model(model, config, example=example_inputs(model, config.data.seq_len))
    change(model)
    outcome = train(model, plan_of(model), config, data, run_dir)
    dist.barrier()
    return outcome


def rows(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv that have a loss."""
    with (run_dir / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("loss")]


def losses(run_dir: Path) -> dict[int, float]:
    """Optimizer step -> loss."""
    return {int(row["step"]): float(row["loss"]) for row in rows(run_dir)}


def fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome that can be pickled and compared."""
    return {name: getattr(outcome, name) for name in ("steps", "steps_skipped", "loss_first", "val_loss_first")}
