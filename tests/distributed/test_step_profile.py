"""Measuring the last steps changes no number, and what it writes fits the plan and the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moecompile.rundir import PROFILE, ROUTES
from moecompile.runtime import profile
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import losses, run

pytestmark = pytest.mark.slow
STEPS = ["trainer.max_steps=6", "trainer.val_interval=6"]
KINDS = {
    "hierarchical": ["mesh=cpu_2x2", "dispatch=hierarchical"],
    "overlap": ["mesh=cpu_2x2", "dispatch=dedup", "dispatch.overlap=shared"],
}


def ranks(rank: int, world_size: int, folder: Path, overrides: list[str]) -> None:
    run([*STEPS, *overrides], folder / "measured")
    profile.LEAST_STEPS = 100
    run([*STEPS, *overrides], folder / "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_run_has_the_same_losses(kind: str, tmp_path: Path) -> None:
    run_distributed_test(ranks, 4, tmp_path, KINDS[kind], timeout_s=240)
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / PROFILE).exists()
    found = json.loads((tmp_path / "measured" / PROFILE).read_text())
    num_layers = len(found["layers"])
    assert num_layers == 1  # the first layer of DeepSeek is dense
    assert all(np.shape(values) == (num_layers, 4) for values in found["parts"].values())
    for part in ("router", "dispatch", "experts", "combine", "shared"):
        assert np.min(found["parts"][part]) > 0, part
    assert np.sum(found["rows"]) == pytest.approx(8 * 32 * 4 * num_layers)  # every token of the step chooses 4 experts
    assert [row["op"] for row in found["exchanges"]]
    assert min(map(min, found["memory"].values())) > 0
    counted, bound = np.array(found["traffic"]), np.array(found["lower_bound"])
    between = counted.reshape(2, 2, 2, 2).sum((1, 3))
    assert (np.diag(counted) == 0).all()
    assert (np.array([between[0, 1], between[1, 0]]) >= 0.9 * np.array([bound[0, 1], bound[1, 0]])).all()
    with np.load(tmp_path / "measured" / ROUTES) as file:
        ids = file["ids"]
        assert ids.shape == (6 * 8 * 32, num_layers, 4)
        assert len(file["tokens"]) == len(ids)
        assert np.all((ids >= 0) & (ids < file["num_experts"][0]))
