"""(9) Memory by kind, reductions, command, versions, and what differs from another run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from moecompile.report.page.charts import chart
from moecompile.report.page.document import Chart, Section, details, escape, note, table
from moecompile.report.page.read import Run, flatten, read_config
from moecompile.report.text import bytes_text
from moecompile.rundir import OVERRIDES, RESOLVED
from moecompile.version import versions


def section(run: Run) -> Section:
    """The section; every task has one."""
    parts: list[str | Chart] = []
    if run.plan is not None and run.plan.estimate is not None:
        parts += _memory(run)
    if run.plan is not None and run.plan.reductions:
        rows = [
            [r.parameters, *(" ".join(axes) or "-" for axes in (r.replicated_over, r.sharded_over, r.sum_over))]
            for r in run.plan.reductions
        ]
        head = ("gradients of", "replicated over", "sharded over", "summed over")
        parts += ["<h3>Gradients</h3>", table(head, rows, numbers=False)]
    parts += ["<h3>Command</h3>", f"<pre>{escape(_command(run))}</pre>"]
    found = run.result.get("versions") or versions()
    parts += ["<h3>Versions</h3>", table(("", "version"), found.items(), numbers=False)]
    parts += _difference(run)
    if run.config:
        flat = flatten(run.config)
        parts.append(details("The whole config", table(("key", "value"), flat.items(), numbers=False)))
    return Section(name="setup", title="Memory, command and config", parts=parts)


def _memory(run: Run) -> list[str | Chart]:
    """Bars of the predicted bytes by kind, and of the measured ones beside them."""
    import plotly.graph_objects as go

    assert run.plan is not None and run.plan.estimate is not None
    estimate = run.plan.estimate
    predicted = asdict(estimate.memory_bytes_per_rank)
    measured = {kind: max(values) for kind, values in run.profile.get("memory", {}).items() if values}
    traces = []
    for kind, count in predicted.items():
        bars = [("predicted", count)] + ([("measured", measured[kind])] if kind in measured else [])
        traces.append(go.Bar(
            name=kind, y=[label for label, _ in bars], x=[value / 2**20 for _, value in bars], orientation="h",
            hovertemplate="%{y} " + kind + "<br>%{x:.2f} MiB<extra></extra>",
        ))  # fmt: skip
    layout = {"barmode": "stack", "title": {"text": "Memory of the fullest rank"}, "xaxis": {"title": {"text": "MiB"}}}
    parts: list[str | Chart] = [chart("memory", traces, layout, height=280 if measured else 240)]
    if estimate.assumes is not None:
        limit = bytes_text(estimate.assumes.memory_bytes)
        fits = "fits" if estimate.fits else "does not fit"
        text = f"{bytes_text(estimate.memory_bytes_per_rank.total)} {fits} into {limit} ({estimate.assumes.hardware})."
        parts.append(note(text))
    return parts


def _command(run: Run) -> str:
    path = run.folder / OVERRIDES
    words = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return " ".join(["python -m moecompile", *(word for word in words if word)])


def _difference(run: Run) -> Iterator[str]:
    """What differs from the run of `compare`, else from the latest other run beside this one."""
    other = _other(run)
    theirs = flatten(read_config(other)) if other is not None else {}
    if other is None or not theirs:
        return
    ours = flatten(run.config)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key, "-") != theirs.get(key, "-")]
    yield f"<h3>Config, beside {escape(other)}</h3>"
    if keys:
        rows = [(key, ours.get(key, "-"), theirs.get(key, "-")) for key in keys]
        yield table(("key", "this run", "the other run"), rows, numbers=False)
    else:
        yield note("Every value is the same.")


def _other(run: Run) -> Path | None:
    given = run.config.get("compare")
    if given:
        path = Path(str(given))
        return path if path.is_dir() else path.parent
    folder = run.folder.absolute()
    beside = [path for path in folder.parent.iterdir() if path != folder and (path / RESOLVED).is_file()]
    return max(beside, key=lambda path: (path / RESOLVED).stat().st_mtime, default=None)
