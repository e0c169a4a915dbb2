"""Writes `report.html` of a run.

Algorithm:
  1. Read the files of the run directory (read.py).
  2. Ask every view for its section; one without data has none.
  3. Write the file (document.py). While the run is not over, the page loads itself again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from moecompile.report.page import curves, layout, load, samples, setup, steps, tokens, traffic, verdict
from moecompile.report.page.document import Section, write_document
from moecompile.report.page.read import Run, read_run
from moecompile.rundir import REPORT

VIEWS: tuple[Callable[[Run], Section | None], ...] = (
    verdict.section,
    steps.section,
    steps.price,
    load.section,
    traffic.section,
    layout.section,
    tokens.section,
    curves.section,
    samples.section,
    setup.section,
)


def write_report(folder: Path, task: str) -> Path:
    """Writes the report of the run in `folder`, from the files that are there, and returns its path.

    Args:
        task: name of the task.
    """
    run = read_run(folder, task)  # Step 1
    found = [section for view in VIEWS if (section := view(run)) is not None]  # Step 2
    path = folder / REPORT
    write_document(path, f"{run.name}: {task}", str(folder), found, reload=not run.is_over)  # Step 3
    return path


def try_report(folder: Path, task: str) -> None:
    """Writes the report; an error is printed, and changes neither the results nor the exit code."""
    try:
        write_report(folder, task)
    except Exception as error:
        print(f"{REPORT} could not be written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
