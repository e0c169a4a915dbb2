"""task=import: the training config of another system becomes a recipe, which is planned and searched, in one process.

Algorithm:
  1. Say of every key of the file what became of it.
  2. Plan what the file describes, as task=plan does.
  3. Search for better layouts, as task=search does, which describes pipelines and ZeRO by itself.
  4. Write two recipes into the run directory: the file's, and the best one that this package runs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.text import Text

from moecompile.errors import DoesNotFit, UserError
from moecompile.imports import Draft, Row, write_recipe, write_runnable
from moecompile.imports.composed import draft_of, file_of
from moecompile.plan import FITS
from moecompile.report.console import plain_table
from moecompile.report.result import write_result
from moecompile.rundir import RESULT, accept
from moecompile.schema import Config, TaskName
from moecompile.tasks import plan, search

_TITLES = {
    "taken": "taken",
    "assumed": "assumed, where the file says nothing",
    "no equal here": "no equal here",
    "unknown": "unknown: nothing was made of these",
    "no effect here": "no effect on a plan",
}
_HEAD = ("task", "recipe", "status", "seconds", "report", "versions")
PLAN = "plan.yaml"


def run(config: Config, run_dir: Path) -> None:
    """Prints what was taken, the plan and the search; writes both recipes, `plan.yaml` and `result.json`.

    Raises:
        DoesNotFit: the file's layout does not fit, and `task.require_fit` asks for it.
    """
    draft, source, console = draft_of(config), file_of(config), Console()
    print_rows(draft.rows, console)  # Step 1
    planned = replace(config, task=replace(config.task, name=TaskName.plan, require_fit=False))
    with TemporaryDirectory() as folder:
        of_plan, of_search = Path(folder, "plan"), Path(folder, "search")
        of_plan.mkdir()
        of_search.mkdir()
        _title("what the file describes", console)
        plan.run(planned, of_plan)  # Step 2
        fields = _result(of_plan)
        _title("other layouts, with the same model, batch and software", console)
        searched = replace(planned.task, name=TaskName.search)
        found = _searched(replace(planned, task=searched), of_search, console)  # Step 3
        accept(run_dir)
        shutil.copy(of_plan / PLAN, run_dir / PLAN)
        if (of_search / PLAN).is_file():
            (run_dir / "search").mkdir(exist_ok=True)
            shutil.copy(of_search / PLAN, run_dir / "search" / PLAN)
    write_recipe(draft, run_dir, source)  # Step 4
    runs = _write_runnable(draft, config, run_dir, source, found)
    print_commands(draft.name, runs, run_dir, console)
    by_kind = {kind.replace(" ", "_"): [dataclasses.asdict(row) for row in rows] for kind, rows in _grouped(draft.rows)}
    fields |= {"source": config.imported.source, "file": source, "imported": draft.name, "runs": runs, "rows": by_kind}
    write_result(run_dir, "import", config.name, fields | {"best": (found or {}).get("best")})
    if config.task.require_fit and fields.get("described_fits", fields.get("fits")) != FITS:
        raise DoesNotFit


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Prints a table for each kind of row; those without effect as their keys alone."""
    for kind, group in _grouped(rows):
        console.print()
        console.print(Text(f"{_TITLES[kind]} ({len(group)})", style="bold"))
        if kind == "no effect here":
            console.print(Text(", ".join(row.key for row in group), style="dim"), soft_wrap=False)
            continue
        table = plain_table("line", "key", "value", "here")
        for row in group:
            table.add_row(str(row.line or ""), row.key, row.value, row.text)
        console.print(table)


def print_commands(name: str, runs: str | None, run_dir: Path, console: Console) -> None:
    """Prints the commands that use the recipes."""
    console.print()
    command = f"python -m moecompile --config-dir {run_dir} recipe="
    console.print(Text(f"{command}{name} task=plan   # what the file describes"), soft_wrap=True)
    if runs is not None:
        console.print(Text(f"{command}{runs}   # the best layout that this package runs"), soft_wrap=True)
    else:
        console.print(Text("no layout that this package runs fits on these ranks, so there is no recipe for one"))


def _grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    kinds = dict.fromkeys(row.kind for row in rows)
    return [(kind, [row for row in rows if row.kind == kind]) for kind in kinds]


def _title(text: str, console: Console) -> None:
    console.print()
    console.rule(Text(text, style="bold"), align="left")


def _result(folder: Path) -> dict[str, Any]:
    """The fields of a result.json, without those that every task has."""
    body = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return {key: value for key, value in body.items() if key not in _HEAD}


def _searched(config: Config, folder: Path, console: Console) -> dict[str, Any] | None:
    """The result of the search; None, and a message, if nothing can be searched."""
    workload = replace(config.workload, tp=1, pp=1, vpp=1, cp=1, etp=1, zero=3, mtp=0)
    try:
        search.run(replace(config, workload=workload), folder)
    except UserError as error:  # the plan above stands without it
        console.print(Text(f"no search: {error}"), soft_wrap=True)
        return None
    return _result(folder)


def _write_runnable(
    draft: Draft, config: Config, run_dir: Path, source: str, found: dict[str, Any] | None
) -> str | None:
    best = (found or {}).get("best")
    if not best:
        return None
    workload = config.workload
    data = {
        "seq_len": workload.seq_len, "global_batch_size": workload.global_batch_size,
        "micro_batch_size": workload.micro_batch_size,
    }  # fmt: skip
    precision = workload.precision.value if workload.precision else config.trainer.precision.value
    return write_runnable(draft, run_dir, source, best["settings"], data, precision)
