"""tests/versions.py: it knows both ends of every range, says what cannot be had, and which package broke a test."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import versions

CPU_BUILD = ["filelock", "sympy>=1.13.3", 'pyreadline; platform_system == "Windows"', 'optree; extra == "optree"']
ON_LINUX = 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'


def report(*requires: str) -> str:
    return json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": [*CPU_BUILD, *requires]}}]})


def test_the_lowest_are_those_of_the_project() -> None:
    lowest = versions.lowest()
    assert lowest["torch"] == "2.11.0" and lowest["hydra-core"] == "1.3.2" and "grandalf" not in lowest
    assert [each.name for each in versions.requirements() if each.name in lowest] == list(lowest)


def test_constraints_are_exact_and_take_any_build_of_torch() -> None:
    freeze = "# Editable Git install with no remote (moecompile==0.2.0)\n-e /src\ntorch==2.13.0+cpu\nRich==15.0.0\nattrs==26.1.0"
    text = versions.constraints(freeze)
    assert text == versions.HEADER + "attrs==26.1.0\nRich==15.0.0\ntorch==2.13.*\n"
    assert versions.pinned(text) == {"attrs": "26.1.0", "rich": "15.0.0", "torch": "2.13.*"}


def test_all_that_is_installed_is_pinned() -> None:
    tested = versions.pinned((versions.REPOSITORY / versions.CONSTRAINTS).read_text(encoding="utf-8"))
    assert {versions._name(each.name) for each in versions.requirements()} <= set(tested)
    for each in versions.requirements():
        version = tested[versions._name(each.name)]
        assert each.specifier.contains(version.replace("*", "0")) and re.fullmatch(r"[\w.]+(\.\*)?", version), each


def test_what_differs_is_of_what_the_project_names() -> None:
    here = {"torch": "2.13.0+cpu", "transformers": "5.26.0", "attrs": "27", "rich": "15.0.0"}
    tested = {"torch": "2.13.*", "transformers": "5.25.0", "attrs": "26", "rich": "15.0.0"}
    assert versions.differing(here, tested) == {"transformers": ("5.26.0", "5.25.0")}


def test_an_image_with_a_build_before_the_release_will_do() -> None:
    """pip leaves the torch of NGC 26.02 alone."""
    project = tomllib.loads((versions.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch>="))
    assert "2.11.0a0+eb65b36914.nv26.2" in torch.specifier and "2.10.1" not in torch.specifier


def test_a_build_with_cuda_is_left_out_and_others_are_not() -> None:
    assert versions.why_not(report()) == ""
    assert versions.why_not(report('triton==3.7.1; platform_system == "Windows"')) == ""
    assert versions.why_not(report(ON_LINUX)) == (
        "1 packages of CUDA, about 3 GB, would come with it (nvidia-nccl-cu13, ...)"
    )


def repository(folder: Path) -> Path:
    """Without a virtual environment."""
    for name in ("pyproject.toml", versions.CONSTRAINTS):
        (folder / name).write_bytes((versions.REPOSITORY / name).read_bytes())
    return folder


class Played:
    """Commands that `versions` runs: pip has `freeze`, pytest fails with the broken tests."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, breaks: dict[str, str], out: str = "") -> None:
        self.asked: list[list[str]] = []
        self.here, self.breaks, self.out = {"transformers": "9.1", "lightning": "2.9", "rich": "15.0.0"}, breaks, out
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(versions, "REPOSITORY", repository(folder))

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        out, code = self.out, 0
        if "freeze" in command:
            out = "\n".join(f"{name}=={version}" for name, version in self.here.items())
        elif "pytest" in command:
            failed = [test for test, package in self.breaks.items() if package == "-" or self.here[package][0] == "9"]
            (cache,) = (Path(word.partition("=")[2]) for word in command if word.startswith("cache_dir="))
            if failed:
                (cache / "v/cache").mkdir(parents=True)
                (cache / "v/cache/lastfailed").write_text(json.dumps(dict.fromkeys(failed, True)))
            code = bool(failed)
        elif command[-2] == "--quiet":
            name, _, version = command[-1].partition("==")
            self.here[name] = version
        return subprocess.CompletedProcess(command, code, stdout=out, stderr="")


def test_newest_says_which_package_broke_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Played(tmp_path, monkeypatch, {"a.py::one": "transformers", "b.py::two": "-"})
    tested = versions.pinned((tmp_path / versions.CONSTRAINTS).read_text())
    assert versions.main(["renew"]) == 1
    assert capsys.readouterr().out == (
        f"newest: transformers 9.1, tested {tested['transformers']}, lightning 2.9, tested {tested['lightning']}\n"
        f"transformers 9.1 broke, and {tested['transformers']} does not:\n  a.py::one\n"
        "no package alone broke:\n  b.py::two\n"
    )
    assert versions.pinned((tmp_path / versions.CONSTRAINTS).read_text()) == tested  # not renewed


def test_renew_writes_the_newest_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Played(tmp_path, monkeypatch, {})
    assert versions.main(["newest"]) == 0
    assert "transformers==9.1\n" not in (tmp_path / versions.CONSTRAINTS).read_text()
    assert versions.main(["renew"]) == 0
    assert (tmp_path / versions.CONSTRAINTS).read_text() == (
        versions.HEADER + "lightning==2.9\nrich==15.0.0\ntransformers==9.1\n"
    )


def test_a_torch_that_is_not_to_be_had_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    played = Played(tmp_path, monkeypatch, {}, report(ON_LINUX))
    assert versions.main(["lowest"]) == 0
    assert "torch==2.11.0 is NOT tested: 1 packages of CUDA" in capsys.readouterr().err
    assert versions.main(["lowest", "--cuda", "--ranks"]) == 0
    assert capsys.readouterr().err == ""
    assert sum("pytest" in command for command in played.asked) == 3


def test_a_python_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main(["newest", "--python", "python3.99"]) == 0
    assert "the newest on python3.99 is NOT tested: there is no such Python" in capsys.readouterr().err
    (shim := tmp_path / "python3.98").write_text(
        "#!/bin/sh\necho 'pyenv: python3.98: command not found' >&2\nexit 127\n"
    )
    shim.chmod(0o755)
    assert versions.main(["newest", "--python", str(shim)]) == 0
    assert "is NOT tested: pyenv: python3.98: command not found" in capsys.readouterr().err


def test_its_tests_exist() -> None:
    assert all((versions.REPOSITORY / path).exists() for path in versions.ON_RANKS)
