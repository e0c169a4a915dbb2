"""Finds the origin of a loss or gradient that is not finite: the module and the rank.

Algorithm, on all ranks together, because a forward exchanges rows:
  1. Run the micro-batches of the step again, with the same weights and random numbers, and check each module's outputs
     in forward and their gradients in backward.
  2. All ranks run the same modules in the same order, so the events of all ranks can be compared: the first one is the
     origin. Other ranks get non-finite values from it through the next exchange or reduction.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.errors import UserError
from moecompile.runtime.gradients import gradient_of
from moecompile.torch_private import local_part, tree_leaves


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True, order=True)
class Event:
    """A value that is not finite on a rank. place: index of the module call, with backward after forward."""

    place: int
    rank: int
    name: str = field(compare=False)
    what: str = field(compare=False)


def origin(model: nn.Module, runs: Sequence[Callable[[], Any]], every: dist.ProcessGroup) -> Event | None:
    """The first event on all ranks; None if the runs are finite this time.

    Args:
        runs: forward and backward of each micro-batch of the step on this rank. every: `Groups.every`.
    """
    for run in runs:  # Step 1
        with _Watch(model) as seen:
            run()
        events: list[Event | None] = [None] * every.size()
        dist.all_gather_object(events, min(seen, default=None), group=every)  # Step 2
        if seen_events := [event for event in events if event is not None]:
            return min(seen_events)
    return None


def error_of(event: Event | None, step: int, world_size: int, *, is_known: bool = True) -> NotFinite:
    """The error for the user. is_known: whether the step was run again, to find where it began."""
    if not is_known:
        began = "Where it began is not known, because a stage of a pipeline cannot be run again by itself"
    elif event is None:
        began = "It was finite when the step was run again, so something outside the model is random"
    else:
        began = f"It began in {event.name} on rank {event.rank} of {world_size}: {event.what} not finite"
    return NotFinite(
        f"the loss or a gradient of step {step} is not finite. {began}. Lower optimizer.lr, check the data, or skip "
        "such steps with trainer.on_nan=skip; trainer.resume continues from the last checkpoint."
    )


class _Watch:
    """Collects the events of this rank while its context is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.rank, self.seen = model, dist.get_rank(), list[Event]()
        self._numbers, self._handles = itertools.count(), list[Any]()

    def __enter__(self) -> list[Event]:
        named = [(name, module) for name, module in self.model.named_modules() if name]
        self._handles = [module.register_forward_hook(partial(self._left, name)) for name, module in named]
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if not self.seen:
            for name, parameter in reversed(list(self.model.named_parameters())):
                self._look(gradient_of(parameter), next(self._numbers), name, "its gradient is")

    def _left(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        place = next(self._numbers)
        for leaf in tree_leaves(dict(output) if hasattr(output, "items") else output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                weights_too = any(not is_finite(weight) for weight in module.parameters(recurse=False))
                self._look(leaf, place, name, "its weights are" if weights_too else "its output is")
                if leaf.requires_grad:
                    leaf.register_hook(partial(self._arrived, name))

    def _arrived(self, name: str, grad: Tensor) -> None:
        self._look(grad, next(self._numbers), name, "the gradient of its output is")

    def _look(self, value: Tensor | None, place: int, name: str, what: str) -> None:
        if value is not None and not is_finite(value):
            self.seen.append(Event(place, self.rank, name, what))


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether all values (of this rank's part) are finite."""
    return bool(torch.isfinite(local_part(tensor)).all())
