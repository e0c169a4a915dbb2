"""One training run on all ranks: Lightning's Trainer around a compiled model."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from moecompile.capture import Example
from moecompile.checkpoint.fingerprint import fingerprint
from moecompile.checkpoint.folders import AUTO, checkpoints_of, latest, set_aside
from moecompile.checkpoint.resume import read_state
from moecompile.load_history import LOAD_HISTORY
from moecompile.mesh import Part
from moecompile.pipeline import compile_model
from moecompile.plan import Plan, Traffic, reductions
from moecompile.planner.params import checkpointing_of
from moecompile.rundir import BASELINE, SAMPLES, accept, note_accepted
from moecompile.runtime import signals
from moecompile.runtime.data import ChatRows, TextData, train_loader, val_loader
from moecompile.runtime.launch import is_restart
from moecompile.runtime.loggers import finished, make_callbacks, make_loggers
from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.profile import StepProfile, TrafficMeter
from moecompile.runtime.progress import LiveReport, ProgressBar, ProgressLines
from moecompile.runtime.routes import routes_observer
from moecompile.runtime.samples import ANSWER, ROWS, Samples
from moecompile.runtime.saving import Saver, starting_point
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.runtime.weight_groups import for_dense
from moecompile.schema import Compiled, Config, Precision, accumulation_steps

# -- a run takes its directory when its first new step is computed; until then nothing is touched -------------------
#
# Algorithm, after the first optimizer step:
#   1. All ranks have computed it: weights were read, and nothing will refuse the run any more.
#   2. Rank 0 moves later checkpoints aside, then the files of this run to their places.
#   3. Every rank makes its loggers, which are told what was logged before.
# If a rank is killed at any moment, the directory has the whole run before or this one (moecompile.rundir).


class Unwritten(Logger):
    """Keeps metrics until there are loggers that write files."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        """Lightning's."""
        return "unwritten"

    @property
    def version(self) -> int:
        """Lightning's."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps them."""
        self.kept.append((dict(metrics), step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """A language model has none."""


class Acceptance(Callback):
    """Gives the run directory to this run, see above. It is the first callback: others write files after it.

    Args:
        first_step: from which the run goes on. make: the loggers, on every rank; they may write at once.
        metrics: whose clock stops meanwhile.
    """

    def __init__(self, run_dir: Path, first_step: int, make: Callable[[], list[Logger]], metrics: Metrics) -> None:
        self.run_dir, self.first_step, self.make, self.metrics = run_dir, first_step, make, metrics
        self.unwritten, self._is_done = Unwritten(), False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if trainer.global_step > self.first_step:
            with self.metrics.paused():
                self.ensure(trainer)

    def ensure(self, trainer: Trainer) -> None:
        """Accepts the run, if that is not done yet: also at the end, when there was no step to compute."""
        if self._is_done:
            return
        self._is_done = True
        trainer.strategy.barrier()  # Step 1
        note_accepted(self.run_dir)
        if trainer.is_global_zero:  # Step 2
            replaced = set_aside(self.run_dir, self.first_step)
            accept(self.run_dir)
            if replaced is not None:
                print(f"later checkpoints, which this run writes again, are kept in {replaced}", flush=True)
        trainer.strategy.barrier()
        trainer.loggers = self.make()  # Step 3
        for logger in trainer.loggers:
            for metrics, step in self.unwritten.kept:
                logger.log_metrics(metrics, step)


# -- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a run. Losses in nats per token; bytes: forward dispatch and combine, per token and MoE layer;
    of the optimizer per rank and step; of lookups in spread embedding tables per rank and micro-batch, forward.
    lookup_share: of the rows that tokens read, those that were different and thus sent.

    max_violation_last: of the worst layer in the last step; max_violation_bound_last: the most that it could be;
    max_violation_least: the lowest of all rows.
    max_violation_share_last: their quotient in the worst layer. dead_experts: layer -> experts without a token; both,
    max_violation_mean_last, max_violation_bound_mean_last, drop_rate_last, entropy_last (nats
    per token) and nodes_per_token_last: means over the layers and the last tenth of the steps.
    """

    steps: int
    steps_skipped: int
    loss_first: float | None
    loss_last: float | None
    val_loss_first: float | None
    val_loss: float
    tokens_per_second: float | None
    max_violation_last: float | None
    max_violation_bound_last: float | None
    max_violation_least: float | None
    max_violation_mean_last: float | None
    max_violation_bound_mean_last: float | None
    max_violation_share_last: float | None
    dead_experts: dict[str, list[int]]
    drop_rate_last: float | None
    entropy_last: float | None
    nodes_per_token_last: float | None
    bytes_per_token_per_layer: Traffic | None
    optimizer_bytes_per_step: Traffic | None
    lookup_bytes: float | None
    lookup_share: float | None
    checkpoint: Path | None


def train(
    model: nn.Module,
    plan: Plan,
    config: Config,
    data: TextData,
    run_dir: Path,
    materialize: Callable[[torch.device], None] | None = None,
    on_row: Callable[[], None] | None = None,
) -> Outcome:
    """Validates, trains to `trainer.max_steps` optimizer steps, validates again and saves a checkpoint.

    Resumes from a checkpoint if `trainer.resume` names one, or after a restart because of a lost rank. All ranks call
    it with the same lowered model; it needs the process group and its environment variables. `materialize`: for a model
    on the meta device, as for the strategy. `on_row`: rank 0 calls it after some rows, when metrics and loads are on
    disk.
    """
    mesh, rank, max_steps = plan.mesh, int(os.environ["RANK"]), config.trainer.max_steps
    known = fingerprint(model, text_hash=data.text_hash, tokenizer=data.tokenizer.to_str())
    start = starting_point(config, plan, run_dir, known, is_restart=is_restart(run_dir))
    folder, first_step = (None, 0) if start is None else (start[0], start[1].step)
    module = LanguageModule(model, config.optimizer, max_steps)
    metrics = Metrics(
        config.trainer.log_interval,
        max_steps,
        has_capacity=any(layer.routing.capacity_factor is not None for layer in plan.layers),
        history_path=run_dir / LOAD_HISTORY,
    )
    place, accumulate, parts = mesh.batch_index(rank), accumulation_steps(config, mesh), mesh.size(Part.SEQUENCE)
    val = val_loader(data.val, config.data, rank=place, world_size=mesh.num_batches, multiple=parts)
    val_windows = min(len(data.val), len(val) * config.data.micro_batch_size * mesh.num_batches)
    meter, saver = TrafficMeter(mesh), Saver(run_dir, plan, config, metrics, start, known, val_windows)
    routes = routes_observer(model, config, run_dir, known, rank=place, accumulate=accumulate, first_step=first_step)
    acceptance = Acceptance(run_dir, first_step, partial(make_loggers, config, run_dir, folder, first_step), metrics)
    observers: list[Callback] = [acceptance, *([] if routes is None else [routes]), metrics, meter, saver]
    routed = config.routing.replay is None
    observers.append(StepProfile(plan, run_dir, max_steps, meter, routes=routed))
    interval = config.trainer.sample_interval
    if interval != 0 and parts == 1 and plan.pipeline is None:  # else a rank has some logits, or some layers, alone
        prompts = [data.val.prompts(ROWS, ANSWER, data.tokenizer)] if isinstance(data.val, ChatRows) else val
        observers.append(Samples(interval, prompts, data.tokenizer, run_dir / SAMPLES, metrics, seed=config.seed))
    if on_row is not None:
        observers.append(LiveReport(metrics, on_row))
    observers += make_callbacks(config.trainer)
    trainer = make_trainer(config, plan, run_dir, observers, loggers=[acceptance.unwritten], materialize=materialize)
    fit = train_loader(
        data.train, config.data, seed=config.seed, rank=place, world_size=mesh.num_batches,
        start_step=first_step, num_steps=max_steps - first_step, multiple=parts,
    )  # fmt: skip
    with finished(trainer):
        if start is None:
            trainer.validate(module, val, verbose=False)
            saver.val_loss_first = module.val_loss
        with signals.training():
            trainer.fit(module, fit, val)
            if trainer.global_step < max_steps and trainer.is_global_zero:
                print(f"ended after step {trainer.global_step} of {max_steps} by a callback", flush=True)
            acceptance.ensure(trainer)
            checkpoint = saver.finish(trainer, module)
            if max_steps % config.trainer.val_interval or first_step == max_steps:  # else validated within fit
                trainer.validate(module, val, verbose=False)
    return _outcome(trainer.global_step, metrics, meter, saver.val_loss_first, module.val_loss, checkpoint)


def _outcome(
    steps: int, metrics: Metrics, meter: TrafficMeter, val_loss_first: float | None, val_loss: float,
    checkpoint: Path | None,
) -> Outcome:  # fmt: skip
    tally = metrics.tally
    return Outcome(
        steps=steps,
        steps_skipped=tally.steps_skipped,
        loss_first=tally.loss_first,
        loss_last=tally.loss_last,
        val_loss_first=val_loss_first,
        val_loss=val_loss,
        tokens_per_second=tally.tokens_per_second,
        max_violation_last=tally.max_violation_last,
        max_violation_bound_last=tally.max_violation_bound_last,
        max_violation_least=tally.max_violation_least,
        max_violation_mean_last=tally.steps.mean_of_last("max_violation"),
        max_violation_bound_mean_last=tally.steps.mean_of_last("max_violation_bound"),
        max_violation_share_last=tally.steps.mean_of_last("max_violation_share"),
        dead_experts={name.removeprefix("model."): experts for name, experts in tally.dead_experts.items()},
        drop_rate_last=tally.steps.mean_of_last("drop_rate"),
        entropy_last=tally.steps.mean_of_last("entropy"),
        nodes_per_token_last=tally.steps.mean_of_last("nodes_per_token"),
        bytes_per_token_per_layer=meter.per_token_and_layer,
        optimizer_bytes_per_step=meter.per_rank_and_step,
        lookup_bytes=None if meter.lookups is None else meter.lookups[0],
        lookup_share=None if meter.lookups is None else meter.lookups[1],
        checkpoint=checkpoint,
    )


def make_trainer(
    config: Config, plan: Plan, run_dir: Path, callbacks: list[Callback], *, loggers: list[Logger] | None = None,
    materialize: Callable[[torch.device], None] | None = None,
) -> Trainer:  # fmt: skip
    """A Trainer over the ranks that are already running. loggers: None: those of the config, in `run_dir`."""
    _quiet_lightning()
    mesh = plan.mesh
    accumulate = accumulation_steps(config, mesh)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
    show_bar = config.trainer.progress_bar and sys.stdout.isatty()
    if config.trainer.progress_bar:
        bar = ProgressBar(refresh_rate=5) if show_bar else ProgressLines(config.trainer.log_interval)
        callbacks = [*callbacks, bar]
    return Trainer(
        strategy=ExpertParallelStrategy(
            loss="sum",
            seed=config.seed,
            timeout=timedelta(seconds=config.trainer.timeout_s),
            on_nan=config.trainer.on_nan.value,
            param_dtype=torch.bfloat16 if config.trainer.precision is Precision.bf16_params else None,
            checkpointing=checkpointing_of(config, plan),
            compile_regions=config.trainer.compile is Compiled.regions,
            materialize=materialize,
        ),
        precision="bf16-mixed" if config.trainer.precision is Precision.bf16_mixed else "32-true",
        plugins=[TorchElasticEnvironment()],  # reads the variables of our launcher, also under SLURM
        accelerator=_accelerator(mesh.device),
        devices=local,
        num_nodes=mesh.world_size // local,
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config.optimizer.clip_norm,
        val_check_interval=min(config.trainer.val_interval, config.trainer.max_steps) * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # the loaders split the batch over ranks themselves
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=show_bar,
        logger=make_loggers(config, run_dir) if loggers is None else loggers,
        callbacks=callbacks,
        default_root_dir=run_dir,
    )


def _accelerator(device: str) -> str:
    """cpu or gpu; `auto` uses CUDA if it is available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"cuda": "gpu"}.get(device, device)


def _quiet_lightning() -> None:
    """Keeps hints about hardware, loggers and data loader workers off the terminal."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # T5's layers return the position bias as a view, which FSDP2 warns about; it is not modified in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(FSDPT5Block\) returned a view tensor")


# -- the dense model, trained in the same way as a baseline ---------------------------------------------------------


def train_dense(
    model: nn.Module, like: Plan, config: Config, data: TextData, run_dir: Path, *, example: Example
) -> Outcome:
    """Trains `model` with a plan like another one, without layers: same ranks, data and optimizer.

    What `optimizer.groups` and `routing.replay` say of experts and routers is left out. Checkpoints, if the run keeps
    any, are only there to go on from, and are removed at the end. All ranks call it with the same newly built model.
    """
    mesh = like.mesh
    plan = Plan(
        mesh=mesh, layers=(), reductions=reductions(mesh, tables=bool(like.lookups)), lookups=like.lookups,
        context_parallel=like.context_parallel,
    )  # fmt: skip
    dense = compile_model(model, config, example=example, plan=plan)
    folder, trainer = run_dir / BASELINE, config.trainer
    goes_on = _goes_on(config, run_dir, folder)
    never = trainer.max_steps + 1  # but after a signal
    trainer = dataclasses.replace(
        trainer,
        save_checkpoint=False,
        save_interval=trainer.save_interval or (never if trainer.save_checkpoint else 0),
        resume=AUTO if goes_on else None,
    )
    routing = dataclasses.replace(config.routing, replay=None)
    config = dataclasses.replace(config, optimizer=for_dense(dense, config.optimizer), routing=routing, trainer=trainer)
    outcome = train(dense, plan, config, data, folder)
    _remove_checkpoints(folder)
    return outcome


def _goes_on(config: Config, run_dir: Path, folder: Path) -> bool:
    """Whether an attempt before this one has left a checkpoint of the dense model; another run's are removed."""
    found = latest(checkpoints_of(folder))
    is_later = config.trainer.resume is not None or is_restart(run_dir)
    if found is not None and is_later and read_state(found).step <= config.trainer.max_steps:
        return True
    _remove_checkpoints(folder)
    return False


def _remove_checkpoints(folder: Path) -> None:
    """All ranks call it; none reads them any more, and none writes new ones before."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(checkpoints_of(folder), ignore_errors=True)
    dist.barrier()
