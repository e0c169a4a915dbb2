"""Prints how much lighter the fullest rank gets by a placement. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from moecompile.planner.placement import PlacedLayer
from moecompile.report.tables import path_text, path_width, plain_table


def print_placement(layers: Sequence[PlacedLayer], console: Console) -> None:
    """One row per layer."""
    table = plain_table("site", "fullest rank / mean, by id", "placed")
    for layer in layers:
        values = (Text(f"{value:.3f}") for value in (layer.before, layer.after))
        table.add_row(path_text(layer.site, 1, path_width(console)), *values)
    console.print()
    console.print(table)


def placement_fields(layers: Sequence[PlacedLayer]) -> dict[str, Any]:
    """The field of result.json: rows of the fullest rank over the mean, before and after."""
    return {"placement": [{"site": each.site, "before": each.before, "after": each.after} for each in layers]}
