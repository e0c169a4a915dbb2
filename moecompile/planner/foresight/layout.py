"""How a model is laid out over GPUs, on which machine and with which software: the inputs of the time model.

A layout may have tensor (tp), pipeline (pp, with vpp virtual stages), context (cp) and expert-tensor (etp) parallelism
and ZeRO, as published systems use them. The runtime of this package runs ep, dp_shard and dp_replicate alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from moecompile.errors import ConfigError
from moecompile.schema import DispatchKind, OverlapKind

RECOMPUTED = ("full", "all_but_exchanges", "moe", "mlp", "attention", "mla_up_proj", "layernorm", "moe_act")
GRAPHED = ("attn", "mamba", "router", "preprocess", "dispatch", "experts", "dense", "all")
SCHEDULES = ("onef1b", "dualpipe")
KINDS = tuple(kind.value for kind in DispatchKind if kind not in (DispatchKind.local, DispatchKind.auto))
IN_FLIGHT = tuple(kind.value for kind in OverlapKind if kind is not OverlapKind.auto)
DISPATCHERS = (*KINDS, "alltoall", "deepep", "hybridep")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a training step.

    gpus: all of them. seq: tokens of a sequence. micro_batch: sequences per micro-batch of a model replica.
    global_batch: sequences per step. zero: 0 nothing sharded but experts, 1 optimizer states, 3 weights too (FSDP).
    replicas: of the weights that ZeRO 3 shards (HSDP).
    """

    gpus: int
    seq: int
    global_batch: int
    micro_batch: int = 1
    ep: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    etp: int = 1
    zero: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name, value, rule, fix in self._broken():
            raise ConfigError(f"layout.{name}", value, rule, fix)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch of a replica on one context-parallel rank."""
        return self.micro_batch * self.seq / self.cp

    @property
    def dp(self) -> int:
        """Replicas of the dense weights of a stage; each has its own micro-batches."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Replicas of an expert."""
        return max(1, self.gpus // (self.pp * self.ep * self.etp))

    @property
    def num_micro(self) -> int:
        """Micro-batches of a replica and step."""
        return self.global_batch // (self.dp * self.micro_batch)

    def _broken(self) -> Iterator[tuple[str, object, str, str]]:
        for name in ("gpus", "seq", "global_batch", "micro_batch", "ep", "tp", "pp", "vpp", "cp", "etp"):
            if getattr(self, name) < 1:
                yield name, getattr(self, name), "must be at least 1", "Give a positive number"
        model = self.tp * self.pp * self.cp
        if self.gpus % model:
            rule = f"tp * pp * cp = {model} must divide the {self.gpus} GPUs"
            yield "gpus", self.gpus, rule, f"Use a multiple of {model}"
        experts = self.pp * self.ep * self.etp
        if self.gpus % experts:
            rule = f"pp * ep * etp = {experts} must divide the {self.gpus} GPUs"
            yield "ep", self.ep, rule, f"Use a divisor of {gcd(self.gpus // self.pp, self.ep * 1024)}"
        step = self.dp * self.micro_batch
        if self.global_batch % step:
            rule = f"must be a multiple of replicas * micro-batch = {self.dp} * {self.micro_batch}"
            yield "global_batch", self.global_batch, rule, f"Use a multiple of {step}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node that computes on its CPU, in seconds of one rank.

    cores: of a node. products: rows -> operations/s of dense products; grouped: rows of an expert -> operations/s.
    contention: ranks that compute at once -> how much longer each takes. attention: operations/s. passes: bytes/s.
    node: of an operation that Python calls. optimizer: of a parameter. messages: ranks -> seconds of an exchange, and
    of each byte that a rank sends in it.
    """

    cores: int
    products: tuple[tuple[float, float], ...]
    grouped: tuple[tuple[float, float], ...]
    contention: tuple[tuple[float, float], ...]
    attention: float
    passes: float
    node: float
    optimizer: float
    messages: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU and its links; conf/hardware has figures and their sources.

    peak: operations/s of matrix products by bits per number (16, 8, 4), from the data sheet. watts: its power limit.
    memory: bytes/s of its memory, from the data sheet; passes: bytes/s that kernels reach. intra, inter: bytes/s that
    exchanges reach, of one GPU in one direction, within its link domain of `domain` GPUs and beyond it. latency:
    seconds of an empty exchange. units: parts that kernels of exchanges may take (SMs). capacity: bytes of its memory.
    host: what was measured of ranks that compute on the CPU, which then decides about time.
    """

    name: str
    peak: dict[int, float]
    watts: float
    memory: float
    passes: float
    intra: float
    inter: float
    latency: float
    domain: int
    units: int
    capacity: float
    host: Host | None = None


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the software of a run does; conf/stack has some.

    bits: of the products with weights (8: FP8, 4: FP4). dispatcher: the exchange. overlap: whether exchanges run beside
    the compute of another micro-batch. schedule: `onef1b` or `dualpipe`. graph: parts of a layer whose launches a CUDA
    graph replays (`attn`, `mamba`, `router`, `preprocess`, `experts`, or `all`). fused: whether activation and
    quantization are fused into the experts' products. recompute: what backward computes again. comm_units: units that
    overlapped exchanges take from compute. row_bits: bits of a number on the wire in dispatch. wire_share: share of a
    machine's exchange bandwidth that this dispatcher reaches. in_flight, chunks: overlap of a plan's own exchanges
    (planner/overlap.py). grad_bits, moment_bits: of a gradient and of each of the optimizer's two moments.
    """

    bits: int = 16
    dispatcher: str = "alltoall"
    overlap: bool = False
    schedule: str = "onef1b"
    graph: tuple[str, ...] = ()
    fused: bool = False
    recompute: tuple[str, ...] = ()
    comm_units: int = 20
    row_bits: int = 16
    wire_share: float = 1.0
    in_flight: str = "none"
    chunks: int = 1
    grad_bits: int = 32
    moment_bits: int = 32

    def __post_init__(self) -> None:
        words = {
            "dispatcher": (DISPATCHERS, (self.dispatcher,)), "schedule": (SCHEDULES, (self.schedule,)),
            "bits": ((32, 16, 8, 4), (self.bits,)), "recompute": (RECOMPUTED, self.recompute),
            "graph": (GRAPHED, self.graph), "in_flight": (IN_FLIGHT, (self.in_flight,)),
            "grad_bits": ((32, 16), (self.grad_bits,)), "moment_bits": ((32, 16, 8), (self.moment_bits,)),
        }  # fmt: skip
        for name, (known, given) in words.items():
            for word in given:
                if word not in known:
                    raise ConfigError(f"stack.{name}", word, "is not known", f"Use one of {', '.join(map(str, known))}")

    def repeats(self, *parts: str) -> bool:
        """Whether backward computes one of these parts again."""
        return any(part in self.recompute for part in parts)
