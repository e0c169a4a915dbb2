"""A rank of task=verify: runs a shrunk config in one process and on all ranks of its mesh, and compares them."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from moecompile import plan as plans
from moecompile.report.console import print_checks
from moecompile.report.result import write_result
from moecompile.rundir import accept, output_dir
from moecompile.runtime.groups import init_process_group
from moecompile.schema import Config
from moecompile.tasks.verify import CERTIFICATE
from moecompile.verify import certify_config
from moecompile.version import versions


def run_rank(config: Config, run_dir: Path) -> None:
    """Runs one rank; rank 0 also runs the reference, compares, and writes the table and the certificate."""
    init_process_group(config)
    checks, plan = certify_config(config, output_dir(run_dir))
    if dist.get_rank() > 0:
        return
    accept(run_dir)
    console, passed = Console(soft_wrap=False), all(check.passed for check in checks)
    rows = [check.row() for check in checks]
    print_checks(rows, console)
    plans.save(plan, run_dir / "plan.yaml")
    certificate = {
        "recipe": config.name, "passed": passed, "plan_hash": plan.hash, "world_size": plan.mesh.world_size,
        "versions": versions(), "checks": rows,
    }  # fmt: skip
    path = run_dir / CERTIFICATE
    path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    fields = {"passed": passed, "checks": rows, "plan_hash": plan.hash}
    result = write_result(run_dir, "verify", config.name, fields, status="ok" if passed else "failed")
    verdict = "passed" if passed else "FAILED"
    console.print(f"\n{config.name}  {verdict}  {result['seconds']:.1f} s  {path}", soft_wrap=True)
