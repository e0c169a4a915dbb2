"""Shrinking keeps what can go wrong and says what it changed."""

from __future__ import annotations

import pytest
import torch

from moecompile.compose import compose_config
from moecompile.runtime.data import IGNORED
from moecompile.schema import accumulation_steps, mesh_spec, validate
from moecompile.tasks.verify import shrink
from moecompile.verify.job import uneven


def test_a_nano_recipe_keeps_its_structure() -> None:
    before = compose_config(["recipe=deepseek_ep"])
    after, notes = shrink(before, steps=3)
    assert (after.experts, after.routing, after.balance) == (before.experts, before.routing, before.balance)
    assert mesh_spec(after.mesh) == mesh_spec(before.mesh)
    assert after.model == before.model
    assert after.trainer.max_steps == 3 and after.data.seq_len == 32
    assert any(note.startswith("data.seq_len: 128 -> 32") for note in notes)
    assert before.data.seq_len == 128  # a copy was changed


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ("h800_256x8", (2, 2, 4)),  # EP groups span nodes, so they still do
        ("h100_8", (1, 8, 8)),
        ("h100_2x8", (2, 2, 4)),
    ],
)
def test_a_cluster_becomes_a_few_processes(mesh: str, shape: tuple[int, int, int]) -> None:
    config = compose_config(
        ["task=verify", "model=deepseek_nano", f"mesh={mesh}", "experts.num_routed=64", "routing.top_k=4"]
    )
    after, notes = shrink(config, steps=2)
    spec = mesh_spec(after.mesh)
    assert (spec.num_nodes, spec.ranks_per_node, spec.ep) == shape
    assert spec.device == "cpu"
    validate(after)
    assert [note for note in notes if note.startswith("mesh.device")]


@pytest.mark.parametrize(("steps", "without"), [(1, 0), (2, 1)])
def test_a_rank_without_targets_has_some_in_another_step(steps: int, without: int) -> None:
    """Of a single step, a rank without any is not tried at all."""
    config, _ = shrink(compose_config(["mesh=cpu_1x2"]), steps=steps)
    accumulate = accumulation_steps(config, mesh_spec(config.mesh))
    labels = [uneven({"labels": torch.zeros(1, 8)}, i, config)["labels"] for i in range(steps * 2 * accumulate)]
    empty = [i for i, each in enumerate(labels) if bool((each == IGNORED).all())]
    assert empty == list(range(accumulate, 2 * accumulate)) * without
