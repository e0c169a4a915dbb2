"""task=compile: rewrites and lowers the model in one process; shows every site, every pass and every graph."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from moecompile.capture import is_meta
from moecompile.models import build_model, example_inputs
from moecompile.pipeline import compile_with_report
from moecompile.plan import FFNSite, Plan
from moecompile.report.console import print_sites
from moecompile.report.result import write_result
from moecompile.schema import Config
from moecompile.tasks.plan import plan_fields, require_layers
from moecompile.tasks.show import show_compiled, site_rows


def run(config: Config, run_dir: Path) -> None:
    """Prints plan, passes and sites; writes `plan.yaml`, `graphs/` and `result.json`."""
    start, console = time.perf_counter(), Console()
    model = build_model(config.model, config.seed)
    compiled = compile_with_report(model, config, example=example_inputs(model, config.data.seq_len))
    if not compiled.plan.layers:
        print_sites(site_rows(compiled), console)
    require_layers(compiled.plan, config)
    show_compiled(compiled, run_dir, console)
    print_sites(site_rows(compiled), console)
    step0, same = compiled.step0_max_abs_diff, _before(compiled.plan)
    console.print(
        f"step 0 equals {same} within {step0:.1e}"
        if step0 is not None
        else f"step 0 was not compared with {same}: {compiled.step0_reason}"
        if is_meta(model)
        else f"step 0 need not equal {same}: {compiled.step0_reason}"
    )
    write_result(
        run_dir,
        {
            "task": "compile",
            "recipe": config.name,
            "status": "ok",
            "seconds": time.perf_counter() - start,
            **plan_fields(compiled.plan),
            "notes": compiled.notes,
            "sites": site_rows(compiled),
            "step0_max_abs_diff": step0,
            "step0_reason": compiled.step0_reason,
        },
    )


def _before(plan: Plan) -> str:
    """What the rewritten model is compared with."""
    dense = all(isinstance(layer.site, FFNSite) for layer in plan.layers)
    return "the dense model" if dense else "the model before"
