"""task=compile: rewrites and lowers the model in one process; shows all sites, passes and graphs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.pipeline import compile_with_report
from moecompile.planner.given import given_plan
from moecompile.report.console import print_sites
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.schema import Config
from moecompile.tasks.plan import plan_fields, require_layers
from moecompile.tasks.show import show_compiled, show_weight_groups, site_rows, step0_fields


def run(config: Config, run_dir: Path) -> None:
    """Prints plan, passes and sites; writes `plan.yaml`, `graphs/` and `result.json`."""
    console = Console()
    model = source_model(config)
    example = example_inputs(model, config.data.seq_len)
    compiled = compile_with_report(model, config, example=example, plan=given_plan(config))
    if not compiled.plan.layers:
        print_sites(site_rows(compiled), console)
    require_layers(compiled.plan, config)
    accept(run_dir)
    show_compiled(compiled, run_dir, console)
    groups = show_weight_groups(compiled.model, config, console)
    print_sites(site_rows(compiled), console)
    fields = plan_fields(compiled.plan)
    fields |= {"notes": compiled.notes, "sites": site_rows(compiled), **step0_fields(compiled), **groups}
    write_result(run_dir, "compile", config.name, fields)
