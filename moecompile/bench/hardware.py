"""The `hardware` file of this machine: what task=bench measured, as a group that any task can select.

1. The price of a node is what the model's forward and backward on one rank took beyond its products and passes, over
   the number of nodes.                                                                             -> `_node`
2. The price of a message comes from exchanges alone. What FSDP and the process group do around one is more, so it is
   multiplied by what the measured step took beyond its computation, over what these messages would. -> `calibrated`
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moecompile.bench.machine import MachineCost, line_of
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.host import WAITING, host_seconds
from moecompile.planner.cost_model.inputs import Host, Inputs
from moecompile.schema import HardwareConfig
from moecompile.version import __version__

NAME = "this_machine"
_GIB = 2**30
_LEAST_NODE = 1e-7  # seconds
_LEAST = 1e-3
_FACTORS = (0.1, 10.0)  # of messages: outside, something else was measured
_ONCE = ("gradients", "optimizer")  # a step, not in forward and backward
_MESSAGES = ("exchange", "tensor", "context", "weights")


def calibrated(cost: MachineCost, one: Inputs, inputs: Inputs, step_seconds: float) -> tuple[Host, float | None]:
    """The host that the measured step calibrates, and the factor of its messages; None: the step has none.

    Args:
        one: a micro-batch on one rank, of which `cost.model_seconds` was measured. inputs: the step of all ranks.
        step_seconds: its measured CPU time, of a rank.
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
    host = dataclasses.replace(host, node=_node(cost, one, host))
    parts = cpu_parts(inputs, host)
    messages = sum(parts[name] for name in _MESSAGES)
    if not messages:
        return host, None
    least, most = _FACTORS
    factor = min(most, max(least, (step_seconds - sum(parts.values()) + messages) / messages))
    rows = tuple((ranks, factor * fixed, factor * each) for ranks, fixed, each in host.messages)
    return dataclasses.replace(host, messages=rows), factor


def cpu_parts(inputs: Inputs, host: Host) -> dict[str, float]:
    """The addends of the CPU time of a rank and step."""
    inputs = dataclasses.replace(inputs, machine=dataclasses.replace(inputs.machine, host=host))
    counts = count(inputs.model, inputs.layout, inputs.machine, inputs.software)
    parts = host_seconds(inputs.model, inputs.layout, counts, inputs.machine, inputs.software)
    return {name: seconds for name, seconds in parts.items() if name != WAITING}


def _node(cost: MachineCost, one: Inputs, host: Host) -> float:
    """Step 1."""
    rest = sum(seconds for name, seconds in cpu_parts(one, host).items() if name not in _ONCE)
    nodes = cpu_parts(one, dataclasses.replace(host, node=1.0))["host"]
    return max(_LEAST_NODE, (cost.model_seconds - rest) / nodes)


def hardware_of(cost: MachineCost, host: Host, before: HardwareConfig, local_ranks: int) -> dict[str, Any]:
    """The content of the file: numbers, and where each comes from.

    Args:
        before: the hardware of the run, for what was not measured. local_ranks: ranks of this machine.
    """
    measured = f"measured by task=bench, moecompile {__version__}, {cost.threads} thread(s) a rank"
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


def write_hardware(run_dir: Path, content: Mapping[str, Any]) -> Path:
    """Writes `hardware/this_machine.yaml` into a run directory, which then is a folder for `--config-dir`."""
    path = run_dir / "hardware" / f"{NAME}.yaml"
    path.parent.mkdir(exist_ok=True)
    head = f"# python -m moecompile --config-dir {run_dir} hardware={NAME} task=plan ...\n"
    path.write_text(head + yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=120))
    return path
