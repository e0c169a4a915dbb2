"""Along which dim a stack of experts is cut, and what the fullest rank has."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch

from moecompile.plan import EVEN, cut_dim, largest_shard


@pytest.mark.parametrize(
    ("shape", "ranks", "dim", "largest"),
    [
        ((4, 4096, 7168), 32, 1, 4 * 128 * 7168),  # DeepSeek-V3 on 2048 GPUs
        ((32, 2880, 5760), 128, 2, 32 * 2880 * 45),  # GPT-OSS without expert parallelism
        ((8, 16, 6), 4, 0, 2 * 16 * 6),
        ((8, 16, 6), 1, 0, 8 * 16 * 6),
        ((256, 10, 6), 3, 0, 86 * 60),  # 0.8% more than a third
        ((4, 10, 9), 3, 2, 4 * 10 * 3),
        ((4, 2880), 32, 1, 4 * 90),  # a bias
        ((30, 24), 4, 1, 30 * 6),  # experts below each other
        ((4, 10, 7), 3, 0, 2 * 70),  # no dim: two ranks have two experts, one has none
        ((2, 10, 7), 4, 0, 70),
    ],
)
def test_a_stack_is_cut_along_a_dim_that_its_ranks_divide(
    shape: tuple[int, ...], ranks: int, dim: int, largest: int
) -> None:
    assert cut_dim(shape, ranks) == dim
    assert largest_shard(shape, ranks) == largest


def test_the_largest_shard_is_that_of_torch_and_even_where_one_can_be() -> None:
    for *shape, ranks in product(range(1, 7), range(1, 7), (1, 4, 6), range(1, 9)):
        whole = torch.empty(shape)
        dim = cut_dim(shape, ranks)
        shards = whole.chunk(ranks, dim)
        assert largest_shard(shape, ranks) == max(shard.numel() for shard in shards)
        if any(size % ranks == 0 for size in shape):
            assert largest_shard(shape, ranks) <= EVEN * prod(shape) / ranks
        assert dim == 0 or len({shard.shape for shard in shards}) == 1  # FSDP2 pads along dim 0 alone
