"""A sharded model and its optimizer, written by the ranks of one mesh or read from what another mesh has written."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moecompile.checkpoint.tensors import read_tensors, tensors_of, write_tensors
from tests.distributed.gradient_job import full


def handed_over(model: nn.Module, optimizer: Optimizer, source: str | None, target: str) -> dict[str, Tensor]:
    """Reads `source`, if there is one, and writes `target`. Returns every tensor, whole."""
    tensors = tensors_of(model, [optimizer], to_read=source is not None)
    if source is not None:
        read_tensors(Path(source), tensors, orders={})
    Path(target).mkdir(exist_ok=True)
    dist.barrier()
    write_tensors(Path(target), tensors, orders={})
    return {name: full(tensor) for name, tensor in tensors.items()}
