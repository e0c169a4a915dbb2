"""`report.html`: one self-contained page per run, and one per sweep. Needs neither torch nor a network.

    read.py       the files of a run directory -> `Run`
    views         outcome, steps, experts, layout; sweeps for a sweep
    document.py   sections and charts -> the file, with plotly's own JavaScript in it
    page.js       inflates the library, draws a chart when it comes into view, follows light, dark and print

Algorithm, for a run:
  1. Read the files of the run directory.
  2. Ask every view for its section. One without data for it returns None, and is left out.
  3. Write the file. While the run is not over, the page loads itself again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from moecompile.report.page.document import Section, write_document
from moecompile.report.page.experts import load_section, tokens_section
from moecompile.report.page.layout import layout_section, traffic_section
from moecompile.report.page.outcome import curves_section, samples_section, setup_section, verdict_section
from moecompile.report.page.read import Run, read_run
from moecompile.report.page.steps import price_section, steps_section
from moecompile.rundir import REPORT

__all__ = ["try_report", "write_report"]

_VIEWS: tuple[Callable[[Run], Section | None], ...] = (
    verdict_section,
    steps_section,
    price_section,
    load_section,
    traffic_section,
    layout_section,
    tokens_section,
    curves_section,
    samples_section,
    setup_section,
)


def write_report(folder: Path, task: str) -> Path:
    """Writes the report of the run in `folder`, from the files that are there, and returns its path.

    Args:
        task: name of the task.
    """
    run = read_run(folder, task)  # Step 1
    found = [section for view in _VIEWS if (section := view(run)) is not None]  # Step 2
    path = folder / REPORT
    write_document(path, f"{run.name}: {task}", str(folder), found, reload=not run.is_over)  # Step 3
    return path


def try_report(folder: Path, task: str) -> None:
    """Writes the report; an error is printed, and changes neither the results nor the exit code."""
    try:
        write_report(folder, task)
    except Exception as error:
        print(f"{REPORT} could not be written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
