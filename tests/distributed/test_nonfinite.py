"""A loss or gradient that is not finite: found on all ranks at once, told with module and rank, or dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.nn import Experts, routers_of
from moecompile.runtime.nonfinite import NotFinite
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import losses, rows, run

COMMON = ["mesh=cpu_1x2", "trainer.max_steps=3", "trainer.save_checkpoint=false", "data.micro_batch_size=2"]
MOE = "model.layers.1.mlp"


def poison_experts(model: nn.Module) -> None:
    """The second half of the experts, those of rank 1, has weights that are not finite."""
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    with torch.no_grad():
        experts.down_proj[8:] = torch.inf


def poison_gradient(model: nn.Module) -> None:
    """Forward is finite; on rank 0 a gradient is not."""
    if dist.get_rank() == 0:
        model.get_submodule("model.layers.0").register_forward_hook(lambda *args: explode(args[-1]))


def explode(output: Tensor) -> Tensor:
    if output.requires_grad:
        output.register_hook(lambda grad: grad / 0)
    return output


class AtStep:
    """Makes the output of the MoE layer NaN on rank 1, in one micro-batch of one optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, model: nn.Module) -> None:
        router = dict(routers_of(model))[f"{MOE}.router"]

        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
            _seed, step, micro_batch, _layer = router.key.tolist()
            bad = router.training and (step, micro_batch) == (self.step, 3)  # the second one of rank 1
            return output * torch.nan if bad else None

        model.get_submodule(MOE).register_forward_hook(hook)


def stopped(folder: Path, change: Any, *overrides: str) -> str:
    try:
        run([*COMMON, *overrides], folder, change)
    except NotFinite as error:
        return str(error)
    raise AssertionError("the run went on")


def job(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    out: dict[str, Any] = {
        "experts": stopped(root / "experts", poison_experts),
        "gradient": stopped(root / "gradient", poison_gradient),
        "second micro-batch": stopped(root / "late", AtStep(1)),
    }
    skipping = ["trainer.on_nan=skip", "balance.rate=0.01", "trainer.save_checkpoint=true"]
    out["skipped"] = run([*COMMON, *skipping], root / "skip", AtStep(1)).steps_skipped
    out["all"] = run([*COMMON, *skipping, "trainer.max_steps=1"], root / "all", poison_experts).steps_skipped
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("nan")
    return folder, run_distributed_test(job, 2, str(folder), timeout_s=400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "step", "began"),
    [
        ("experts", 1, f"{MOE}.experts on rank 1 of 2: its weights are not finite"),
        ("gradient", 1, "in model.layers.0 on rank 0 of 2: the gradient of its output is not finite"),
        ("second micro-batch", 2, f"{MOE} on rank 1 of 2: its output is not finite"),
    ],
)
def test_all_ranks_stop_and_name_the_place(
    results: tuple[Path, list[dict[str, Any]]], case: str, step: int, began: str
) -> None:
    for result in results[1]:
        assert result[case].startswith(f"the loss or a gradient of step {step} is not finite. It began in model.")
        assert began in result[case]
        assert "trainer.on_nan=skip" in result[case]


@pytest.mark.slow
def test_a_step_is_dropped_on_all_ranks_and_counted(results: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = results
    assert [result["skipped"] for result in found] == [1, 1]
    assert list(losses(folder / "skip")) == [1, 3]
    assert [row["steps_skipped"] for row in rows(folder / "skip")] == ["", "1.0"]
    assert all(result["all"] == 1 for result in found)
    assert losses(folder / "all") == {}
