"""One table over the jobs of a multirun. Needs neither torch nor hydra.

Algorithm:
  1. Read `resolved.yaml` and `result.json` of every job, which live in folders named by the job's number.
  2. Find the config keys whose values differ between jobs: those are what was swept.
  3. Write `sweep.csv` with all of them, and print the first few of each job.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.report.text import bytes_text

_MAX_KEYS = 6  # a sweep over recipes changes dozens of keys; the rest is in sweep.csv

# column of sweep.csv -> (short heading, path in result.json, how the number is written)
_RESULTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "loss_first": ("first", ("loss_first",), ".4f"),
    "loss_last": ("last", ("loss_last",), ".4f"),
    "val_loss": ("val", ("val_loss",), ".4f"),
    "max_violation_last": ("MaxVio", ("max_violation_last",), ".3f"),
    "tokens_per_second": ("tok/s", ("tokens_per_second",), ",.0f"),
    "inter_node_bytes_per_token": ("inter-node", ("bytes_per_token_per_layer", "inter_node"), "bytes"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job: its number, its flattened config and its result; both are empty where the job did not get so far."""

    number: int
    config: dict[str, str]
    result: dict[str, Any]

    @property
    def status(self) -> str:
        """`ok` or `failed`; a job without a result did not live to write one."""
        return str(self.result.get("status", "failed"))

    def measured(self, column: str) -> Any:
        """A value of `_RESULTS`, None where the job did not measure it."""
        value: Any = self.result
        for key in _RESULTS[column][1]:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def summarize(sweep_dir: Path) -> None:
    """Prints one row per job of `sweep_dir` and writes `sweep.csv` beside the job folders."""
    folders = sorted((p for p in sweep_dir.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    jobs = [_read(folder) for folder in folders]  # Step 1
    keys = _swept_keys(jobs)  # Step 2
    _write_csv(sweep_dir / "sweep.csv", jobs, keys)  # Step 3
    console = Console()
    console.print(_table(jobs, keys[:_MAX_KEYS]))
    hidden = len(keys) - _MAX_KEYS
    if hidden > 0:
        console.print(Text(f"{hidden} more keys differ, see sweep.csv"))
    console.print(Text(str(sweep_dir / "sweep.csv")), soft_wrap=True)


def _read(folder: Path) -> Job:
    config, result = folder / "resolved.yaml", folder / "result.json"
    loaded = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None
    return Job(
        number=int(folder.name),
        config=dict(_flatten(loaded or {})),
        result=json.loads(result.read_text(encoding="utf-8")) if result.exists() else {},
    )


def _flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """(dotted key, value as text) of every leaf; lists are leaves."""
    if isinstance(value, Mapping):
        return [item for key, child in value.items() for item in _flatten(child, f"{path}.{key}" if path else str(key))]
    return [(path, "null" if value is None else str(value))]


def _swept_keys(jobs: Sequence[Job]) -> list[str]:
    """Keys whose values differ between jobs that have a config, in config order. An absent key is a value too."""
    configs = [job.config for job in jobs if job.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def _write_csv(path: Path, jobs: Sequence[Job], keys: Sequence[str]) -> None:
    tmp = path.with_suffix(".tmp")
    with tmp.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *keys, "status", *_RESULTS])
        for job in jobs:
            found = (job.measured(column) for column in _RESULTS)
            writer.writerow([job.number, *(job.config.get(key, "") for key in keys), job.status, *found])
    tmp.replace(path)


def _table(jobs: Sequence[Job], keys: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("job", no_wrap=True)
    table.add_column("overrides", overflow="fold")
    table.add_column("status", no_wrap=True)
    for heading, _, _ in _RESULTS.values():
        table.add_column(heading, no_wrap=True, justify="right")
    names = _short_names(keys)
    for job in jobs:
        swept = "\n".join(f"{names[key]}={job.config[key]}" for key in keys if key in job.config)
        status = Text(job.status, style="green" if job.status == "ok" else "bold red")
        found = (_number_text(job.measured(column), style) for column, (_, _, style) in _RESULTS.items())
        table.add_row(str(job.number), Text(swept), status, *found)
    return table


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Keys by their last part alone where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def _number_text(value: Any, style: str) -> str:
    if value is None:
        return "-"
    return bytes_text(value) if style == "bytes" else format(value, style)
