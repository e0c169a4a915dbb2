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

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from moecompile.checkpoint.tensors import forget_unused, read_tensors, shapes, tensors_of, write_tensors
from moecompile.errors import ConfigError, PlanError
from moecompile.nn import (
    LayerLoad,
    auxiliary_loss,
    auxiliary_losses,
    forget_auxiliary_losses,
    set_random_key,
    update_balance,
)
from moecompile.passes.recompute import recompute
from moecompile.passes.same_weights import check_same_weights
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compiled_module, plan_of
from moecompile.plan import Plan
from moecompile.runtime.completion import Completion
from moecompile.runtime.gradients import all_finite, clip_by_global_norm, clip_by_value, divide, sum_replicated
from moecompile.runtime.manual import Guard, Tokens, only_routers_behind
from moecompile.runtime.modes import train_routing
from moecompile.runtime.nonfinite import origin, told
from moecompile.torch_private import compile_whole, drop_unreduced, parameters_of, set_timeouts

LIGHTNING = "lightning.pt"
"""What Lightning keeps beside tensors, in a checkpoint that its Trainer saved."""
DEFAULT_TIMEOUT = timedelta(minutes=30)
_MIX = 0x9E3779B97F4A7C15  # odd and large: neighbouring keys are far apart


class ExpertParallelStrategy(ModelParallelStrategy):
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
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.loss, self.seed, self.on_nan, self.materialize = loss, seed, on_nan, materialize
        self.param_dtype, self.checkpointing, self.compile_regions = param_dtype, checkpointing, compile_regions
        self.loads: list[LayerLoad] = []  # of the last optimizer step
        self.aux_losses: dict[str, Tensor] = {}  # of the last micro-batch
        self.grad_norm: float | None = None  # before clipping, of the last optimizer step that clipped
        self.skipped = False  # whether the last optimizer step was dropped
        self._window: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # arguments of its training steps, for on_nan
        self._is_finite: Tensor | None = None  # of this rank's losses, in the accumulation window
        self._tokens = Tokens()  # of the last micro-batch
        self._num_tokens: Tensor | int = 0  # of this rank, in the accumulation window
        self._micro_batches = 0  # of this rank, in the accumulation window
        self._completion = Completion()
        self._guard: Guard | None = None  # under manual optimization
        self._is_again = False  # whether a step runs once more, to be looked at
        self._is_last = False  # whether the running micro-batch is the last one of its window

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
            recompute(compiled, self.checkpointing)

    def _watch(self, compiled: nn.Module) -> None:
        """Under manual optimization the module calls backward and steps itself."""
        assert self.model is not None
        if self._guard is not None:
            self._guard.remove()
        self._guard = None
        if self._is_automatic:
            return
        if self.on_nan is not None:
            raise ConfigError(
                "on_nan", self.on_nan, "looks at steps of automatic optimization alone",
                "Use on_nan=None, and look at losses in training_step",
            )  # fmt: skip
        if isinstance(compiled, FSDPModule):  # zero_grad and toggles after a forward must meet the shards
            compiled.set_reshard_after_forward(True)
        self._guard = Guard(self.model, compiled, self.optimizers, self._end_manual_step)

    @property
    def _is_automatic(self) -> bool:
        assert self.lightning_module is not None
        return bool(self.lightning_module.automatic_optimization)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Micro-batches but the last one of a step: gradients are added up where they are, nothing is reduced.

        Under manual optimization all are reduced, as nobody knows what will be zeroed before the step.
        """
        assert self.model is not None
        modules = self.model.modules() if self._is_automatic else ()
        wrapped = [module for module in modules if isinstance(module, FSDPModule)]
        for module in wrapped:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in wrapped:
                module.set_requires_gradient_sync(True, recurse=False)

    def count_tokens(self, num_tokens: Tensor | int) -> None:
        """Says, under manual optimization with `loss="sum"`, over how many tokens of this rank the next losses sum.

        It holds for every `manual_backward` until the next count or the next training step. The gradient of a weight is
        divided by the tokens, over all ranks, of the counts whose losses reached it since it was zeroed, each once.

        Raises:
            ConfigError: the optimization is automatic (`training_step` returns the count), or the loss is a mean.
        """
        if self._is_automatic or self.loss != "sum":
            raise ConfigError(
                "count_tokens", int(num_tokens), "is for manual optimization with loss=sum",
                "Under automatic optimization return {'loss': sum, 'num_tokens': n} from training_step; for a mean no "
                "count is needed",
            )  # fmt: skip
        self._tokens.count(num_tokens, self.root_device)

    def take_auxiliary_loss(self) -> Tensor | None:
        """The auxiliary losses of the last training forward; what is taken is not added by the next backward again."""
        assert self.model is not None
        aux = auxiliary_loss(self.model)
        if aux is not None:
            self.aux_losses = auxiliary_losses(self.model)
        forget_auxiliary_losses(self.model)
        return aux

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step; with `loss="sum"` its token count is added up over the accumulation window."""
        self._begin_step()
        if self.on_nan is not None:
            self._window.append((args, kwargs))
        with self._keyed_random_numbers():
            output = super().training_step(*args, **kwargs)
        if self.loss == "sum" and self._is_automatic and output is not None:  # None: Lightning has its own answer
            if not isinstance(output, Mapping) or "num_tokens" not in output:
                raise ConfigError(
                    "loss", "sum", "training_step must return {'loss': sum over tokens, 'num_tokens': their number}",
                    "Return both, or use loss='mean'",
                )  # fmt: skip
            self._tokens.count(output["num_tokens"], self.root_device)
            self._num_tokens = self._num_tokens + self._tokens.last
        return output

    def _begin_step(self) -> None:
        """Forgets what belongs to the last step, and a window that was left before its end."""
        assert self.lightning_module is not None and self.model is not None
        self.aux_losses = {}
        self._tokens.expire()
        trainer = self.lightning_module.trainer
        is_first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if self._is_automatic and is_first and self._micro_batches and not self._is_again:
            drop_unreduced(self.model)
            self._completion.abandon()
            self._end_window()
            update_balance(self.model, dist.group.WORLD, move=False)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the auxiliary losses, divides means, and completes the gradients where this is the last backward.

        They are added here and not to what `training_step` returns, so that the loss that is logged stays the module's.
        """
        module = self.lightning_module
        assert module is not None and self.model is not None
        loss = self._objective(closure_loss)
        finite = loss.detach().isfinite().all()
        self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        if not self._completion.is_open:
            self._completion.open(parameters_of(self.model))
        self.pre_backward(loss)
        loss = self.precision_plugin.pre_backward(loss, module)
        with nullcontext() if self._guard is None else self._guard.backward():
            self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)
        if self._guard is not None or self._is_last:  # before the hook on_after_backward sees them
            self._complete_gradients()
        loss = self.precision_plugin.post_backward(loss, module)
        self.post_backward(loss)
        return loss

    def _objective(self, loss: Tensor) -> Tensor:
        """What this rank differentiates. Sums undo Lightning's division by the accumulation steps."""
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
            return loss if aux is None else loss + tokens * aux
        if aux is not None:
            loss = loss + aux / accumulate
        return loss / self.world_size

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Completes the gradients after the last backward, before hooks and clipping see them."""

        def completed() -> Any:
            self._is_last = True
            try:
                result = closure()
            finally:
                self._is_last = False
            if self._micro_batches:  # no backward in the last training step
                self._complete_gradients()
            return result

        return super().optimizer_step(optimizer, completed if self._is_automatic else closure, model, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of shards (torch DCP) that every mesh can read at `filepath`, whole or not there."""
        path, optimizers = Path(self.broadcast(filepath)), self.optimizers if "optimizer_states" in checkpoint else []
        assert self.model is not None
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
        rest = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        with whole_folder(path, is_first_rank=self.is_global_zero, barrier=self.barrier) as folder:
            write_tensors(folder, self._tensors_of(optimizers))
            if self.is_global_zero:
                plans.save(plan_of(self.model), folder / PLAN)
                torch.save({**rest, "optimizer_states": groups} if optimizers else rest, folder / LIGHTNING)

    def _tensors_of(self, optimizers: list[Optimizer]) -> dict[str, Tensor]:
        """Makes an optimizer's first step, of zeros, where it has no state yet: nobody else's business."""
        assert self.model is not None
        with nullcontext() if self._guard is None else self._guard.pause():
            return tensors_of(self.model, optimizers)

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
        found = {name: shape for name, shape in shapes(path).items() if optimizers or name.startswith("model.")}
        tensors = forget_unused(self.model, optimizers, self._tensors_of(optimizers), found)
        check_entries(found, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
        for optimizer, saved in zip(optimizers, groups, strict=True):
            _set_groups(optimizer, saved, path)
        read_tensors(path, tensors)
        return rest

    def _complete_gradients(self) -> None:
        """Ends a window: sums over ranks, one division, and under automatic optimization the balance."""
        assert self.model is not None
        parameters = parameters_of(self.model)
        if not self._completion.is_open:
            self._completion.open(parameters)
        sum_replicated(parameters)
        total, kept, self.skipped = self._over_ranks(parameters)
        if self.skipped:
            self._drop_step(parameters)
        else:
            if self.loss == "sum":
                divide(parameters, total.clamp_min(1))
            self._completion.close(parameters, total if self.loss == "sum" else None, kept, self._tokens.number)
        if self._is_automatic:
            self._end_window()
            self.loads = update_balance(self.model, dist.group.WORLD, move=not self.skipped)

    def _end_window(self) -> None:
        self._num_tokens, self._micro_batches, self._is_finite = 0, 0, None
        self._window.clear()

    def _end_manual_step(self) -> None:
        """Balances by what was counted since the last step: nothing, for the second optimizer after one backward."""
        assert self.model is not None
        self._end_window()
        loads = update_balance(self.model, dist.group.WORLD)
        if any(load.tokens for load in loads):
            self.loads = loads

    def _over_ranks(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, bool]:
        """Of all ranks: tokens of the window, weights whose gradients go on, whether something is not finite."""
        tokens = self._num_tokens if self._is_automatic or self.loss == "mean" else self._tokens.last
        kept = self._completion.kept(parameters) if self.loss == "sum" else []
        sums = torch.zeros(2 + len(kept), dtype=torch.int64, device=self.root_device)
        sums[0] = tokens
        if self.on_nan is not None:
            sums[1] = ~(all_finite(parameters) & (True if self._is_finite is None else self._is_finite))
        if any(kept):
            sums[2:] = torch.tensor(kept)
        if self.loss == "sum" or self.on_nan is not None:
            dist.all_reduce(sums)
        return sums[0], sums[2:], self.on_nan is not None and bool(sums[1])

    def _drop_step(self, parameters: list[nn.Parameter]) -> None:
        """An optimizer passes over weights without a gradient; or the run ends.

        Raises:
            NotFinite: on_nan=stop, the same on all ranks.
        """
        assert self.lightning_module is not None and self.model is not None
        for parameter in parameters:
            parameter.grad = None
        self._completion.abandon()
        if self.on_nan == "skip":
            return
        window, self._window, self._micro_batches, self._is_last = self._window, [], 0, False
        step = self.lightning_module.trainer.global_step

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            output = self.training_step(*args, **kwargs)
            loss = output["loss"] if isinstance(output, Mapping) else output
            self.backward(loss, None)

        self._is_again = True
        try:
            event = origin(compiled_module(self.model), [partial(run, *arguments) for arguments in window])
        finally:
            self._is_again = False
        raise told(event, step + 1, self.world_size)

    @contextmanager
    def _keyed_random_numbers(self) -> Iterator[None]:
        """What is random depends on the micro-batch's number in one process, not on the rank; dropout as well."""
        assert self.lightning_module is not None and self.model is not None
        trainer = self.lightning_module.trainer
        if self._is_automatic:
            number = self.global_rank * trainer.accumulate_grad_batches + self._micro_batches
        else:  # how many there will be is the module's choice
            number = self._micro_batches * self.world_size + self.global_rank
        set_random_key(self.model, self.seed, trainer.global_step, number)
        self._micro_batches += 1
        devices = [self.root_device] if self.root_device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(((self.seed * _MIX + trainer.global_step) * _MIX + number) % 2**63)
            yield

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
