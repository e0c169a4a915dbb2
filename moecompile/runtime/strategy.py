"""ExpertParallelStrategy: Lightning runs a compiled model on a mesh.

    Trainer(strategy="expert_parallel")                            # the module returns a mean loss over its batch
    Trainer(strategy=ExpertParallelStrategy(loss="sum"))           # it returns {"loss": sum, "num_tokens": n}

The LightningModule is an ordinary one, with a model that `moecompile.compile_model` has lowered. The strategy gets the
plan from it, shards it, and sets the routers' random keys. From backward to the optimizer step it
  1. adds the routers' auxiliary losses to the loss, times the micro-batch's tokens if the loss is a sum,
  2. sums the gradients of replicated weights (FSDP2 has summed the others),
  3. divides once: by the micro-batches at a time (`mean`, as DDP does), or by the tokens of the whole window (`sum`),
  4. updates the correction biases from the global load, once per optimizer step,
  5. clips by one norm over all meshes (Lightning's own `gradient_clip_val`).
With manual optimization, 1 to 3 are done in every `manual_backward` (moecompile.runtime.manual).
A step with a loss or gradients that are not finite can be skipped on all ranks, or end the run. Checkpoints are folders
of shards that can be loaded on any mesh.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moecompile import hub_kernels
from moecompile.capture import layers_of, seed_generators
from moecompile.checkpoint.folders import whole
from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import Part
from moecompile.nn import (
    LayerLoad,
    LoadMeter,
    Router,
    auxiliary_loss,
    auxiliary_losses,
    forget_auxiliary_losses,
    set_random_key,
    update_balance,
)
from moecompile.nn.own_router import OwnRouter
from moecompile.nn.stages import end_stages
from moecompile.passes.base import run_on_model
from moecompile.passes.cut import Cut, stage_plan
from moecompile.passes.recompute import CHECKPOINTED
from moecompile.passes.run import on_every_rank
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import device_mesh_of
from moecompile.pipeline import compiled_module, plan_of
from moecompile.plan import Plan
from moecompile.runtime import trainer_checkpoint
from moecompile.runtime.even_batches import even
from moecompile.runtime.gradients import (
    FinishGradients,
    WideSums,
    all_finite,
    clip_by_global_norm,
    clip_by_value,
    divide,
    forget,
    sum_replicated,
)
from moecompile.runtime.groups import Groups
from moecompile.runtime.manual import Guard, Tokens, only_routers_behind
from moecompile.runtime.nonfinite import error_of, origin
from moecompile.runtime.stages import PipelineSteps, check_held, loss_kinds
from moecompile.runtime.weight_groups import check_rows_are_stepped, step_meshes_apart
from moecompile.torch_private import drop_unreduced, parameters_of, set_timeouts, tree_map_only

DEFAULT_TIMEOUT = timedelta(minutes=30)
_MIX = 0x9E3779B97F4A7C15  # odd and large: neighbouring keys are far apart


@dataclass
class GradAccumulation:
    """The micro-batches of one optimizer step on this rank so far; each window is a new object.

    num_micro_batches: those that have begun. num_tokens: their tokens, with automatic optimization of a sum. is_finite:
    whether their losses are finite; None before the first backward. arguments: of their training steps, with `on_nan`.
    wide: sums in fp32 of gradients that are reduced each time and narrower.
    """

    num_micro_batches: int = 0
    num_tokens: Tensor | int = 0
    is_finite: Tensor | None = None
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    wide: WideSums = field(default_factory=WideSums)

    def add_loss(self, loss: Tensor) -> None:
        """Records whether the loss of a micro-batch is finite, without a host sync."""
        finite = loss.detach().isfinite().all()
        self.is_finite = finite if self.is_finite is None else self.is_finite & finite


@contextmanager
def keyed_random_numbers(
    modules: Sequence[nn.Module], seed: int, step: int, number: int, device: torch.device
) -> Iterator[None]:
    """Makes random numbers (routers, dropout) depend on the micro-batch's index in one process, not on the rank.

    Args:
        modules: whose routers draw. step: optimizer step. number: index of the micro-batch in the step, in the order of
            one process.
    """
    for module in modules:
        set_random_key(module, seed, step, number)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_generators(((seed * _MIX + step) * _MIX + number) % 2**63)
        yield


class ExpertParallelStrategy(ModelParallelStrategy):
    """Expert parallelism with FSDP2 for a LightningModule that holds a compiled model.

    With accumulation, the plan says when weights are gathered and gradients reduced (`Plan.gather`, `Plan.reduce`).

    Args:
        loss: `mean` if `training_step` returns a mean over its batch; `sum` if it returns the sum over its tokens, in a
            dict with their number: `{"loss": loss, "num_tokens": n}`. With `sum`, unequal token counts are exact. With
            manual optimization: the argument of `manual_backward`, after `count_tokens(n)` for a sum.
        seed: of random numbers in training (routers, dropout), with the optimizer step and the micro-batch.
        on_nan: what to do if a loss or a gradient is not finite: `stop` ends the run and names layer and rank, `skip`
            skips the step on all ranks; None: no check. Not with manual optimization.
        process_group_backend: by default gloo on a CPU and NCCL on CUDA.
        timeout: of the process group.
        param_dtype: the dtype in which layers compute, see `moecompile.passes.shard.shard`; None: that of the weights.
        checkpointing: `full` or `keep_exchanges`: layers are recomputed in backward (moecompile.passes.recompute);
            `budget`: what the plan says of each layer.
        compile_regions: whether the graphs of moecompile are compiled with torch.compile.
        materialize: for a model that was compiled on the meta device: called with the root device after sharding, to
            fill the shards.

    Raises:
        ConfigError: an unknown `loss`, `on_nan` or `checkpointing`.
        PlanError: at setup: no compiled model, or the Trainer's ranks do not fit it.
        NotFinite: in a step: as `on_nan` says.

    After each optimizer step, `loads` has one `LayerLoad` per router; after each backward, `aux_losses` has the sums
    over the micro-batch's layers by kind, times their coefficients, per token.
    """

    def __init__(
        self,
        loss: str = "mean",
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        seed: int = 0,
        on_nan: str | None = None,
        *,
        param_dtype: torch.dtype | None = None,
        checkpointing: str = "none",
        compile_regions: bool = False,
        materialize: Callable[[torch.device], None] | None = None,
    ) -> None:
        if loss not in ("mean", "sum"):
            raise ConfigError("loss", loss, "must be mean or sum", "Use what your training_step returns")
        if on_nan not in (None, "stop", "skip"):
            raise ConfigError("on_nan", on_nan, "must be stop, skip or None", "Use one of these")
        if checkpointing not in CHECKPOINTED:
            raise ConfigError(
                "checkpointing", checkpointing, f"must be one of {', '.join(CHECKPOINTED)}", "Use one of these"
            )
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.loss, self.seed, self.on_nan = loss, seed, on_nan
        self.param_dtype, self.checkpointing, self.compile_regions = param_dtype, checkpointing, compile_regions
        self.materialize = materialize
        self.grad_norm: float | None = None  # before clipping, of the last optimizer step that clipped
        self.loads: list[LayerLoad] = []  # of the last optimizer step
        self.aux_losses: dict[str, Tensor] = {}  # of the last micro-batch
        self.skipped = False  # whether the last optimizer step was skipped
        self._groups: Groups | None = None  # after setup
        self._window = GradAccumulation()
        self._tokens = Tokens()  # of the last micro-batch
        self._finish = FinishGradients()
        self._guard: Guard | None = None  # with manual optimization
        self._is_again = False  # whether a step is run again, to find the origin of a NaN
        self._is_last = False  # whether the current micro-batch is the last one of its window
        self._reduces_each, self._gathers_once = False, False  # as the plan says, after setup
        self._is_counted = False
        self._stages: PipelineSteps | None = None  # with mesh.pp, after setup

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """EP peers get different data; ranks of one TP or CP group get the same."""
        assert self.model is not None
        mesh = plan_of(self.model).mesh
        return {"num_replicas": mesh.num_batches, "rank": mesh.batch_index(self.global_rank)}

    def process_dataloader(self, dataloader: Any) -> Any:
        """Lightning's: ranks must call the model equally often."""
        return even(super().process_dataloader(dataloader), self._timeout or DEFAULT_TIMEOUT)

    @property
    def device_mesh(self) -> DeviceMesh:
        """The (dp_replicate, edp, ep) mesh, after setup."""
        if self._device_mesh is None:
            raise PlanError("strategy.device_mesh", None, "is made at setup", "Read it after Trainer.fit has begun")
        return self._device_mesh

    def setup_environment(self) -> None:
        """Sets up only the process group; the mesh depends on the plan, which the module may not have yet."""
        self._setup_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Shards the compiled model, then sets up optimizers as Lightning does."""
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False  # FSDP2 reads versions of its buffers; with gloo, Lightning does the same
        compiled = compiled_module(self.model)
        hub_kernels.take_off(self.model)  # put on after it was compiled
        plan = plan_of(compiled)
        self._check_world(plan)
        if trainer.state.fn == TrainerFn.FITTING and self.world_size > 1:
            self._check_of_ranks(trainer)
        if self.materialize is None or self._device_mesh is not None:
            self.model_to_device()  # also restores shards that an earlier validation left unsharded
        self.model = self.precision_plugin.convert_module(self.model)
        if self._device_mesh is None:
            _check_not_split(compiled, type(self.model).__name__)
            check_same_weights(self.model)
            self._device_mesh = device_mesh_of(plan.mesh, self.root_device.type)
            self._groups = Groups.of(plan.mesh, self.root_device.type)
            self._parallelize(compiled, plan, self._device_mesh)
            self._reduces_each, self._gathers_once = plan.reduce == "each", plan.gather == "step"
            self._is_counted = plan.is_counted(self.global_rank)
            if self.materialize is not None:
                self.materialize(self.root_device)
                check_same_weights(self.model, self._groups.stage)  # the replicated ones
            set_timeouts(self._timeout or DEFAULT_TIMEOUT)
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]
        # Autocast's plugin refuses to clip for a fused optimizer, because of a scaler that bf16 does not have.
        self.precision_plugin.clip_gradients = partial(  # type: ignore[method-assign]
            Precision.clip_gradients, self.precision_plugin
        )
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            _train_routing(compiled)
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                step_meshes_apart(optimizer)
            if self._stages is not None:
                self._stages.tied.check_settings(self.optimizers)
            self._watch(compiled)
            check_rows_are_stepped(compiled, self.optimizers)
        self.setup_precision_plugin()

    def _parallelize(self, compiled: nn.Module, plan: Plan, device_mesh: DeviceMesh) -> None:
        index, kinds = plan.mesh.index(self.global_rank, Part.LAYERS), loss_kinds(compiled)
        if plan.pipeline is not None:
            assert self.model is not None
            check_held(self.model, compiled)
            run_on_model([Cut(index=index)], compiled, plan)
        steps = on_every_rank(
            device_mesh, self.param_dtype, checkpointing=self.checkpointing, compile_regions=self.compile_regions
        )
        run_on_model(steps, compiled, stage_plan(plan, index))
        if plan.pipeline is not None:
            end_stages(compiled)
            self._stages = PipelineSteps(self, compiled, plan, index, kinds)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the folder `filepath` atomically: shards (torch DCP) that can be loaded on any mesh."""
        assert self.model is not None
        trainer_checkpoint.save(
            Path(self.broadcast(filepath)), checkpoint, self.model,
            self.optimizers if "optimizer_states" in checkpoint else [], is_first_rank=self.is_global_zero,
            barrier=self.barrier, stages=self.groups.stages,
        )  # fmt: skip

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: `save_checkpoint` writes it. Lightning's makes missing state by a step, and gathers all of it."""
        return {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads such a folder, written on any mesh; no code in it is run.

        Raises:
            PlanError: entries are missing or have other shapes, a parameter group has weights with several settings,
                something beside tensors has a class of its own, or `fit` goes on from weights alone.
        """
        assert self.model is not None and self.lightning_module is not None
        goes_on = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        path = Path(self.broadcast(whole(Path(checkpoint_path))))
        with nullcontext() if self._guard is None else self._guard.pause():  # it makes steps with zeros
            found, are_same = trainer_checkpoint.load(
                path, self.model, self.optimizers, self.groups.stages, goes_on=goes_on
            )
        for config, state in zip(self.lr_scheduler_configs, found.get("lr_schedulers", ()), strict=False):
            if not are_same:
                trainer_checkpoint.fit_scheduler(config.scheduler, state)
        return found

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = self.precision_plugin.main_params(optimizer)
        stages, tied = self.groups.mesh.size(Part.LAYERS), () if self._stages is None else self._stages.uncounted
        norm = clip_by_global_norm(parameters, clip_val, self.groups.every, stages=stages, uncounted=tied)
        self.grad_norm = float(norm)

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(self.precision_plugin.main_params(optimizer), clip_val)

    def _check_world(self, plan: Plan) -> None:
        if plan.mesh.world_size != self.world_size:
            raise PlanError(
                "mesh", f"{plan.mesh.num_nodes} x {plan.mesh.ranks_per_node}",
                f"the plan is for {plan.mesh.world_size} ranks, the Trainer has {self.world_size}",
                "Change mesh.num_nodes and mesh.ranks_per_node, or the Trainer's devices and num_nodes",
            )  # fmt: skip
        if plan.mesh.axes(Part.SEQUENCE) and self.loss == "mean":
            raise ConfigError(
                "loss", "mean",
                f"with {plan.mesh.setting(Part.SEQUENCE)}, ranks may have unequally many of a sequence's targets",
                "Return {'loss': sum, 'num_tokens': n} of moecompile.own_positions(model, labels), and use loss='sum'",
            )  # fmt: skip

    def _check_of_ranks(self, trainer: Trainer) -> None:
        """Refuses what trains with one rank alone, and would end in torch's words: averages late in a run."""
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                "precision", "16-mixed", "lets each rank decide by itself whether a step is skipped", "Use bf16-mixed"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ConfigError(
                    "callbacks", type(callback).__name__,
                    "averages a copy of the whole weights, and a rank has shards, or stages, of them",
                    "Leave it out, or average the weights of a rank in a callback of your own; of checkpoints of "
                    "task=train, export.average is the mean",
                )  # fmt: skip
            if isinstance(callback, BaseFinetuning):
                raise ConfigError(
                    "callbacks", type(callback).__name__,
                    "compares the values of weights when it unfreezes some, and a rank has shards of them",
                    "Leave it out; set requires_grad where it does, and give the optimizer all weights at once",
                )  # fmt: skip

    # -- from training_step to the optimizer step ------------------------------------------------------------

    def _watch(self, compiled: nn.Module) -> None:
        """Installs the guard with manual optimization, where the module itself calls backward and steps."""
        assert self.model is not None
        if self._guard is not None:
            self._guard.remove()
        self._guard = None
        if self._is_automatic:
            if self._gathers_once:
                for module in self._sharded():
                    module.set_reshard_after_forward(False, recurse=False)
            return
        if self._stages is not None:
            raise ConfigError(
                "mesh.pp", self.groups.mesh.pp, "a pipeline orders the backwards of a step, and this module calls them "
                "itself (manual optimization)", "Use automatic optimization, or no stages",
            )  # fmt: skip
        if by_rows := [each.by_rows for each in plan_of(compiled).lookups if each.by_rows]:
            raise ConfigError(
                "embeddings.optimizer", by_rows[0], "is for automatic optimization, and this module calls its "
                "backwards itself", "Use embeddings.optimizer=same",
            )  # fmt: skip
        if self.on_nan is not None:
            raise ConfigError(
                "on_nan", self.on_nan, "is only for automatic optimization",
                "Use on_nan=None, and check losses in training_step",
            )  # fmt: skip
        if isinstance(compiled, FSDPModule):  # zero_grad and toggles after a forward must see the shards
            compiled.set_reshard_after_forward(True)
        self._guard = Guard(self.model, compiled, self.optimizers, self._end_manual_step)

    @property
    def aux_tokens(self) -> Tensor | None:
        """By what `aux_losses` must be multiplied to be summed; None: by the tokens of the micro-batch."""
        return None if self._stages is None else self._stages.aux_tokens

    @property
    def groups(self) -> Groups:
        """The process groups by what they mean, after setup."""
        if self._groups is None:
            raise PlanError("strategy.groups", None, "are made at setup", "Read them after Trainer.fit has begun")
        return self._groups

    @property
    def _is_automatic(self) -> bool:
        assert self.lightning_module is not None
        return bool(self.lightning_module.automatic_optimization)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """For all micro-batches of a step except the last: gradients are accumulated, and summed over replicas later.

        With `reduce=last` they are not reduced either; with `gather=step` weights stay whole. With manual optimization
        all are reduced, because the module may zero gradients before the step.
        """
        wrapped = self._sharded() if self._is_automatic else []
        for module in wrapped:
            module.set_requires_gradient_sync(self._reduces_each, recurse=False)
            module.set_requires_all_reduce(False, recurse=False)
            module.set_reshard_after_backward(not self._gathers_once, recurse=False)
        try:
            yield
        finally:  # the last backward reshards: the optimizer changes shards, which the next forward must gather
            for module in wrapped:
                module.set_requires_gradient_sync(True, recurse=False)
                module.set_reshard_after_backward(True, recurse=False)

    def _sharded(self) -> list[FSDPModule]:
        assert self.model is not None
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def count_tokens(self, num_tokens: Tensor | int) -> None:
        """Sets the number of this rank's tokens in the next losses, for manual optimization with `loss="sum"`.

        It is used for every `manual_backward` until the next count or the next training step. The gradient of a weight
        is divided by the tokens of all ranks in the counts whose losses it depends on since it was zeroed, each counted
        once.

        Raises:
            ConfigError: the optimization is automatic (`training_step` returns the count), or the loss is a mean.
        """
        if self._is_automatic or self.loss != "sum":
            raise ConfigError(
                "count_tokens", int(num_tokens), "is for manual optimization with loss=sum",
                "With automatic optimization, return {'loss': sum, 'num_tokens': n} from training_step; "
                "a mean needs no count",
            )  # fmt: skip
        self._tokens.count(num_tokens, self.root_device)

    def take_auxiliary_loss(self) -> Tensor | None:
        """Returns the auxiliary losses of the last training forward, which the next backward does not add again."""
        assert self.model is not None
        aux = auxiliary_loss(self.model)
        if aux is not None:
            self.aux_losses = auxiliary_losses(self.model)
        forget_auxiliary_losses(self.model)
        return aux

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's step; with `loss="sum"`, its tokens are summed over the accumulation window.

        In a pipeline, the last micro-batch of a window runs the steps of all of them (moecompile.runtime.stages).
        """
        self._begin_step()
        if self._stages is not None:
            return self._stages.training_step(args, kwargs, is_last=self._is_last)
        if self.on_nan is not None:
            # Containers of its own: a step may take something out of its batch.
            self._window.arguments.append(tree_map_only(Tensor, lambda leaf: leaf, (args, kwargs)))
        with self._random_numbers():
            output = self._module_step(*args, **kwargs)
        if self.loss == "sum" and self._is_automatic and output is not None:  # None: handled by Lightning
            self._count_tokens(output)
            self._window.num_tokens = self._window.num_tokens + self._tokens.last
        return output

    def _module_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step."""
        return super().training_step(*args, **kwargs)

    def _count_tokens(self, output: Any) -> None:
        if not isinstance(output, Mapping) or "num_tokens" not in output:
            raise ConfigError(
                "loss", "sum", "training_step must return {'loss': sum over tokens, 'num_tokens': their number}",
                "Return both, or use loss='mean'",
            )  # fmt: skip
        self._tokens.count(output["num_tokens"], self.root_device)

    def evaluated(self, step: Callable[[], Any], inputs: Any) -> Any:
        """The result of `step`, which calls the model without gradients; in a pipeline through all stages, and on the
        last one alone (elsewhere None). inputs: their shapes are those of what stages send.
        """
        return step() if self._stages is None else self._stages.evaluate(step, inputs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, see `evaluated`."""
        return self.evaluated(partial(super().validation_step, *args, **kwargs), (args, kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, see `evaluated`."""
        return self.evaluated(partial(super().test_step, *args, **kwargs), (args, kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, see `evaluated`."""
        return self.evaluated(partial(super().predict_step, *args, **kwargs), (args, kwargs))

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Lightning's, over all ranks."""
        votes = super().reduce(torch.tensor(int(decision), device=self.root_device), None, "sum")
        return bool(votes == self.world_size) if all else bool(votes)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Lightning's. Ranks of a TP group and those of a pipeline log the same values: a sum has each once."""
        if group is None and self._groups is not None and reduce_op in ("sum", dist.ReduceOp.SUM):
            group = self._groups.tokens
        return super().reduce(tensor, group, reduce_op)

    def _begin_step(self) -> None:
        """Resets the state of the last step, and abandons a window that was not completed."""
        assert self.lightning_module is not None and self.model is not None
        self.aux_losses = {}
        self._tokens.expire()
        trainer = self.lightning_module.trainer
        is_first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if self._is_automatic and is_first and self._window.num_micro_batches and not self._is_again:
            drop_unreduced(self.model)
            forget(parameters_of(self.model))  # sums so far, with reduce=each and of replicated weights
            self._finish.abandon()
            self._window = GradAccumulation()
            update_balance(self.model, self.groups.tokens, move=False)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the auxiliary losses, divides means, and completes the gradients if this is the last backward.

        They are added here, not to the result of `training_step`, so that the logged loss is the module's.
        """
        module = self.lightning_module
        assert module is not None and self.model is not None
        if self._stages is not None:  # backwards are computed already; hooks run as usual
            self.precision_plugin.pre_backward(closure_loss, module)
            self._stages.backward(closure_loss, is_last=self._is_last)
            return self.precision_plugin.post_backward(closure_loss, module)
        loss = self._objective(closure_loss)
        self._window.add_loss(loss)
        if not self._finish.is_open:
            self._finish.open(parameters_of(self.model))
        self.pre_backward(loss)
        loss = self.precision_plugin.pre_backward(loss, module)
        with nullcontext() if self._guard is None else self._guard.backward():
            self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)
        if self._guard is not None or self._is_last:  # before the hook on_after_backward sees them
            self._complete_gradients()
        else:
            self._after_backward(parameters_of(self.model))
        loss = self.precision_plugin.post_backward(loss, module)
        self.post_backward(loss)
        return loss

    def _after_backward(self, parameters: list[nn.Parameter]) -> None:
        """After a backward that is not the last one of a window."""
        if self._reduces_each:
            self._window.wide.take(parameters)

    def _objective(self, loss: Tensor) -> Tensor:
        """The loss for backward on this rank. For sums, it undoes Lightning's division by the accumulation steps."""
        assert self.lightning_module is not None and self.model is not None
        if self._is_automatic:
            accumulate = self.lightning_module.trainer.accumulate_grad_batches
            behind: AbstractContextManager[None] = nullcontext()
        else:
            accumulate, behind = 1, only_routers_behind(loss, self.model)
        with behind:
            aux = self.take_auxiliary_loss()
        if self.loss == "sum":
            tokens = self._tokens.last
            loss = loss * accumulate
            return loss if aux is None else loss + self.groups.of_micro_batch(tokens) * aux
        if aux is not None:
            loss = loss + aux / accumulate
        return loss / self.groups.num_batches

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Completes the gradients after the last backward, before hooks and clipping."""

        def completed() -> Any:
            self._is_last = True
            try:
                result = closure()
            finally:
                self._is_last = False
            if self._window.num_micro_batches:  # no backward in the last training step
                self._complete_gradients()
            return result

        return super().optimizer_step(optimizer, completed if self._is_automatic else closure, model, **kwargs)

    def _complete_gradients(self) -> None:
        """Ends a window: sums over ranks, divides once, and with automatic optimization updates the balance."""
        assert self.model is not None
        parameters = parameters_of(self.model)
        if not self._finish.is_open:
            self._finish.open(parameters)
        self._window.wide.give()
        sum_replicated(parameters, self.groups.tokens)
        if self._stages is not None:
            self._stages.tied.sum_gradients()
        total, kept, self.skipped = self._over_ranks(parameters)
        if self.skipped:
            self._drop_step(parameters)
        else:
            if self.loss == "sum":
                divide(parameters, total.clamp_min(1))
            self._finish.close(parameters, total if self.loss == "sum" else None, kept, self._tokens.number)
        if self._is_automatic:
            self._window = GradAccumulation()
            self.loads = update_balance(self.model, self.groups.tokens, move=not self.skipped)
            if self._stages is not None:
                self.loads = self._stages.of_all_stages(self.loads)

    def _end_manual_step(self) -> None:
        """Updates the balance from the load since the last step, which is zero for a second optimizer's step."""
        assert self.model is not None
        self._window = GradAccumulation()
        loads = update_balance(self.model, self.groups.tokens)
        if any(load.tokens for load in loads):
            self.loads = loads

    def _over_ranks(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, bool]:
        """Over all ranks: tokens of the window, weights with earlier gradients, whether something is not finite."""
        tokens = self._window.num_tokens if self._is_automatic or self.loss == "mean" else self._tokens.last
        kept = self._finish.kept(parameters) if self.loss == "sum" else []
        shared = kept if self._stages is None else []  # stages have different weights
        sums = torch.zeros(2 + len(shared), dtype=torch.int64, device=self.root_device)
        sums[0] = tokens if self._is_counted else 0
        if self.on_nan is not None:
            losses = self._window.is_finite
            sums[1] = ~(all_finite(parameters) & (True if losses is None else losses))
        if any(shared):
            sums[2:] = torch.tensor(shared)
        if self.loss == "sum" or self.on_nan is not None:
            dist.all_reduce(sums, group=self.groups.every)
        kept_anywhere = sums[2:]
        if kept and not shared:
            kept_anywhere = torch.tensor(kept, dtype=torch.int64, device=self.root_device)
            dist.all_reduce(kept_anywhere, group=self.groups.stage)
        return sums[0], kept_anywhere, self.on_nan is not None and bool(sums[1])

    def _drop_step(self, parameters: list[nn.Parameter]) -> None:
        """Removes all gradients, so that the optimizer changes nothing; or ends the run.

        Raises:
            NotFinite: on_nan=stop; the same on all ranks.
        """
        assert self.lightning_module is not None and self.model is not None
        forget(parameters)
        self._finish.abandon()
        if self.on_nan == "skip":
            return
        window, self._window, self._is_last = self._window, GradAccumulation(), False
        step = self.lightning_module.trainer.global_step
        if self._stages is not None:  # a micro-batch cannot be run again without the other stages
            raise error_of(None, step + 1, self.world_size, is_known=False)

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            output = self.training_step(*args, **kwargs)
            loss = output["loss"] if isinstance(output, Mapping) else output
            self.backward(loss, None)

        runs = [partial(run, *arguments) for arguments in window.arguments]
        self._is_again = True
        try:
            event = origin(compiled_module(self.model), runs, self.groups.every)
        finally:
            self._is_again = False
        raise error_of(event, step + 1, self.world_size)

    def _random_numbers(
        self, place: int | None = None, modules: Sequence[nn.Module] = ()
    ) -> AbstractContextManager[None]:
        """The context with the random numbers of the micro-batch that begins, or of that at `place` in its window.

        modules: whose routers draw; none: all.
        """
        assert self.lightning_module is not None and self.model is not None
        trainer, begins = self.lightning_module.trainer, place is None
        place = self._window.num_micro_batches if place is None else place
        if self._is_automatic:
            number = self.groups.batch_index * trainer.accumulate_grad_batches + place
        else:  # the module decides how many there are
            number = place * self.groups.num_batches + self.groups.batch_index
        self._window.num_micro_batches += begins
        drawing = modules or [self.model]
        return keyed_random_numbers(drawing, self.seed, trainer.global_step, number, self.root_device)


def _check_not_split(compiled: nn.Module, name: str) -> None:
    """Refuses a model that is on the ranks already: of another Trainer, or of `until="shard"`."""
    if any(isinstance(parameter, DTensor) for parameter in compiled.parameters()):
        raise PlanError(
            "model", name, "is split over ranks already, by another Trainer or by until='shard'",
            "Use one Trainer for a module, also to validate, test and predict; or build the module again, and give "
            "what was saved as ckpt_path",
        )  # fmt: skip


def _train_routing(model: nn.Module) -> None:
    """Puts routers, what reads the model's own, and meters of `model` into training mode before training begins; prints
    a note if it changes any.

    `from_pretrained` leaves a model in evaluation mode, and Lightning keeps the mode: counts, the bias rule and
    auxiliary losses would silently be off. Other modules keep their mode, as does a model without trained parameters,
    and a stack of layers without any: a frozen tower, or a teacher, whose biases must not move.
    """
    kinds, frozen = (Router, OwnRouter, LoadMeter), _in_frozen_stacks(model)
    in_eval = [m for m in model.modules() if isinstance(m, kinds) and not m.training and m not in frozen]
    if not in_eval or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in in_eval:
        module.train()
    layers = sum(isinstance(module, LoadMeter) for module in in_eval)
    rank_zero_info(
        f"The routers of {layers} MoE layers were in evaluation mode, as from_pretrained leaves a model. They are "
        "now in training mode: loads are counted, the bias rule and auxiliary losses hold. All else, such as dropout, "
        "keeps its mode; call model.train() to change that."
    )


def _in_frozen_stacks(model: nn.Module) -> set[nn.Module]:
    """All modules in layers beside which no layer is trained."""
    paths = {module: path for path, module in model.named_modules()}
    stacks = defaultdict[str, list[nn.Module]](list)
    for layer in layers_of(model):
        stacks[paths[layer].rpartition(".")[0]].append(layer)
    frozen = [s for s in stacks.values() if not any(p.requires_grad for layer in s for p in layer.parameters())]
    return {module for layers in frozen for layer in layers for module in layer.modules()}


def groups_of(trainer: Trainer) -> Groups:
    """The process groups of a trainer with `ExpertParallelStrategy`."""
    assert isinstance(trainer.strategy, ExpertParallelStrategy)
    return trainer.strategy.groups


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Expert parallelism with FSDP2, from a moecompile plan"
)
