"""What a plan says to change where it does not fit: what it promises is what the plan of the changed config says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moecompile
from moecompile.plan import Estimate

SMALL = ["hardware.memory_gib=0.001", "mesh.ranks_per_node=2", "data.global_batch_size=32", "data.micro_batch_size=4"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(nn.functional.gelu(self.up(x)))
        return out


def estimated(*overrides: str) -> Estimate:
    torch.manual_seed(0)
    found = moecompile.make_plan(
        nn.Sequential(*(Block() for _ in range(4))), overrides, example=torch.zeros(1, 64)
    ).estimate
    assert found is not None
    return found


def test_a_plan_that_fits_needs_none() -> None:
    assert estimated("mesh.ranks_per_node=2").remedies == ()


@pytest.mark.parametrize("checkpointing", ["none", "keep_exchanges", "full"])
def test_each_remedy_takes_what_the_plan_of_the_changed_config_takes(checkpointing: str) -> None:
    given = [*SMALL, f"trainer.checkpointing={checkpointing}"]
    before = estimated(*given)
    assert not before.fits
    assert before.remedies
    for remedy in before.remedies:
        changed = {item.partition("=")[0] for item in remedy.change.split()}
        kept = [item for item in given if item.partition("=")[0] not in changed]
        after = estimated(*kept, *remedy.change.split())
        assert after.memory_bytes_per_rank.total == remedy.total < before.memory_bytes_per_rank.total
        assert after.fits == remedy.fits


def test_what_is_offered() -> None:
    offered = [remedy.change for remedy in estimated(*SMALL).remedies]
    assert offered[:3] == [
        "trainer.checkpointing=full", "data.micro_batch_size=1", "trainer.precision=bf16_params",
    ]  # fmt: skip
    assert offered[3] == "mesh.num_nodes=8 mesh.ranks_per_node=8 mesh.ep=2 data.global_batch_size=256"
    assert offered[4] == " ".join(offered[:3])
    none = [remedy.change for remedy in estimated(*SMALL, "trainer.checkpointing=none").remedies]
    assert none[0] == "trainer.checkpointing=keep_exchanges"


def test_as_few_ranks_as_make_it_fit() -> None:
    """Each rank's share of the weights halves with twice the ranks, so some mesh is the first that fits."""
    total = estimated(*SMALL).memory_bytes_per_rank.total
    enough = f"hardware.memory_gib={0.75 * total / 2**30}"
    found = [r for r in estimated(enough, *SMALL[1:]).remedies if r.change.startswith("mesh.num_nodes")]
    assert len(found) == 1
    assert found[0].fits


def test_what_the_estimate_assumes() -> None:
    assumes = estimated(*SMALL, "data.seq_len=64", "trainer.precision=bf16_mixed").assumes
    assert assumes is not None
    assert (assumes.tokens_per_rank, assumes.seq_len, assumes.accumulation) == (256, 64, 4)
    assert (assumes.precision, assumes.optimizer, assumes.hardware) == ("bf16_mixed", "adamw", "laptop")
    assert assumes.memory_bytes == round(0.001 * 2**30)
