"""The strategy's part from `training_step` to the optimizer step, with automatic and manual optimization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from moecompile.errors import ConfigError, PlanError
from moecompile.nn import (
    LayerLoad,
    auxiliary_loss,
    auxiliary_losses,
    forget_auxiliary_losses,
    update_balance,
)
from moecompile.pipeline import compiled_module
from moecompile.runtime.completion import Completion
from moecompile.runtime.gradients import all_finite, divide, sum_replicated
from moecompile.runtime.groups import Groups
from moecompile.runtime.manual import Guard, Tokens, only_routers_behind
from moecompile.runtime.nonfinite import error_of, origin
from moecompile.runtime.window import Window, keyed_random_numbers
from moecompile.torch_private import drop_unreduced, parameters_of


class TrainingSteps(ModelParallelStrategy):
    """Objective, gradients and balance of `ExpertParallelStrategy`.

    Args:
        loss, seed, on_nan: as in `ExpertParallelStrategy`. options: of Lightning's strategy.
    """

    def __init__(self, loss: str, seed: int, on_nan: str | None, **options: Any) -> None:
        super().__init__(**options)
        self.loss, self.seed, self.on_nan = loss, seed, on_nan
        self.loads: list[LayerLoad] = []  # of the last optimizer step
        self.aux_losses: dict[str, Tensor] = {}  # of the last micro-batch
        self.skipped = False  # whether the last optimizer step was skipped
        self._groups: Groups | None = None  # after setup
        self._window = Window()
        self._tokens = Tokens()  # of the last micro-batch
        self._completion = Completion()
        self._guard: Guard | None = None  # with manual optimization
        self._is_again = False  # whether a step is run again, to find the origin of a NaN
        self._is_last = False  # whether the current micro-batch is the last one of its window

    def _watch(self, compiled: nn.Module) -> None:
        """Installs the guard with manual optimization, where the module itself calls backward and steps."""
        assert self.model is not None
        if self._guard is not None:
            self._guard.remove()
        self._guard = None
        if self._is_automatic:
            return
        if self.on_nan is not None:
            raise ConfigError(
                "on_nan", self.on_nan, "is only for automatic optimization",
                "Use on_nan=None, and check losses in training_step",
            )  # fmt: skip
        if isinstance(compiled, FSDPModule):  # zero_grad and toggles after a forward must see the shards
            compiled.set_reshard_after_forward(True)
        self._guard = Guard(self.model, compiled, self.optimizers, self._end_manual_step)

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
        """For all micro-batches of a step except the last: gradients are accumulated locally, without a reduction.

        With manual optimization all are reduced, because the module may zero gradients before the step.
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
        """Runs the module's step; with `loss="sum"`, its tokens are summed over the accumulation window."""
        self._begin_step()
        if self.on_nan is not None:
            self._window.arguments.append((args, kwargs))
        with self._random_numbers():
            output = super().training_step(*args, **kwargs)
        if self.loss == "sum" and self._is_automatic and output is not None:  # None: handled by Lightning
            if not isinstance(output, Mapping) or "num_tokens" not in output:
                raise ConfigError(
                    "loss", "sum", "training_step must return {'loss': sum over tokens, 'num_tokens': their number}",
                    "Return both, or use loss='mean'",
                )  # fmt: skip
            self._tokens.count(output["num_tokens"], self.root_device)
            self._window.num_tokens = self._window.num_tokens + self._tokens.last
        return output

    def _begin_step(self) -> None:
        """Resets the state of the last step, and abandons a window that was not completed."""
        assert self.lightning_module is not None and self.model is not None
        self.aux_losses = {}
        self._tokens.expire()
        trainer = self.lightning_module.trainer
        is_first = trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0
        if self._is_automatic and is_first and self._window.num_micro_batches and not self._is_again:
            drop_unreduced(self.model)
            self._completion.abandon()
            self._window = Window()
            update_balance(self.model, self.groups.tokens, move=False)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Adds the auxiliary losses, divides means, and completes the gradients if this is the last backward.

        They are added here, not to the result of `training_step`, so that the logged loss is the module's.
        """
        module = self.lightning_module
        assert module is not None and self.model is not None
        loss = self._objective(closure_loss)
        self._window.add_loss(loss)
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
        if not self._completion.is_open:
            self._completion.open(parameters)
        sum_replicated(parameters, self.groups.tokens)
        total, kept, self.skipped = self._over_ranks(parameters)
        if self.skipped:
            self._drop_step(parameters)
        else:
            if self.loss == "sum":
                divide(parameters, total.clamp_min(1))
            self._completion.close(parameters, total if self.loss == "sum" else None, kept, self._tokens.number)
        if self._is_automatic:
            self._window = Window()
            self.loads = update_balance(self.model, self.groups.tokens, move=not self.skipped)

    def _end_manual_step(self) -> None:
        """Updates the balance from the load since the last step, which is zero for a second optimizer's step."""
        assert self.model is not None
        self._window = Window()
        loads = update_balance(self.model, self.groups.tokens)
        if any(load.tokens for load in loads):
            self.loads = loads

    def _over_ranks(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, bool]:
        """Over all ranks: tokens of the window, weights with earlier gradients, whether something is not finite."""
        tokens = self._window.num_tokens if self._is_automatic or self.loss == "mean" else self._tokens.last
        kept = self._completion.kept(parameters) if self.loss == "sum" else []
        sums = torch.zeros(2 + len(kept), dtype=torch.int64, device=self.root_device)
        sums[0] = tokens if self.groups.is_counted else 0
        if self.on_nan is not None:
            losses = self._window.is_finite
            sums[1] = ~(all_finite(parameters) & (True if losses is None else losses))
        if any(kept):
            sums[2:] = torch.tensor(kept)
        if self.loss == "sum" or self.on_nan is not None:
            dist.all_reduce(sums, group=self.groups.every)
        return sums[0], sums[2:], self.on_nan is not None and bool(sums[1])

    def _drop_step(self, parameters: list[nn.Parameter]) -> None:
        """Removes all gradients, so that the optimizer changes nothing; or ends the run.

        Raises:
            NotFinite: on_nan=stop; the same on all ranks.
        """
        assert self.lightning_module is not None and self.model is not None
        for parameter in parameters:
            parameter.grad = None
        self._completion.abandon()
        if self.on_nan == "skip":
            return
        window, self._window, self._is_last = self._window, Window(), False
        step = self.lightning_module.trainer.global_step

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

    def _random_numbers(self) -> AbstractContextManager[None]:
        """The context with the random numbers of the micro-batch that begins."""
        assert self.lightning_module is not None and self.model is not None
        trainer, place = self.lightning_module.trainer, self._window.num_micro_batches
        if self._is_automatic:
            number = self.groups.batch_index * trainer.accumulate_grad_batches + place
        else:  # the module decides how many there are
            number = place * self.groups.num_batches + self.groups.batch_index
        self._window.num_micro_batches += 1
        return keyed_random_numbers(self.model, self.seed, trainer.global_step, number, self.root_device)
