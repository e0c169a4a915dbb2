"""The process groups of a run, by what they mean. Sums, votes and numbers of micro-batches name one of them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moecompile import torch_private
from moecompile.kept_groups import device_mesh, of_members
from moecompile.mesh import MeshSpec, Part, axes_that_split
from moecompile.schema import Config


@dataclass(frozen=True)
class Groups:
    """The ranks that something is summed over.

    every: all ranks; votes (is something not finite) and norms of weights that are spread over all of them. tokens:
    ranks of a stage with different tokens, this one among them: loads, gradients of weights that are whole on every
    rank. losses: the same of all stages, of which the last one has losses and token counts. Where no ranks share
    tokens, all three have all ranks. sequences: ranks with parts of the same sequences; None if each has whole ones.
    stage: ranks that have the same layers. stages: those that have the other layers for this rank's tokens; None
    without a pipeline.
    """

    mesh: MeshSpec
    rank: int
    every: ProcessGroup
    tokens: ProcessGroup
    losses: ProcessGroup
    stage: ProcessGroup
    sequences: ProcessGroup | None = None
    stages: ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: MeshSpec, device_type: str) -> Groups:
        """The groups of this rank; all ranks call it, after the process group is initialized."""
        every = dist.group.WORLD
        assert every is not None
        tokens = losses = stage = every
        if mesh.size(Part.BATCH, Part.SEQUENCE) < mesh.world_size:
            tokens = losses = _along(mesh, device_type, Part.BATCH, Part.SEQUENCE)
        if stages := _along(mesh, device_type, Part.LAYERS) if mesh.axes(Part.LAYERS) else None:
            of_stage = [part for part in (Part.BATCH, Part.SEQUENCE, Part.TOKENS) if mesh.axes(part)]
            losses, stage = every, _along(mesh, device_type, *(of_stage or [Part.BATCH]))
            if mesh.size(Part.LAYERS, Part.BATCH, Part.SEQUENCE) < mesh.world_size:
                losses = _along(mesh, device_type, Part.LAYERS, Part.BATCH, Part.SEQUENCE)
        sequences = _along(mesh, device_type, Part.SEQUENCE) if mesh.axes(Part.SEQUENCE) else None
        return cls(mesh, dist.get_rank(), every, tokens, losses, stage, sequences, stages)

    def of_micro_batch(self, num_tokens: Tensor) -> Tensor:
        """The tokens of a whole micro-batch, of which this rank has `num_tokens`."""
        if self.sequences is not None:
            num_tokens = num_tokens.clone()
            dist.all_reduce(num_tokens, group=self.sequences)
        return num_tokens

    @property
    def batch_index(self) -> int:
        """The index of this rank's micro-batch among `num_batches` at a time."""
        return self.mesh.batch_index(self.rank)

    @property
    def num_batches(self) -> int:
        """Number of different micro-batches at a time."""
        return self.mesh.num_batches

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first one of `losses`."""
        return self.rank == self.mesh.group(Part.LAYERS, Part.BATCH, Part.SEQUENCE, rank=self.rank)[0]


def _along(mesh: MeshSpec, device_type: str, *of: Part) -> ProcessGroup:
    """The ranks that differ from this one along the axes that split `of`."""
    names = axes_that_split(*of)
    return device_mesh(device_type, mesh.dims(names))["_".join(names)].get_group()


def along(mesh: MeshSpec, device_type: str, *of: Part, purpose: str) -> ProcessGroup:
    """A group for one purpose of the ranks that differ from this one along the axes that split `of`; all call it."""
    group = of_members(device_type, [mesh.group(*of, rank=rank) for rank in range(mesh.world_size)], purpose)
    assert group is not None
    return group


# -- the process group of tasks that need it before the Trainer -----------------------------------------------------


def init_process_group(config: Config) -> None:
    """Initializes gloo or NCCL; the Trainer uses this group later. Also sets the CPU threads of this rank."""
    torch.set_num_threads(config.trainer.threads_per_rank)
    cuda = config.mesh.device == "cuda" or (config.mesh.device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")  # this one
    torch_private.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.trainer.timeout_s))
