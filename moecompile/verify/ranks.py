"""Runs the job on N ranks with the strategy, loaders and Trainer of `task=train`, and records a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.checkpoint.tensors import tensors_of
from moecompile.mesh import MeshSpec, Part, expert_axes
from moecompile.nn.context import own_positions
from moecompile.nn.placement import by_id, expert_orders
from moecompile.nn.replay import replay_routes
from moecompile.nn.stages import tied_names
from moecompile.plan import Plan
from moecompile.runtime.data import TextData, train_loader
from moecompile.runtime.gradients import gradient_of
from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy, groups_of
from moecompile.runtime.training import make_trainer
from moecompile.schema import Config, accumulation_steps
from moecompile.torch_private import local_part
from moecompile.verify.diagnosis import Axes
from moecompile.verify.entries import Entries, Places, local_gradient
from moecompile.verify.job import Batch, Trace, drawn_routes, evaluated, recorded_routes, uneven

_QUIET = logging.getLogger("torch.distributed.tensor._redistribute")


def run_ranks(model: nn.Module, plan: Plan, config: Config, data: TextData, run_dir: Path) -> Trace:
    """Trains the lowered `model`; all ranks call it.

    Returns:
        on rank 0 the trace of all ranks, in the order of one process; on other ranks an incomplete one.
    """
    mesh, rank = plan.mesh, dist.get_rank()
    module = LanguageModule(model, config.optimizer, config.trainer.max_steps)
    loader = train_loader(
        data.train, config.data, seed=config.seed, rank=mesh.batch_index(rank), world_size=mesh.num_batches,
        num_steps=config.trainer.max_steps, multiple=mesh.size(Part.SEQUENCE),
    )  # fmt: skip
    accumulate = accumulation_steps(config, mesh)
    numbers = [_global_number(i, mesh, rank, accumulate) for i in range(accumulate * config.trainer.max_steps)]
    batches = [uneven(batch, number, config) for batch, number in zip(loader, numbers, strict=True)]
    first = list(zip(batches, numbers, strict=True))[:accumulate]
    replayed = [drawn_routes(model, config, batch, number) for batch, number in first]
    metrics = Metrics(1, config.trainer.max_steps)
    keys = [(config.seed, number) for number in numbers[:accumulate]]
    recorder = _Recorder(metrics, batches[:accumulate], plan, replayed, keys, Entries(model))
    trainer = make_trainer(config, plan, run_dir, [metrics, recorder])
    trainer.fit(module, _Batches(batches))
    trace, stages = recorder.trace, groups_of(trainer).stages
    trace.inputs = _in_order([own_positions(model, batch["input_ids"]) for batch in batches], accumulate, plan)
    trace.weights = merged(_whole(model), stages)
    entries = tensors_of(model, trainer.optimizers)
    trace.saved = merged({name: full(tensor) for name, tensor in entries.items()}, stages)
    trainer.save_checkpoint(run_dir / "checkpoint")
    _overwrite(entries.values())
    trainer.strategy.load_checkpoint(run_dir / "checkpoint")
    restored = {name: full(tensor) for name, tensor in tensors_of(model, trainer.optimizers).items()}
    trace.restored = merged(restored, stages)
    return trace


def merged(own: dict[str, Tensor], stages: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """On ranks of the first stage of a pipeline what all stages have, else `own`. All ranks call it."""
    if stages is None:
        return own
    is_first = dist.get_rank(stages) == 0
    gathered: list[Any] = [None] * stages.size() if is_first else []
    dist.gather_object(own, gathered or None, group=stages, group_dst=0)
    return {name: tensor for part in reversed(gathered) for name, tensor in part.items()} | own


def _global_number(i: int, mesh: MeshSpec, rank: int, accumulate: int) -> int:
    """The index in one process of this rank's micro-batch i."""
    step, place = divmod(i, accumulate)
    return (step * mesh.num_batches + mesh.batch_index(rank)) * accumulate + place


class _Batches:
    """A loader over given batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Recorder(StepObserver):
    """Fills the trace during `fit`. It must come after `Metrics` in the list of observers, whose results it reads.

    Args:
        first: micro-batches of step 0 on this rank. replayed: the experts that each of them replays; empty: none.
        keys: seed and global number of each, for routers that draw. entries: of the model before it was sharded.
    """

    def __init__(
        self, metrics: Metrics, first: list[Batch], plan: Plan, replayed: list[dict[str, Tensor]],
        keys: list[tuple[int, int]], entries: Entries,
    ) -> None:  # fmt: skip
        self.metrics, self.first, self.plan, self.replayed, self.trace = metrics, first, plan, replayed, Trace()
        self.mesh, self.keys, self.entries = plan.mesh, keys, entries
        self._numbers: dict[str, Tensor] = {}
        self._micro_batch = ExitStack()

    def started(self, module: LanguageModule) -> None:
        """Records the outputs before the first step, and what this rank has of the weights."""
        self._numbers = {name: self.entries.locate(local_part(w)) for name, w in module.model.named_parameters()}
        strategy = module.trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        outputs = [
            strategy.evaluated(partial(evaluated, module, batch, *key), batch)
            for batch, key in zip(self.first, self.keys, strict=True)
        ]
        nothing = torch.zeros(0)  # of earlier stages of a pipeline
        outputs = [nothing if output is None else output for output in outputs]
        self.trace.outputs = _in_order(outputs, len(outputs), self.plan)

    def micro_batch_started(self, module: LanguageModule, number: int) -> None:
        """Starts to record the routes of step 0, and to replay some."""
        if number < len(self.first):
            self._micro_batch.enter_context(recorded_routes(module.model, self.trace))
            if self.replayed[number]:
                self._micro_batch.enter_context(replay_routes(module.model, self.replayed[number]))

    def gradients_ready(self, module: LanguageModule, step: int) -> None:
        """Records the gradients of step 0."""
        if step == 0:
            weights = dict(module.model.named_parameters())
            every = {name: gradient_of(weight) for name, weight in weights.items()}
            grads = {name: grad for name, grad in every.items() if grad is not None}
            tied = tied_names(module.model)
            whole = {tied.get(name, name): grad for name, grad in _by_id(module.model, grads).items()}
            self.trace.grads = merged(whole, groups_of(module.trainer).stages)
            self._hold({name: local_gradient(weights[name], grad) for name, grad in grads.items()})

    def _hold(self, grads: dict[str, Tensor | None]) -> None:
        """On rank 0, what each rank has of each gradient."""
        gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object((self._numbers, grads), gathered or None)
        if gathered:
            places = Places(self.entries, [numbers for numbers, _ in gathered])
            held = {name: places.held(name, [of_rank for _, of_rank in gathered]) for name in places.parts}
            self.trace.places, self.trace.held = places, held
            self.trace.expert_axes = Axes({axis: self.mesh.size(axis) for axis in expert_axes()})
            self.trace.dense_axes = Axes(self.mesh.dims(("dp_shard",)))

    def micro_batch_ended(self, module: LanguageModule, number: int) -> None:
        """Ends what `micro_batch_started` started."""
        self._micro_batch.close()

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """Records loss, norm and loads."""
        assert self.metrics.tally.loss_last is not None and strategy.grad_norm is not None
        self.trace.losses.append(self.metrics.tally.loss_last)
        self.trace.norms.append(strategy.grad_norm)
        self.trace.loads += [layer.load for layer in strategy.loads]

    def ended(self, module: LanguageModule) -> None:
        """Gathers the routes of all ranks."""
        rank = dist.get_rank()
        for chosen in (self.trace.routes, self.trace.choices):
            held: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(held, list(chosen))  # of a pipeline, the layers of the rank's stages
            for name in dict.fromkeys(name for names in held for name in names):
                whole = [
                    ids_TK.unflatten(0, (len(batch["labels"]), -1))
                    for ids_TK, batch in zip(chosen.get(name, ()), self.first, strict=False)
                ]
                ranks = [r for r, names in enumerate(held) if name in names and self.mesh.counts_in_stage(r)]
                every = _in_order(whole, len(self.first), self.plan, ranks)
                if name in chosen or rank == 0:
                    chosen[name] = [ids_BSK.flatten(0, 1) for ids_BSK in every]


def full(tensor: Tensor) -> Tensor:
    """A copy of a tensor; a DTensor is gathered from all ranks. All ranks call it."""
    if _QUIET.level != logging.ERROR:  # it warns that gathering over two axes takes two collectives
        _QUIET.setLevel(logging.ERROR)  # which empties what every logger has cached
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _whole(model: nn.Module) -> dict[str, Tensor]:
    return _by_id(model, model.state_dict())


def _by_id(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name of the parameter, experts in the order of their ids."""
    orders = expert_orders(model)
    return {name: by_id(full(tensor), orders.get(name)) for name, tensor in tensors.items()}


@torch.no_grad()
def _overwrite(entries: Iterable[Tensor]) -> None:
    """Overwrites every entry of the checkpoint, with NaN or -1."""
    for tensor in entries:
        local = local_part(tensor)
        local.fill_(float("nan") if local.is_floating_point() else -1)


def _in_order(local: list[Tensor], per_step: int, plan: Plan, ranks: Sequence[int] | None = None) -> list[Tensor]:
    """On rank 0, the tensors (B, s, ...) of all ranks in the order of one process: by step, rank, position in the step.

    Of ranks that share tokens, those of the one that counts them; parts of the same sequences are joined. ranks: those
    whose tensors they are; None: those that count.
    """
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(local, gathered or None)
    if not gathered:
        return local
    mesh = plan.mesh
    ranks = [rank for rank in range(mesh.world_size) if plan.is_counted(rank)] if ranks is None else ranks
    parts = [gathered[rank] for rank in ranks]
    steps = range(0, len(parts[0]), per_step)
    of_batch = mesh.size(Part.SEQUENCE)
    counted = [
        [torch.cat(tensors, 1) for tensors in zip(*parts[first : first + of_batch], strict=True)]
        for first in range(0, len(parts), of_batch)
    ]
    return [tensor for step in steps for tensors in counted for tensor in tensors[step : step + per_step]]
