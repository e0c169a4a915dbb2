"""Config of the machine: `mesh`, `hardware` and `dispatch`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Union

from moecompile.ranges import Real, Whole, number
from moecompile.schema.enums import DispatchBalance, DispatchKind, OverlapKind, Precision, Schedule, WireDtype


@dataclass(kw_only=True)
class MeshConfig:
    """`mesh`: ranks and their axes; num_nodes * ranks_per_node = dp_replicate * dp_shard * cp * tp."""

    num_nodes: int = number(1, Whole(1, 65_536))
    """Nodes."""
    ranks_per_node: int = number(1, Whole(1, 1_024))
    """Ranks on each node."""
    ep: Union[int, str] = "auto"
    """Expert parallel size: ranks of an EP group, over which the experts are spread; `auto`: all ranks; `search`: what
    is predicted to be fastest and fits, with `dp_replicate` and what is `auto` in `dispatch`."""
    dp_replicate: int = number(1, Whole(1))
    """Replicas of the sharded weights."""
    dp_shard: Union[int, str] = "auto"
    """Ranks over which dense weights are sharded; `auto`: all ranks of a replica, divided by `cp` and `tp`."""
    tp: int = 1
    """Tensor parallel size: ranks that share a micro-batch and split dense weights, by the model's own `tp_plan`."""
    pp: int = 1
    """Pipeline parallel size; not supported, so 1."""
    cp: int = 1
    """Context parallel size: ranks that share sequences, and split their positions; attention splits its heads."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`."""
    placement: Optional[str] = None
    """A `placement.yaml` of task=place, or its folder: which EP rank has which experts; null: in the order of ids."""


@dataclass(kw_only=True)
class FigureConfig:
    """A number and where it comes from."""

    value: Optional[float] = number(None, Real("(0, inf)", "Give a positive number with its source"))
    """The number; null: not known."""
    source: str = ""
    """Where it is written, or how it was measured."""


@dataclass(kw_only=True)
class FiguresConfig:
    """`hardware.figures`: what predicting the time of a step needs, per rank; each has a `value` and a `source`."""

    bf16_tflops: FigureConfig = field(default_factory=FigureConfig)
    """Peak of dense matrix products in bf16, 1e12 operations/s, from the data sheet."""
    fp8_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same in 8 bits; where there is no such unit, the bf16 peak."""
    fp4_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same in 4 bits; where there is no such unit, the peak in 8 bits."""
    fp32_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same for fp32 (on NVIDIA GPUs TF32)."""
    watts: FigureConfig = field(default_factory=FigureConfig)
    """Power limit."""
    memory_tb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth of the memory, 1e12 bytes/s, from the data sheet."""
    memory_effective_tb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth that kernels reach, 1e12 bytes/s."""
    latency_us: FigureConfig = field(default_factory=FigureConfig)
    """Time of an exchange without rows, microseconds."""
    link_domain: FigureConfig = field(default_factory=FigureConfig)
    """Ranks that the fast links connect (72: a rack of GB200)."""
    compute_units: FigureConfig = field(default_factory=FigureConfig)
    """Units, of which exchanges may take some (streaming multiprocessors)."""


@dataclass(kw_only=True)
class RateConfig:
    """A rate of `hardware.host`; rows rise from one to the next."""

    rows: float = 0.0
    """Rows, positive."""
    gflops: float = 0.0
    """1e9 operations/s with as many, positive."""


@dataclass(kw_only=True)
class ContentionConfig:
    """One of `hardware.host.contention`; ranks rise from one to the next."""

    ranks: float = 0.0
    """Ranks of a node that compute at once, positive."""
    factor: float = 0.0
    """How many times as long each of them takes as one alone, positive."""


@dataclass(kw_only=True)
class MessageConfig:
    """One of `hardware.host.messages`; ranks rise from one to the next."""

    ranks: float = 0.0
    """Ranks of an exchange, positive."""
    fixed_us: float = 0.0
    """CPU time of an exchange without rows, microseconds, positive."""
    byte_ns: float = 0.0
    """CPU time for each byte that a rank sends, nanoseconds, positive."""


@dataclass(kw_only=True)
class HostConfig:
    """`hardware.host`: ranks that compute on the CPU, as task=bench measures them; steps then take CPU time."""

    cores: Optional[int] = number(None, Whole(1))
    """Cores of a node, which its ranks share; null: no such ranks."""
    products: list[RateConfig] = field(default_factory=list)
    """Dense products, by the rows that they have."""
    grouped: list[RateConfig] = field(default_factory=list)
    """Products of experts, by the rows of each of them."""
    contention: list[ContentionConfig] = field(default_factory=list)
    """What ranks of a node that compute at once cost each other."""
    messages: list[MessageConfig] = field(default_factory=list)
    """Exchanges, by the ranks among which they are; none: measured on one rank."""
    attention_gflops: FigureConfig = field(default_factory=FigureConfig)
    """Speed of attention without projections, 1e9 operations/s."""
    pass_gb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth that operations on single numbers reach, 1e9 bytes/s."""
    node_us: FigureConfig = field(default_factory=FigureConfig)
    """What Python and autograd take for one operation, microseconds."""
    optimizer_ns: FigureConfig = field(default_factory=FigureConfig)
    """What the optimizer takes for a parameter, nanoseconds."""


@dataclass(kw_only=True)
class HardwareConfig:
    """`hardware`: memory and bandwidth of one rank."""

    name: str = "laptop"
    """Its name, for display."""
    memory_gib: float = number(4.0, Real("(0, inf)", "Give the memory of one rank in GiB"))
    """Memory of one rank, GiB."""
    intra_node_gb_s: float = number(2.0, Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"))
    """Bandwidth in one direction that exchanges of one rank reach within its link domain, 1e9 bytes/s."""
    inter_node_gb_s: float = number(2.0, Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"))
    """The same beyond it."""
    tflops: float = number(0.1, Real("(0, inf)", "Give the speed of one rank's matrix products in 1e12 operations/s"))
    """Speed that products of experts reach on one rank, 1e12 operations/s. A plan decides by it about overlap
    and lending; a forecast takes calibrated shares of the peaks in `figures`."""
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    host: HostConfig = field(default_factory=HostConfig)


@dataclass(kw_only=True)
class StackConfig:
    """`stack`: what the software of a run does, for predicting the time of a step (task=plan)."""

    name: str = "runtime"
    """Its name, for display."""
    bits: Optional[int] = number(None, Whole(4, 32))
    """Bits of the numbers in products with weights: 32, 16, 8 or 4; null: those of `trainer.precision`."""
    dispatcher: Optional[str] = None
    """`alltoall`, `deepep`, `hybridep` or a kind of `dispatch`; null: the plan's."""
    overlap: bool = False
    """Whether exchanges run beside the compute of another micro-batch."""
    schedule: Schedule = Schedule.onef1b
    """The pipeline's schedule."""
    graph: list[str] = field(default_factory=list)
    """Parts of a layer that CUDA graphs replay: attn, mamba, router, preprocess, dispatch, experts, dense; or all."""
    fused: bool = False
    """Whether activation and quantization are fused into the products of experts."""
    recompute: Optional[list[str]] = None
    """What backward computes again: full, all_but_exchanges, moe, mlp, attention, mla_up_proj, layernorm, moe_act;
    null: that of `trainer.checkpointing`."""
    row_bits: int = number(16, Whole(8, 16))
    """Bits of a number of a row in dispatch: 16 or 8."""
    grad_bits: int = number(32, Whole(16, 32))
    """Bits of a gradient in a described layout: 32 or 16."""
    moment_bits: int = number(32, Whole(8, 32))
    """Bits of each of the optimizer's two moments in a described layout: 32, 16 or 8."""
    wire_share: FigureConfig = field(
        default_factory=lambda: FigureConfig(value=1.0), metadata={"range": Real("(0, 1]", "Use 1.0")}
    )
    """Share of the machine's effective bandwidth that its exchanges reach."""
    comm_units: FigureConfig = field(
        default_factory=lambda: FigureConfig(value=20), metadata={"range": Real("[0, inf)", "Use 20, or 0 for none")}
    )
    """Compute units that overlapped exchanges take."""


@dataclass(kw_only=True)
class WorkloadConfig:
    """`workload`: the training step that task=plan plans, where it is not the one of `data`."""

    name: str = "data"
    """Its name, for display."""
    seq_len: Optional[int] = number(None, Whole(1))
    """Tokens per sequence; null: `data.seq_len`."""
    global_batch_size: Optional[int] = number(None, Whole(1))
    """Sequences per optimizer step; null: `data.global_batch_size`."""
    micro_batch_size: Optional[int] = number(None, Whole(1))
    """Sequences per rank and forward; null: `data.micro_batch_size`."""
    precision: Optional[Precision] = None
    """Precision of weights and computation; null: `trainer.precision`."""
    tp: int = number(1, Whole(1))
    """Tensor parallel size of a layout that is described, not run."""
    pp: int = number(1, Whole(1))
    """Pipeline parallel size of a layout that is described, not run."""
    vpp: int = number(1, Whole(1))
    """Virtual stages per rank of such a pipeline."""
    cp: int = number(1, Whole(1))
    """Context parallel size of a layout that is described, not run."""
    etp: int = number(1, Whole(1))
    """Tensor parallel size of experts in a layout that is described, not run."""
    zero: int = number(3, Whole(0, 3))
    """What is sharded over replicas: nothing (0), optimizer states (1), weights too (3, FSDP)."""
    load: Optional[str] = None
    """`metrics.csv` of a run, or a file of loads, whose imbalance is priced beside synthetic ones."""
    source: str = ""
    """Where the batch is published."""


@dataclass(kw_only=True)
class DispatchConfig:
    """`dispatch`: how tokens are sent to their experts."""

    kind: DispatchKind = DispatchKind.auto
    """Kind of dispatch; `auto`: flat, dedup or hierarchical, whose exchanges are predicted to take the least time, from
    `hardware`."""
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
    backend: Optional[str] = None
    """`module:name` of a back end that dispatches and combines instead (DeepEP, ...); only from the command line or
    Python. null: the exchanges of `kind`."""
