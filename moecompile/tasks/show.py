"""What every task shows and writes of a compilation: plan, passes, sites, graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from moecompile import plan as plans
from moecompile.pipeline import Compiled
from moecompile.report.console import print_passes, print_plan
from moecompile.report.graphs import graph_summary, write_graphs


def show_compiled(compiled: Compiled, run_dir: Path, console: Console) -> None:
    """Prints plan and passes; writes `plan.yaml` and `graphs/`, layers with the same graphs once."""
    print_plan(compiled.plan, console, compiled.notes)
    print_passes(compiled.records, console)
    plans.save(compiled.plan, run_dir / "plan.yaml")
    seen: set[tuple[str, ...]] = set()
    for fqn in compiled.graphs["captured"]:
        stages = {stage: graphs[fqn] for stage, graphs in compiled.graphs.items()}
        form = tuple(graph_summary(graph) for graph in stages.values())
        if form not in seen:
            seen.add(form)
            write_graphs(stages, run_dir / "graphs", fqn or "model")


def site_rows(compiled: Compiled) -> list[dict[str, Any]]:
    """The `sites` of result.json."""
    return [dataclasses.asdict(site) for site in compiled.sites]
