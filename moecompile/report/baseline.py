"""Prints the table that compares a run with its baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.report.text import count_text


def print_baseline(result: Mapping[str, Any], console: Console) -> None:
    """Prints MoE and dense model side by side.

    Args:
        result: result.json of a run with a baseline.
    """
    dense = result["baseline"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in ("", "MoE", "dense"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, key, text_of in _LINES:
        if result.get(key) is not None and dense.get(key) is not None:
            table.add_row(Text(name.format(**result)), text_of(result[key]), text_of(dense[key]))
    console.print()
    console.print(table)


def _nats(loss: float) -> str:
    return f"{loss:.4f}"


_LINES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "params_total", count_text),
    ("a token uses", "params_active", count_text),
    ("validation, nats per token, step 0", "val_loss_first", _nats),
    ("validation, nats per token, step {steps}", "val_loss", _nats),
    ("training loss, last row", "loss_last", _nats),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
)
