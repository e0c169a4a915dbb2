"""task=verify of adapters: it passes as they are, and fails if experts are frozen by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from moecompile.compose import compose_config
from moecompile.passes.shard import ShardModel
from moecompile.plan import Plan
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import SHORT

SMALL = [
    "model=mixtral_8x7b", "mesh=cpu_1x2", "adapters=lora", "adapters.rank=2", "data.vocab_size=300", "data.seq_len=16",
    "data.micro_batch_size=1", "data.global_batch_size=4", "verify.dtype=float64", SHORT,
]  # fmt: skip

MUTATIONS = {"frozen": "gradients on one side only"}


def _both(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    right = ShardModel.run

    def frozen(step: ShardModel, model: nn.Module, plan: Plan) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".experts.lora_" not in name)
        right(step, model, plan)

    found = {}
    for name, function in (("right", right), ("frozen", frozen)):
        (folder / name).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardModel, "run", function)
            found[name] = certify_config(shrink(compose_config(SMALL), steps=2)[0], folder / name)[0]
    return found


@pytest.mark.slow
def test_frozen_experts_are_caught(tmp_path: Path) -> None:
    found = run_distributed_test(_both, 2, tmp_path, timeout_s=240)[0]
    assert [check for check in found["right"] if not check.passed] == []
    assert any(check.name.endswith("gradients of experts") for check in found["right"])
    failed = [check.name for check in found["frozen"] if not check.passed]
    assert any(MUTATIONS["frozen"] in name for name in failed), failed
