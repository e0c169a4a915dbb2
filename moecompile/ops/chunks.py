"""Tokens in chunks, and one exchange of counts for all of them.

Legend: T tokens, r ranks on the axis, n chunks, m numbers per rank and chunk.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_lib = torch.library.Library("moecompile", "FRAGMENT")
_lib.define("split_tokens(Tensor(a) x, int num_chunks) -> Tensor(a)[]")
_lib.define("counts_of_chunk(Tensor(a) counts, int chunk, int num_chunks) -> Tensor(a)")


def _split_tokens(x: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    """Parts of the first dim, of equal size or one apart; empty ones where there are fewer tokens than chunks.

    The gradient is one concatenation.
    """
    size = x.shape[0]
    bounds = [size * i // num_chunks for i in range(num_chunks + 1)]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    return tuple(torch.split_with_sizes(x, sizes))


def _counts_of_chunk(counts: Tensor, chunk: int, num_chunks: int) -> Tensor:
    """One chunk's numbers of joined counts, (..., n m) -> (..., m)."""
    part: Tensor = counts.unflatten(-1, (num_chunks, counts.shape[-1] // num_chunks)).select(-2, chunk)
    return part


# Composites: autograd and fake tensors see the torch functions inside.
_lib.impl("split_tokens", _split_tokens, "CompositeImplicitAutograd")
_lib.impl("counts_of_chunk", _counts_of_chunk, "CompositeImplicitAutograd")


@torch.library.custom_op("moecompile::join_counts", mutates_args=())
def join_counts(counts: list[Tensor], num_ranks: int) -> Tensor:
    """The counts of all chunks side by side: n tensors of r * m numbers -> (r, n m)."""
    return torch.cat([each.reshape(num_ranks, -1) for each in counts], dim=1)


@join_counts.register_fake
def _(counts: list[Tensor], num_ranks: int) -> Tensor:
    return counts[0].new_empty(num_ranks, sum(each.numel() for each in counts) // num_ranks)
