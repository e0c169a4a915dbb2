"""Prints the tables of task=bench. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.report.tables import path_text, path_width, plain_grid, plain_table
from moecompile.report.text import bytes_text, fold_paths, plural


def print_bench(result: Mapping[str, Any], console: Console) -> None:
    """Prints the layers compared with a dense FFN, then the optimizer step.

    Args:
        result: the content of bench.json.
    """
    unit = "GPU ms" if result["device"] == "cuda" else f"CPU ms, {plural(result['threads'], 'thread')}"
    console.print()
    console.print(
        Text(f"one layer on one rank, forward + backward of {result['layers'][0]['tokens']:,} tokens, {unit}:")
    )
    console.print(_layers_table(result["layers"], path_width(console)))
    if not all(row["has_router"] for row in result["layers"]):
        console.print(Text("the model's existing experts are timed without its own router", style="dim"))
    console.print(Text("kept: memory that forward saves for backward, without weights", style="dim"))
    console.print()
    console.print(_step_grid(result["step"]))
    if machine := result.get("machine"):
        console.print()
        console.print(
            _machine_grid(machine) if "hardware" in machine else Text(f"no hardware file: {machine['reason']}")
        )


def _layers_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table("layer", "experts", "dense", "MoE", "ratio", "kept", "MoE", "ratio")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        sites = row["sites"]
        path = fold_paths((site or "the model", None) for site in sites)[0][0]
        shared = f"\n+ shared {row['d_shared']}" if row["d_shared"] else ""
        experts = f"{row['num_experts']} x {row['d_expert']}\ntop-{row['top_k']}{shared}"
        numbers = (
            *(f"{_decisive(row[name]):.2f}" for name in ("dense", "moe")), f"{row['ratio']:.2f}",
            *(bytes_text(row[name]) for name in ("dense_kept", "moe_kept")), f"{row['kept_ratio']:.2f}",
        )  # fmt: skip
        cells = (Text(number, no_wrap=True) for number in numbers)
        table.add_row(path_text(path, len(sites), width), Text(experts), *cells)
    return table


def _decisive(times: Mapping[str, float | None]) -> float:
    """GPU time, or CPU time on a CPU."""
    decisive = times["cpu_ms"] if times["device_ms"] is None else times["device_ms"]
    assert decisive is not None
    return decisive


def _step_grid(step: Mapping[str, Any]) -> Table:
    grid = plain_grid()
    ranks = plural(step["world_size"], "rank")
    spent = [(name, step[name]) for name in ("exchanges", "experts", "rows")]
    rest = max(0.0, 1 - sum(share for _, share in spent))
    lines = (
        ("step", f"{step['wall_ms']:,.1f} ms for {step['tokens']:,} tokens on {ranks}"),
        ("", f"{step['cpu_ms']:,.1f} ms of CPU time per rank"),
        ("speed", f"{step['tokens_per_second']:,.0f} tokens/s"),
        ("memory", _memory_text(step)),
        ("of it", ", ".join(f"{name} {share:.0%}" for name, share in [*spent, ("the rest", rest)])),
    )
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _machine_grid(machine: Mapping[str, Any]) -> Table:
    """What of a step's time is the machine's, in CPU time of a rank."""
    host = machine["hardware"]["host"]
    fastest = {name: max(row["gflops"] for row in host[name]) for name in ("products", "grouped")}
    overheads = f"{host['node_us']['value']:.3g} us per operation, {host['optimizer_ns']['value']:.3g} ns per parameter"
    grid = plain_grid()
    lines = [
        (
            "machine",
            f"{plural(host['cores'], 'core')}, {fastest['products']:.0f} GFLOP/s, experts {fastest['grouped']:.0f}",
        ),
        (
            "",
            f"attention {host['attention_gflops']['value']:.0f} GFLOP/s, memory {host['pass_gb_s']['value']:.0f} GB/s",
        ),
        ("overhead", overheads),
    ]
    for row in host["messages"]:
        price = f"{row['fixed_us'] / 1e3:.2g} ms and {row['byte_ns']:.2g} ns per byte"
        lines.append(("exchange", f"{price} on {plural(int(row['ranks']), 'rank')}"))
    if machine["message_factor"] is None:
        lines.append(("predicted", f"{machine['predicted_cpu_ms']:,.1f} ms of CPU time for this step"))
    else:
        lines.append(("", f"{machine['message_factor']:.2g} times one alone, so that this step is met"))
    lines.append(("select it", f"hardware={machine['hardware']['name']} --config-dir FOLDER (this run's)"))
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _memory_text(step: Mapping[str, Any]) -> str:
    planned = step["planned_bytes"]
    text = f"{bytes_text(step['peak_bytes'])} of tensors on the fullest rank"
    return text if planned is None else f"{text}, planned {bytes_text(planned)}"
