"""What runs on a GPU, on GPUs that are played by the CPU (tests/standin): the losses are those of CPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standin import compare

REPOSITORY = Path(__file__).parents[2]
IN_CI = ("two nodes", "pairs of stages", "all axes", "replicas, in bf16")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which builds the device")


def on_gpus(*words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(compare.STANDIN), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_a_training_has_the_losses_of_cpus(name: str, tmp_path: Path) -> None:
    found, allowed = compare.off(name, tmp_path)
    assert found <= allowed


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in compare.CASES if name not in IN_CI])
def test_every_other_training_has_the_losses_of_cpus(name: str, tmp_path: Path) -> None:
    found, allowed = compare.off(name, tmp_path)
    assert found <= allowed


PLAYED = """
import torch

x = torch.ones(3, 4, device="cuda", requires_grad=True)
(x * 2).sum().backward()
assert x.grad.device.type == "cuda" and x.grad.tolist() == [[2.0] * 4] * 3
try:
    x + torch.ones(3, 4)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise AssertionError("tensors of two devices were mixed")

import torch.distributed as dist

dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
for wrong in (torch.ones(2), torch.ones(4, 4, device="cuda").t(), torch.ones(2, dtype=torch.int16, device="cuda")):
    try:
        dist.all_reduce(wrong)
    except RuntimeError:
        continue
    raise AssertionError(f"NCCL would have refused {wrong}")
"""


@pytest.mark.slow
def test_it_refuses_what_a_gpu_refuses() -> None:
    done = on_gpus("-c", PLAYED, timeout_s=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_step_takes_the_planned_memory_of_a_gpu(tmp_path: Path) -> None:
    """Of the ops that a GPU runs, by what they allocate: in eager mode, activations are computed piece by piece."""
    done = on_gpus(
        "benchmarks/gpu.py", "--report", str(tmp_path / "gpu.json"), "--parts", "memory bf16_params", timeout_s=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_the_tests_for_a_gpu_pass() -> None:
    needs_kernels = "layer or two_ranks or host_does"
    done = on_gpus(
        "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:xdist", "-k", f"not ({needs_kernels})", timeout_s=1500
    )
    assert done.returncode == 0, done.stdout
