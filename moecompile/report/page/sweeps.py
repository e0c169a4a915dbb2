"""The report of a sweep: its jobs in a table with links to their reports, their losses and figures side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompile.report.page.document import Chart, Section, chart, escape, lines, note, write_document
from moecompile.report.page.read import read_run
from moecompile.rundir import REPORT

FIGURES = {
    "val_loss": ("Validation loss", "nats per token"),
    "tokens_per_second": ("Speed", "tokens/s on all ranks"),
    "max_violation_mean_last": ("MaxVio", "mean of layers, last tenth of steps"),
    "memory_bytes_per_rank": ("Predicted memory", "bytes on the fullest rank"),
    "step_seconds": ("Predicted step", "s"),
    "inter_node_bytes_per_token": ("Bytes across nodes", "per token and layer"),
}
"""Column of sweep.csv -> title and unit."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job: its folder's name, the swept settings, `ok`, `diverged` or `failed`, its figures by column of sweep.csv,
    and its warnings."""

    name: str
    settings: Mapping[str, str]
    status: str
    task: str
    figures: Mapping[str, Any]
    warnings: Sequence[str] = ()

    @property
    def label(self) -> str:
        """Its settings in a line."""
        return ", ".join(f"{key}={value}" for key, value in self.settings.items()) or f"job {self.name}"


def write_sweep_report(folder: Path, jobs: Sequence[SweepJob], seeds: Sequence[str] = ()) -> Path:
    """Writes `report.html` of the sweep in `folder`, and returns its path. seeds: what is said of runs that differ in
    the seed alone."""
    done = [job for job in jobs if job.status == "ok"]
    parts: list[str | Chart] = [_table(folder, jobs)]
    wrong = Counter(job.status for job in jobs if job.status != "ok")
    counts = [f"{count} of {len(jobs)} jobs {status}." for status, count in wrong.items()]
    parts.append(note(" ".join(counts) or f"All {len(jobs)} jobs succeeded."))
    parts += [f'<p class="big">{escape(text)}</p>' for text in seeds]
    parts += [f"<p><b>job {escape(job.name)}</b>: {escape(text)}</p>" for job in jobs for text in job.warnings]
    sections = [Section(name="jobs", title="Jobs", parts=parts)]
    if curves := _losses(folder, done):
        sections.append(Section(name="losses", title="Losses", parts=curves))
    if bars := [_bars(column, done) for column in FIGURES if any(_number(job, column) is not None for job in done)]:
        sections.append(Section(name="figures", title="Side by side", parts=bars))
    path = folder / REPORT
    write_document(path, f"Sweep of {len(jobs)} jobs", str(folder), sections)
    return path


def _table(folder: Path, jobs: Sequence[SweepJob]) -> str:
    keys = list(dict.fromkeys(key for job in jobs for key in job.settings))
    columns = (
        [name for name in jobs[0].figures if any(job.figures.get(name) is not None for job in jobs)] if jobs else []
    )
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("job", *keys, "status", *columns))
    lines_ = []
    for job in jobs:
        link = f'<a href="{escape(job.name)}/{REPORT}">{escape(job.name)}</a>'
        first = link if (folder / job.name / REPORT).exists() else escape(job.name)
        cells = [first, *(escape(job.settings.get(key, "")) for key in keys)]
        cells.append(f'<span class="{"good" if job.status == "ok" else "bad"}">{escape(job.status)}</span>')
        cells += [escape(_text(job.figures.get(name))) for name in columns]
        lines_.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines_)}</tbody></table></div>'


def _losses(folder: Path, jobs: Sequence[SweepJob]) -> list[str | Chart]:
    """Training and validation losses of all jobs."""
    runs = [(job, read_run(folder / job.name, job.task)) for job in jobs if job.task == "train"]
    parts: list[str | Chart] = []
    for column, title in (("loss", "Training loss"), ("val_loss", "Validation loss")):
        curves = [
            (job.label, steps, values) for job, run in runs for name, steps, values in run.columns("") if name == column
        ]
        if curves:
            parts.append(lines(column, curves, "optimizer step", "nats per token", title={"text": title}))
    return parts


def _bars(column: str, jobs: Sequence[SweepJob]) -> Chart:
    import plotly.graph_objects as go

    title, unit = FIGURES[column]
    bar = go.Bar(y=[job.label for job in jobs], x=[_number(job, column) for job in jobs], orientation="h")
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": unit}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return chart(f"bars-{column}", [bar], layout, height=160 + 26 * len(jobs))


def _number(job: SweepJob, column: str) -> float | None:
    value = job.figures.get(column)
    return float(value) if isinstance(value, int | float) else None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return "" if value is None else str(value)
