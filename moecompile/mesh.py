"""The device mesh as plain numbers: which ranks share a node, an EP group or a data-parallel axis.

Rank order (the same everywhere): nodes are contiguous ranks, and the `ep` axis varies fastest, so EP groups are
contiguous ranks too:

    rank = (dp_replicate_index * edp_shard + edp_index) * ep + ep_index

    world = num_nodes * ranks_per_node = dp_replicate * dp_shard = edp * ep,   dp_shard = edp_shard * ep

The batch is split over all ranks. Dense parameters live on (dp_replicate, dp_shard), experts on
(dp_replicate, edp_shard, ep).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moecompile.errors import ConfigError


class LinkClass(str, Enum):
    """What lies between two ranks."""

    SELF = "self"
    INTRA_NODE = "intra_node"
    INTER_NODE = "inter_node"


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """A validated mesh; every size is a number of ranks.

    Raises:
        ConfigError: the sizes do not multiply up, or an EP group would straddle nodes unevenly.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    ep: int = 1
    dp_replicate: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node", "ep", "dp_replicate"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"mesh.{name}", value, "must be at least 1", "Give a positive number")
        shape = f"{self.num_nodes} nodes x {self.ranks_per_node} ranks = {self.world_size} ranks"
        if self.world_size % self.ep:
            raise ConfigError(
                "mesh.ep", self.ep, f"must divide the world size ({shape})", f"Use one of {_divisors(self.world_size)}"
            )
        if self.ep > 1 and self.ep % self.ranks_per_node and self.ranks_per_node % self.ep:
            fitting = [
                n for n in _divisors(self.world_size) if not (n % self.ranks_per_node and self.ranks_per_node % n)
            ]
            raise ConfigError(
                "mesh.ep",
                self.ep,
                f"an EP group must fill whole nodes or fit into one ({shape})",
                f"Use one of {fitting}",
            )
        if self.edp % self.dp_replicate:
            raise ConfigError(
                "mesh.dp_replicate",
                self.dp_replicate,
                f"must divide the number of expert copies, world / ep = {self.edp} ({shape}, ep={self.ep})",
                f"Use one of {_divisors(self.edp)}",
            )

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
        """Number of ranks over which one copy of an expert is FSDP-sharded."""
        return self.edp // self.dp_replicate

    @property
    def dp_shard(self) -> int:
        """Number of ranks over which dense parameters are FSDP-sharded."""
        return self.world_size // self.dp_replicate

    @property
    def nodes_per_ep_group(self) -> int:
        """Number of nodes that one EP group spans."""
        return max(1, self.ep // self.ranks_per_node)

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


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
