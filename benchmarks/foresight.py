"""How well is the time of a published run predicted? Fits the constants, scores them, writes tables and a plot.

    python benchmarks/foresight.py                      # scores: about a minute
    python benchmarks/foresight.py fit                  # fits to all published runs, writes calibration.yaml, scores
    python benchmarks/foresight.py score ROWS FEATURES  # runs of another file in the format of published.yaml

Writes benchmarks/results/foresight.json, docs/assets/foresight.md and docs/assets/foresight.png.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

from forecast.kernels import kernel_fits  # noqa: E402
from forecast.runs import DATA, PUBLISHED, Run, parts, read_runs, tokens_s  # noqa: E402
from forecast.scores import (  # noqa: E402
    ablation,
    calibrate,
    counted,
    deepseek_v3,
    errors,
    leave_out,
    one_vote,
    pairs,
    simumax,
    splits,
    summary,
)
from forecast.tables import plot, tables  # noqa: E402

from moecompile.planner.cost_model.constants import CALIBRATION, CONSTANTS, PRIORS, calibrated  # noqa: E402
from moecompile.version import versions  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "foresight.json"
MARKDOWN, PICTURE = (REPOSITORY / "docs" / "assets" / f"foresight.{end}" for end in ("md", "png"))


def data_hash() -> str:
    """SHA-256 over the files that runs are read from."""
    return hashlib.sha256(b"".join((PUBLISHED / name).read_bytes() for name in DATA)).hexdigest()


def write_calibration(runs: Sequence[Run], path: Path = CALIBRATION) -> dict[str, float]:
    """Fits the constants to all runs and writes them."""
    constants = calibrate(runs)
    body = {
        "constants": {name: float(f"{value:.4g}") for name, value in constants.items()},
        "errors_percent": {"fitted": summary(errors(runs, constants)), "priors": summary(errors(runs, PRIORS))},
        "data_sha256": data_hash(),
        "code": versions()["moecompile"],
        "rows": [run.id for run in runs],
    }
    head = "# Written by `python benchmarks/foresight.py fit`; what each constant means is in constants.py.\n"
    path.write_text(head + yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=120), encoding="utf-8")
    return dict(body["constants"])


def measure(runs: Sequence[Run], left_out: Mapping[str, str], constants: Mapping[str, float]) -> dict[str, Any]:
    """All scores."""
    steps = simumax(constants)
    return {
        "constants": [
            {
                "name": c.name, "meaning": c.meaning, "unit": c.unit, "prior": c.prior, "fitted": constants[c.name],
                "bounds": [c.low, c.high], "source": c.source,
            }
            for c in CONSTANTS
        ],
        "runs": [
            {
                "id": run.id, "group": run.group, "gpus": run.layout.gpus, "measured": round(run.tokens_s, 1),
                "predicted": round(tokens_s(run, constants), 1), "assumed": list(run.assumed),
                "seconds": {name: round(value, 4) for name, value in parts(run, constants).items() if value},
            }
            for run in runs
        ],
        "left_out": dict(left_out),
        "splits": splits(runs),
        "calibrated on all": summary(errors(runs, constants)),
        "one vote per config": one_vote(runs, constants),
        "systems": leave_out(runs, lambda run: run.system),
        "models": leave_out(runs, lambda run: run.model.name),
        "pairs": {
            "layouts": pairs(runs, constants, layouts=True),
            "layouts and software": pairs(runs, constants, layouts=False),
        },
        "deepseek_v3": deepseek_v3(constants),
        "simumax": {
            "rows": steps,
            "ours": summary([abs(row["percent"]) for row in steps]),
            "theirs": summary([100 * abs(row["theirs"] / row["ms"] - 1) for row in steps]),
        },
        "ablation": ablation(runs),
        "kernels": kernel_fits(),
        "counts": counted(),
        "data_sha256": data_hash(),
    }  # fmt: skip


def main(words: Sequence[str]) -> None:
    """The program."""
    if words[:1] == ["score"]:
        rows, features = map(Path, words[1:3])
        runs, left_out = read_runs(rows, features)
        made = {run.id: tokens_s(run, calibrated()) for run in runs}
        rows_of = {
            run.id: f"{run.group}, {run.layout.gpus} GPUs: {made[run.id]:,.0f} of {run.tokens_s:,.0f} tokens/s, "
            f"{100 * (made[run.id] / run.tokens_s - 1):+.0f}%"
            for run in runs
        }
        print(json.dumps({"rows": rows_of, **summary(errors(runs, calibrated())), "left_out": left_out}, indent=2))
        return
    runs, left_out = read_runs()
    constants = write_calibration(runs) if words[:1] == ["fit"] else dict(calibrated())
    result = measure(runs, left_out, constants)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    MARKDOWN.write_text(tables(result), encoding="utf-8")
    plot(result, PICTURE)
    print(MARKDOWN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
