"""Shows and writes a compilation: plan, passes, sites, graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import nn

from moecompile import plan as plans
from moecompile.capture import is_meta
from moecompile.pipeline import Compilation
from moecompile.report.console import print_passes, print_weight_groups
from moecompile.report.graphs import graph_summary, timeline, write_graphs
from moecompile.report.plan_tables import print_plan
from moecompile.report.text import NOT_COMPARED, step0_text
from moecompile.runtime.weight_groups import weight_groups
from moecompile.schema import Config, OptimizerKind


def show_compiled(compiled: Compilation, run_dir: Path, console: Console) -> None:
    """Prints plan, passes and step 0; writes `plan.yaml` and `graphs/`, once for layers with equal graphs."""
    print_plan(compiled.plan, console, compiled.notes)
    print_passes(compiled.records, console)
    _print_timelines(compiled, console)
    if compiled.plan.layers:
        console.print()
        console.print(Text(_step0_text(compiled)))
    plans.save(compiled.plan, run_dir / "plan.yaml")
    seen: set[tuple[str, ...]] = set()
    for fqn in compiled.graphs["captured"]:
        stages = {stage: graphs[fqn] for stage, graphs in compiled.graphs.items()}
        form = tuple(graph_summary(graph) for graph in stages.values())
        if form not in seen:
            seen.add(form)
            write_graphs(stages, run_dir / "graphs", fqn or "model")


def _print_timelines(compiled: Compilation, console: Console) -> None:
    """Prints which exchanges overlap with experts, once for each kind of layer."""
    paths: dict[str, list[str]] = {}
    for path, graph in compiled.graphs.get("fused", {}).items():
        if lines := timeline(graph):
            paths.setdefault(lines, []).append(path or "the model")
    for lines, where in paths.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        console.print()
        console.print(Text(f"In flight, {where[0]}{more}:\n{lines}"), soft_wrap=True)


def step0_fields(compiled: Compilation) -> dict[str, Any]:
    """The step-0 receipt in result.json."""
    return {f"step0_{name}": value for name, value in dataclasses.asdict(compiled.step0).items()}


def _step0_text(compiled: Compilation) -> str:
    """`step 0 equals the dense model within 6.0e-08`, or why it need not."""
    is_dense = all(isinstance(layer.site, plans.FFNSite) for layer in compiled.plan.layers)
    same, reason = "the dense model" if is_dense else "the model before", compiled.step0.reason or ""
    if is_meta(compiled.model) or reason.startswith(NOT_COMPARED):
        return f"step 0 was not compared with {same}: {reason.removeprefix(NOT_COMPARED)}"
    return f"step 0 {step0_text(step0_fields(compiled), same)}"


def show_weight_groups(model: nn.Module, config: Config, console: Console | None) -> dict[str, Any]:
    """Prints which weights have which optimizer, unless all have AdamW's defaults; the field of result.json.

    Args:
        console: None on ranks that print nothing.

    Raises:
        ConfigError: a pattern of `optimizer.groups` matches nothing.
    """
    rows = [group.row() for group in weight_groups(model, config.optimizer)]
    is_default = config.optimizer.kind is OptimizerKind.adamw and not config.optimizer.groups
    if console is not None and not is_default:
        print_weight_groups(rows, console)
    return {} if is_default else {"weight_groups": rows}


def site_rows(compiled: Compilation) -> list[dict[str, Any]]:
    """The `sites` of result.json."""
    return [dataclasses.asdict(site) for site in compiled.sites]
