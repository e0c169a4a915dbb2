"""tests/oldest.py: it knows the oldest torch, and tests nothing only where that cannot be had, which it says."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import oldest

CPU_BUILD = ["filelock", "sympy>=1.13.3", 'pyreadline; platform_system == "Windows"', 'optree; extra == "optree"']
ON_LINUX = 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"'


def report(*requires: str) -> str:
    return json.dumps({"install": [{"metadata": {"name": "torch", "requires_dist": [*CPU_BUILD, *requires]}}]})


def test_the_oldest_torch_is_that_of_the_project() -> None:
    assert oldest.oldest() == "2.12"


def test_a_build_with_cuda_is_left_out_and_others_are_not() -> None:
    assert oldest.why_not(report()) == ""
    assert oldest.why_not(report('triton==3.7.1; platform_system == "Windows"')) == ""
    assert oldest.why_not(report(ON_LINUX)) == (
        "1 packages of CUDA, about 3 GB, would come with it (nvidia-nccl-cu13, ...)"
    )


@pytest.mark.parametrize(("code", "out", "why"), [(1, "", "no network"), (0, report(ON_LINUX), "packages of CUDA")])
def test_what_is_not_tested_is_said(
    code: int, out: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, code, stdout=out, stderr="no network")

    monkeypatch.setattr(subprocess, "run", run)
    assert oldest.main() == 0
    assert "torch==2.12.* is NOT tested: " in (said := capsys.readouterr().err) and why in said
    assert len(asked) == 1 and "--dry-run" in asked[0]


def test_its_tests_exist() -> None:
    assert all((oldest.REPOSITORY / path).exists() for path in oldest.TESTS)
