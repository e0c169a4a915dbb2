"""Prints the forecast of a step. Needs no torch."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.planner.cost_model.forecast import COMMUNICATION, Forecast
from moecompile.planner.cost_model.host import WAITING
from moecompile.report.tables import plain_grid, plain_table
from moecompile.report.text import seconds_text

_LEAST = 0.002  # parts below this share of a step are joined


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Prints the time of a step, its parts, the price of imbalance, and the changes that would help most."""
    console.print()
    console.print(_head(forecast))
    console.print()
    console.print(_parts(forecast))
    if forecast.prices:
        console.print()
        console.print(_prices(forecast))
    if forecast.changes:
        console.print()
        console.print(_changes(forecast))


def _head(forecast: Forecast) -> Table:
    grid = plain_grid()
    count = forecast.micro_batches
    step = f"{seconds_text(forecast.seconds)}, {count} micro-batch{'es' * (count != 1)}"
    if WAITING in forecast.parts:
        step += f", {seconds_text(forecast.seconds - forecast.parts[WAITING])} of CPU time"
    speed = f"{forecast.tokens_per_second_per_rank:,.0f} tokens/s, {forecast.tflops_per_rank:,.3g} model TFLOP/s"
    grid.add_row(Text("predicted step", style="bold"), Text(step))
    grid.add_row(Text("per rank", style="bold"), Text(f"{speed}, {100 * forecast.mfu:.1f}% of the peak (MFU)"))
    return grid


def _parts(forecast: Forecast) -> Table:
    """The addends; a part's share is also the step's elasticity to it."""
    table = plain_table("part of the step", "time", "share = elasticity")
    rest = 0.0
    for name, seconds in sorted(forecast.parts.items(), key=lambda item: -item[1]):
        if seconds < _LEAST * forecast.seconds:
            rest += seconds
            continue
        shown = f"{name} (communication)" if name in COMMUNICATION else name
        table.add_row(Text(shown), Text(seconds_text(seconds)), Text(f"{100 * seconds / forecast.seconds:.1f}%"))
    if rest:
        table.add_row(Text("all others"), Text(seconds_text(rest)), Text(f"{100 * rest / forecast.seconds:.1f}%"))
    return table


def _prices(forecast: Forecast) -> Table:
    table = plain_table("load of the fullest rank", "median", "step", "99th percentile", "step")
    for price in forecast.prices:
        cells = (
            f"{price.p50_load:.2f} x mean", seconds_text(price.p50_seconds), f"{price.p99_load:.2f} x mean",
            seconds_text(price.p99_seconds),
        )  # fmt: skip
        table.add_row(Text(price.name), *map(Text, cells))
    return table


def _changes(forecast: Forecast) -> Table:
    table = plain_table("step", "saves", "with this change (memory not checked, stack.* not run)")
    for change in forecast.changes:
        saved = 100 * (1 - change.seconds / forecast.seconds)
        table.add_row(Text(seconds_text(change.seconds)), Text(f"{saved:.1f}%"), Text(change.change))
    return table
