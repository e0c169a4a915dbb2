"""Every recipe with its exchanges in flight: N ranks equal one process; a wait that is left out is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.compose import compose_config
from moecompile.ops import in_flight
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import NARROW, SHORT

RECIPES = (
    "deepseek_ep", "deepseek_v2", "deepseek_v4", "gpt_oss", "kimi_k3", "longcat", "mixtral_ep", "nemotron3", "olmoe",
    "qwen3_moe", "switch_ep",
)  # fmt: skip
CASES = [(recipe, 2) for recipe in RECIPES] + [("deepseek_ep", 4), ("gpt_oss", 4), ("mixtral_ep", 4), ("switch_ep", 4)]
"""Recipe and chunks: four of them for gated and plain experts, biases, drops."""
TINY = [
    "mesh=cpu_1x2", "data.vocab_size=300", "data.seq_len=16", "data.micro_batch_size=1", "data.global_batch_size=8",
    "verify.dtype=float64", "dispatch.overlap=chunks", "trainer.checkpointing=keep_exchanges",
    SHORT,
]  # fmt: skip
LAYERS = ["model.config.num_hidden_layers=2", *NARROW]
SHALLOW = {
    "switch_ep": ["model.config.num_layers=2", "model.config.d_model=64", "model.config.d_ff=128"],
    "nemotron3": ["model.config.layers_block_type=[mamba,mlp,attention,mlp]"],
}


def _certified(recipe: str, chunks: int, folder: Path) -> list[Check]:
    folder.mkdir(exist_ok=True)
    config = compose_config([f"recipe={recipe}", *TINY, *SHALLOW.get(recipe, LAYERS), f"dispatch.chunks={chunks}"])
    return certify_config(shrink(config, steps=1)[0], folder)[0]


def _without_a_wait(ticket: int, *, hands_over: bool = True) -> Tensor:
    """What a reader of rows may see that does not wait: a buffer that nothing was written to yet."""
    out, _, work = in_flight._in_flight.pop(ticket)
    work.wait()
    return torch.zeros_like(out) if out.is_floating_point() else out


def _all(rank: int, world_size: int, folder: Path) -> dict[tuple[str, int], list[Check]]:
    found = {(recipe, chunks): _certified(recipe, chunks, folder / f"{recipe}-{chunks}") for recipe, chunks in CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_flight, "_land", _without_a_wait)
        found["a wait left out", 2] = _certified("deepseek_ep", 2, folder / "wrong")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_distributed_test(_all, 2, tmp_path_factory.mktemp("verify"), timeout_s=500)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "chunks"), CASES)
def test_recipes_with_chunks(recipe: str, chunks: int, found: dict[tuple[str, int], list[Check]]) -> None:
    checks = found[recipe, chunks]
    assert [check for check in checks if not check.passed] == [] and len(checks) > 10
    gradients = [check for check in checks if "gradients of" in check.name and "rounding" not in check.name]
    assert len(gradients) == 3 and max(check.error for check in gradients) <= 1e-10


@pytest.mark.slow
def test_a_wait_left_out_is_caught(found: dict[tuple[str, int], list[Check]]) -> None:
    failed = [check.name for check in found["a wait left out", 2] if not check.passed]
    assert "float64: outputs" in failed and "float64: gradients of experts" in failed
