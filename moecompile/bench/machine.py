"""Measures what the time of a step on this machine depends on, and writes it as a `hardware` file for any task.

All in CPU time, except where wall time is said. Ranks of the mesh that are not needed wait.

1. On rank 0: products by rows, experts' products by rows of each, attention, a memory pass, the optimizer, all at the
   model's own sizes; then the whole model's forward and backward.                                    -> `_one_rank`
2. The model's forward and backward on 2, 4, ... ranks at once, over that of one rank.              -> `_contention`
3. Exchanges of each kind by size, on the first 2, 4, ... ranks. Messages are the line through those of rows.
                                                                                                     -> `_exchanges`

The file says what was measured, and two prices:
a. The price of a node is what the model's forward and backward on one rank took beyond its products and passes, over
   the number of nodes.                                                                             -> `_node`
b. The price of a message comes from exchanges alone. What FSDP and the process group do around one is more, so it is
   multiplied by what the measured step took beyond its computation, over what these messages would. -> `calibrated`
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from moecompile.bench.layers import WEIGHT_STD
from moecompile.nn import Experts
from moecompile.planner.cost_model.counts import ATTENTION_BACKWARD, count
from moecompile.planner.cost_model.host import WAITING, host_seconds
from moecompile.planner.cost_model.inputs import Host, Inputs
from moecompile.schema import (
    ContentionConfig,
    FigureConfig,
    FiguresConfig,
    HardwareConfig,
    HostConfig,
    MessageConfig,
    RateConfig,
)
from moecompile.torch_private import all_gather_single, reduce_scatter_single
from moecompile.version import __version__


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How closely is measured. rounds: of each measurement. least, together: seconds of a round, of one rank and of all
    at once. calls, sizes: of an exchange. every: on 2, 4, ... ranks, else on all of them alone.
    """

    rounds: int
    least: float
    together: float
    calls: int
    sizes: tuple[int, ...]
    every: bool


ROWS, EXPERT_ROWS = (16, 64, 256, 1024), (1, 4, 16, 64, 256)
SIZES = (64, 4096, 65536, 524288, 2097152)  # bytes that a rank sends
FULL = Effort(rounds=5, least=0.02, together=0.3, calls=10, sizes=SIZES, every=True)
SHORT = Effort(rounds=2, least=0.004, together=0.05, calls=3, sizes=(64, 65536, 524288), every=False)
NAME = "this_machine"
_GIB = 2**30
_LEAST_NODE = 1e-7  # seconds
_LEAST = 1e-3
_FACTORS = (0.1, 10.0)  # of messages: outside, something else was measured
_ONCE = ("gradients", "optimizer")  # a step, not in forward and backward
_MESSAGES = ("exchange", "tensor", "context", "weights")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model and its micro-batch: what is measured is measured at these.

    d_model: of a dense product. heads, d_qk, d_v, seq: of attention; no heads: none. row: width of the experts' rows.
    experts: on a rank. d_expert: their width. tokens: of a micro-batch.
    """

    d_model: int
    heads: int
    d_qk: int
    d_v: int
    seq: int
    row: int
    experts: int
    d_expert: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ExchangeCost:
    """Microseconds of one exchange on rank 0: all_to_all, all_gather or reduce_scatter, of bytes that a rank sends."""

    kind: str
    ranks: int
    bytes: int
    wall_us: float
    cpu_us: float


@dataclass(frozen=True, kw_only=True)
class MachineCost:
    """What was measured: rows -> 1e9 operations/s of products, 1e9 bytes/s of passes, nanoseconds of the optimizer per
    parameter, seconds of the model's forward and backward, ranks -> factor of ranks that compute at once.
    """

    cores: int
    threads: int
    products: list[tuple[int, float]]
    grouped: list[tuple[int, float]]
    attention_gflops: float
    pass_gb_s: float
    optimizer_ns: float
    model_seconds: float
    contention: list[tuple[int, float]]
    exchanges: list[ExchangeCost]


def measure_machine(
    run: Callable[[], object], sizes: Sizes, waiting: dist.ProcessGroup, timeout: timedelta, effort: Effort = FULL
) -> MachineCost | None:
    """All ranks call it; None on all but rank 0.

    Args:
        run: forward and backward of the model on this rank alone. waiting: of all ranks, which wait in it for rank 0.
            timeout: of groups of some of them. effort: with less than `FULL`, only rank 0 needs `run`: ranks that
            compute at once have products of their own.
    """
    torch.manual_seed(0)
    world = dist.get_world_size()
    counts = _counts(world) if effort.every else [world] * (world > 1)
    groups = {ranks: dist.new_group(list(range(ranks)), timeout=timeout) for ranks in counts}
    one = _one_rank(run, sizes, effort) if dist.get_rank() == 0 else None
    dist.barrier(waiting)
    alone = one["model_seconds"] if one else 1.0
    if not effort.every:
        run = _products(ROWS[-1], sizes)
        alone = _seconds(run, effort, effort.together) if one else 1.0
    contention = _contention(run, alone, groups, waiting, effort)
    exchanges = [cost for ranks, group in groups.items() for cost in _exchanges(ranks, group, waiting, effort)]
    if one is None:
        return None
    return MachineCost(
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        contention=contention,
        exchanges=exchanges,
        **one,
    )


def _counts(world: int) -> list[int]:
    """2, 4, ... and all of them."""
    return sorted({2**i for i in range(1, world.bit_length()) if 2**i <= world} | ({world} if world > 1 else set()))


def _one_rank(run: Callable[[], object], sizes: Sizes, effort: Effort) -> dict[str, Any]:
    """Step 1."""
    return {
        "products": [(rows, _product_rate(rows, sizes, effort)) for rows in ROWS],
        "grouped": [(rows, _expert_rate(rows, sizes, effort)) for rows in EXPERT_ROWS],
        "attention_gflops": _attention_rate(sizes, effort),
        "pass_gb_s": _pass_rate(sizes, effort),
        "optimizer_ns": _optimizer_ns(sizes, effort),
        "model_seconds": _seconds(run, effort),
    }


def _product_rate(rows: int, sizes: Sizes, effort: Effort) -> float:
    """1e9 operations/s of a linear layer's three products."""
    return 6e-9 * rows * sizes.d_model * sizes.d_model / _seconds(_products(rows, sizes), effort)


def _products(rows: int, sizes: Sizes) -> Callable[[], None]:
    x, weight, grad = (
        torch.randn(*shape) for shape in ((rows, sizes.d_model), (sizes.d_model, sizes.d_model), (rows, sizes.d_model))
    )

    def products() -> None:
        F.linear(x, weight)
        grad @ weight
        grad.T @ x

    return products


def _expert_rate(rows: int, sizes: Sizes, effort: Effort) -> float:
    """1e9 operations/s of the experts of a rank, forward and backward, with as many rows for each."""
    none = nn.Identity()  # the op has its own activation
    experts = Experts(sizes.row, sizes.d_expert, sizes.experts, gated=True, activation=none)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=WEIGHT_STD)
    total = rows * sizes.experts
    x = torch.randn(total, sizes.row, requires_grad=True)
    source_R, weights_R, grad = torch.arange(total), torch.ones(total), torch.randn(total, sizes.row)
    counts_E = torch.full((sizes.experts,), rows)

    def step() -> None:
        experts(x, counts_E, source_R=source_R, weights_R=weights_R).backward(grad)
        experts.zero_grad()

    return 18e-9 * total * sizes.row * sizes.d_expert / _seconds(step, effort)


def _attention_rate(sizes: Sizes, effort: Effort) -> float:
    """1e9 operations/s of causal attention, forward and backward, which has 2.5 times as many."""
    if not sizes.heads:
        return _product_rate(sizes.tokens, sizes, effort)  # nothing will be divided by it
    shape = (max(1, sizes.tokens // sizes.seq), sizes.heads, sizes.seq)
    q, k = (torch.randn(*shape, sizes.d_qk, requires_grad=True) for _ in range(2))
    v = torch.randn(*shape, sizes.d_v, requires_grad=True)
    grad = torch.randn(*shape, sizes.d_v)

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    flops = 2 * shape[0] * sizes.seq * sizes.heads * (sizes.d_qk + sizes.d_v) * (sizes.seq + 1) / 2
    return 1e-9 * flops * (1 + ATTENTION_BACKWARD) / _seconds(step, effort)


def _pass_rate(sizes: Sizes, effort: Effort) -> float:
    """1e9 bytes/s of an addition of two micro-batches of hidden states, which is read and written in turn."""
    x, y, out = (torch.randn(sizes.tokens, 4 * sizes.d_model) for _ in range(3))
    return 3e-9 * x.nbytes / _seconds(lambda: torch.add(x, y, out=out), effort)


def _optimizer_ns(sizes: Sizes, effort: Effort) -> float:
    """Nanoseconds of AdamW for a parameter."""
    weights = [nn.Parameter(torch.randn(sizes.d_model, sizes.d_model)) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights)
    return 1e9 * _seconds(optimizer.step, effort) / sum(weight.numel() for weight in weights)


def _contention(
    run: Callable[[], object],
    alone: float,
    groups: dict[int, dist.ProcessGroup],
    waiting: dist.ProcessGroup,
    effort: Effort,
) -> list[tuple[int, float]]:
    """Step 2; on rank 0 from what it takes `alone`."""
    found = [(1, 1.0)]
    for ranks, group in groups.items():
        if dist.get_rank() < ranks:
            dist.barrier(group)
            found.append((ranks, max(1.0, _seconds(run, effort, effort.together) / alone)))
        dist.barrier(waiting)
    return found


def _exchanges(
    ranks: int, group: dist.ProcessGroup, waiting: dist.ProcessGroup, effort: Effort
) -> Iterator[ExchangeCost]:
    """Step 3; nothing on ranks that are not in the group."""
    if dist.get_rank() < ranks:
        for size in effort.sizes:
            for kind, call in _calls(ranks, size // 4, group).items():
                wall, cpu = _exchange_seconds(call, group, effort)
                yield ExchangeCost(kind=kind, ranks=ranks, bytes=size, wall_us=1e6 * wall, cpu_us=1e6 * cpu)
    dist.barrier(waiting)


def _calls(ranks: int, numbers: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Each kind of exchange, in which a rank sends about as many fp32 numbers to the others together."""
    block = max(1, numbers // (ranks - 1))
    one, whole, other = torch.zeros(block), torch.zeros(block * ranks), torch.zeros(block * ranks)
    return {
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all_gather": lambda: all_gather_single(whole, one, group),
        "reduce_scatter": lambda: reduce_scatter_single(one, whole, group),
    }


def _exchange_seconds(call: Callable[[], object], group: dist.ProcessGroup, effort: Effort) -> tuple[float, float]:
    """Wall and CPU seconds, medians; CPU time is that of the process, whose back end has threads of its own."""
    times = []
    for _ in range(effort.rounds + 1):
        dist.barrier(group)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(effort.calls):
            call()
        times.append(((time.perf_counter() - wall) / effort.calls, (time.process_time() - cpu) / effort.calls))
    walls, cpus = zip(*times[1:], strict=True)
    return statistics.median(walls), statistics.median(cpus)


def _seconds(call: Callable[[], object], effort: Effort, least: float | None = None) -> float:
    """CPU seconds of one call: the median of rounds that take `least` at least."""
    least = effort.least if least is None else least
    call()
    start = time.process_time()
    call()
    number = max(1, int(least / max(1e-9, time.process_time() - start)))
    rounds = []
    for _ in range(effort.rounds):
        start = time.process_time()
        for _ in range(number):
            call()
        rounds.append((time.process_time() - start) / number)
    return statistics.median(rounds)


_LAYERS, _WIDTH = 8, 64
_OF_A_LAYER = 3  # FSDP's exchanges: two gathers and a reduction


def sharded_seconds(effort: Effort) -> float:
    """CPU seconds of one of FSDP's exchanges with what it does around it; all ranks call it.

    Small layers that are sharded over all ranks take as much longer than the same on one.
    """

    def layers() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS)))

    whole, sharded = layers(), layers()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for each in (*sharded, sharded):
        fully_shard(each, mesh=mesh)
    x = torch.randn(_WIDTH, _WIDTH)
    seconds = []
    for model in (whole, sharded):
        rounds = []
        for _ in range(effort.rounds + 1):
            start = time.process_time()
            model(x).sum().backward()
            rounds.append(time.process_time() - start)
        seconds.append(statistics.median(rounds[1:]))
    return max(0.0, seconds[1] - seconds[0]) / (_OF_A_LAYER * (_LAYERS + 1))


def line_of(exchanges: Sequence[ExchangeCost]) -> list[tuple[int, float, float]]:
    """Ranks, microseconds of CPU time of an exchange, and nanoseconds per byte: least squares over sizes of all kinds.

    Relative errors count, so that small exchanges do not vanish beside large ones.
    """
    found = []
    for ranks in sorted({cost.ranks for cost in exchanges}):
        costs = [cost for cost in exchanges if cost.ranks == ranks]
        found.append((ranks, *_fit([(cost.bytes, cost.cpu_us) for cost in costs])))
    return found


def _fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(microseconds, nanoseconds per byte), not negative."""
    ones = np.ones(len(points))
    rows = np.array([[1 / y, 1e-3 * x / y] for x, y in points])
    fixed, each = np.linalg.lstsq(rows, ones, rcond=None)[0]
    if fixed < 0:
        fixed, each = 0.0, np.linalg.lstsq(rows[:, 1:], ones, rcond=None)[0][0]
    elif each < 0:
        fixed, each = np.linalg.lstsq(rows[:, :1], ones, rcond=None)[0][0], 0.0
    return float(fixed), float(each)


def calibrated(cost: MachineCost, one: Inputs, inputs: Inputs, step_seconds: float) -> tuple[Host, float | None]:
    """The host that the measured step calibrates, and the factor of its messages; None: the step has none.

    Args:
        one: a micro-batch on one rank, of which `cost.model_seconds` was measured. inputs: the step of all ranks.
        step_seconds: its measured CPU time, of a rank.
    """
    host = host_before(cost, one)
    parts = cpu_parts(inputs, host)
    messages = sum(parts[name] for name in _MESSAGES)
    if not messages:
        return host, None
    least, most = _FACTORS
    factor = min(most, max(least, (step_seconds - sum(parts.values()) + messages) / messages))
    return with_messages(host, factor), factor


def with_messages(host: Host, factor: float) -> Host:
    """The host, whose exchanges take `factor` times as long."""
    rows = tuple((ranks, factor * fixed, factor * each) for ranks, fixed, each in host.messages)
    return dataclasses.replace(host, messages=rows)


def host_before(cost: MachineCost, one: Inputs) -> Host:
    """The host with exchanges as they were measured by themselves.

    Args:
        one: as for `calibrated`.
    """
    host = Host(
        cores=cost.cores,
        products=tuple((float(rows), 1e9 * rate) for rows, rate in cost.products),
        grouped=tuple((float(rows), 1e9 * rate) for rows, rate in cost.grouped),
        contention=tuple((float(ranks), factor) for ranks, factor in cost.contention),
        messages=tuple((float(ranks), 1e-6 * fixed, 1e-9 * each) for ranks, fixed, each in line_of(cost.exchanges)),
        attention=1e9 * cost.attention_gflops,
        passes=1e9 * cost.pass_gb_s,
        node=0.0,
        optimizer=1e-9 * cost.optimizer_ns,
    )
    return dataclasses.replace(host, node=_node(cost, one, host))


def cpu_parts(inputs: Inputs, host: Host) -> dict[str, float]:
    """The addends of the CPU time of a rank and step."""
    inputs = dataclasses.replace(inputs, machine=dataclasses.replace(inputs.machine, host=host))
    counts = count(inputs.model, inputs.layout, inputs.machine, inputs.software)
    parts = host_seconds(inputs.model, inputs.layout, counts, inputs.machine, inputs.software)
    return {name: seconds for name, seconds in parts.items() if name != WAITING}


def _node(cost: MachineCost, one: Inputs, host: Host) -> float:
    """Step a."""
    rest = sum(seconds for name, seconds in cpu_parts(one, host).items() if name not in _ONCE)
    nodes = cpu_parts(one, dataclasses.replace(host, node=1.0))["host"]
    return max(_LEAST_NODE, (cost.model_seconds - rest) / nodes)


def hardware_of(
    cost: MachineCost, host: Host, before: HardwareConfig, local_ranks: int, by: str = "by task=bench"
) -> dict[str, Any]:
    """The content of the file: numbers, and where each comes from.

    Args:
        before: the hardware of the run, for what was not measured. local_ranks: ranks of this machine. by: whom.
    """
    measured = f"measured {by}, moecompile {__version__}, {cost.threads} thread(s) a rank"
    fastest = max(rate for _, rate in (*cost.products, *cost.grouped))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB / local_ranks
    peak = _figure(fastest / 1e3, f"{measured}: the fastest product")
    bandwidths, latency = _links(cost, before, measured)
    figures = {
        **dict.fromkeys(("bf16_tflops", "fp8_tflops", "fp4_tflops", "fp32_tflops"), peak),
        "watts": _kept(before, "watts"),
        **dict.fromkeys(("memory_tb_s", "memory_effective_tb_s"), _figure(cost.pass_gb_s / 1e3, measured)),
        "latency_us": latency,
        "link_domain": _kept(before, "link_domain"),
        "compute_units": _kept(before, "compute_units"),
    }
    return {
        "name": NAME,
        "memory_gib": _short(memory),
        **bandwidths,
        "tflops": _short(max(rate for _, rate in cost.grouped) / 1e3),
        "figures": figures,
        "host": {
            "cores": host.cores,
            "one_machine": host.one_machine,
            "products": [{"rows": rows, "gflops": _short(rate / 1e9)} for rows, rate in host.products],
            "grouped": [{"rows": rows, "gflops": _short(rate / 1e9)} for rows, rate in host.grouped],
            "contention": [{"ranks": ranks, "factor": _short(factor)} for ranks, factor in host.contention],
            "messages": [
                {
                    "ranks": ranks,
                    "fixed_us": max(_LEAST, _short(1e6 * fixed)),
                    "byte_ns": max(_LEAST, _short(1e9 * each)),
                }
                for ranks, fixed, each in host.messages
            ],
            "attention_gflops": _figure(host.attention / 1e9, measured),
            "pass_gb_s": _figure(host.passes / 1e9, measured),
            "node_us": _figure(1e6 * host.node, f"{measured}: the rest of forward and backward, per operation"),
            "optimizer_ns": _figure(1e9 * host.optimizer, measured),
        },
    }


def _links(cost: MachineCost, before: HardwareConfig, measured: str) -> tuple[dict[str, float], dict[str, Any]]:
    """Bandwidths and latency in wall time, between as many ranks as there are; links between nodes are not measured."""
    names = ("intra_node_gb_s", "inter_node_gb_s")
    if not cost.exchanges:
        return {name: getattr(before, name) for name in names}, _kept(before, "latency_us")
    ranks = max(each.ranks for each in cost.exchanges)
    rows = [each for each in cost.exchanges if each.ranks == ranks and each.kind == "all_to_all"]
    largest, smallest = max(rows, key=lambda each: each.bytes), min(rows, key=lambda each: each.bytes)
    source = f"{measured}: all_to_all, {ranks} ranks of one machine, {smallest.bytes} bytes"
    rate = _short(largest.bytes / largest.wall_us / 1e3)
    return dict.fromkeys(names, rate), _figure(smallest.wall_us, source)


def _figure(value: float, source: str) -> dict[str, Any]:
    return {"value": _short(value), "source": source}


def _kept(before: HardwareConfig, name: str) -> dict[str, Any]:
    figure = getattr(before.figures, name)
    return {"value": figure.value, "source": figure.source}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


_ROWS: dict[str, type] = {
    "products": RateConfig, "grouped": RateConfig, "contention": ContentionConfig, "messages": MessageConfig,
}  # fmt: skip


def hardware_config(content: Mapping[str, Any]) -> HardwareConfig:
    """The typed config of what `hardware_of` returns.

    Raises:
        TypeError, KeyError: it is something else.
    """
    host: dict[str, Any] = {
        name: [_ROWS[name](**row) for row in value]
        if name in _ROWS
        else FigureConfig(**value)
        if isinstance(value, Mapping)
        else value
        for name, value in content["host"].items()
    }
    figures = {name: FigureConfig(**figure) for name, figure in content["figures"].items()}
    return HardwareConfig(**{**content, "figures": FiguresConfig(**figures), "host": HostConfig(**host)})


def write_hardware(run_dir: Path, content: Mapping[str, Any]) -> Path:
    """Writes `hardware/this_machine.yaml` into a run directory, which then is a folder for `--config-dir`."""
    path = run_dir / "hardware" / f"{NAME}.yaml"
    path.parent.mkdir(exist_ok=True)
    head = f"# python -m moecompile --config-dir {run_dir} hardware={NAME} task=plan ...\n"
    path.write_text(head + yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=120))
    return path
