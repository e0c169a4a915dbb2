"""What differs between two plans, and what that costs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.plan import Plan
from moecompile.planner.cost_model.forecast import Forecast
from moecompile.report.tables import plain_table
from moecompile.report.text import bytes_text, seconds_text

Rows = dict[str, tuple[Any, Any]]
_LEFT_OUT = ("layers", "estimate", "reductions", "tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A plan, its forecast and the config values that it was made with, flat."""

    plan: Plan
    forecast: Forecast
    config: Mapping[str, Any]


def differences(this: Compared, other: Compared) -> Rows:
    """Dotted name -> (this, other): decisions of the plans, and config values that a forecast reads.

    Layers are compared by their site; layers that differ in the same way are one entry, with their number.
    """
    rows = _differing(_flat(_without_layers(this.plan)), _flat(_without_layers(other.plan)))
    by_site = [{layer.site.fqn: dict(_flat(asdict(layer))) for layer in each.plan.layers} for each in (this, other)]
    counted: dict[tuple[str, str, str], int] = {}
    for fqn in dict.fromkeys([*by_site[0], *by_site[1]]):
        mine, theirs = (sites.get(fqn) for sites in by_site)
        if mine is None or theirs is None:
            rows[fqn] = ("planned" if mine else "not planned", "planned" if theirs else "not planned")
            continue
        for name, (a, b) in _differing(mine.items(), theirs.items()).items():
            counted[name, str(a), str(b)] = counted.get((name, str(a), str(b)), 0) + 1
    for (name, a, b), count in counted.items():
        key = f"{name} ({count} layers)" if count > 1 else name
        rows[key if key not in rows else f"{key}, {a} -> {b}"] = (a, b)
    return rows | {
        f"config {name}": pair for name, pair in _differing(this.config.items(), other.config.items()).items()
    }


def costs(this: Compared, other: Compared) -> Rows:
    """Name -> (this, other): predicted seconds of the step and of its parts, bytes on links, memory by kind."""
    rows: Rows = {"step, seconds": (this.forecast.seconds, other.forecast.seconds)}
    rows["tokens/s per rank"] = tuple(each.forecast.tokens_per_second_per_rank for each in (this, other))  # type: ignore[assignment]
    for name in dict.fromkeys([*this.forecast.parts, *other.forecast.parts]):
        rows[f"{name}, seconds"] = (this.forecast.parts.get(name, 0.0), other.forecast.parts.get(name, 0.0))
    if this.plan.estimate is not None and other.plan.estimate is not None:
        pair = [each.estimate for each in (this.plan, other.plan) if each.estimate is not None]
        memory = [{**asdict(each.memory_bytes_per_rank), "total": each.memory_bytes_per_rank.total} for each in pair]
        traffic = [asdict(each.bytes_per_token_per_layer) for each in pair]
        rows |= {f"memory {name}, bytes": (memory[0][name], memory[1][name]) for name in memory[0]}
        rows |= {f"{name} per token and layer, bytes": (traffic[0][name], traffic[1][name]) for name in traffic[0]}
    return rows


def print_comparison(this: Compared, other: Compared, console: Console) -> None:
    """Prints both tables; of the costs, those that differ."""
    console.print()
    found = differences(this, other)
    if not found:
        console.print(Text("compared: the same plan, with the same config"))
        return
    table = plain_table("differs", "this", "other")
    for name, (a, b) in found.items():
        table.add_row(Text(name), Text(str(a)), Text(str(b)))
    console.print(table)
    changed = {name: pair for name, pair in costs(this, other).items() if pair[0] != pair[1]}
    if changed:
        console.print()
        console.print(_costs(changed))


def _costs(rows: Rows) -> Table:
    table = plain_table("predicted", "this", "other", "this costs")
    for name, (a, b) in rows.items():
        what, _, unit = name.partition(", ")
        write = {"seconds": seconds_text, "bytes": bytes_text}.get(unit, "{:,.0f}".format)
        change = f"{100 * (a / b - 1):+.1f}%" if b else ""
        table.add_row(Text(what), Text(write(a)), Text(write(b)), Text(change))
    return table


def _without_layers(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in asdict(plan).items() if name not in _LEFT_OUT}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _differing(this: Any, other: Any) -> Rows:
    mine, theirs = dict(this), dict(other)
    names = dict.fromkeys([*mine, *theirs])
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}
