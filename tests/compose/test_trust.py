"""Hostile files: recipes and plans that try to run something. Each would leave a file behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from moecompile.compose import compose_config, load_resolved, main
from moecompile.compose.hydra_state import check_hydra_node, of_hydra
from moecompile.errors import PlanError, UserError
from moecompile.plan import from_yaml
from moecompile.schema import check_name
from tests.forked import python

RECIPES = {
    "callback": "hydra:\n  callbacks:\n    x:\n      _target_: subprocess.Popen\n      args: [touch, {file}]\n",
    "logging": "hydra:\n  job_logging:\n    version: 1\n    handlers:\n      x: {{(): subprocess.Popen, args: [touch, {file}]}}\n",
    "launcher": "hydra:\n  launcher:\n    _target_: subprocess.Popen\n    args: [touch, {file}]\n",
    "environment": "hydra:\n  job:\n    env_set: {{PYTHONPATH: {file}}}\n",
    "overrides": "hydra:\n  overrides:\n    task: [model.factory=os.getcwd]\nmodel: {{factory: os.getcwd}}\n",
}
"""What a recipe may try, and Hydra would do before our code runs."""


@pytest.mark.parametrize(
    "mode", [["recipe=callback"], ["-m", "recipe=logging,launcher"], ["recipe=environment"], ["recipe=overrides"]]
)
def test_a_recipe_cannot_make_hydra_run_code(mode: list[str], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "recipe").mkdir()
    for name, text in RECIPES.items():
        body = f"# @package _global_\nname: {name}\n" + text.format(file=ran)
        (tmp_path / "recipe" / f"{name}.yaml").write_text(body)
    folders = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
    run = python("-m", "moecompile", "--config-dir", str(tmp_path), *mode, "task=plan", *folders, cwd=tmp_path)
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stderr.startswith("error: hydra.") and run.stderr.count("\n") == 1
    assert re.search(
        "a recipe or another config file sets it(, and Hydra would run what it says)?. Remove it", run.stderr
    )
    assert not ran.exists()


@pytest.mark.parametrize("has_folder", [False, True])
def test_a_command_line_is_compared_with_one_composition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_folder: bool
) -> None:
    """A job is composed once; once more to learn the mode, if a folder of the user's may set it; and the shipped node
    beside both is composed once."""
    composed: list[list[str]] = []
    right = ConfigLoaderImpl._load_configuration_impl

    def counting(self: ConfigLoaderImpl, *args: Any, overrides: list[str], **named: Any) -> Any:
        composed.append(overrides)
        return right(self, *args, overrides=overrides, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counting)
    flags = ["--config-dir", str(tmp_path)] if has_folder else []
    monkeypatch.setattr(sys, "argv", ["moecompile", *flags, "mesh=cpu_1", f"hydra.run.dir={tmp_path / 'run'}"])
    assert main(lambda config, run_dir: 0) == 0
    assert [words for words in composed if "mesh=cpu_1" not in words] == [[f"hydra.run.dir={tmp_path / 'run'}"]]
    assert len(composed) == 2 + has_folder


def test_a_recipe_may_begin_a_multirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "many.yaml").write_text("# @package _global_\nname: many\nhydra: {mode: MULTIRUN}\n")
    flags = ["--config-dir", str(tmp_path), f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    monkeypatch.setattr(sys, "argv", ["moecompile", *flags, "recipe=many", "seed=0,1"])
    seeds: list[int] = []
    assert main(lambda config, run_dir: seeds.append(config.seed) or 0) == 0
    assert seeds == [0, 1]


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
    check_hydra_node(node, {**node, "runtime": {}, "job": {"name": "x", "override_dirname": "b"}}, [])
    with pytest.raises(UserError, match=r"^hydra.job.name: a recipe or another"):
        check_hydra_node({**node, "job": {"name": "y"}}, node, [])
    with pytest.raises(UserError, match=r"^hydra.callbacks.x: a recipe or another"):
        check_hydra_node({**node, "callbacks": {"x": {}}}, node, [])
    said = {**node, "overrides": {"task": ["seed=1"], "hydra": ["hydra.run.dir=y"]}}
    check_hydra_node(said, node, ["hydra.run.dir=y", "seed=1"])
    with pytest.raises(UserError, match=r"^hydra.overrides: a recipe or another"):
        check_hydra_node(said, node, ["hydra.run.dir=y"])


def test_an_option_that_is_typed_is_not_one_of_a_folder(tmp_path: Path) -> None:
    """`hydra/launcher=mine` names a file, which may name no code; nor may the first file say where Hydra imports from."""
    (tmp_path / "hydra" / "launcher").mkdir(parents=True)
    hydra = f"hydra: {{callbacks: {{x: {{_target_: subprocess.Popen, args: [touch, {tmp_path}/ran]}}}}}}\n"
    (tmp_path / "hydra" / "launcher" / "mine.yaml").write_text(f"# @package _global_\n{hydra}")
    (tmp_path / "imported.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nhydra: {searchpath: ['pkg://imported']}\n")
    for words, told in (
        (["hydra/launcher=mine"], "error: hydra/launcher=mine: there is no such option. Use one of basic"),
        (["--config-name", "mine"], "error: --config-name: the shipped config is always the first. Give your own as"),
    ):
        run = python("-m", "moecompile", "--config-dir", str(tmp_path), *words, "task=plan", cwd=tmp_path)
        assert run.returncode == 2 and run.stderr.startswith(told), run.stderr
        assert not (tmp_path / "ran").exists()


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


READS = {
    "plain": "name: ${oc.env:SECRET}",
    "default": "name: ${oc.env:SECRET,x}",
    "nested": "data:\n  path: a/${oc.env:SECRET}/b",
    "decoded": "model:\n  config:\n    hidden_size: ${oc.decode:${oc.env:SECRET}}",
    "built": "optimizer:\n  lr: ${oc.${name}:SECRET}\nname: env",
    "elsewhere": "name: ${data.path}\ndata:\n  path: ${oc.env:SECRET}",
}


@pytest.mark.parametrize("text", READS.values(), ids=READS)
def test_a_config_file_cannot_read_the_environment(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "64")
    monkeypatch.setenv("MOECOMPILE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(UserError, match=r"=\$\{oc\.env:SECRET\}: a config file may not read the environment\. Write"):
        compose_config(["recipe=mine"])


def test_what_the_caller_gives_may_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "64")
    config = compose_config(
        ["data.path='/a/${oc.env:SECRET}'", "experts.num_routed=${oc.env:SECRET}", "name=${data.path}"]
    )
    assert (config.data.path, config.experts.num_routed, config.name) == ("/a/64", 64, "/a/64")
    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == "64", "other programs in this process are left alone"


def test_a_stored_config_cannot_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "64")
    (tmp_path / "resolved.yaml").write_text("name: ${oc.env:SECRET}\n")
    with pytest.raises(UserError, match="a config file may not read the environment"):
        load_resolved(tmp_path / "resolved.yaml")


def test_a_name_cannot_lead_out_of_the_runs(tmp_path: Path) -> None:
    cwd = tmp_path / "a" / "b" / "cwd"
    (cwd / "recipe").mkdir(parents=True)
    (cwd / "recipe" / "mine.yaml").write_text("# @package _global_\nname: ../../../out\n")
    before = sorted(tmp_path.rglob("*"))
    for args in (["name=../../.."], ["--config-dir", ".", "recipe=mine"], ["-m", "name=../../../x", "seed=0,1"]):
        run = python("-m", "moecompile", "task=plan", *args, cwd=cwd)
        assert (run.returncode, run.stdout) == (2, "")
        assert re.match(r"error: name=\.\./.*: is part of the run directory.*\n$", run.stderr)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/a", "a\\b", "a\nb", "x" * 201])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(UserError, match=r"^name="):
        check_name(name)
