"""Prints what a rehearsed rank holds and sends, beside the plan. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from moecompile.plan import Plan
from moecompile.report.console import plain_table
from moecompile.report.text import bytes_text

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was seen beside what is planned (None: nothing is), bytes. axis, ranks, calls: of collectives."""

    name: str
    seen: float
    planned: float | None = None
    differs: bool = False
    axis: str = ""
    ranks: int = 0
    calls: int = 0
    planned_calls: int | None = None

    @property
    def text(self) -> str:
        """`rows over ep: 3 times 1.2 MiB, planned 3 times 1.3 MiB`."""
        where = f" over {self.axis}" if self.axis else ""
        times = "" if not self.axis else f"{self.calls} calls, "
        of_plan = "nothing" if self.planned is None else bytes_text(self.planned)
        of_calls = "" if self.planned_calls is None else f"{self.planned_calls} calls, "
        return f"{self.name}{where}: {times}{bytes_text(self.seen)}, planned {of_calls}{of_plan}"


def print_rehearsal(result: Mapping[str, Any], plan: Plan, console: Console) -> None:
    """Prints the moments, the memory and the collectives of `result`, the content of result.json."""
    load = "" if result["load"] == "balanced" else f", {result['rows_over_mean']:.2f} times the mean rows"
    console.print()
    console.print(
        Text(f"rank {result['ranks'][0]} of {plan.mesh.world_size:,}, plan {plan.hash}, load {result['load']}{load}")
    )
    moments = plain_table("moment", "memory at most", "at its end")
    for each in result["moments"]:
        moments.add_row(each["name"], bytes_text(each["peak"]), bytes_text(each["end"]))
    memory = plain_table("memory", "program", "plan", "")
    for row in result["memory"]:
        memory.add_row(row["name"], bytes_text(row["seen"]), bytes_text(row["planned"]), _mark(row))
    sent = plain_table("collectives", "axis", "ranks", "calls", "plan", "bytes given", "plan", "")
    for row in result["collectives"]:
        calls, of_plan = row["planned_calls"], row["planned"]
        sent.add_row(
            row["name"], row["axis"], f"{row['ranks']:,}", f"{row['calls']:,}", "" if calls is None else f"{calls:,}",
            bytes_text(row["seen"]), "" if of_plan is None else bytes_text(of_plan), _mark(row),
        )  # fmt: skip
    for table in (moments, memory, sent):
        console.print()
        console.print(table)
    console.print()
    for note in result["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _mark(row: Mapping[str, Any]) -> str:
    if row["differs"]:
        return "differs"
    if not row["planned"] or row["planned"] == row["seen"]:
        return ""
    return f"{100 * (row['seen'] / row['planned'] - 1):+.1f}%"


def conclusion(differs: Sequence[str]) -> str:
    """The last line."""
    if not differs:
        return "rehearsed: the program sends and holds what the plan says, and its ranks agree"
    more = f"; and {len(differs) - _SHOWN} more" if len(differs) > _SHOWN else ""
    return f"rehearsed: the program differs from the plan: {'; '.join(differs[:_SHOWN])}{more}"
