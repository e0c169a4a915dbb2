"""Hostile files: recipes and plans that try to run something. Each would leave a file behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.errors import PlanError, UserError
from moecompile.plan import from_yaml
from moecompile.trust import check_hydra_node, of_hydra

RECIPES = {
    "callback": "hydra:\n  callbacks:\n    x:\n      _target_: subprocess.Popen\n      args: [touch, {file}]\n",
    "logging": "hydra:\n  job_logging:\n    version: 1\n    handlers:\n      x: {{(): subprocess.Popen, args: [touch, {file}]}}\n",
    "launcher": "hydra:\n  launcher:\n    _target_: subprocess.Popen\n    args: [touch, {file}]\n",
    "environment": "hydra:\n  job:\n    env_set: {{PYTHONPATH: {file}}}\n",
}
"""What a recipe may try, and Hydra would do before our code runs."""


@pytest.mark.parametrize("mode", [["recipe=callback"], ["-m", "recipe=logging,launcher"], ["recipe=environment"]])
def test_a_recipe_cannot_make_hydra_run_code(mode: list[str], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "recipe").mkdir()
    for name, text in RECIPES.items():
        body = f"# @package _global_\nname: {name}\n" + text.format(file=ran)
        (tmp_path / "recipe" / f"{name}.yaml").write_text(body)
    folders = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
    run = subprocess.run(
        [sys.executable, "-m", "moecompile", "--config-dir", str(tmp_path), *mode, "task=plan", *folders],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr.startswith("error: hydra.") and run.stderr.count("\n") == 1
    assert "a recipe or another config file sets it, and Hydra would run what it says. Remove it there" in run.stderr
    assert not ran.exists()


def test_the_command_line_may(tmp_path: Path) -> None:
    given = [
        "recipe=x",
        "hydra.run.dir=y",
        "+hydra.job.env_set.A=1",
        "hydra/launcher=basic",
        "~hydra.callbacks",
        "a.b=1",
    ]
    assert of_hydra(given) == given[1:5]
    node = {"run": {"dir": "runs"}, "job": {"name": "x", "override_dirname": "a"}, "runtime": {"cwd": "/"}}
    check_hydra_node(node, {**node, "runtime": {}, "job": {"name": "x", "override_dirname": "b"}})
    with pytest.raises(UserError, match=r"^hydra.job.name: a recipe or another"):
        check_hydra_node({**node, "job": {"name": "y"}}, node)
    with pytest.raises(UserError, match=r"^hydra.callbacks.x: a recipe or another"):
        check_hydra_node({**node, "callbacks": {"x": {}}}, node)


@pytest.mark.parametrize("value", ["__import__('os').system('touch ran')", "$(touch ran)", "`touch ran`"])
def test_values_are_never_evaluated(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose_config([f'name="{value}"']).name == value
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:subprocess.Popen [[touch, {file}]]",
        "format: 1\nmesh: !!python/object/apply:os.system ['touch {file}']\n",
        "format: 1\nlayers: !!python/name:os.system\n",
    ],
)
def test_a_plan_cannot_run_code(text: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan.yaml=\.\.\.: is not plain YAML"):
        from_yaml(text.format(file=tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
