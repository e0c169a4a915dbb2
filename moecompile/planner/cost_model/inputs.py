"""What the cost model is given: a model, how it is laid out over GPUs, on which machine and with which software.

A layout may have tensor (tp), pipeline (pp, with vpp virtual stages), context (cp) and expert-tensor (etp) parallelism
and ZeRO, as published systems use them. What a plan of this package splits over its own tp and pp, `Layout` says too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from typing import TypeVar

from moecompile.errors import ConfigError
from moecompile.plan import BUDGET, Plan, Traffic
from moecompile.planner.cost_model.shapes import ModelShape, with_recomputed, with_share
from moecompile.planner.lookups import lookup_step
from moecompile.planner.params import checkpointing_of
from moecompile.planner.traffic import PACKING_BYTES, Links
from moecompile.schema import (
    FP32_BYTES,
    MOMENTS,
    NUMBERS,
    Config,
    ContentionConfig,
    DispatchKind,
    FigureConfig,
    HardwareConfig,
    HostConfig,
    MessageConfig,
    OptimizerConfig,
    OverlapKind,
    Precision,
    RateConfig,
    StackConfig,
    StateKind,
    is_described,
    resolved,
)
from moecompile.stages import SCHEDULES as RUN_SCHEDULES
from moecompile.stages import Pipeline

RECOMPUTED = (
    "full", "all_but_exchanges", "moe", "experts", "mlp", "attention", "mla_up_proj", "layernorm", "moe_act",
)  # fmt: skip
GRAPHED = ("attn", "mamba", "router", "preprocess", "dispatch", "experts", "dense", "all")
DESCRIBED_SCHEDULE = "onef1b"
SCHEDULES = (DESCRIBED_SCHEDULE, "dualpipe", *RUN_SCHEDULES)
KINDS = tuple(kind.value for kind in DispatchKind if kind not in (DispatchKind.local, DispatchKind.auto))
IN_FLIGHT = tuple(kind.value for kind in OverlapKind if kind is not OverlapKind.auto)
DISPATCHERS = (*KINDS, "alltoall", "deepep", "hybridep")
GIB = 2**30
PEAKS = {32: "fp32_tflops", 16: "bf16_tflops", 8: "fp8_tflops", 4: "fp4_tflops"}
_HOST_FIGURES = ("attention_gflops", "pass_gb_s", "node_us", "optimizer_ns")
Row = TypeVar("Row", RateConfig, ContentionConfig, MessageConfig)
_PATHS = {
    "gpus": "mesh", "ep": "mesh.ep", "seq": "data.seq_len", "global_batch": "data.global_batch_size",
    "micro_batch": "data.micro_batch_size", **{name: f"workload.{name}" for name in ("tp", "pp", "vpp", "cp", "etp")},
}  # fmt: skip
SAID_BY_MESH = ("tp", "pp", "cp")  # sizes of a described layout that are also axes of a mesh
_OVER_TP = frozenset({"experts"})
"""What every plan splits over tp: tokens are cut before experts, and before shared ones that are made with them."""
REPEATED: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "full": ("full",),
    "keep_exchanges": ("all_but_exchanges",),
    BUDGET: (),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a training step.

    gpus: all of them. seq: tokens of a sequence. micro_batch: sequences per micro-batch of a model replica.
    global_batch: sequences per step. zero: 0 nothing sharded but experts, 1 optimizer states, 3 weights too (FSDP).
    replicas: of the weights that ZeRO 3 shards (HSDP). reduce, gather: when ZeRO 3 reduces gradients and gathers
    weights (planner/schedule.py); published systems reduce in each micro-batch, and gather layers. split: layers of
    each place along pp, and where the head is; None: the best split. over_tp: what tp splits, of `experts`,
    `attention`, `ffn`, `head` and `embedding`, where all else is computed by each rank; None: everything, and sequences
    between layers, as published systems do.
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
    reduce: str = "each"
    gather: str = "layer"
    split: tuple[tuple[int, ...], int] | None = None
    over_tp: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for name, value, rule, fix in self._broken():
            raise ConfigError(f"layout.{name}", value, rule, fix)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch of a replica on one context-parallel rank."""
        return self.micro_batch * self.seq / self.cp

    def ranks_of(self, part: str) -> int:
        """Over how many ranks of a TP group a part is split; 1: each computes it for all tokens."""
        return self.tp if self.over_tp is None or part in self.over_tp else 1

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

    cores: of a node, or of all nodes if they are one machine. products: rows -> operations/s of dense products;
    grouped: rows of an expert -> operations/s. contention: ranks that compute at once -> how much longer each takes.
    attention: operations/s. passes: bytes/s. node: of an operation that Python calls. optimizer: of a parameter.
    messages: ranks -> seconds of an exchange, and of each byte that a rank sends in it.
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
    one_machine: bool = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU and its links; conf/hardware has figures and their sources.

    peak: operations/s of matrix products by bits per number (16, 8, 4), from the data sheet. watts: its power limit.
    memory: bytes/s of its memory, from the data sheet; passes: bytes/s that kernels reach. links: what exchanges reach,
    in one direction, within its link domain of `domain` GPUs and beyond it. units: parts that kernels of exchanges may
    take (SMs). capacity: bytes of its memory. host: what was measured of ranks that compute on the CPU, which then
    decides about time.
    """

    name: str
    peak: dict[int, float]
    watts: float
    memory: float
    passes: float
    links: Links
    domain: int
    units: int
    capacity: float
    host: Host | None = None


@dataclass(frozen=True, kw_only=True)
class Software:
    """What the software of a run does; conf/stack has some.

    bits: of the products with weights (8: FP8, 4: FP4). dispatcher: the exchange. overlap: whether exchanges run beside
    the compute of another micro-batch. schedule: `onef1b` or `dualpipe`, or that of a planned pipeline. graph: parts of
    a layer whose launches a CUDA graph replays (`attn`, `mamba`, `router`, `preprocess`, `experts`, or `all`). fused:
    whether activation and quantization are fused into the experts' products. recompute: what backward computes again.
    comm_units: units that overlapped exchanges take from compute. row_bits: bits of a number on the wire in dispatch.
    packing: bytes of memory that kernels of its own move to narrow a number of a row, in forward and backward.
    wire_share: share of a machine's exchange bandwidth that this dispatcher reaches. in_flight, chunks: overlap of a
    plan's own exchanges (seconds.py). paired: share of a planned pipeline's forwards and backwards that run beside
    another. grad_bits, moment_bits: of a gradient and of each of the optimizer's two moments. number_bytes, wide_bytes:
    of a number that products of 16 or more bits read and write, and of one between layers and of a weight as ZeRO 3
    gathers it; they differ under autocast.
    """

    bits: int = 16
    dispatcher: str = "alltoall"
    overlap: bool = False
    schedule: str = DESCRIBED_SCHEDULE
    graph: tuple[str, ...] = ()
    fused: bool = False
    recompute: tuple[str, ...] = ()
    comm_units: int = 20
    row_bits: float = 16
    packing: float = 0.0
    wire_share: float = 1.0
    in_flight: str = "none"
    chunks: int = 1
    paired: float = 0.0
    grad_bits: int = 32
    moment_bits: int = 32
    number_bytes: int = 2
    wide_bytes: int = 2

    def __post_init__(self) -> None:
        for name, known, given in (
            ("dispatcher", DISPATCHERS, (self.dispatcher,)), ("schedule", SCHEDULES, (self.schedule,)),
            ("bits", (32, 16, 8, 4), (self.bits,)), ("recompute", RECOMPUTED, self.recompute),
            ("graph", GRAPHED, self.graph), ("in_flight", IN_FLIGHT, (self.in_flight,)),
            ("grad_bits", (32, 16), (self.grad_bits,)), ("moment_bits", (32, 16, 8), (self.moment_bits,)),
        ):  # fmt: skip
            for word in given:
                if word not in known:
                    raise ConfigError(f"stack.{name}", word, "is not known", f"Use one of {', '.join(map(str, known))}")

    @property
    def casts(self) -> bool:
        """Whether weights are copied into narrower numbers in each micro-batch."""
        return self.wide_bytes > self.number_bytes

    def repeats(self, *parts: str) -> bool:
        """Whether backward computes one of these parts again."""
        return not {*parts}.isdisjoint(self.recompute)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A step whose time is predicted. spread: the plan whose embedding tables are spread over ranks; None: none are."""

    model: ModelShape
    layout: Layout
    machine: Machine
    software: Software
    spread: Plan | None = field(default=None, repr=False)

    @property
    def tables(self) -> Traffic:
        """Bytes that a rank sends for lookups in a step. Not a multiple of those of a token: ids repeat rows."""
        if self.spread is None:
            return Traffic(intra_node=0.0, inter_node=0.0)
        return lookup_step(self.spread, self.layout.tokens, self.layout.num_micro, self.software.bits // 8)


def machine_of(hardware: HardwareConfig) -> Machine:
    """The machine.

    Raises:
        ConfigError: a figure is missing, not positive, or above the data sheet's.
    """
    figures = hardware.figures

    def figure(name: str) -> float:
        return number(f"hardware.figures.{name}", getattr(figures, name))

    sheet, reached = figure("memory_tb_s"), figure("memory_effective_tb_s")
    if reached > sheet:
        raise ConfigError(
            "hardware.figures.memory_effective_tb_s.value", reached,
            f"is above the data sheet's hardware.figures.memory_tb_s.value={sheet:g}", "Correct one of them",
        )  # fmt: skip
    return Machine(
        name=hardware.name,
        peak={bits: figure(name) * 1e12 for bits, name in PEAKS.items()},
        watts=figure("watts"),
        memory=sheet * 1e12,
        passes=reached * 1e12,
        links=replace(links_of(hardware), latency=figure("latency_us") * 1e-6),
        domain=round(figure("link_domain")),
        units=round(figure("compute_units")),
        capacity=hardware.memory_gib * GIB,
        host=None if hardware.host.cores is None else host_of(hardware.host),
    )


def links_of(hardware: HardwareConfig) -> Links:
    """Its links; where the latency is not known, bytes alone decide."""
    latency = hardware.figures.latency_us.value or 0.0
    return Links(intra=hardware.intra_node_gb_s * 1e9, inter=hardware.inter_node_gb_s * 1e9, latency=latency * 1e-6)


def pass_bytes(hardware: HardwareConfig) -> float:
    """Bytes/s of memory that simple loops reach.

    Raises:
        ConfigError: the figure is missing.
    """
    if hardware.host.cores is not None:
        return 1e9 * number("hardware.host.pass_gb_s", hardware.host.pass_gb_s)
    return 1e12 * number("hardware.figures.memory_effective_tb_s", hardware.figures.memory_effective_tb_s)


def host_of(host: HostConfig) -> Host:
    """The ranks of a CPU.

    Raises:
        ConfigError: a figure is missing, or a table is not one of positive numbers with rising first ones.
    """
    figures = {name: number(f"hardware.host.{name}", getattr(host, name)) for name in _HOST_FIGURES}
    return Host(
        cores=host.cores or 1,
        one_machine=host.one_machine,
        products=tuple((each.rows, 1e9 * each.gflops) for each in _rows("products", host.products)),
        grouped=tuple((each.rows, 1e9 * each.gflops) for each in _rows("grouped", host.grouped)),
        contention=tuple((each.ranks, each.factor) for each in _rows("contention", host.contention)),
        messages=tuple(
            (each.ranks, 1e-6 * each.fixed_us, 1e-9 * each.byte_ns)
            for each in _rows("messages", host.messages, least=0)
        ),
        attention=1e9 * figures["attention_gflops"],
        passes=1e9 * figures["pass_gb_s"],
        node=1e-6 * figures["node_us"],
        optimizer=1e-9 * figures["optimizer_ns"],
    )


def _rows(name: str, rows: list[Row], least: int = 1) -> list[Row]:
    """A table, checked."""
    values = [list(vars(row).values()) for row in rows]
    first = [row[0] for row in values]
    if len(rows) < least or any(min(row) <= 0 for row in values) or first != sorted(set(first)):
        raise ConfigError(
            f"hardware.host.{name}", values, "needs rows of positive numbers, with rising first ones",
            "Measure it with task=bench",
        )  # fmt: skip
    return rows


def number(path: str, figure: FigureConfig) -> float:
    """The value of a figure.

    Raises:
        ConfigError: it is missing or out of range.
    """
    if figure.value is None:
        raise ConfigError(
            f"{path}.value", None, "is needed to predict the time of a step", "Give the number and its source"
        )
    NUMBERS[f"{path}.value"].check(f"{path}.value", figure.value)
    return float(figure.value)


def software_of(
    stack: StackConfig,
    *,
    bits: int = 16,
    dispatcher: str = "alltoall",
    recompute: tuple[str, ...] = (),
    moment_bits: int = 32,
) -> Software:
    """The software.

    Args:
        bits, dispatcher, recompute, moment_bits: what holds where the stack leaves it open.

    Raises:
        ConfigError: a word is not known, or a share is out of range.
    """
    return Software(
        bits=stack.bits or bits,
        dispatcher=stack.dispatcher or dispatcher,
        overlap=stack.overlap,
        schedule=stack.schedule.value,
        graph=tuple(stack.graph),
        fused=stack.fused,
        recompute=recompute if stack.recompute is None else tuple(stack.recompute),
        comm_units=round(stack.comm_units.value or 0),
        row_bits=stack.row_bits,
        grad_bits=stack.grad_bits,
        moment_bits=stack.moment_bits or moment_bits,
        wire_share=number("stack.wire_share", stack.wire_share),
    )


def _predicting(shape: ModelShape, further: int) -> ModelShape:
    """The shape with layers like its last one with experts, that predict further tokens."""
    likes = [layer for layer in shape.layers if layer.ffn is not None and layer.ffn.experts] or list(shape.layers)
    if not further or not likes:
        return shape
    return replace(shape, layers=(*shape.layers, replace(likes[-1], count=further, mtp=True)))


def _repeating(shape: ModelShape, plan: Plan, stack: StackConfig) -> ModelShape:
    """The shape with what backward repeats of single layers: the plan's choice, unless the stack says it.

    Raises:
        ConfigError: a share of nothing that the stack says.
    """
    if stack.recompute is not None:
        return with_share(shape, stack.recompute_share)
    if stack.recompute_share < 1:
        raise ConfigError(
            "stack.recompute_share", stack.recompute_share, "has no effect without stack.recompute",
            "Give stack.recompute=[full] too, or leave it out",
        )  # fmt: skip
    return with_recomputed(shape, plan.recomputed, plan.pipeline)


def _moment_bits(optimizer: OptimizerConfig, weight_bytes: int) -> int:
    """Of a moment."""
    return MOMENTS[resolved(optimizer.state, 8 * weight_bytes) or StateKind.fp32].bits


def _with_rows(software: Software, plan: Plan, machine: Machine) -> Software:
    """With rows as the plan sends them. A CPU's bytes are those of numbers of `bits`, which are divided out here."""
    formats = [(layer.dispatch.wire, layer.row_site.d_model) for layer in plan.layers if layer.steps]
    is_narrow = any(each.narrow for each, _ in formats)
    if not formats or not (is_narrow or machine.host is None):
        return software
    wire, width = max(formats, key=formats.count)
    number = software.wide_bytes if machine.host is None else software.bits // 8
    both = 8 * sum(wire.row_bytes(width, number)) / width
    counted = 1.0 if machine.host is None else software.bits / 16
    return replace(software, row_bits=both / counted - 16, packing=2 * PACKING_BYTES if is_narrow else 0.0)


def _numbers(config: Config, weight_bytes: int) -> tuple[int, int]:
    """`Software.number_bytes` and `wide_bytes` of a run on GPUs."""
    precision = config.trainer.precision
    wide = 2 if precision is Precision.bf16_params else weight_bytes
    return 2 if precision is Precision.bf16_mixed else wide, wide


def _over_tp(plan: Plan) -> frozenset[str] | None:
    """`Layout.over_tp`, from the names of split modules: those of attention have it in the name of what they are in."""
    if plan.mesh.tp == 1:
        return None
    found = set(_OVER_TP)
    for entry in plan.tensor_parallel:
        owner = entry.modules.rpartition(".")[0]
        if entry.style == "embedding_rowwise":
            found.add("embedding")
        elif "*" not in owner:
            found.add("head")
        else:
            found.add("attention" if "att" in owner.rpartition(".")[2].lower() else "ffn")
    return frozenset(found)


def _split(pipeline: Pipeline | None) -> tuple[tuple[int, ...], int] | None:
    """`Layout.split`."""
    if pipeline is None:
        return None
    stages = [[pipeline.stages[i] for i in pipeline.stages_of(index)] for index in range(pipeline.ranks)]
    return tuple(sum(len(stage.layers) for stage in own) for own in stages), pipeline.rank_with_loss


def inputs_of(shape: ModelShape, plan: Plan, config: Config, *, described: bool = False) -> Inputs:
    """What is forecast for a plan.

    Args:
        described: whether described layouts start from it, which have the numbers of their own software; else the
            config's `workload` says so.

    Raises:
        ConfigError: the described layout does not divide, mesh and workload both say a size, or a figure of the
            hardware or the stack is missing.
    """
    workload, data, mesh = config.workload, config.data, plan.mesh
    for name in SAID_BY_MESH:
        if getattr(workload, name) > 1 and getattr(mesh, name) > 1:
            rule = f"the mesh says {getattr(mesh, name)} already"
            raise ConfigError(f"workload.{name}", getattr(workload, name), rule, "Set one of them to 1")
    batch = data.global_batch_size
    if not is_described(workload):  # as in the plan's memory, each rank has at least one whole micro-batch
        step = data.micro_batch_size * mesh.num_batches
        batch = -(-batch // step) * step
    try:
        layout = Layout(
            gpus=mesh.world_size, seq=data.seq_len, global_batch=batch, micro_batch=data.micro_batch_size,
            ep=mesh.ep, tp=mesh.tp * workload.tp, pp=mesh.pp * workload.pp,
            vpp=workload.vpp if plan.pipeline is None else plan.pipeline.per_rank,
            cp=mesh.cp * workload.cp, etp=workload.etp, zero=workload.zero,
            replicas=mesh.dp_replicate if workload.zero == 3 and not is_described(workload) else 1,
            **({} if is_described(workload) else {"reduce": plan.reduce, "gather": plan.gather}),
            split=_split(plan.pipeline), over_tp=None if described or is_described(workload) else _over_tp(plan),
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(_PATHS[error.path.removeprefix("layout.")], error.value, error.rule, error.fix) from error
    dispatches = [(layer.dispatch.kind, layer.dispatch.overlap, layer.dispatch.chunks) for layer in plan.layers]
    kind, overlap, chunks = max(dict.fromkeys(dispatches), key=dispatches.count, default=("local", "none", 1))
    own = config.stack.dispatcher is None and not config.stack.overlap
    # The plan's nodes are its link domains: ranks of one node are connected by the fast links.
    machine = replace(machine_of(config.hardware), domain=mesh.ranks_per_node)
    number, wide = _numbers(config, shape.weight_bytes)
    # A CPU's bytes are scaled by `bits`, and a described layout has the numbers of its own software.
    as_planned = machine.host is None and not (described or is_described(workload))
    software = software_of(
        config.stack, bits=32 if config.trainer.precision is Precision.fp32 and number == FP32_BYTES else 16,
        dispatcher="flat" if kind == "local" else kind, recompute=REPEATED[checkpointing_of(config, plan)],
        moment_bits=_moment_bits(config.optimizer, shape.weight_bytes if as_planned else FP32_BYTES),
    )  # fmt: skip
    if as_planned:
        software = replace(software, number_bytes=number, wide_bytes=wide)
    if plan.pipeline is not None:
        paired = plan.pipeline.paired(layout.num_micro) if own else 0.0
        software = replace(software, schedule=plan.pipeline.schedule, paired=paired)
    if own:
        software = _with_rows(software, plan, machine)
    if machine.host is not None:
        software = replace(software, fused=True)  # as the experts' kernel for CPUs is
    return Inputs(
        model=_repeating(_predicting(shape, workload.mtp), plan, config.stack),
        layout=layout,
        machine=machine,
        software=replace(software, in_flight=overlap, chunks=chunks) if own else software,
        spread=plan if plan.lookups else None,
    )
