"""(8) Text that the model wrote, the last sample first."""

from __future__ import annotations

import json

from moecompile.report.page.document import Section, note, table
from moecompile.report.page.read import Run
from moecompile.rundir import SAMPLES

_MOST = 20  # rows of the table


def section(run: Run) -> Section | None:
    """The section; None: nothing was written."""
    path = run.folder / SAMPLES
    if run.task != "train" or not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return None
    rows.sort(key=lambda row: -row["step"])
    shown = table(
        ("step", "given", "written"), [(r["step"], r["prompt"], r["text"]) for r in rows[:_MOST]], numbers=False
    )
    text = "From beginnings of validation texts, one token after another at temperature 0.8. "
    text += f"All samples are in {SAMPLES}; trainer.sample_interval says when they are taken."
    return Section(name="samples", title="Samples of text", parts=[shown, note(text)])
