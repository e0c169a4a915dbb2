"""A table and a plot over the jobs of a multirun. Needs neither torch nor hydra.

Algorithm:
  1. Read `overrides.txt`, `resolved.yaml` and `result.json` of every job, from a folder with the job's number as name,
     and in `failures.txt` which of them have failed.
  2. Find the overrides whose values differ between jobs: those were swept. With a group (`mesh=cpu_1,cpu_2x2`), many
     config keys differ; they are columns of `sweep.csv`.
  3. Write `sweep.csv`, print the table, draw `sweep.png`, write `report.html`.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.atomic import replacing
from moecompile.libyaml import load_yaml
from moecompile.report.baseline import over_seeds
from moecompile.report.console import print_warnings
from moecompile.report.text import bytes_text, seconds_text
from moecompile.rundir import FAILURES

# column of sweep.csv -> (short heading, empty for columns only in the file; path in result.json; format)
_RESULTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "loss_first": ("", ("loss_first",), ".4f"),
    "loss_last": ("loss", ("loss_last",), ".3f"),
    "val_loss_first": ("val 0", ("val_loss_first",), ".3f"),
    "val_loss": ("val", ("val_loss",), ".3f"),
    "max_violation_last": ("", ("max_violation_last",), ".3f"),
    "max_violation_mean_last": ("MaxVio", ("max_violation_mean_last",), ".2f"),
    "max_violation_bound_mean_last": ("of", ("max_violation_bound_mean_last",), ".2f"),
    "tokens_per_second": ("tok/s", ("tokens_per_second",), ",.0f"),
    "memory_bytes_per_rank": ("memory", ("memory_bytes_per_rank", "total"), "bytes"),
    "fits": ("fits", ("fits",), "yes"),
    "step_seconds": ("step", ("step_seconds",), "seconds"),
    "tokens_per_second_per_rank": ("", ("tokens_per_second_per_rank",), ",.0f"),
    "intra_node_bytes_per_token": ("intra-node", ("bytes_per_token_per_layer", "intra_node"), "bytes"),
    "inter_node_bytes_per_token": ("inter-node", ("bytes_per_token_per_layer", "inter_node"), "bytes"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: number, overrides, flattened config and result; the latter are empty if it failed before."""

    number: int
    overrides: dict[str, str]
    config: dict[str, str]
    result: dict[str, Any]

    @property
    def status(self) -> str:
        """`ok`, `diverged` or `failed`; a job without a result failed before it could write one."""
        return str(self.result.get("status", "failed"))

    @property
    def warnings(self) -> list[str]:
        """What its run warns of."""
        return list(self.result.get("warnings", ()))

    def measured(self, column: str) -> Any:
        """A value of `_RESULTS`; None if the job did not measure it."""
        value: Any = self.result
        for key in _RESULTS[column][1]:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def summarize(sweep_dir: Path) -> None:
    """Prints one row per job of `sweep_dir`; writes `sweep.csv`.

    If two jobs or more succeeded, it also writes `sweep.png` and `report.html`.
    """
    folders = sorted((p for p in sweep_dir.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    failed = _failed(sweep_dir / FAILURES)
    jobs = [_read(folder, has_failed=int(folder.name) in failed) for folder in folders]  # Step 1
    swept = _differing([job.overrides for job in jobs])  # Step 2
    _write_csv(sweep_dir / "sweep.csv", jobs, _differing([job.config for job in jobs]))  # Step 3
    console = Console()
    console.print(_table(jobs, swept))
    if seeds := list(_over_seeds(jobs, swept)):
        console.print()
        for text in seeds:
            console.print(Text(text))
    for job in jobs:
        print_warnings([f"job {job.number}: {text}" for text in job.warnings], console)
    console.print(Text(str(sweep_dir / "sweep.csv")), soft_wrap=True)
    _draw(sweep_dir / "sweep.png", jobs, swept, console)
    _report(sweep_dir, jobs, swept, seeds, console)


def _over_seeds(jobs: Sequence[Job], swept: Sequence[str]) -> Iterator[str]:
    """A line for each setting that ran with several seeds, with the means and their intervals of 95 %."""
    if "seed" not in swept:
        return
    names = _short_names(swept)
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        others = [f"{names[key]}={job.overrides[key]}" for key in swept if key != "seed" and key in job.overrides]
        groups.setdefault(", ".join(others), []).append(job)
    for setting, group in groups.items():
        done = [job for job in group if job.status == "ok"]
        if (text := over_seeds([job.result for job in done])) is not None:
            rest = Counter(job.status for job in group if job.status != "ok")
            missing = "".join(f", {count} {status}" for status, count in sorted(rest.items()))
            yield f"{setting + ': ' if setting else ''}{len(done)} seeds{missing}, mean +- 95% interval: {text}"


def _failed(path: Path) -> set[int]:
    """Numbers of the jobs that an error has ended this time; what an earlier attempt has left of them is no result."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {int(number) for number, _, message in (line.split("\t", 2) for line in lines) if message}


def _read(folder: Path, *, has_failed: bool) -> Job:
    overrides, config, result = (folder / name for name in ("overrides.txt", "resolved.yaml", "result.json"))
    loaded = load_yaml(config.read_text(encoding="utf-8")) if config.exists() else None
    lines = overrides.read_text(encoding="utf-8").splitlines() if overrides.exists() else []
    return Job(
        number=int(folder.name),
        overrides={key.lstrip("+"): value for key, _, value in (line.partition("=") for line in lines)},
        config=dict(_flatten(loaded or {})),
        result=json.loads(result.read_text(encoding="utf-8")) if result.exists() and not has_failed else {},
    )


def _flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; lists are leaves."""
    if isinstance(value, Mapping):
        return [item for key, child in value.items() for item in _flatten(child, f"{path}.{key}" if path else str(key))]
    return [(path, "null" if value is None else str(value))]


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys whose values differ between non-empty settings, in their order. An absent key counts as a value."""
    nonempty = [setting for setting in settings if setting]
    keys = dict.fromkeys(key for setting in nonempty for key in setting)
    return [key for key in keys if len({setting.get(key) for setting in nonempty}) > 1]


def _write_csv(path: Path, jobs: Sequence[Job], keys: Sequence[str]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, "status", *_RESULTS, "warnings"])
        for job in jobs:
            settings, values = (job.config.get(key, "") for key in keys), (job.measured(column) for column in _RESULTS)
            writer.writerow([job.number, *settings, job.status, *values, "; ".join(job.warnings)])


def _table(jobs: Sequence[Job], swept: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("job", no_wrap=True)
    table.add_column("overrides", overflow="fold")
    table.add_column("status", no_wrap=True)
    measured = [name for name in _RESULTS if any(job.measured(name) is not None for job in jobs)]
    hidden = set(_hidden(jobs)) if "loss_last" in measured else set()
    shown = {name: _RESULTS[name][2] for name in measured if _RESULTS[name][0] and name not in hidden}
    for column in shown:
        table.add_column(_RESULTS[column][0], no_wrap=True, justify="right")
    names = _short_names(swept)
    for job in jobs:
        values = "\n".join(f"{names[key]}={job.overrides[key]}" for key in swept if key in job.overrides)
        status = Text(job.status, style="green" if job.status == "ok" else "bold red")
        if job.warnings:
            status.append("\nwarned", style="yellow")
        cells = (_number_text(job.measured(column), style) for column, style in shown.items())
        table.add_row(str(job.number), Text(values), status, *cells)
    return table


def _hidden(jobs: Sequence[Job]) -> Iterator[str]:
    """Columns for which a table with training columns has no space: bytes that are not sent over a slow link."""
    yield "intra_node_bytes_per_token"
    if not any(job.measured("inter_node_bytes_per_token") for job in jobs):
        yield "inter_node_bytes_per_token"


def _draw(path: Path, jobs: Sequence[Job], swept: Sequence[str], console: Console) -> None:
    """Draws the plot; an error is printed and does not affect the table or the exit code."""
    done = [job for job in jobs if job.status == "ok"]
    names = _short_names(swept)
    try:
        from moecompile.report.sweep_plot import Point, draw

        points = [
            Point(
                settings={names[key]: job.overrides[key] for key in swept if key in job.overrides},
                measured={**{column: job.measured(column) for column in _RESULTS}, "memory_gib": _gib(job)},
            )
            for job in done
        ]
        drawn = draw(points, path)
    except Exception as error:
        console.print(Text(f"sweep.png could not be drawn: {type(error).__name__}: {error}"))
        return
    if drawn:
        console.print(Text(str(path)), soft_wrap=True)


def _report(sweep_dir: Path, jobs: Sequence[Job], swept: Sequence[str], seeds: Sequence[str], console: Console) -> None:
    """Writes `report.html`, if jobs can be compared; as for the plot, an error is only printed."""
    if sum(job.status == "ok" for job in jobs) < 2:
        return
    names = _short_names(swept)
    try:
        from moecompile.report.page.sweeps import SweepJob, write_sweep_report

        write_sweep_report(sweep_dir, [
            SweepJob(
                name=str(job.number), status=job.status, task=str(job.result.get("task", "")),
                settings={names[key]: job.overrides[key] for key in swept if key in job.overrides},
                figures={column: job.measured(column) for column in _RESULTS}, warnings=job.warnings,
            )
            for job in jobs
        ], seeds)  # fmt: skip
    except Exception as error:
        console.print(Text(f"report.html could not be written: {type(error).__name__}: {error}"))


def _gib(job: Job) -> float | None:
    memory = job.measured("memory_bytes_per_rank")
    return None if memory is None else memory / 2**30


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last part if that is unique, else the key."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def _number_text(value: Any, style: str) -> str:
    if value is None:
        return "-"
    if style == "yes":
        return value if isinstance(value, str) else "yes" if value else "no"  # a word since version 0.3
    named = {"bytes": bytes_text, "seconds": seconds_text}
    return named[style](value) if style in named else format(value, style)
