"""What all layers share: sizes, weights, the interface of a layer.

Shapes: T tokens, D model dim, F expert hidden, E experts, e this rank's experts, K top-k.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from layer import HEAP, HIDDEN
from torch import Tensor, nn

ENVIRONMENT = HEAP | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def restart_with_environment() -> None:
    """Starts this program again if it does not have the variables that libraries read when they start."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})


def open_process_group() -> None:
    """A group of one, which DeepSpeed and Megatron-Core ask for."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@dataclass(frozen=True)
class Size:
    """experts, top-k, width of an expert, tokens of a rank."""

    experts: int
    top_k: int
    width: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """`64,6,256,4096`.

        Raises:
            ValueError: not four positive numbers, or more experts a token than there are.
        """
        parts = [int(part) for part in text.split(",")] if text.replace(",", "").isdigit() else []
        if len(parts) != 4 or min(parts) < 1 or parts[1] > parts[0]:
            raise ValueError(f"{text!r} is no size: give experts,top-k,width,tokens, for example 64,6,256,4096")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.experts},{self.top_k},{self.width},{self.tokens}"


@dataclass(frozen=True)
class Place:
    """This rank among those that share the experts, on one node or several."""

    rank: int = 0
    ranks: int = 1
    nodes: int = 1

    def mine(self, tensor: Tensor) -> Tensor:
        """(E, ...) -> (e, ...): this rank's experts."""
        return tensor.chunk(self.ranks, 0)[self.rank]


@dataclass(frozen=True)
class Weights:
    """Or their gradients; a layer returns those of its own experts."""

    router_ED: Tensor
    gate_up_EHD: Tensor  # H = 2 F: gate, then up
    down_EDF: Tensor

    @classmethod
    def random(cls, size: Size, dtype: torch.dtype = torch.bfloat16) -> Weights:
        """The same ones on every rank and at every call."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

        experts, width = size.experts, size.width
        return cls(draw(experts, HIDDEN), draw(experts, 2 * width, HIDDEN), draw(experts, HIDDEN, width))

    def named(self) -> dict[str, Tensor]:
        """name -> tensor."""
        return {"router": self.router_ED, "gate_up": self.gate_up_EHD, "down": self.down_EDF}


class Layer(Protocol):
    """One MoE layer. module: what holds the parameters."""

    module: nn.Module

    def __call__(self, x_1TD: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)."""

    def gradients(self) -> Weights:
        """Of this rank's experts, after backward."""


class NotHereError(Exception):
    """A layer that cannot run here; the message says what to do about it."""


def grad(parameter: Tensor) -> Tensor:
    """The gradient that this rank holds; zeros where nothing was used."""
    found = parameter.grad
    found = torch.zeros_like(parameter) if found is None else found
    return found.to_local() if hasattr(found, "to_local") else found
