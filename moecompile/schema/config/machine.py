"""Where a model runs: `mesh`, `hardware` and `dispatch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from moecompile.schema.enums import DispatchKind, OverlapKind, WireDtype


@dataclass(kw_only=True)
class MeshConfig:
    """`mesh`: ranks and their axes; num_nodes * ranks_per_node = dp_replicate * dp_shard."""

    num_nodes: int = 1
    """Nodes, 1 to 65536."""
    ranks_per_node: int = 1
    """Ranks on each node, 1 to 1024."""
    ep: Union[int, str] = "auto"
    """Ranks that share one set of experts (an EP group); `auto`: all."""
    dp_replicate: int = 1
    """Copies of the sharded weights, 1 or more."""
    dp_shard: Union[int, str] = "auto"
    """Ranks over which dense weights are sharded; `auto`: all of a copy."""
    tp: int = 1
    """Tensor parallelism does not exist yet: 1."""
    pp: int = 1
    """Pipeline parallelism does not exist yet: 1."""
    cp: int = 1
    """Context parallelism does not exist yet: 1."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`."""


@dataclass(kw_only=True)
class HardwareConfig:
    """`hardware`: what one rank has."""

    name: str = "laptop"
    """Its name, for people."""
    memory_gib: float = 4.0
    """Memory of one rank, GiB, positive."""
    intra_node_gb_s: float = 2.0
    """Bandwidth of one rank within its node, 1e9 bytes/s, positive."""
    inter_node_gb_s: float = 2.0
    """Bandwidth of one rank to other nodes, 1e9 bytes/s, positive."""
    tflops: float = 0.1
    """Matrix products of one rank as experts reach them, 1e12 operations/s, positive."""


@dataclass(kw_only=True)
class DispatchConfig:
    """`dispatch`: how tokens travel to their experts."""

    kind: DispatchKind = DispatchKind.auto
    """Which exchange; `auto`: the one that sends the fewest bytes between nodes, then in all."""
    wire_dtype: WireDtype = WireDtype.auto
    """Precision of rows, partial sums and their gradients on the wire; routing weights stay fp32."""
    overlap: OverlapKind = OverlapKind.none
    """What runs while rows are on the wire: `none`, `shared` (the shared experts), `chunks` (these, and the experts on
    other parts of the tokens), or `auto`: the predicted fastest."""
    chunks: Union[int, str] = "auto"
    """Parts of a micro-batch's tokens with `overlap=chunks`, 2 or more; `auto`: 2 or 4, the predicted faster one."""
