"""task=verify from the command line: the certificate, the result, the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.errors import VerificationFailed
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import make_plan
from moecompile.tasks import verify
from tests.forked import python
from tests.placements import random_placement


@pytest.mark.slow
def test_switch_passes_with_drops_and_auxiliary_losses(tmp_path: Path) -> None:
    """T5, top-1 with capacity, an auxiliary loss: two ranks equal one process."""
    run = python(
        "-m", "moecompile", "task=verify", "recipe=switch_ep", "mesh=cpu_1x2", "verify.dtype=float64", "verify.steps=2",
        f"hydra.run.dir={tmp_path}", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["passed"] and certificate["world_size"] == 2
    names = {check["name"] for check in certificate["checks"]}
    assert {"float64: gradients of experts", "float64: gradients of router", "float64: checkpoint round trip"} <= names
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] and result["status"] == "ok" and result["checks"] == certificate["checks"]
    assert "shrunk  data.micro_batch_size" in run.stdout


@pytest.mark.slow
def test_tensor_parallelism_passes(tmp_path: Path) -> None:
    """Four ranks of two TP groups and one EP group equal one process, through Lightning's strategy and a checkpoint.

    Experts are where a placement says.
    """
    overrides = ["recipe=deepseek_ep", "mesh=cpu_tp2_ep4", "model.config.num_hidden_layers=2"]
    config = compose_config(overrides)
    model = build_model(config.model, config.seed)
    plan = make_plan(model, config, example=example_inputs(model, config.data.seq_len))
    run = python(
        "-m", "moecompile", "task=verify", *overrides, "verify.steps=2", "verify.dtype=float64",
        random_placement(plan.layers, tmp_path / "placement.yaml", 1), f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["world_size"] == 4
    assert "shrunk  mesh.placement" not in run.stdout


def test_a_failed_check_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = {"name": "float64: gradient norm", "max_abs_err": 1.0, "tolerance": 1e-10, "passed": False, "where": ""}

    def ranks(*_: object, **__: object) -> None:
        (tmp_path / verify.CERTIFICATE).write_text(json.dumps({"checks": [check]}))

    monkeypatch.setattr(verify, "start_ranks", ranks)
    with pytest.raises(VerificationFailed, match="float64: gradient norm"):
        verify.run(compose_config(["task=verify", "recipe=deepseek_ep"]), tmp_path)
    assert VerificationFailed.exit_code == 1
