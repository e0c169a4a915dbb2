"""A run of the second study: one command line of moecompile, whose losses at every step are kept."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quality import study
from quality.study import FOLDER, Unit


def run(unit: Unit) -> dict[str, Any]:
    """Runs a layout and returns its result; `placement` is made from the loads of one rank, which is run before it."""
    folder = FOLDER / "layout" / unit.name
    overrides = [*study.layout_overrides(unit), f"hydra.run.dir={folder}"]
    if unit.arm == "placement":
        placed = FOLDER / "layout" / "placed"
        first = FOLDER / "layout" / "layout-flat-0"  # its plan has the ranks among which experts are placed
        _moecompile([*study.layout_overrides(_flat(unit)), f"hydra.run.dir={first}"])
        _moecompile(["task=place", f"place.run={first}", f"hydra.run.dir={placed}"])
        overrides.append(f"mesh.placement={placed}")
    _moecompile(overrides, native=unit.arm != "rounding")
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curve = [{"step": int(row["step"]), "loss": float(row["loss"])} for row in rows if row.get("loss")]
    val = [{"step": int(row["step"]), "val": float(row["val_loss"])} for row in rows if row.get("val_loss")]
    return {
        "unit": unit.name, "settings": unit.settings, "settings_hash": unit.hash, "curve": curve, "val": val,
        "parent_hash": None,
    }  # fmt: skip


def _flat(unit: Unit) -> Unit:
    return Unit(unit.study, unit.size, unit.domain, "flat", unit.seed)


def _moecompile(overrides: list[str], *, native: bool = True) -> None:
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if native else {"MOECOMPILE_NATIVE": "0"})
    subprocess.run([sys.executable, "-m", "moecompile", *overrides], env=environ, check=True, cwd=Path.cwd())
