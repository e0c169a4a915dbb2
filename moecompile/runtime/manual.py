"""Manual optimization: what a LightningModule with `automatic_optimization = False` can do, and what is refused.

Gradients are complete after each `manual_backward`, as with DDP: summed over ranks, divided, with auxiliary losses. So
the order of backward, clipping, steps, toggles and closures does not matter. With `loss="sum"`, the number of tokens
must be set before each backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moecompile.errors import ConfigError
from moecompile.nn.losses import KeepsLosses, keepers_of


class Tokens:
    """The number of tokens of the next backwards on this rank, which the module sets before them."""

    def __init__(self) -> None:
        self.number = 0  # of counts so far
        self._last: Tensor | None = None

    def count(self, num_tokens: Tensor | int, device: torch.device) -> None:
        """Sets the count until the next one, or the next training step."""
        self.number, self._last = self.number + 1, torch.as_tensor(num_tokens, dtype=torch.int64, device=device)

    def expire(self) -> None:
        """Resets the count at the start of a training step."""
        self._last = None

    @property
    def last(self) -> Tensor:
        """The current count.

        Raises:
            ConfigError: there is none.
        """
        if self._last is None:
            raise ConfigError(
                "loss", "sum", "under manual optimization the tokens of a backward must be counted before it",
                "Call self.trainer.strategy.count_tokens(num_tokens) before manual_backward, or use loss='mean'",
            )  # fmt: skip
        return self._last


class Guard:
    """Detects a backward that bypasses the strategy, and notifies the strategy of every optimizer step.

    Args:
        model: the LightningModule. compiled: the model in it. optimizers: torch's own.
        after_step: called after each step of an optimizer that has weights of `compiled`.
    """

    def __init__(
        self, model: nn.Module, compiled: nn.Module, optimizers: list[Optimizer], after_step: Callable[[], None]
    ) -> None:
        self._is_inside, self._is_paused, self._num_backwards = False, False, 0
        self._compiled, self._after_step = set(compiled.parameters()), after_step
        plain = [p for p in model.parameters() if p.is_leaf and p.requires_grad and not isinstance(p, DTensor)]
        self._handles: list[Any] = [p.register_post_accumulate_grad_hook(self._accumulated) for p in plain]
        self._handles += [optimizer.register_step_post_hook(self._stepped) for optimizer in optimizers]

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The context of a backward by the strategy."""
        self._is_inside, self._num_backwards = True, self._num_backwards + 1
        try:
            yield
        finally:
            self._is_inside = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The context of optimizer steps that are not the module's."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _accumulated(self, parameter: Tensor) -> None:
        if not self._is_inside:
            raise _bypassed()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_paused:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not self._num_backwards and any(parameter.grad is not None for parameter in parameters):
            raise _bypassed()
        if not self._compiled.isdisjoint(parameters):
            self._after_step()


def _bypassed() -> ConfigError:
    return ConfigError(
        "automatic_optimization", False,
        "a backward did not go through the strategy, so its gradients are not summed over ranks",
        "Call self.manual_backward(loss) instead of loss.backward()",
    )  # fmt: skip


@contextmanager
def only_routers_behind(loss: Tensor, model: nn.Module) -> Iterator[None]:
    """Hides the auxiliary losses of routers if `loss` does not depend on their last forward (a detached one)."""
    nodes = {router.aux_node: router for _, router in keepers_of(model) if router.aux_node is not None}
    held: dict[KeepsLosses, tuple[dict[str, Tensor], Node | None]] = {}
    for node in _not_behind(loss.grad_fn, set(nodes)) if nodes else ():
        router = nodes[node]
        held[router] = router.aux_losses, router.aux_node
        router.aux_losses, router.aux_node = {}, None
    try:
        yield
    finally:
        for router, (losses, place) in held.items():
            router.aux_losses, router.aux_node = losses, place


def _not_behind(start: Node | None, wanted: set[Node]) -> set[Node]:
    """Those of `wanted` that are not among the ancestors of `start`."""
    missing, seen, stack = set(wanted), set(), [start]
    while stack and missing:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            missing.discard(node)
            stack += [parent for parent, _ in node.next_functions]
    return missing
