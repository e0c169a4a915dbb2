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
A step whose loss or gradients are not finite can be dropped on all ranks, or end the run. Checkpoints are folders of
shards that any mesh reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from moecompile import plan as plans
from moecompile.checkpoint.atomic import whole_folder
from moecompile.checkpoint.fit import check_entries
from moecompile.checkpoint.folders import PLAN
from moecompile.checkpoint.sums import check
from moecompile.checkpoint.tensors import read_tensors, shapes, tensors_of, write_tensors
from moecompile.errors import ConfigError, PlanError
from moecompile.nn import LayerLoad, auxiliary_loss, auxiliary_losses, set_random_key, update_balance
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compiled_module, plan_of
from moecompile.plan import Plan
from moecompile.runtime.gradients import all_finite, clip_by_global_norm, divide, sum_replicated
from moecompile.runtime.nonfinite import origin, told
from moecompile.torch_private import compile_whole, set_timeouts

LIGHTNING = "lightning.pt"
"""What Lightning keeps beside tensors, in a checkpoint that its Trainer saved."""
DEFAULT_TIMEOUT = timedelta(minutes=30)
_MIX = 0x9E3779B97F4A7C15  # odd and large: neighbouring keys are far apart


class ExpertParallelStrategy(ModelParallelStrategy):
    """Expert parallelism with FSDP2 for a LightningModule that holds a compiled model.

    Args:
        loss: `mean` if `training_step` returns a mean over its batch; `sum` if it returns the sum over its tokens, in a
            dict with their number: `{"loss": loss, "num_tokens": n}`. With `sum`, unequal token counts are exact.
        seed: keys what is random in training (routers, dropout), together with the optimizer step and the micro-batch.
        on_nan: what to do when a loss or a gradient is not finite: `stop` ends the run and names layer and rank, `skip`
            drops the step on all ranks; None does not look.
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
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.loss, self.seed, self.on_nan, self.materialize = loss, seed, on_nan, materialize
        self.param_dtype, self.checkpointing, self.compile_regions = param_dtype, checkpointing, compile_regions
        self.loads: list[LayerLoad] = []  # of the last optimizer step
        self.aux_losses: dict[str, Tensor] = {}  # of the last micro-batch
        self.grad_norm: float | None = None  # before clipping, of the last optimizer step that clipped
        self.skipped = False  # whether the last optimizer step was dropped
        self._window: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # arguments of its training steps, for on_nan
        self._is_finite: Tensor | None = None  # of this rank's losses, in the accumulation window
        self._num_tokens: Tensor | int = 0  # of this rank, in the accumulation window
        self._micro_tokens: Tensor | None = None  # of the last micro-batch
        self._micro_batches = 0  # of this rank, in the accumulation window

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
            self._device_mesh = device_mesh_of(plan.mesh, self.root_device.type)
            self._parallelize(compiled, plan, self._device_mesh)
            if self.materialize is not None:
                self.materialize(self.root_device)
            set_timeouts(self._timeout or DEFAULT_TIMEOUT)
        self.precision_plugin.clip_grad_by_norm = self._clip  # type: ignore[method-assign]
        # Autocast's plugin refuses to clip for a fused optimizer, because of a scaler that bf16 does not have.
        self.precision_plugin.clip_gradients = partial(  # type: ignore[method-assign]
            Precision.clip_gradients, self.precision_plugin
        )
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _parallelize(self, compiled: nn.Module, plan: Plan, device_mesh: DeviceMesh) -> None:
        shard(compiled, plan, device_mesh, self.param_dtype)
        if self.compile_regions:
            for region in [module for module in compiled.modules() if isinstance(module, fx.GraphModule)]:
                compile_whole(region)
        if self.checkpointing != "none":
            recompute(compiled, self.checkpointing)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Micro-batches but the last one of a step: gradients are added up where they are, nothing is reduced."""
        assert self.model is not None
        wrapped = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in wrapped:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in wrapped:
                module.set_requires_gradient_sync(True, recurse=False)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step; with `loss="sum"` its token count is added up over the accumulation window."""
        if self.on_nan is not None:
            self._window.append((args, kwargs))
        with self._keyed_random_numbers():
            output = super().training_step(*args, **kwargs)
        if self.loss == "sum":
            if not isinstance(output, Mapping) or "num_tokens" not in output:
                raise ConfigError(
                    "loss", "sum", "training_step must return {'loss': sum over tokens, 'num_tokens': their number}",
                    "Return both, or use loss='mean'",
                )  # fmt: skip
            self._micro_tokens = torch.as_tensor(output["num_tokens"], dtype=torch.int64, device=self.root_device)
            self._num_tokens = self._num_tokens + self._micro_tokens
        return output

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the auxiliary losses; undoes Lightning's division by the accumulation steps for sums; divides means.

        They are added here and not to what `training_step` returns, so that the loss that is logged stays the module's.
        """
        assert self.lightning_module is not None and self.model is not None
        accumulate = self.lightning_module.trainer.accumulate_grad_batches
        aux = auxiliary_loss(self.model)
        self.aux_losses = auxiliary_losses(self.model) if aux is not None else {}
        if self.loss == "sum":
            closure_loss = closure_loss * accumulate
            if aux is not None and self._micro_tokens is not None:
                closure_loss = closure_loss + self._micro_tokens * aux
        else:
            if aux is not None:
                closure_loss = closure_loss + aux / accumulate
            closure_loss = closure_loss / self.world_size
        finite = closure_loss.detach().isfinite()
        self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Completes the gradients after the last backward, before hooks and clipping see them."""

        def completed() -> Any:
            result = closure()
            self._complete_gradients()
            return result

        return super().optimizer_step(optimizer, completed, model, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of shards (torch DCP) that every mesh can read at `filepath`, whole or not there."""
        path, optimizers = Path(self.broadcast(filepath)), self.optimizers if "optimizer_states" in checkpoint else []
        assert self.model is not None
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
        rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        with whole_folder(path, is_first_rank=self.is_global_zero, barrier=self.barrier) as folder:
            write_tensors(folder, tensors_of(self.model, optimizers))
            if self.is_global_zero:
                plans.save(plan_of(self.model), folder / PLAN)
                torch.save({**rest, "optimizer_states": groups} if optimizers else rest, folder / LIGHTNING)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads such a folder, written on whatever mesh; nothing in it is run as code.

        Raises:
            PlanError: entries are missing or have other shapes, or the optimizers have other parameter groups.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        check(path, [LIGHTNING, PLAN], key="ckpt_path")
        rest: dict[str, Any] = torch.load(path / LIGHTNING, weights_only=True)
        groups = rest.get("optimizer_states", [])
        optimizers = self.optimizers if groups else []
        tensors = tensors_of(self.model, optimizers)
        found = {name: shape for name, shape in shapes(path).items() if optimizers or name.startswith("model.")}
        check_entries(found, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        for optimizer, saved in zip(optimizers, groups, strict=True):
            _set_groups(optimizer, saved, path)
        read_tensors(path, tensors)
        return rest

    def _complete_gradients(self) -> None:
        assert self.model is not None
        parameters = list(self.model.parameters())
        sum_replicated(parameters)
        total, self.skipped = self._over_ranks(parameters)
        if self.skipped:
            self._drop_step(parameters)
        elif self.loss == "sum":
            divide(parameters, total.clamp_min(1))
        self._num_tokens, self._micro_batches, self._is_finite = 0, 0, None
        self._window.clear()
        self.loads = update_balance(self.model, dist.group.WORLD, move=not self.skipped)

    def _over_ranks(self, parameters: list[nn.Parameter]) -> tuple[Tensor, bool]:
        """Tokens of the accumulation window on all ranks, and whether a loss or gradient of any rank is not finite."""
        sums = torch.zeros(2, dtype=torch.int64, device=self.root_device)
        sums[0] = self._num_tokens
        if self.on_nan is not None:
            sums[1] = ~(all_finite(parameters) & (True if self._is_finite is None else self._is_finite))
        if self.loss == "sum" or self.on_nan is not None:
            dist.all_reduce(sums)
        return sums[0], self.on_nan is not None and bool(sums[1])

    def _drop_step(self, parameters: list[nn.Parameter]) -> None:
        """An optimizer passes over weights without a gradient; or the run ends.

        Raises:
            NotFinite: on_nan=stop, the same on all ranks.
        """
        assert self.lightning_module is not None and self.model is not None
        for parameter in parameters:
            parameter.grad = None
        if self.on_nan == "skip":
            return
        window, self._window, self._micro_batches = self._window, [], 0
        step = self.lightning_module.trainer.global_step

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            output = self.training_step(*args, **kwargs)
            loss = output["loss"] if isinstance(output, Mapping) else output
            self.backward(loss, None)

        raise told(
            origin(compiled_module(self.model), [partial(run, *arguments) for arguments in window]),
            step + 1,
            self.world_size,
        )

    @contextmanager
    def _keyed_random_numbers(self) -> Iterator[None]:
        """What is random depends on the micro-batch's number in one process, not on the rank; dropout as well."""
        assert self.lightning_module is not None and self.model is not None
        trainer = self.lightning_module.trainer
        number = self.global_rank * trainer.accumulate_grad_batches + self._micro_batches
        set_random_key(self.model, self.seed, trainer.global_step, number)
        self._micro_batches += 1
        devices = [self.root_device] if self.root_device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(((self.seed * _MIX + trainer.global_step) * _MIX + number) % 2**63)
            yield

    def _clip(self, optimizer: Optimizer, clip_val: float) -> None:
        self.grad_norm = float(clip_by_global_norm(self.precision_plugin.main_params(optimizer), clip_val))

    def _check_world(self, plan: Plan) -> None:
        if plan.mesh.world_size != self.world_size:
            raise PlanError(
                "mesh", f"{plan.mesh.num_nodes} x {plan.mesh.ranks_per_node}",
                f"the plan is for {plan.mesh.world_size} ranks, the Trainer has {self.world_size}",
                "Change mesh.num_nodes and mesh.ranks_per_node, or the Trainer's devices and num_nodes",
            )  # fmt: skip


def _set_groups(optimizer: Optimizer, saved: list[dict[str, Any]], path: Path) -> None:
    """Learning rates and the like, as a scheduler or the user has left them."""
    if len(saved) != len(optimizer.param_groups):
        raise PlanError(
            "ckpt_path", path, f"the optimizer had {len(saved)} parameter groups, it has {len(optimizer.param_groups)}",
            "Make the same groups on every mesh",
        )  # fmt: skip
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(values)


StrategyRegistry.register(
    "expert_parallel", ExpertParallelStrategy, description="Expert parallelism with FSDP2, from a moecompile plan"
)
