"""Prints what a rehearsed rank holds and sends, beside the plan. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.plan import Plan
from moecompile.planner.step import BACK, FORTH
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
    place = ", the fullest of its pipeline" if result["pipeline"] else ""
    rank = f"rank {result['rank']} of {plan.mesh.world_size:,}{place}"
    console.print()
    console.print(Text(f"{rank}, plan {plan.hash}, load {result['load']}{load}"), soft_wrap=True)
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
    for table in (moments, memory, sent, *_of_stages(result["pipeline"], plan)):
        console.print()
        console.print(table)
    console.print()
    for note in result["notes"]:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _of_stages(ranks: Sequence[Mapping[str, Any]], plan: Plan) -> Iterator[Table]:
    """The peak of each rank of a pipeline, and what it sends to others of it."""
    if not ranks or plan.pipeline is None:
        return
    table = plain_table("rank", "stage", "layers", "peak", "plan", "", "to other stages", "plan", "")
    for each in ranks:
        peak = each["memory"][-1]
        rows = [row for row in each["collectives"] if row["name"] in (FORTH, BACK)]
        seen, of_plan = (sum(row[key] for row in rows) for key in ("seen", "planned"))
        table.add_row(
            f"{each['rank']:,}", ", ".join(map(str, each["stages"])),
            str(sum(len(plan.pipeline.stages[stage].layers) for stage in each["stages"])), bytes_text(peak["seen"]),
            bytes_text(peak["planned"]), _mark(peak), bytes_text(seen), bytes_text(of_plan),
            "differs" if any(row["differs"] for row in rows) else "",
        )  # fmt: skip
    yield table


def _mark(row: Mapping[str, Any]) -> str:
    if row["differs"]:
        return "differs"
    if not row["planned"] or row["planned"] == row["seen"]:
        return ""
    return f"{100 * (row['seen'] / row['planned'] - 1):+.1f}%"


def conclusion(differs: Sequence[str], messages: int = 0) -> str:
    """The last line. messages: that the ranks of a pipeline send each other."""
    if not differs and messages:
        return (
            "rehearsed: the program sends and holds what the plan says, its ranks agree, and each of the "
            f"{messages:,} messages of a pipeline has its receive"
        )
    if not differs:
        return "rehearsed: the program sends and holds what the plan says, and its ranks agree"
    more = f"; and {len(differs) - _SHOWN} more" if len(differs) > _SHOWN else ""
    return f"rehearsed: the program differs from the plan: {'; '.join(differs[:_SHOWN])}{more}"
