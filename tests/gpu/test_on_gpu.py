"""What benchmarks/gpu.py reports, as tests on the first GPU; tests/benchmarks/test_gpu.py runs the same on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moecompile.compose import conf_dir
from moecompile.nn import set_random_key
from moecompile.ops.host import finish_read, start_read
from tests.tiny import a_router

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
CUDA = torch.device("cuda")
RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml") if not path.stem.startswith("upcycle"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_gradients_are_those_of_the_cpu(recipe: str, precision: str) -> None:
    from on_gpu.correct import check_recipe

    found = check_recipe(recipe, CUDA, precision)
    assert found["ok"], found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_agrees_with_other_layers(dtype: torch.dtype) -> None:
    from on_gpu.layer import SMALL, measure

    found = measure(SMALL[0], CUDA, dtype, rounds=1)
    assert found["ok"], found["errors"]
    assert all(row["device_ms"] > 0 and row["kernels"] > 0 for row in found["layers"].values())


def test_the_host_does_not_wait_for_a_bf16_layer_of_one_rank() -> None:
    from on_gpu.layer import SMALL, measure

    row = measure(SMALL[0], CUDA, torch.bfloat16, rounds=1)["layers"]["moecompile"]
    assert row["waits"] == 0, row


@pytest.mark.parametrize("kind", ["flat", "dedup", "allgather"])
def test_two_ranks_on_one_gpu_are_one_process(kind: str, tmp_path: Path) -> None:
    from on_gpu import ranks

    found = ranks.check(kind, CUDA, tmp_path)
    assert found["ok"], found


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_a_training_has_the_losses_of_the_cpu(precision: str, tmp_path: Path) -> None:
    from on_gpu import runs

    found = runs.train(CUDA, precision, tmp_path)
    assert found["ok"], found


def test_a_step_takes_the_planned_memory(tmp_path: Path) -> None:
    from on_gpu import runs

    found = runs.memory(CUDA, "fp32", tmp_path, large=True)
    assert found["ok"], found


def test_numbers_are_read_from_the_device() -> None:
    values = torch.arange(100, device=CUDA)
    copies = [start_read(values * i) for i in range(3)]
    for i, copy in enumerate(copies):
        assert copy.is_pinned() and torch.equal(finish_read(copy), torch.arange(100) * i)


def test_random_keys_reach_the_routers() -> None:
    model = torch.nn.ModuleList([a_router(8, 4), a_router(8, 4)]).to(CUDA)
    set_random_key(model, 1, 2, 3)
    assert [router.key.tolist() for router in model] == [[1, 2, 3, 0], [1, 2, 3, 1]]
