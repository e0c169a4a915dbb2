"""The auxiliary losses of a router between the forward that makes them and the backward that needs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from moecompile.torch_private import in_backward


class KeepsLosses(nn.Module):
    """A router, ours or what is read from the model's own, that keeps the losses of its last training forward.

    aux_losses: kind -> coefficient * loss, with its graph. aux_node: to test whether a loss depends on that forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.aux_losses: dict[str, Tensor] = {}
        self.aux_node: Node | None = None

    @property
    def aux_loss(self) -> Tensor | None:
        """Sum of coefficient * loss of the last training forward, a mean over its tokens; None without losses."""
        return torch.stack(list(self.aux_losses.values())).sum() if self.aux_losses else None

    @property
    def is_trained(self) -> bool:
        """Whether the router gets gradients."""
        return True

    def keep(self, losses: dict[str, Tensor], made: Tensor) -> None:
        """Replaces the losses of the previous forward by those of this one, which made the tensor `made`.

        A forward without gradients does not replace losses with gradients, which the objective still needs for its
        backward.
        """
        if torch.compiler.is_compiling():
            self.aux_losses = losses  # compiled code cannot query whether autograd is in backward
        elif in_backward():
            return  # a recomputed forward must not keep its graph alive
        elif torch.is_grad_enabled() or not any(loss.requires_grad for loss in self.aux_losses.values()):
            self.aux_losses, self.aux_node = losses, made.grad_fn

    def __getstate__(self) -> dict[str, Any]:
        # The losses of the last forward have a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "aux_losses": {}, "aux_node": None}


def keepers_of(model: nn.Module) -> list[tuple[str, KeepsLosses]]:
    """All of them with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, KeepsLosses)]
