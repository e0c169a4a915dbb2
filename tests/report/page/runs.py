"""Run directories as tasks leave them, written by hand, without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moecompile import plan as plans
from moecompile.load_history import LOAD_HISTORY, LoadHistory
from moecompile.plan import Plan
from moecompile.rundir import FORECAST, PROFILE, ROUTES
from tests.plan.plans import a_plan

FORECAST_FIELDS = {
    "step_seconds": 0.5, "step_parts": {"products": 0.4, "exchange across nodes": 0.1},
    "imbalance": [{"name": "zipf", "p50_load": 1.2, "p50_seconds": 0.6, "p99_load": 1.9, "p99_seconds": 0.9}],
    "changes": [{"change": "dispatch.kind=dedup", "seconds": 0.4}],
}  # fmt: skip


def a_run(folder: Path, *, layers: int = 2, experts: int = 12, steps: int = 20, seed: int = 0) -> Plan:
    """A finished training run of `a_plan()`, with everything that a report can show."""
    generator, plan = np.random.default_rng(seed), a_plan()
    folder.mkdir(parents=True, exist_ok=True)
    plans.save(plan, folder / "plan.yaml")
    (folder / "resolved.yaml").write_text(
        yaml.safe_dump({"name": "tiny", "seed": seed, "trainer": {"max_steps": steps}})
    )
    (folder / "overrides.txt").write_text("recipe=tiny\nseed=1")
    names = [f"model.layers.{i}.mlp.router" for i in range(layers)]
    history = LoadHistory()
    for step in range(1, steps + 1):
        counts = generator.poisson(40, (layers, experts))
        counts[0, 0] = 0 if step == 1 else 40
        history.add(step, dict(zip(names, counts.tolist(), strict=True)))
    history.save(folder / LOAD_HISTORY)
    columns = [
        "step",
        "loss",
        "val_loss",
        "learning_rate",
        "max_violation_bound",
        *(f"max_violation/{n}" for n in names),
        f"load/{names[0]}/0",
    ]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(1, steps + 1):
            writer.writerow(
                {
                    name: {"step": step, "val_loss": "", "max_violation_bound": 7.5}.get(name, 1 / step)
                    for name in columns
                }
            )
    (folder / FORECAST).write_text(json.dumps(FORECAST_FIELDS))
    (folder / PROFILE).write_text(json.dumps(a_profile(plan)))
    tokens = generator.integers(0, 50, 400)
    ids = np.stack([np.stack([generator.permutation(experts)[:3] for _ in tokens]) for _ in range(layers)], 1)
    np.savez_compressed(
        folder / ROUTES, tokens=tokens, ids=ids, layers=np.array(names), num_experts=np.array([experts] * layers)
    )
    result = {
        "task": "train", "recipe": "tiny", "status": "ok", "seconds": 3.0, "steps": steps, "loss_first": 3.0,
        "loss_last": 1.0, "val_loss_first": 3.125, "val_loss": 1.25, "max_violation_mean_last": 0.5,
        "max_violation_bound_mean_last": 7.5, "step0_max_abs_diff": 1e-7, "versions": {"python": "3"},
        "bytes_per_token_per_layer": {"intra_node": 100.0, "inter_node": 50.0}, "unigram_entropy": 2.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return plan


def a_profile(plan: Plan) -> dict[str, Any]:
    ranks, layers = plan.mesh.world_size, len(plan.layers)
    part = [[0.001 * (1 + rank) for rank in range(ranks)] for _ in range(layers)]
    return {
        "step_seconds": 0.6, "timed_steps": [18, 19, 20], "cost": 0.1,
        "memory": {kind: [1000] * ranks for kind in ("weights", "grads", "optimizer", "activations")},
        "phases": {name: [0.2] * ranks for name in ("forward", "backward", "rest", "step")},
        "layers": [layer.site.fqn for layer in plan.layers],
        "parts": dict.fromkeys(("router", "dispatch", "experts", "combine", "waiting"), part),
        "rows": [[100 + 10 * rank for rank in range(ranks)] for _ in range(layers)],
        "traffic": [[100.0 * (a != b) for b in range(ranks)] for a in range(ranks)],
        "lower_bound": [[0, 150], [150, 0]], "exchanges": [],
    }  # fmt: skip
