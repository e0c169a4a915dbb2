"""What a run reports while it trains: loss, tokens per second, load balance, bytes on the wire."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from moecompile.mesh import LinkClass, MeshSpec
from moecompile.nn import LayerLoad
from moecompile.ops import traffic
from moecompile.plan import Traffic
from moecompile.runtime.history import LoadHistory
from moecompile.runtime.strategy import ExpertParallelStrategy


class Metrics(Callback):
    """Logs one row every `log_interval` optimizer steps, to the loggers and the progress bar, and keeps the load.

    loss: mean over all tokens of the steps since the last row, nats per token, without auxiliary losses. `aux/KIND`:
    those, coefficients included, in the same way. tokens_per_second: tokens with a target over all ranks, since the
    last row. max_violation: the worst layer's MaxVio of the last step. What each layer did in the last step has its
    path in the column's name.

    Args:
        log_interval, max_steps: optimizer steps between rows, and of the run.
        has_capacity: whether experts may drop tokens; then the drop rate of the last step is in the short row too.
        history_path: where rank 0 writes the load of every row.
    """

    def __init__(
        self, log_interval: int, max_steps: int, *, has_capacity: bool = False, history_path: Path | None = None
    ) -> None:
        self.log_interval, self.max_steps, self.has_capacity = log_interval, max_steps, has_capacity
        self.loss_first: float | None = None
        self.loss_last: float | None = None
        self.max_violation_last: float | None = None
        self.tokens_per_second: float | None = None  # after the first row, which holds the warm-up
        self.history_path, self.history = history_path, LoadHistory()
        self._steps: list[dict[str, float]] = []  # of each optimizer step, over layers
        self.steps_skipped = 0
        self._sums: Tensor | None = None  # of this rank, since the last row
        self._step_sums: Tensor | None = None  # of this rank, in the running optimizer step
        self._steps_before = 0  # steps that are not in `_steps` any more, since the run went on from a checkpoint
        self._row_start = self._timed_seconds = 0.0
        self._timed_tokens = 0
        self._last_step = 0

    def mean_of_last(self, name: str) -> float | None:
        """Mean over the last tenth of the steps (at least one) of a value in `over_layers`; None: not measured."""
        values = [step[name] for step in self._last_tenth() if name in step]
        return sum(values) / len(values) if values else None

    def _last_tenth(self) -> list[dict[str, float]]:
        num_steps = self._steps_before + len(self._steps)
        return self._steps[-math.ceil(num_steps / 10) :] if num_steps else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._row_start, self._last_step = time.perf_counter(), trainer.global_step

    def state(self) -> dict[str, Any]:
        """What a run that goes on from here needs for the same rows; all ranks call it after the same step."""
        sums = self._sums.clone() if self._sums is not None else None
        if sums is not None and dist.is_initialized():
            dist.all_reduce(sums)
        return {
            "sums": sums.tolist() if sums is not None else None,
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "max_violation_last": self.max_violation_last,
            "steps_skipped": self.steps_skipped,
            "num_steps": self._steps_before + len(self._steps),
            "steps": self._last_tenth(),
        }

    def restore(self, state: dict[str, Any], history: LoadHistory, *, is_first_rank: bool) -> None:
        """Takes over `state`, on whatever number of ranks, and the rows so far."""
        if state["sums"] is not None:
            sums = torch.tensor(state["sums"], dtype=torch.float64)
            self._sums = sums if is_first_rank else torch.zeros_like(sums)
        self.loss_first, self.loss_last = state["loss_first"], state["loss_last"]
        self.max_violation_last, self.steps_skipped = state["max_violation_last"], state["steps_skipped"]
        self._steps = list(state["steps"])
        self._steps_before = state["num_steps"] - len(self._steps)
        if is_first_rank:
            self.history = history

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the micro-batch; after an optimizer step that closes a row, logs it."""
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        # Lightning has divided the loss by the accumulation steps.
        loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        num_tokens = outputs["num_tokens"].double()
        aux_losses = [aux.double() * num_tokens for aux in strategy.aux_losses.values()]
        sums = torch.stack((loss, num_tokens, *aux_losses))
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._end_step(strategy)
        if step == 1 or step % self.log_interval == 0 or step == self.max_steps:
            self._log_row(trainer, pl_module, strategy, step)

    def _end_step(self, strategy: ExpertParallelStrategy) -> None:
        """Adds the step to the row; of one that was dropped only the count is kept."""
        sums, self._step_sums = self._step_sums, None
        assert sums is not None
        if strategy.skipped:
            self.steps_skipped, sums = self.steps_skipped + 1, torch.zeros_like(sums)
        elif strategy.loads:
            self._steps.append(over_layers(strategy.loads))
        self._sums = sums if self._sums is None else self._sums.to(sums) + sums

    def _log_row(
        self, trainer: Trainer, pl_module: LightningModule, strategy: ExpertParallelStrategy, step: int
    ) -> None:
        assert self._sums is not None
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        loss, num_tokens, *aux_losses = self._sums.tolist()
        self._sums = None
        seconds = time.perf_counter() - self._row_start
        row = {"tokens_per_second": num_tokens / seconds}
        if num_tokens:  # else every step since the last row was dropped
            row["loss"] = loss / num_tokens
            self._measure(row, num_tokens, seconds)
        if self.steps_skipped:
            row["steps_skipped"] = float(self.steps_skipped)
        if strategy.loads and not strategy.skipped:
            row["max_violation"] = self.max_violation_last = max(load.max_violation for load in strategy.loads)
            if self.has_capacity:
                row["drop_rate"] = self._steps[-1]["drop_rate"]
            if trainer.is_global_zero:
                self.history.add(step, {load.name: load.load.tolist() for load in strategy.loads})
        extra = {
            f"aux/{kind}": aux / max(1, num_tokens) for kind, aux in zip(strategy.aux_losses, aux_losses, strict=True)
        }
        for load in strategy.loads if not strategy.skipped else []:
            extra |= of_layer(load)
        if strategy.grad_norm is not None and not strategy.skipped:
            extra["grad_norm"] = strategy.grad_norm
        pl_module.log_dict(row, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(row | extra, step=step)
        self._row_start = time.perf_counter()

    def _measure(self, row: dict[str, float], num_tokens: float, seconds: float) -> None:
        if self.loss_first is None:
            self.loss_first = row["loss"]
        else:
            self._timed_tokens, self._timed_seconds = (
                self._timed_tokens + int(num_tokens),
                self._timed_seconds + seconds,
            )
            self.tokens_per_second = self._timed_tokens / self._timed_seconds
        self.loss_last = row["loss"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the load history."""
        self.save_history()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what there is of it."""
        self.save_history()

    def save_history(self) -> None:
        """Writes the load of every row so far; on rank 0."""
        if self.history_path is not None and self.history.steps:
            self.history.save(self.history_path)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: validation is not training time."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts it again."""
        self._row_start += time.perf_counter() - self._paused


def over_layers(loads: Sequence[LayerLoad]) -> dict[str, float]:
    """Means over the layers in one step; routers whose entropy is unknown are left out of it."""
    means = {
        "max_violation": [load.max_violation for load in loads],
        "entropy": [load.entropy for load in loads if load.entropy is not None],
        "nodes_per_token": [load.nodes_per_token for load in loads],
        "drop_rate": [load.drop_rate for load in loads],
    }
    return {name: sum(values) / len(values) for name, values in means.items() if values}


def of_layer(load: LayerLoad) -> dict[str, float]:
    """What a layer did in one step, as columns: `KIND/PATH`, and `load/PATH/EXPERT`, `node_tokens/PATH/NODE`."""
    columns: dict[str, float | None] = {
        f"max_violation/{load.name}": load.max_violation,
        f"drop_rate/{load.name}": load.drop_rate,
        f"entropy/{load.name}": load.entropy,
        f"nodes_per_token/{load.name}": load.nodes_per_token,
    }
    for kind, counts in (("load", load.load), ("node_tokens", load.node_tokens)):
        digits = len(str(len(counts) - 1))  # columns are sorted as text
        columns |= {f"{kind}/{load.name}/{i:0{digits}d}": count for i, count in enumerate(counts.tolist())}
    return {name: value for name, value in columns.items() if value is not None}


class TrafficMeter(Callback):
    """Counts the bytes that training forwards put on each link class."""

    def __init__(self, mesh: MeshSpec) -> None:
        self.mesh = mesh
        self._bytes = {LinkClass.INTRA_NODE: 0, LinkClass.INTER_NODE: 0, LinkClass.SELF: 0}
        self._tokens = 0  # of all ranks and layers; those of an encoder and a decoder see different numbers
        self._last_step = 0
        self.per_token_and_layer: Traffic | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the run goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        """Forgets what was sent outside training (validation, warm-up)."""
        traffic.take()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds what this rank sent for one micro-batch, and the tokens of a step that ended."""
        for rank, sent in traffic.take().items():
            self._bytes[self.mesh.link(trainer.global_rank, rank)] += sent
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            assert isinstance(trainer.strategy, ExpertParallelStrategy)
            self._tokens += sum(load.tokens for load in trainer.strategy.loads)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bytes per token and MoE layer, over all ranks."""
        sent = [self._bytes[LinkClass.INTRA_NODE], self._bytes[LinkClass.INTER_NODE]]
        sums = torch.tensor(sent, dtype=torch.int64, device=pl_module.device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        intra, inter = (total / max(1, self._tokens) for total in sums.tolist())
        self.per_token_and_layer = Traffic(intra_node=intra, inter_node=inter)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over optimizer steps, from where the run goes on, with rounded figures."""

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begins at the step that is done already."""
        bar = self.train_progress_bar
        if bar.total == trainer.max_steps:
            return  # another pass over the data
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description("step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves after a step, not after a micro-batch."""
        bar, step = self.train_progress_bar, trainer.global_step
        if step != bar.n and (step % self.refresh_rate == 0 or step == trainer.max_steps):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """loss, tokens/s, MaxVio, drops and val_loss, as far as they are known."""
        return _figures(trainer)


class ProgressLines(Callback):
    """The same figures as lines, for output that is no terminal: one every `log_interval` optimizer steps."""

    def __init__(self, log_interval: int) -> None:
        self.log_interval, self._last_step = log_interval, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the run goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Prints after a step that closes a row."""
        step = trainer.global_step
        if trainer.is_global_zero and step != self._last_step and (step == 1 or step % self.log_interval == 0):
            figures = "  ".join(f"{name} {value}" for name, value in _figures(trainer).items())
            print(f"step {step}/{trainer.max_steps}  {figures}", flush=True)
        self._last_step = step


def _figures(trainer: Trainer) -> dict[str, str]:
    """loss, tokens/s, MaxVio, drops and val_loss as text, as far as they are known."""
    found = trainer.progress_bar_metrics
    names = {
        "loss": "loss", "tokens_per_second": "tok/s", "max_violation": "MaxVio", "drop_rate": "drops", "val_loss": "val"
    }  # fmt: skip
    shapes = {"tokens_per_second": "{:,.0f}", "max_violation": "{:.2f}", "drop_rate": "{:.1%}"}
    return {
        short: shapes.get(name, "{:.3f}").format(float(found[name])) for name, short in names.items() if name in found
    }
