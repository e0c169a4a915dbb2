"""Config of the machine: `mesh`, `hardware` and `dispatch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from moecompile.schema.enums import DispatchBalance, DispatchKind, OverlapKind, WireDtype


@dataclass(kw_only=True)
class MeshConfig:
    """`mesh`: ranks and their axes; num_nodes * ranks_per_node = dp_replicate * dp_shard."""

    num_nodes: int = 1
    """Nodes, 1 to 65536."""
    ranks_per_node: int = 1
    """Ranks on each node, 1 to 1024."""
    ep: Union[int, str] = "auto"
    """Expert parallel size: ranks of an EP group, over which the experts are spread; `auto`: all ranks."""
    dp_replicate: int = 1
    """Replicas of the sharded weights, 1 or more."""
    dp_shard: Union[int, str] = "auto"
    """Ranks over which dense weights are sharded; `auto`: all ranks of a replica."""
    tp: int = 1
    """Tensor parallel size; not supported yet, so 1."""
    pp: int = 1
    """Pipeline parallel size; not supported yet, so 1."""
    cp: int = 1
    """Context parallel size; not supported yet, so 1."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`."""


@dataclass(kw_only=True)
class HardwareConfig:
    """`hardware`: memory and bandwidth of one rank."""

    name: str = "laptop"
    """Its name, for display."""
    memory_gib: float = 4.0
    """Memory of one rank, GiB, positive."""
    intra_node_gb_s: float = 2.0
    """Bandwidth of one rank within its node, 1e9 bytes/s, positive."""
    inter_node_gb_s: float = 2.0
    """Bandwidth of one rank to other nodes, 1e9 bytes/s, positive."""
    tflops: float = 0.1
    """Matmul speed that experts reach on one rank, 1e12 operations/s, positive."""


@dataclass(kw_only=True)
class DispatchConfig:
    """`dispatch`: how tokens are sent to their experts."""

    kind: DispatchKind = DispatchKind.auto
    """Kind of dispatch; `auto`: the one that sends the fewest bytes between nodes, then the fewest in total."""
    wire_dtype: WireDtype = WireDtype.auto
    """Precision of rows, partial sums and their gradients on the wire; routing weights stay fp32."""
    overlap: OverlapKind = OverlapKind.none
    """What runs while rows are on the wire: nothing (`none`), the shared experts (`shared`), these and the experts on
    other parts of the tokens (`chunks`), or what is predicted to be fastest (`auto`)."""
    chunks: Union[int, str] = "auto"
    """Parts of a micro-batch's tokens with `overlap=chunks`, 2 or more; `auto`: 2 or 4, predicted to be faster."""
    balance: DispatchBalance = DispatchBalance.none
    """Whether experts with many tokens are lent to ranks with few, decided in each micro-batch: never (`none`), where
    it saves time (`lend`), or `lend` if a loan can pay on this mesh (`auto`)."""
    slots: Union[int, str] = "auto"
    """Experts that a rank can borrow at once, 1 or more; `auto`: 2, or as many as other ranks have."""
