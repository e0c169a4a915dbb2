"""Prints what a search found. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.planner.search.found import Candidate
from moecompile.planner.search.run import Found
from moecompile.report.tables import plain_grid, plain_table
from moecompile.report.text import bytes_text, seconds_text
from moecompile.schema import Config


def print_search(found: Found, config: Config, console: Console) -> None:
    """Prints both fronts, the best layout as overrides, what was kept and why candidates were rejected."""
    console.print(_head(found, config))
    for title, front in (("runs", found.runs), ("described, not run", found.described)):
        if front:
            console.print()
            console.print(_front(title, front, config.search.show))
    console.print()
    if found.runs:
        console.print(Text("best layout that runs; add this to your command:", style="bold"))
        console.print(Text(found.runs[0].overrides), soft_wrap=True)
    elif found.least is not None:
        needed, settings = found.least
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        console.print(Text(f"no layout that runs fits into memory; the least is {bytes_text(needed)}, with {shown}"))
    if found.described:
        best, is_faster = found.described[0], not found.runs or found.described[0].seconds < found.runs[0].seconds
        console.print()
        speed = "faster" if is_faster else "slower"
        console.print(Text(f"best described layout, {speed}; task=plan shows it, it is not run as described:"))
        console.print(Text(best.overrides), soft_wrap=True)
    if found.rejected:
        console.print()
        console.print(_rejected(found))


def _head(found: Found, config: Config) -> Table:
    grid, data = plain_grid(), config.data
    considered = f"{found.considered:,} candidates in {found.cpu_seconds:.1f} s, {found.fitting:,} fit"
    grid.add_row(Text("search", style="bold"), Text(considered))
    grid.add_row(Text("kept", style="bold"), Text(f"{data.global_batch_size:,} sequences of {data.seq_len:,} tokens"))
    for axis, reason in found.kept.items():
        grid.add_row(Text(""), Text(f"{axis}: {reason}"))
    return grid


def _front(title: str, front: Sequence[Candidate], rows: int) -> Table:
    table = plain_table("step", "tokens/s", "memory", f"{title}: fastest for its memory")
    for candidate in front[:rows]:
        table.add_row(
            Text(seconds_text(candidate.seconds)), Text(f"{candidate.tokens_per_second_per_rank:,.0f}"),
            Text(bytes_text(candidate.memory_bytes)), Text(_short(candidate.settings)),
        )  # fmt: skip
    if len(front) > rows:
        table.add_row(Text("..."), Text(""), Text(""), Text(f"{len(front) - rows} more in result.json"))
    return table


def _short(settings: Mapping[str, object]) -> str:
    """Settings by the last part of their keys; sizes of 1 are left out."""
    return " ".join(
        f"{key.rpartition('.')[2]}={value}"
        for key, value in settings.items()
        if value not in (1, "auto", None) or key in ("mesh.ep", "data.micro_batch_size", "workload.zero")
    )


def _rejected(found: Found) -> Table:
    table = plain_table("rejected", "because", "the first one")
    for reason in found.rejected:
        table.add_row(Text(f"{reason.count:,}"), Text(reason.rule), Text(reason.example))
    return table
