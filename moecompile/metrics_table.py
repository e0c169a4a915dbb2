"""The rows of a run's `metrics.csv`, which Lightning's logger writes: resuming, reports and the planner read them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

METRICS = "metrics.csv"
"""Name of the file in the run directory."""


def read_rows(path: Path, without: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """The file's rows: column -> number, without empty cells. A row that was cut off (a full disk, a kill) is none.

    Args:
        without: beginnings of columns that are left out: there may be thousands.

    Raises:
        OSError: it cannot be read.
    """
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    head = next(lines, [])
    kept = [(i, name) for i, name in enumerate(head) if not name.startswith(without)] if without else [*enumerate(head)]
    rows = (_row(kept, line) for line in lines if len(line) == len(head))
    return [row for row in rows if row]


def _row(columns: list[tuple[int, str]], line: list[str]) -> dict[str, float]:
    try:
        return {name: float(line[i]) for i, name in columns if line[i]}
    except ValueError:
        return {}
