"""task=verify: shrinks a config and starts the ranks that compare it (moecompile.tasks.ranks.verify)."""

from __future__ import annotations

import json
from pathlib import Path

from moecompile.compose import RESOLVED, save_resolved
from moecompile.errors import VerificationFailed
from moecompile.rundir import place
from moecompile.schema import Config
from moecompile.tasks.shrink import shrink
from moecompile.tasks.start import start_ranks

CERTIFICATE = "certificate.json"


def run(config: Config, run_dir: Path) -> None:
    """Prints what was shrunk and runs the ranks.

    Raises:
        VerificationFailed: a check failed.
    """
    small, notes = shrink(config, config.verify.steps)
    save_resolved(small, place(run_dir) / RESOLVED)
    for note in notes:
        print(f"shrunk  {note}", flush=True)
    start_ranks(small, run_dir)
    certificate = json.loads((run_dir / CERTIFICATE).read_text(encoding="utf-8"))
    failed = [check for check in certificate["checks"] if not check["passed"]]
    if failed:
        raise VerificationFailed(config.name, [check["name"] for check in failed])
