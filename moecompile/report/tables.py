"""The style of console output: tables and grids without frames, module paths that fit a column. Needs no torch.

Cells have explicit line breaks, so that tables fit 80 columns also if the output is not a terminal.
"""

from __future__ import annotations

import re

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def plain_table(*columns: str) -> Table:
    """A table without a frame; its first column is not wrapped."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=i == 0)
    return table


def plain_grid() -> Table:
    """A grid for lines of names and values."""
    return Table.grid(padding=(0, 2, 0, 0))


def path_width(console: Console) -> int:
    """Characters per line of a module path in a table."""
    return console.width // 3 - 1


def path_text(path: str, count: int, width: int) -> Text:
    """A module path, wrapped at dots if it is long, and its number of sites."""
    lines = [""]
    for part in re.split(r"(?<=[^.]\.)(?=[^.])", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    text = Text("\n".join(lines))
    return text.append(f"\n{count} sites", style="dim") if count > 1 else text
