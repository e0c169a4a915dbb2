"""The device mesh as plain numbers: the axes of all weights, and which ranks share a node, a group or a micro-batch.

One set of ranks is factored twice, because dense weights and experts are placed differently (folding):

    dense weights  (dp_replicate, dp_shard, cp, tp)  world = dp_replicate * dp_shard * cp * tp
    experts        (dp_replicate, edp, ep)           world = dp_replicate * edp * ep

Rank order (the same everywhere): nodes are contiguous ranks, and the last axis varies fastest, so the groups of `tp`,
of `cp` (without `tp`) and of `ep` are contiguous ranks:

    rank = ((dp_replicate_index * dp_shard + dp_shard_index) * cp + cp_index) * tp + tp_index
         = (dp_replicate_index * edp_shard + edp_index) * ep + ep_index

Ranks along `TOKEN_AXES` have different tokens: along `cp`, each has its part of the positions of the same sequences.
Ranks along `tp` share a micro-batch: they split weights, and inside MoE layers they split its tokens. `cp` and `tp` are
not used together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moecompile.errors import ConfigError

TOKEN_AXES = ("dp_replicate", "dp_shard", "cp")
DENSE_AXES = (*TOKEN_AXES, "tp")
EXPERT_AXES = ("dp_replicate", "edp", "ep")


class LinkClass(str, Enum):
    """What lies between two ranks."""

    SELF = "self"
    INTRA_NODE = "intra_node"
    INTER_NODE = "inter_node"


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """A validated mesh; every size is a number of ranks.

    Raises:
        ConfigError: the sizes do not multiply up, a TP, CP or EP group would straddle nodes unevenly, or cp and tp are
            used together.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    ep: int = 1
    dp_replicate: int = 1
    tp: int = 1
    cp: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node", "ep", "dp_replicate", "tp", "cp"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"mesh.{name}", value, "must be at least 1", "Give a positive number")
        for axis in ("ep", "tp", "cp"):
            self._check_contiguous(axis)
        if self.tp > 1 and self.cp > 1:
            rule = f"attention splits heads over cp, and mesh.tp={self.tp} splits them too"
            raise ConfigError("mesh.cp", self.cp, rule, "Use mesh.cp=1, or mesh.tp=1")
        copies, rule = self.edp, f"the number of expert copies, world / ep = {self.edp} ({self._shape}, ep={self.ep})"
        if copies % self.dp_replicate == 0:
            copies, axis = self.num_batches, "cp" if self.cp > 1 else "tp"
            rule = f"the number of micro-batches, world / {axis} = {copies} ({self._shape}, {axis}={self.size(axis)})"
        if copies % self.dp_replicate:
            raise ConfigError(
                "mesh.dp_replicate", self.dp_replicate, f"must divide {rule}", f"Use one of {divisors(copies)}"
            )

    def _check_contiguous(self, axis: str) -> None:
        """Checks that the groups of an axis that varies fastest divide the ranks, and the nodes evenly."""
        group = {"ep": "an EP group", "tp": "a TP group", "cp": "a CP group"}[axis]
        size, path = getattr(self, axis), f"mesh.{axis}"
        fitting = divisors(self.world_size)
        if self.world_size % size:
            rule = f"must divide the world size ({self._shape})"
            raise ConfigError(path, size, rule, f"Use one of {fitting}")
        if size % self.ranks_per_node and self.ranks_per_node % size:
            fitting = [n for n in fitting if not (n % self.ranks_per_node and self.ranks_per_node % n)]
            rule = f"{group} must fill whole nodes or fit into one ({self._shape})"
            raise ConfigError(path, size, rule, f"Use one of {fitting}")

    @property
    def _shape(self) -> str:
        sizes = ((self.num_nodes, "node"), (self.ranks_per_node, "rank"), (self.world_size, "rank"))
        nodes, each, ranks = (f"{size} {noun}{'s' * (size != 1)}" for size, noun in sizes)
        return f"{nodes} x {each} = {ranks}"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node

    @property
    def edp(self) -> int:
        """Number of ranks that hold (a shard or a replica of) the same experts."""
        return self.world_size // self.ep

    @property
    def edp_shard(self) -> int:
        """Number of ranks over which one copy of an expert is FSDP-sharded: the size of the axis `edp`."""
        return self.edp // self.dp_replicate

    @property
    def dp_shard(self) -> int:
        """Number of ranks along the axis `dp_shard`."""
        return self.num_batches // self.dp_replicate

    @property
    def fsdp_shard(self) -> int:
        """Number of ranks over which dense parameters are FSDP-sharded: those along dp_shard and cp."""
        return self.dp_shard * self.cp

    @property
    def num_batches(self) -> int:
        """Number of different micro-batches at a time: the data-parallel size."""
        return self.world_size // (self.cp * self.tp)

    @property
    def nodes_per_ep_group(self) -> int:
        """Number of nodes that one EP group spans."""
        return max(1, self.ep // self.ranks_per_node)

    def size(self, axis: str) -> int:
        """The number of ranks along an axis of `DENSE_AXES` or `EXPERT_AXES`."""
        size: int = getattr(self, {"edp": "edp_shard"}.get(axis, axis))
        return size

    def batch_index(self, rank: int) -> int:
        """The index of the micro-batch of global `rank` among `num_batches`."""
        return rank // (self.cp * self.tp)

    def is_counted(self, rank: int) -> bool:
        """Whether global `rank` is the one of those with the same tokens that counts them, in sums over all ranks."""
        return rank % self.tp == 0

    def node_of(self, rank: int) -> int:
        """The node that holds global `rank`."""
        return rank // self.ranks_per_node

    def ep_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks of the EP group of `rank`, in EP order."""
        first = rank // self.ep * self.ep
        return tuple(range(first, first + self.ep))

    def link(self, a: int, b: int) -> LinkClass:
        """The link class between two global ranks."""
        if a == b:
            return LinkClass.SELF
        return LinkClass.INTRA_NODE if self.node_of(a) == self.node_of(b) else LinkClass.INTER_NODE


def divisors(n: int) -> list[int]:
    """The divisors of `n`, the smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]
