"""ExpertParallelStrategy: Lightning runs a compiled model on a mesh.

    Trainer(strategy="expert_parallel")                            # the module returns a mean loss over its batch
    Trainer(strategy=ExpertParallelStrategy(loss="sum"))           # it returns {"loss": sum, "num_tokens": n}

The LightningModule is an ordinary one. It holds a model that `moecompile.compile_model` lowered; the strategy finds its
plan, shards it, keys the routers' random numbers, and does what has to happen from backward to the optimizer step:
  1. adds the routers' auxiliary losses to the loss, times the micro-batch's tokens where the loss is a sum,
  2. sums the gradients of the weights that every rank holds whole (FSDP2 has summed the others),
  3. divides once: by the world size (`mean`, as DDP does) or by the tokens of the whole accumulation window (`sum`),
  4. moves the correction biases by the global load, once per optimizer step,
  5. clips by one norm over all meshes (Lightning's own `gradient_clip_val`).
Under manual optimization 1 to 3 happen in every `manual_backward` (moecompile.runtime.manual).
A step whose loss or gradients are not finite can be dropped on all ranks, or end the run. Checkpoints are folders of
shards that any mesh reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from moecompile.checkpoint.tensors import tensors_of
from moecompile.errors import ConfigError, PlanError
from moecompile.passes.recompute import recompute
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compiled_module, plan_of
from moecompile.plan import Plan
from moecompile.runtime import trainer_checkpoint
from moecompile.runtime.gradients import clip_by_global_norm, clip_by_value
from moecompile.runtime.modes import train_routing
from moecompile.runtime.steps import TrainingSteps
from moecompile.torch_private import compile_whole, set_timeouts

DEFAULT_TIMEOUT = timedelta(minutes=30)


class ExpertParallelStrategy(TrainingSteps):
    """Expert parallelism with FSDP2 for a LightningModule that holds a compiled model.

    Args:
        loss: `mean` if `training_step` returns a mean over its batch; `sum` if it returns the sum over its tokens, in a
            dict with their number: `{"loss": loss, "num_tokens": n}`. With `sum`, unequal token counts are exact. Under
            manual optimization: what `manual_backward` gets, after `count_tokens(n)` for a sum.
        seed: keys what is random in training (routers, dropout), together with the optimizer step and the micro-batch.
        on_nan: what to do when a loss or a gradient is not finite: `stop` ends the run and names layer and rank, `skip`
            drops the step on all ranks; None does not look. Not under manual optimization.
        process_group_backend, timeout: of the process group; gloo on a CPU and NCCL on CUDA by default.
        param_dtype: what layers compute in, see `moecompile.passes.shard.shard`; None: as their weights are.
        checkpointing: `full` or `keep_exchanges`: layers compute again in backward (moecompile.passes.recompute).
        compile_regions: whether the graphs that moecompile made go through torch.compile.
        materialize: for a model that was compiled on the meta device: called with the root device after sharding, it
            gives the shards their values.

    Raises:
        ConfigError: an unknown `loss`, `on_nan` or `checkpointing`. PlanError (at setup): no compiled model, or the
            Trainer's ranks do not fit it. NotFinite (in a step): as `on_nan` says.

    After each optimizer step `loads` has one `LayerLoad` a router; after each backward `aux_losses` has the sums over
    the micro-batch's layers by kind, coefficients included, per token.
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
        if checkpointing not in ("none", "full", "keep_exchanges"):
            raise ConfigError(
                "checkpointing", checkpointing, "must be none, full or keep_exchanges", "Use one of these"
            )
        super().__init__(loss, seed, on_nan, process_group_backend=process_group_backend, timeout=timeout)
        self.param_dtype, self.checkpointing, self.compile_regions = param_dtype, checkpointing, compile_regions
        self.materialize = materialize
        self.grad_norm: float | None = None  # before clipping, of the last optimizer step that clipped

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The batch is split over all ranks: EP peers hold different data."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def device_mesh(self) -> DeviceMesh:
        """The (dp_replicate, edp, ep) mesh, after setup."""
        if self._device_mesh is None:
            raise PlanError("strategy.device_mesh", None, "is made at setup", "Read it after Trainer.fit has begun")
        return self._device_mesh

    def setup_environment(self) -> None:
        """Process group only; the mesh follows from the plan, which the module may not have made yet."""
        self._setup_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Shards the compiled model, then sets up optimizers as Lightning does."""
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        compiled = compiled_module(self.model)
        plan = plan_of(compiled)
        self._check_world(plan)
        if self.materialize is None or self._device_mesh is not None:
            self.model_to_device()  # also puts back shards that an earlier validation has left gathered
        self.model = self.precision_plugin.convert_module(self.model)
        if self._device_mesh is None:
            check_same_weights(self.model)
            self._device_mesh = device_mesh_of(plan.mesh, self.root_device.type)
            self._parallelize(compiled, plan, self._device_mesh)
            if self.materialize is not None:
                self.materialize(self.root_device)
                check_same_weights(self.model)  # those that every rank holds whole
            set_timeouts(self._timeout or DEFAULT_TIMEOUT)
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_by_value  # type: ignore[method-assign]
        # Autocast's plugin refuses to clip for a fused optimizer, because of a scaler that bf16 does not have.
        self.precision_plugin.clip_gradients = partial(  # type: ignore[method-assign]
            Precision.clip_gradients, self.precision_plugin
        )
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            train_routing(compiled)
            self.setup_optimizers(trainer)
            self._watch(compiled)
        self.setup_precision_plugin()

    def _parallelize(self, compiled: nn.Module, plan: Plan, device_mesh: DeviceMesh) -> None:
        shard(compiled, plan, device_mesh, self.param_dtype)
        if self.compile_regions:
            for region in [module for module in compiled.modules() if isinstance(module, fx.GraphModule)]:
                compile_whole(region)
        if self.checkpointing != "none":
            recompute(compiled, plan, self.checkpointing)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of shards (torch DCP) that every mesh can read at `filepath`, whole or not there."""
        assert self.model is not None
        trainer_checkpoint.save(
            Path(self.broadcast(filepath)), checkpoint, self.model,
            self.optimizers if "optimizer_states" in checkpoint else [], self._tensors_of,
            is_first_rank=self.is_global_zero, barrier=self.barrier,
        )  # fmt: skip

    def _tensors_of(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Makes an optimizer's first step, of zeros, where it has no state yet: nobody else's business."""
        assert self.model is not None
        with nullcontext() if self._guard is None else self._guard.pause():
            return tensors_of(self.model, optimizers)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads such a folder, written on whatever mesh; nothing in it is run as code.

        Raises:
            PlanError: entries are missing or have other shapes, or the optimizers have other parameter groups.
        """
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        return trainer_checkpoint.load(path, self.model, self.optimizers, self._tensors_of)

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        self.grad_norm = float(clip_by_global_norm(self.precision_plugin.main_params(optimizer), clip_val))

    def _clip_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        clip_by_value(self.precision_plugin.main_params(optimizer), clip_val)

    def _check_world(self, plan: Plan) -> None:
        if plan.mesh.world_size != self.world_size:
            raise PlanError(
                "mesh", f"{plan.mesh.num_nodes} x {plan.mesh.ranks_per_node}",
                f"the plan is for {plan.mesh.world_size} ranks, the Trainer has {self.world_size}",
                "Change mesh.num_nodes and mesh.ranks_per_node, or the Trainer's devices and num_nodes",
            )  # fmt: skip


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Expert parallelism with FSDP2, from a moecompile plan"
)
