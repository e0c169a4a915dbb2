"""Plans are documents: shown, compared, and run by the command line."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecompile import plan as plans
from moecompile.compose import compose_config, save_resolved
from moecompile.errors import PlanError
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import compile_with_report
from moecompile.planner.given import with_plan
from moecompile.tasks import plan as task
from tests.forked import python

BASE = ("recipe=mixtral_ep",)


def planned(folder: Path, *overrides: str) -> Any:
    folder.mkdir()
    config = with_plan(compose_config(["task=plan", *BASE, *overrides]))
    save_resolved(config, folder / "resolved.yaml")
    task.run(config, folder)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, planned(folder, "dispatch.kind=flat", "trainer.checkpointing=none")


def test_a_plan_is_shown_as_it_was_made(first: tuple[Path, Any], tmp_path: Path) -> None:
    folder, made = first
    shown = planned(tmp_path / "again", f"plan={folder}", "trainer.checkpointing=none")
    assert shown["plan_hash"] == made["plan_hash"]
    for key in ("step_seconds", "step_parts", "memory_bytes_per_rank", "bytes_per_token_per_layer"):
        assert shown[key] == made[key]
    assert any(note.endswith("are those of this plan") for note in shown["notes"])
    other = planned(
        tmp_path / "other", f"plan={folder}"
    )  # decisions are the plan's, what is recomputed is the config's
    assert other["plan_hash"] == made["plan_hash"]
    assert other["step_seconds"] > made["step_seconds"]


def test_what_differs_and_what_it_costs(
    first: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = first
    now = planned(tmp_path / "now", f"compare={folder}", "routing.top_k=3")
    shown = capsys.readouterr().out
    found, costs = now["compared"]["differences"], now["compared"]["costs"]
    assert found["dispatch.kind (4 layers)"] == ["hierarchical", "flat"]
    assert found["routing.top_k (4 layers)"] == ["3", "2"]
    assert found["config trainer.checkpointing"] == ["keep_exchanges", "none"]
    assert not any(name.startswith(("mesh", "placement")) for name in found)
    assert costs["step, seconds"] == [now["step_seconds"], made["step_seconds"]]
    assert costs["memory total, bytes"] == [each["memory_bytes_per_rank"]["total"] for each in (now, made)]
    assert costs["intra_node per token and layer, bytes"] == [
        each["bytes_per_token_per_layer"]["intra_node"] for each in (now, made)
    ]
    parts = sum(pair[0] for name, pair in costs.items() if name.endswith(", seconds") and name != "step, seconds")
    assert parts == pytest.approx(now["step_seconds"])
    assert "this costs" in shown
    assert "dispatch.kind" in shown
    same = planned(tmp_path / "same", f"compare={folder}", "dispatch.kind=flat", "trainer.checkpointing=none")
    assert same["compared"]["differences"] == {}
    assert "the same plan, with the same config" in capsys.readouterr().out


def test_what_a_plan_of_fewer_layers_leaves_is_named(first: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = first
    plan = plans.read(folder / "plan.yaml")
    plans.save(replace(plan, layers=plan.layers[1:]), tmp_path / "fewer.yaml")
    left = "the plan has 3 of the model's 4 layers to rewrite; it leaves as they are: model.layers.0.mlp"
    shown = planned(tmp_path / "shown", f"plan={tmp_path / 'fewer.yaml'}", "trainer.checkpointing=none")
    assert left in shown["notes"]
    config = compose_config([*BASE])
    model = build_model(config.model, config.seed)
    example = example_inputs(model, config.data.seq_len)
    compiled = compile_with_report(model, example=example, plan=plans.read(tmp_path / "fewer.yaml"))
    assert compiled.notes[0] == left
    assert {site.reason for site in compiled.sites if site.status == "left"} == {"not in the given plan"}


@pytest.mark.slow
def test_a_plan_of_another_model_is_refused(first: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = first
    for key in ("plan", "compare"):
        with pytest.raises(PlanError, match=r"the model has .* there"):
            planned(tmp_path / key, f"{key}={folder / 'plan.yaml'}", "model=t5_nano")


@pytest.mark.slow
def test_the_command_line_runs_a_plan(tmp_path: Path) -> None:
    """A found plan is compiled and trained; a multirun of plans is one table with a picture; a clash is one message."""
    short = ("trainer.max_steps=2", "trainer.val_interval=2", "data.val_batches=1", "trainer.save_checkpoint=false")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "moecompile", *BASE, *words, cwd=tmp_path)

    swept = run("-m", "task=plan", "dispatch=flat,dedup", "hydra.sweep.dir=swept")
    assert swept.returncode == 0, swept.stderr
    assert "step" in swept.stdout
    assert "step_seconds,tokens_per_second_per_rank" in (tmp_path / "swept" / "sweep.csv").read_text()
    assert (tmp_path / "swept" / "sweep.png").is_file()
    for name in ("compile", "train"):
        done = run(f"task={name}", "plan=swept/0", *short, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
        made, found = (json.loads((tmp_path / each / "result.json").read_text()) for each in ("swept/0", name))
        assert found["plan_hash"] == made["plan_hash"]
    refused = run("task=train", "plan=swept/0", "dispatch.kind=dedup", "hydra.run.dir=refused")
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        "error: dispatch.kind=dedup: the plan of swept/0 has flat. Leave it out, or plan again."
    )
    assert not (tmp_path / "refused").exists()
