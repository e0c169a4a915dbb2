"""What is built from the checkout works without it: configs, recipes, data and the console script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from moecompile.version import __version__

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel that was built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    run(REPOSITORY, "-m", "build", "--no-isolation", "--outdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = dist.glob("*.whl")
    run(folder, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def run(cwd: Path, *args: str, path: Path | None = None) -> str:
    environ = {**os.environ, "PYTHONPATH": str(path or "")}
    result = subprocess.run([sys.executable, *args], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_version_is_the_same_wherever_it_is_said() -> None:
    assert PROJECT["version"] == __version__
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    newest = re.search(r"^## \[(.+?)\] - (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest.groups() == (__version__, str(citation["date-released"]))
    for page in ("README.md", "docs/index.md"):
        assert f"Version {__version__}" in (REPOSITORY / page).read_text(), page


def test_the_docs_and_messages_name_extras_that_exist_and_every_extra_is_named() -> None:
    texts = [
        path.read_text()
        for room in ("docs", "moecompile")
        for path in (REPOSITORY / room).rglob("*.*")
        if path.suffix in (".md", ".py")
    ]
    named = {
        name for text in texts for found in re.findall(r"moecompile\[([\w,]+)\]", text) for name in found.split(",")
    }
    assert named == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_the_source_distribution_holds_configs_recipes_and_licence(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        assert not [member.name for member in tar.getmembers() if member.issym() or member.islnk()]
    needed = {"conf/config.yaml", "conf/recipe/deepseek_ep.yaml", "LICENSE", "NOTICE", "CITATION.cff", "pyproject.toml"}
    needed |= {"benchmarks/memory.py", "tests/test_packaging.py", "docs/index.md", ".ci/run"}
    assert needed <= names


def test_the_wheel_holds_every_config_recipe_and_data_file(installed: Path) -> None:
    package = installed / "moecompile"
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert (package / "conf" / path.relative_to(REPOSITORY / "conf")).read_bytes() == path.read_bytes()
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        assert (package / "conf" / "recipe" / path.name).read_bytes() == path.read_bytes()
    assert (package / "runtime" / "data" / "moby_dick.txt").stat().st_size == 1_204_997
    assert (package / "py.typed").is_file()
    assert not (installed / "tests").exists()


@pytest.mark.parametrize("script", [False, True], ids=["module", "console_script"])
def test_the_installed_wheel_finds_its_configs_from_anywhere(script: bool, installed: Path, tmp_path: Path) -> None:
    door = [str(installed / "bin" / "moecompile")] if script else ["-m", "moecompile"]
    shown = yaml.safe_load(run(tmp_path, *door, "--cfg", "job", "recipe=deepseek_ep", path=installed))
    assert (shown["name"], shown["model"]["name"]) == ("deepseek_ep", "deepseek_nano")
    assert "recipe: deepseek_ep" in run(tmp_path, *door, "--help", path=installed)


def test_python_callers_of_the_installed_wheel_compose_its_configs(installed: Path, tmp_path: Path) -> None:
    program = (
        "from moecompile.compose import compose_config, conf_dir;"
        "print(conf_dir(), compose_config(['recipe=deepseek_ep']).name)"
    )
    assert run(tmp_path, "-c", program, path=installed) == f"{installed / 'moecompile' / 'conf'} deepseek_ep\n"
