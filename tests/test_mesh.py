"""The mesh as plain numbers."""

from __future__ import annotations

import re

import pytest

from moecompile.errors import ConfigError
from moecompile.mesh import LinkClass, MeshSpec, Part, dense_axes, expert_axes


def mesh(num_nodes: int, ranks_per_node: int, ep: int, dp_replicate: int = 1) -> MeshSpec:
    return MeshSpec(num_nodes=num_nodes, ranks_per_node=ranks_per_node, ep=ep, dp_replicate=dp_replicate)


@pytest.mark.parametrize(
    ("spec", "world", "edp", "edp_shard", "dp_shard", "nodes"),
    [
        (mesh(1, 1, 1), 1, 1, 1, 1, 1),
        (mesh(1, 4, 4), 4, 1, 1, 4, 1),
        (mesh(1, 4, 2), 4, 2, 2, 4, 1),
        (mesh(2, 2, 4), 4, 1, 1, 4, 2),
        (mesh(2, 2, 2, 2), 4, 2, 1, 2, 1),
        (mesh(4, 8, 16, 2), 32, 2, 1, 16, 2),
        (mesh(4, 8, 4, 2), 32, 8, 4, 16, 1),
        (mesh(256, 8, 64), 2048, 32, 32, 2048, 8),
    ],
)
def test_sizes_multiply_up(spec: MeshSpec, world: int, edp: int, edp_shard: int, dp_shard: int, nodes: int) -> None:
    assert (spec.world_size, spec.edp, spec.edp_shard, spec.dp_shard) == (world, edp, edp_shard, dp_shard)
    assert spec.nodes_per_ep_group == nodes
    assert spec.world_size == spec.dp_replicate * spec.dp_shard == spec.edp * spec.ep
    assert spec.dp_shard == spec.edp_shard * spec.ep


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), "mesh.num_nodes=0: must be at least 1. Give a positive number."),
        ((1, 0, 1), "mesh.ranks_per_node=0: must be at least 1. Give a positive number."),
        ((1, 1, 0), "mesh.ep=0: must be at least 1. Give a positive number."),
        ((1, 1, 1, 0), "mesh.dp_replicate=0: must be at least 1. Give a positive number."),
        ((2, 2, 3), "mesh.ep=3: must divide the world size (2 nodes x 2 ranks = 4 ranks). Use one of [1, 2, 4]."),
        (
            (2, 6, 4),
            "mesh.ep=4: an EP group must fill whole nodes or fit into one (2 nodes x 6 ranks = 12 ranks). "
            "Use one of [1, 2, 3, 6, 12].",
        ),
        (
            (2, 2, 2, 4),
            "mesh.dp_replicate=4: must divide the number of expert copies, world / ep = 2 (2 nodes x 2 ranks = 4 ranks, "
            "ep=2). Use one of [1, 2].",
        ),
    ],
)
def test_sizes_that_do_not_fit(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        mesh(*sizes)


def test_ranks_are_factored_twice() -> None:
    spec = MeshSpec(num_nodes=2, ranks_per_node=4, ep=4, tp=2, dp_replicate=2)
    assert [spec.size(axis) for axis in dense_axes()] == [1, 2, 2, 1, 2]  # pp, dp_replicate, dp_shard, cp, tp
    assert [spec.size(axis) for axis in expert_axes()] == [1, 2, 1, 4]  # pp, dp_replicate, edp, ep
    assert spec.num_batches == 4
    assert [spec.batch_index(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [spec.counts_in_stage(rank) for rank in range(8)] == [True, False] * 4
    plain = mesh(2, 4, 4)
    assert plain.num_batches == plain.world_size == 8
    assert all(plain.batch_index(rank) == rank and plain.counts_in_stage(rank) for rank in range(8))


def test_a_stage_has_whole_nodes_or_nodes_have_whole_stages() -> None:
    spec = MeshSpec(num_nodes=2, ranks_per_node=4, pp=2, ep=2, dp_replicate=2)
    assert [spec.size(axis) for axis in dense_axes()] == [2, 2, 2, 1, 1]  # pp, dp_replicate, dp_shard, cp, tp
    assert [spec.size(axis) for axis in expert_axes()] == [2, 2, 1, 2]  # pp, dp_replicate, edp, ep
    assert (spec.num_batches, spec.ranks_per_stage, spec.edp) == (4, 4, 2)
    assert [spec.batch_index(rank) for rank in range(8)] == [0, 1, 2, 3] * 2
    assert [spec.group("pp", rank=rank) for rank in (0, 3)] == [(0, 4), (3, 7)] and spec.ep_peers(6) == (6, 7)
    assert spec.stage == MeshSpec(num_nodes=1, ranks_per_node=4, ep=2, dp_replicate=2)
    within = MeshSpec(num_nodes=2, ranks_per_node=4, pp=8)
    assert within.stage == MeshSpec() and within.group("pp") == tuple(range(8))
    assert MeshSpec(num_nodes=4, ranks_per_node=2, pp=2, ep=4).stage == MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"pp": 3},
            "mesh.pp=3: stages must have equally many ranks, of whole nodes or within one (2 nodes x 6 ranks = ",
        ),
        ({"pp": 8}, "Use one of [1, 2, 4, 6, 12]."),
        (
            {"pp": 2, "ep": 12},
            "mesh.ep=12: must divide the 6 ranks of a stage (2 nodes x 6 ranks = 12 ranks, mesh.pp=2)",
        ),
    ],
)
def test_stages_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MeshSpec(num_nodes=2, ranks_per_node=6, **sizes)


def test_ranks_of_a_cp_group_are_contiguous_and_have_tokens_of_their_own() -> None:
    spec = MeshSpec(num_nodes=2, ranks_per_node=4, ep=4, cp=2, dp_replicate=2)
    assert [spec.size(axis) for axis in dense_axes()] == [1, 2, 2, 2, 1]
    assert (spec.num_batches, spec.size(Part.STORED)) == (4, 4)
    assert [spec.batch_index(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(spec.counts_in_stage(rank) for rank in range(8))


@pytest.mark.parametrize(
    ("tp", "dp_replicate", "message"),
    [
        (0, 1, "mesh.tp=0: must be at least 1. Give a positive number."),
        (3, 1, "mesh.tp=3: must divide the world size (2 nodes x 4 ranks = 8 ranks). Use one of [1, 2, 4, 8]."),
        (
            4, 4, "mesh.dp_replicate=4: must divide the number of micro-batches, world / tp = 2 (2 nodes x 4 ranks = "
            "8 ranks, tp=4). Use one of [1, 2].",
        ),
    ],
)  # fmt: skip
def test_tp_that_does_not_fit(tp: int, dp_replicate: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        MeshSpec(num_nodes=2, ranks_per_node=4, ep=2, tp=tp, dp_replicate=dp_replicate)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"ranks_per_node": 8, "tp": 8, "cp": 2},
            "mesh.cp=2: must, times mesh.tp=8, divide the world size (1 node x 8 ranks = 8 ranks). Use one of [1].",
        ),
        (
            {"ranks_per_node": 12, "tp": 4, "cp": 2},
            "mesh.cp=2: must, times mesh.tp=4, divide the world size (1 node x 12 ranks = 12 ranks). Use one of [1, 3].",
        ),
        (
            {"ranks_per_node": 8, "tp": 2, "cp": 4, "pp": 2},
            "mesh.cp=4: must, times mesh.tp=2, divide the 4 ranks of a stage (1 node x 8 ranks = 8 ranks, mesh.pp=2). "
            "Use one of [1, 2].",
        ),
        (
            {"num_nodes": 2, "ranks_per_node": 6, "tp": 2, "cp": 2},
            "mesh.cp=2: a CP group, times mesh.tp=2, must fill whole nodes or fit into one (2 nodes x 6 ranks = 12 ranks)."
            " Use one of [1, 3, 6].",
        ),
    ],
)  # fmt: skip
def test_tp_and_cp_that_do_not_fit_together(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        MeshSpec(**sizes)


def test_ranks_of_a_tp_group_are_inside_a_cp_group() -> None:
    spec = MeshSpec(num_nodes=2, ranks_per_node=8, tp=2, cp=4, ep=4)
    assert spec.group(Part.SEQUENCE, rank=9) == (9, 11, 13, 15) and spec.group(Part.TOKENS, rank=9) == (8, 9)
    assert [spec.batch_index(rank) for rank in range(16)] == [0] * 8 + [1] * 8


def test_ep_groups_and_nodes_are_contiguous_ranks() -> None:
    spec = mesh(2, 4, 4)
    assert [spec.ep_peers(rank) for rank in (0, 3, 4, 7)] == [(0, 1, 2, 3)] * 2 + [(4, 5, 6, 7)] * 2
    assert [spec.node_of(rank) for rank in range(8)] == [0] * 4 + [1] * 4
    assert mesh(2, 2, 4).ep_peers(3) == (0, 1, 2, 3)


def test_every_rank_is_in_one_ep_group() -> None:
    spec = mesh(4, 4, 8)
    groups = {spec.ep_peers(rank) for rank in range(spec.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(16))


def test_an_unknown_axis_raises() -> None:
    with pytest.raises(KeyError, match="xp is not an axis: pp, dp_replicate, dp_shard, cp, tp, edp, ep"):
        MeshSpec().size("xp")


def test_links() -> None:
    spec = mesh(2, 2, 4)
    assert spec.link(1, 1) is LinkClass.SELF
    assert spec.link(0, 1) is LinkClass.INTRA_NODE
    assert spec.link(1, 2) is spec.link(3, 0) is LinkClass.INTER_NODE
