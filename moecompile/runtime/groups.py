"""The process groups of a run, by what they mean. Sums, votes and numbers of micro-batches name one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moecompile.kept_groups import device_mesh
from moecompile.mesh import MeshSpec


@dataclass(frozen=True)
class Groups:
    """The ranks that something is summed over.

    every: all ranks; votes (is something not finite) and norms of weights that are spread over all of them. tokens:
    ranks with different tokens, this one among them: losses, token counts, loads, gradients of weights that are whole
    on every rank. Without tensor parallelism, both have all ranks. sequences: ranks with parts of the same sequences;
    None without context parallelism.
    """

    mesh: MeshSpec
    rank: int
    every: ProcessGroup
    tokens: ProcessGroup
    sequences: ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: MeshSpec, device_type: str) -> Groups:
        """The groups of this rank; all ranks call it, after the process group is initialized."""
        every = dist.group.WORLD
        assert every is not None
        tokens = every
        if mesh.tp > 1:
            tokens = device_mesh(device_type, {"tokens": mesh.num_batches, "tp": mesh.tp})["tokens"].get_group()
        sequences = None
        if mesh.cp > 1:
            sequences = device_mesh(device_type, {"batches": mesh.num_batches, "cp": mesh.cp})["cp"].get_group()
        return cls(mesh, dist.get_rank(), every, tokens, sequences)

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
    def is_counted(self) -> bool:
        """Whether this rank counts its tokens in sums over `every`."""
        return self.mesh.is_counted(self.rank)
