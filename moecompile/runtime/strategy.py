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
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from moecompile.checkpoint.tensors import tensors_of
from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import Part
from moecompile.nn import LoadMeter, Router
from moecompile.passes.base import run_on_model
from moecompile.passes.run import on_every_rank
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import device_mesh_of
from moecompile.pipeline import compiled_module, plan_of
from moecompile.plan import Plan
from moecompile.runtime import trainer_checkpoint
from moecompile.runtime.gradients import clip_by_global_norm, clip_by_value
from moecompile.runtime.groups import Groups
from moecompile.runtime.steps import TrainingSteps
from moecompile.torch_private import set_timeouts

DEFAULT_TIMEOUT = timedelta(minutes=30)


class ExpertParallelStrategy(TrainingSteps):
    """Expert parallelism with FSDP2 for a LightningModule that holds a compiled model.

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
        checkpointing: `full` or `keep_exchanges`: layers are recomputed in backward (moecompile.passes.recompute).
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
        """EP peers get different data; ranks of one TP or CP group get the same."""
        assert self.model is not None
        mesh = plan_of(self.model).mesh
        return {"num_replicas": mesh.num_batches, "rank": mesh.batch_index(self.global_rank)}

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
        compiled = compiled_module(self.model)
        plan = plan_of(compiled)
        self._check_world(plan)
        if self.materialize is None or self._device_mesh is not None:
            self.model_to_device()  # also restores shards that an earlier validation left unsharded
        self.model = self.precision_plugin.convert_module(self.model)
        if self._device_mesh is None:
            check_same_weights(self.model)
            self._device_mesh = device_mesh_of(plan.mesh, self.root_device.type)
            self._groups = Groups.of(plan.mesh, self.root_device.type)
            self._parallelize(compiled, plan, self._device_mesh)
            if self.materialize is not None:
                self.materialize(self.root_device)
                check_same_weights(self.model)  # the replicated ones
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
            self._watch(compiled)
        self.setup_precision_plugin()

    def _parallelize(self, compiled: nn.Module, plan: Plan, device_mesh: DeviceMesh) -> None:
        steps = on_every_rank(
            device_mesh, self.param_dtype, checkpointing=self.checkpointing, compile_regions=self.compile_regions
        )
        run_on_model(steps, compiled, plan)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes the folder `filepath` atomically: shards (torch DCP) that can be loaded on any mesh."""
        assert self.model is not None
        trainer_checkpoint.save(
            Path(self.broadcast(filepath)), checkpoint, self.model,
            self.optimizers if "optimizer_states" in checkpoint else [], self._tensors_of,
            is_first_rank=self.is_global_zero, barrier=self.barrier,
        )  # fmt: skip

    def _tensors_of(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """The entries to save. It creates missing optimizer state by a step with zeros, which the guard ignores."""
        assert self.model is not None
        with nullcontext() if self._guard is None else self._guard.pause():
            return tensors_of(self.model, optimizers)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads such a folder, written on any mesh; no code in it is run.

        Raises:
            PlanError: entries are missing or have other shapes, or the optimizers have other parameter groups.
        """
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        return trainer_checkpoint.load(path, self.model, self.optimizers, self._tensors_of)

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        parameters = self.precision_plugin.main_params(optimizer)
        self.grad_norm = float(clip_by_global_norm(parameters, clip_val, self.groups.every))

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


def _train_routing(model: nn.Module) -> None:
    """Puts routers and meters of `model` into training mode before training begins; prints a note if it changes any.

    `from_pretrained` leaves a model in evaluation mode, and Lightning keeps the mode: counts, the bias rule and
    auxiliary losses would silently be off. Other modules keep their mode, as does a model without trained parameters.
    """
    in_eval = [module for module in model.modules() if isinstance(module, (Router, LoadMeter)) and not module.training]
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


def groups_of(trainer: Trainer) -> Groups:
    """The process groups of a trainer with `ExpertParallelStrategy`."""
    assert isinstance(trainer.strategy, ExpertParallelStrategy)
    return trainer.strategy.groups


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Expert parallelism with FSDP2, from a moecompile plan"
)
