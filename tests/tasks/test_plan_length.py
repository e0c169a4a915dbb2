"""task=plan of long sequences: the model is recorded on a short one, and the numbers are those of the long one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moecompile.compose import compose_config
from moecompile.models.build import LONGEST_EXAMPLE, build_model, example_inputs
from moecompile.pipeline import make_plan
from moecompile.tasks import plan as task

LONG = 2 * LONGEST_EXAMPLE
SMALL = ["model.config.hidden_size=32", "model.config.intermediate_size=64", "model.config.num_hidden_layers=2"]
KINDS = {
    "dense": ["recipe=mixtral_ep", *SMALL],
    "existing": ["model=olmoe_1b_7b", "mesh=h100_8", "model.config.num_hidden_layers=2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_the_example_changes_nothing(kind: str) -> None:
    config = compose_config([*KINDS[kind], f"data.seq_len={LONG}"])
    short = example_inputs(build_model(config.model, 0), LONG)
    long = example_inputs(build_model(config.model, 0), LONG, longest=LONG)
    assert [e["input_ids"].shape[1] for e in (short, long)] == [LONGEST_EXAMPLE, LONG]
    plans = [make_plan(build_model(config.model, 0), config, example=example) for example in (short, long)]
    assert plans[0] == plans[1] and plans[0].hash == plans[1].hash
    assert plans[0].estimate is not None and plans[1].estimate is not None
    assert dataclasses.asdict(plans[0].estimate) == dataclasses.asdict(plans[1].estimate)
    half = compose_config([*KINDS[kind], f"data.seq_len={LONG // 2}"])
    less = make_plan(build_model(half.model, 0), half, example=short)
    assert less.estimate is not None
    activations = [plan.estimate.memory_bytes_per_rank.activations for plan in (less, plans[0]) if plan.estimate]
    assert activations[1] > 1.5 * activations[0] > 0  # the numbers do follow data.seq_len


def test_a_hundred_thousand_tokens_are_planned(tmp_path: Path) -> None:
    """Attention on that many would need 40 GB a head."""
    torch.manual_seed(0)
    task.run(compose_config([*KINDS["dense"], "data.seq_len=100000"]), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["memory_bytes_per_rank"]["activations"] > 100_000 * 32 * 4
