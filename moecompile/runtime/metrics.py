"""Metrics of training: rows for the loggers and the progress bar, totals of the run, and the load of every expert."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moecompile.load_history import LoadHistory
from moecompile.nn import LayerLoad
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.torch_private import device_of


class Metrics(Callback):
    """Logs one row every `log_interval` optimizer steps, to the loggers and the progress bar, and keeps the load.

    loss: mean over all tokens of the steps since the last row, nats per token, without auxiliary losses. `aux/KIND`:
    the same mean of an auxiliary loss, times its coefficient. tokens_per_second: tokens with a target on all ranks,
    since the last row, or since the run went on. learning_rate: of the first group of weights in the last step.
    max_violation: the worst layer's MaxVio in the last step; max_violation_bound: the most that it could be. Columns
    with a module path have values of one layer in the last step.

    Args:
        log_interval, max_steps: optimizer steps between rows, and of the run.
        has_capacity: whether experts may drop tokens; then the progress bar also shows the drop rate of the last step.
        history_path: file in which rank 0 writes the load of every row.
    """

    def __init__(
        self, log_interval: int, max_steps: int, *, has_capacity: bool = False, history_path: Path | None = None
    ) -> None:
        self.log_interval, self.max_steps, self.has_capacity = log_interval, max_steps, has_capacity
        self.tally = RunTotals()
        self.history_path, self.history = history_path, LoadHistory()
        self._last_step = self.rows = 0
        self._learning_rate: float | None = None
        self._row_start = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._row_start, self._last_step = time.perf_counter(), trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps the learning rate of the step, before the schedule goes on."""
        self._learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the micro-batch; logs a row after an optimizer step that completes one."""
        strategy = trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        # Lightning has divided the loss by the accumulation steps.
        loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        self.tally.sums.add(loss, outputs["num_tokens"], strategy.aux_losses, strategy.aux_tokens)
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self.tally.end_step(strategy.loads, skipped=strategy.skipped)
        if step == 1 or step % self.log_interval == 0 or step == self.max_steps:
            self._log_row(trainer, pl_module, strategy, step)

    def _log_row(
        self, trainer: Trainer, pl_module: LightningModule, strategy: ExpertParallelStrategy, step: int
    ) -> None:
        loss, num_tokens, aux_losses = self.tally.sums.take(strategy.groups.losses)
        row = self.tally.end_row(loss, num_tokens, time.perf_counter() - self._row_start)
        loads = [] if strategy.skipped else strategy.loads
        if loads:
            worst = max(loads, key=lambda load: load.max_violation)
            row["max_violation"] = self.tally.max_violation_last = worst.max_violation
            row["max_violation_bound"] = self.tally.max_violation_bound_last = worst.max_violation_bound
            least = self.tally.max_violation_least
            self.tally.max_violation_least = worst.max_violation if least is None else min(least, worst.max_violation)
            if self.has_capacity:
                row["drop_rate"] = over_layers(loads)["drop_rate"]
            if trainer.is_global_zero:
                self.history.add(step, {load.name: load.load.tolist() for load in loads})
        extra = {f"aux/{kind}": aux / max(1, num_tokens) for kind, aux in aux_losses.items()}
        for load in loads:
            extra |= of_layer(load)
        if self._learning_rate is not None:
            extra["learning_rate"] = self._learning_rate
        if strategy.grad_norm is not None and not strategy.skipped:
            extra["grad_norm"] = strategy.grad_norm
        pl_module.log_dict(row, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(row | extra, step=step)
        self.rows += 1
        self._row_start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._row_start += time.perf_counter() - start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock: validation is not training time."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock again."""
        self._row_start += time.perf_counter() - self._paused

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the load history."""
        self.save_history()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the load history so far; before the first row it is only what a checkpoint's run has logged."""
        if self.rows:
            self.save_history()

    def save_history(self) -> None:
        """Writes the load of every row so far, on rank 0."""
        if self.history_path is not None and self.history.steps:
            self.history.save(self.history_path)


def of_layer(load: LayerLoad) -> dict[str, float]:
    """Values of a layer in one step, as columns: `KIND/PATH`, and `load/PATH/EXPERT`, `node_tokens/PATH/NODE`."""
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


class RunTotals:
    """The metrics of a run, which a resumed run continues.

    loss_first, loss_last: of the first and the last row, nats per token. max_violation_last: of the worst layer in the
    last step of a row; max_violation_bound_last: the most that it could be; max_violation_least: the lowest of all
    rows. None: not measured.
    """

    def __init__(self) -> None:
        self.sums, self.steps = LossSums(), LayerMeans()
        self.steps_skipped = 0
        self.loss_first: float | None = None
        self.loss_last: float | None = None
        self.max_violation_last: float | None = None
        self.max_violation_bound_last: float | None = None
        self.max_violation_least: float | None = None
        self._last_used: dict[str, Tensor] = {}  # layer -> number of the last step in which each expert had a token
        self._timed_tokens, self._timed_seconds = 0, 0.0
        self._is_warm = False  # whether this process has ended a row
        self._restored_tokens = 0.0  # of the row, from before this process

    def end_step(self, loads: Sequence[LayerLoad], *, skipped: bool) -> None:
        """Ends an optimizer step; a skipped step is only counted."""
        self.sums.end_step(dropped=skipped)
        if skipped:
            self.steps_skipped += 1
        elif loads:
            for load in loads:
                known = self._last_used.setdefault(load.name, torch.full_like(load.load, self.steps.count))
                known[load.load > 0] = self.steps.count + 1
            self.steps.add(over_layers(loads))

    @property
    def dead_experts(self) -> dict[str, list[int]]:
        """Layer -> its experts without a token in the last tenth of the steps; layers without any are left out.

        Empty while an even load would be fewer than `_FEW` tokens an expert: chance leaves some without any.
        """
        window = len(self.steps.last_tenth())
        if (self.steps.mean_of_last("least_mean_load") or 0.0) * window < _FEW:
            return {}
        dead = {name: (used <= self.steps.count - window).nonzero() for name, used in self._last_used.items()}
        return {name: experts.flatten().tolist() for name, experts in dead.items() if len(experts)}

    @property
    def tokens_per_second(self) -> float | None:
        """Of the whole run, without the first row of each process, which includes the warm-up; None: not measured."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds else None

    def end_row(self, loss: float, num_tokens: float, seconds: float) -> dict[str, float]:
        """Ends a row and returns its columns.

        Args:
            loss: sum over `num_tokens` tokens, 0 if all steps were skipped. seconds: of this process.
        """
        timed, self._restored_tokens = num_tokens - self._restored_tokens, 0.0
        row = {"tokens_per_second": timed / seconds}
        if num_tokens:
            row["loss"] = self.loss_last = loss / num_tokens
            if self.loss_first is None:
                self.loss_first = self.loss_last
        if timed:
            if self._is_warm:
                self._timed_tokens += int(timed)
                self._timed_seconds += seconds
            self._is_warm = True
        if self.steps_skipped:
            row["steps_skipped"] = float(self.steps_skipped)
        return row

    def state(self, tokens: dist.ProcessGroup | None = None) -> dict[str, Any]:
        """The state from which a resumed run continues its rows; all ranks call it after the same step.

        Args:
            tokens: as for `LossSums.over_ranks`.
        """
        return {
            "sums": self.sums.over_ranks(tokens),
            "kinds": list(self.sums.kinds),
            "loss_first": self.loss_first,
            "loss_last": self.loss_last,
            "max_violation_last": self.max_violation_last,
            "max_violation_bound_last": self.max_violation_bound_last,
            "max_violation_least": self.max_violation_least,
            "last_used": {name: used.tolist() for name, used in self._last_used.items()},
            "steps_skipped": self.steps_skipped,
            "timed": [self._timed_tokens, self._timed_seconds],
            "num_steps": self.steps.count,
            "steps": self.steps.last_tenth(),
        }

    def restore(self, state: Mapping[str, Any], *, is_first_rank: bool) -> None:
        """Restores `state`, on any number of ranks; is_first_rank: of those with different tokens."""
        self.sums.restore(state["sums"], state["kinds"], is_first_rank=is_first_rank)
        self.steps.restore(state["steps"], state["num_steps"])
        self.loss_first, self.loss_last = state["loss_first"], state["loss_last"]
        self.max_violation_last, self.steps_skipped = state["max_violation_last"], state["steps_skipped"]
        self.max_violation_bound_last = state.get("max_violation_bound_last")  # not in checkpoints of 0.2.0
        self.max_violation_least = state.get("max_violation_least")  # nor this
        self._last_used = {name: torch.tensor(used) for name, used in state.get("last_used", {}).items()}
        self._timed_tokens, self._timed_seconds = state.get("timed", (0, 0.0))  # nor this
        self._restored_tokens = state["sums"][1] if state["sums"] is not None else 0.0


_FEW = 10
"""Tokens of an expert at an even load, in the last tenth of the steps, below which none is called dead."""


class LossSums:
    """Sums over this rank's tokens since the last row: the loss, their number, each auxiliary loss. float64."""

    def __init__(self) -> None:
        self._row: Tensor | None = None
        self._step: Tensor | None = None  # of the current optimizer step
        self.kinds: tuple[str, ...] = ()  # of auxiliary losses in the row, with those that a resumed run has no more

    def add(
        self, loss: Tensor, num_tokens: Tensor, aux_losses: Mapping[str, Tensor], aux_tokens: Tensor | None = None
    ) -> None:
        """Adds a micro-batch. loss: the sum over its tokens; aux_losses: per token, by kind. aux_tokens: the tokens of
        the latter; None: those of the loss.
        """
        num_tokens = num_tokens.double()
        self.kinds = tuple(dict.fromkeys((*self.kinds, *aux_losses)))
        aux_tokens = num_tokens if aux_tokens is None else aux_tokens
        none = torch.zeros_like(num_tokens)
        aux = [aux_losses[kind].double() * aux_tokens if kind in aux_losses else none for kind in self.kinds]
        sums = torch.stack((loss.detach().double(), num_tokens, *aux))
        self._step = sums if self._step is None else self._step + sums

    def end_step(self, *, dropped: bool) -> None:
        """Adds the current step to the row, unless it was skipped."""
        sums, self._step = self._step, None
        assert sums is not None
        if dropped:
            sums = torch.zeros_like(sums)
        if self._row is not None:
            sums[: len(self._row)] += self._row.to(sums)  # that of a resumed run may lack its last kinds
        self._row = sums

    def over_ranks(self, tokens: dist.ProcessGroup | None = None) -> list[float] | None:
        """The row so far, summed over the ranks of a group, which all call it; None before its first step.

        Args:
            tokens: `Groups.losses`, the ranks with different tokens; None: only this process.
        """
        if self._row is None:
            return None
        sums = self._row.clone()
        if tokens is not None:
            sums = sums.to(device_of(tokens)) if sums.is_cpu else sums  # as it is restored, until the first step
            dist.all_reduce(sums, group=tokens)
        return sums.tolist()

    def take(self, tokens: dist.ProcessGroup | None = None) -> tuple[float, float, dict[str, float]]:
        """Loss, tokens and auxiliary losses of the row, over ranks as in `over_ranks`. Starts a new row."""
        sums = self.over_ranks(tokens)
        assert sums is not None
        loss, num_tokens, *aux_losses = sums
        of_kinds = dict(zip(self.kinds, aux_losses, strict=True))
        self._row, self.kinds = None, ()
        return loss, num_tokens, of_kinds

    def restore(self, sums: Sequence[float] | None, kinds: Sequence[str], *, is_first_rank: bool) -> None:
        """Restores the result of `over_ranks`: the first rank has the sums of all.

        kinds: of the auxiliary losses in it, which are left out if it has others.
        """
        if sums is not None:
            self.kinds = tuple(kinds) if len(kinds) == len(sums) - 2 else ()
            row = torch.tensor(sums[: 2 + len(self.kinds)], dtype=torch.float64)
            self._row = row if is_first_rank else torch.zeros_like(row)


class LayerMeans:
    """The results of `over_layers` of every optimizer step; a resumed run has only the last tenth of earlier steps."""

    def __init__(self) -> None:
        self.count = 0  # of the whole run
        self._kept: list[dict[str, float]] = []

    def add(self, step: dict[str, float]) -> None:
        """Adds a step."""
        self._kept.append(step)
        self.count += 1

    def last_tenth(self) -> list[dict[str, float]]:
        """The last tenth of the steps, at least one."""
        return self._kept[-math.ceil(self.count / 10) :] if self.count else []

    def mean_of_last(self, name: str) -> float | None:
        """Mean over the last tenth of a value in `over_layers`; None: not measured."""
        values = [step[name] for step in self.last_tenth() if name in step]
        return sum(values) / len(values) if values else None

    def restore(self, steps: Sequence[dict[str, float]], count: int) -> None:
        """Restores the result of `last_tenth` after `count` steps."""
        self._kept, self.count = list(steps), count


def over_layers(loads: Sequence[LayerLoad]) -> dict[str, float]:
    """Means over the layers in one step; the entropy is over routers for which it is known.

    max_violation_share: MaxVio over its bound, of the worst layer. least_mean_load: assignments over experts, of the
    layer with the fewest.
    """
    shares = [load.max_violation / bound for load in loads if (bound := load.max_violation_bound) > 0]
    means = {
        "max_violation": [load.max_violation for load in loads],
        "max_violation_bound": [load.max_violation_bound for load in loads],
        "max_violation_share": [max(shares)] if shares else [],
        "least_mean_load": [min(float(load.load.double().mean()) for load in loads)],
        "entropy": [load.entropy for load in loads if load.entropy is not None],
        "nodes_per_token": [load.nodes_per_token for load in loads],
        "drop_rate": [load.drop_rate for load in loads],
    }
    return {name: sum(values) / len(values) for name, values in means.items() if values}
