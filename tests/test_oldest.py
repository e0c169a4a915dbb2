"""tests/oldest.py: it knows the oldest torch, and tests nothing only where that cannot be had, which it says."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import oldest

CPU_BUILD = ["filelock", "sympy>=1.13.3", 'pyreadline; platform_system == "Windows"', 'optree; extra == "optree"']
ON_LINUX = 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'


def report(*requires: str) -> str:
    return json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": [*CPU_BUILD, *requires]}}]})


def test_the_oldest_torch_is_that_of_the_project() -> None:
    assert oldest.oldest() == "2.11"


def test_an_image_with_a_build_before_the_release_will_do() -> None:
    """pip leaves the torch of NGC 26.02 alone."""
    project = tomllib.loads((oldest.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (Requirement(text) for text in project["dependencies"] if text.startswith("torch>="))
    assert "2.11.0a0+eb65b36914.nv26.2" in torch.specifier and "2.10.1" not in torch.specifier


def test_a_build_with_cuda_is_left_out_and_others_are_not() -> None:
    assert oldest.why_not(report()) == ""
    assert oldest.why_not(report('triton==3.7.1; platform_system == "Windows"')) == ""
    assert oldest.why_not(report(ON_LINUX)) == (
        "1 packages of CUDA, about 3 GB, would come with it (nvidia-nccl-cu13, ...)"
    )


@pytest.mark.parametrize(("code", "out", "why"), [(1, "", "no network"), (0, report(ON_LINUX), "packages of CUDA")])
def test_what_is_not_tested_is_said(
    code: int, out: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        failed = code if "install" in command else 0
        return subprocess.CompletedProcess(command, failed, stdout=out, stderr="no network")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(oldest, "REPOSITORY", repository(tmp_path))
    assert oldest.main() == 0
    assert "torch==2.11.* is NOT tested: " in (said := capsys.readouterr().err) and why in said
    _, made, wanted = asked
    assert "venv" in made and "--dry-run" in wanted


def repository(folder: Path) -> Path:
    """Without a virtual environment."""
    (folder / "pyproject.toml").write_bytes((oldest.REPOSITORY / "pyproject.toml").read_bytes())
    return folder


def test_a_python_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert oldest.main(["--python", "python3.99"]) == 0
    assert "torch==2.11.* on python3.99 is NOT tested: there is no such Python" in capsys.readouterr().err
    (shim := tmp_path / "python3.98").write_text(
        "#!/bin/sh\necho 'pyenv: python3.98: command not found' >&2\nexit 127\n"
    )
    shim.chmod(0o755)
    assert oldest.main(["--python", str(shim)]) == 0
    assert "is NOT tested: pyenv: python3.98: command not found" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "ran"), [((), 0), (("--cuda",), 1), (("--cuda", "--whole"), 2)])
def test_what_is_run(options: tuple[str, ...], ran: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's libraries, and on ranks, where that is asked for."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=report(ON_LINUX), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(oldest, "REPOSITORY", repository(tmp_path))
    assert oldest.main(options) == 0
    assert sum("pytest" in command for command in asked if "install" not in command) == ran


def test_its_tests_exist() -> None:
    assert all((oldest.REPOSITORY / path).exists() for path in (*oldest.TESTS, *oldest.ON_RANKS))
