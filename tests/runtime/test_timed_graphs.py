"""A timed forward computes what the graph computes, bit for bit, and says where the time went."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import moecompile
from moecompile.passes.recompute import recompute
from moecompile.runtime.profile import StepProfile, TimedGraphs, Times, TrafficMeter
from moecompile.torch_private import in_backward
from tests.plan.plans import a_plan
from tests.tiny import TinyGPT


def step(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(ids)
    out.square().sum().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_outputs_and_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    ids = torch.randint(31, (2, 6))
    model = moecompile.compile_model(TinyGPT(), ["experts.num_routed=4", "routing.top_k=2"], example=ids).train()
    before = step(model, ids)
    graphs = TimedGraphs(model, None)
    graphs.install()
    timed = step(model, ids)
    graphs.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, timed, strict=True))
    assert len(graphs.times) == 2
    for times in graphs.times.values():
        assert times.rows == [ids.numel() * 2]
        assert {"router", "experts"} <= set(times.seconds[0])
        assert not {"dispatch", "combine", "waiting"} & set(times.seconds[0])
    step(model, ids)
    assert all(len(times.seconds) == 1 for times in graphs.times.values())  # removed


@pytest.mark.parametrize("checkpointing", ["full", "keep_exchanges"])
def test_regions_that_are_computed_again_are_timed_once_and_stay_so(checkpointing: str) -> None:
    """A budget wraps the graph itself, as here, where there is no layer around it."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    ffn = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = moecompile.compile_model(ffn, ["experts.num_routed=4", "routing.top_k=2"], example=x).train()
    before = step(model, x)
    recompute(model, moecompile.plan_of(model), checkpointing)
    experts, calls = model.get_submodule("experts"), []
    experts.register_forward_pre_hook(lambda *_: calls.append(in_backward()))
    graphs = TimedGraphs(model, None)
    for turn in range(3):
        graphs.remove()  # as after every micro-batch
        if turn:
            graphs.install()
        calls.clear()
        assert all(torch.equal(a, b) for a, b in zip(before, step(model, x), strict=True))
        assert calls == [False, True]
    (times,) = graphs.times.values()
    assert times.rows == [10, 10] and len(times.seconds) == 2  # what backward computed is not in them
    assert times.seconds[0]["experts"] > 0


def test_a_micro_batch_without_a_backward_is_followed_by_others() -> None:
    x = torch.randn(5, 8)
    ffn = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = moecompile.compile_model(ffn, ["experts.num_routed=4"], example=x)
    graphs = TimedGraphs(model, None)
    for _ in range(2):
        graphs.install()
    model(x)
    graphs.remove()
    assert "forward" not in vars(model)
    (times,) = graphs.times.values()
    assert len(times.seconds) == 1


def test_exchanges_are_those_of_a_layer_by_its_whole_name(tmp_path: Path) -> None:
    plan = a_plan()
    profile = StepProfile(plan, tmp_path, 9, TrafficMeter(plan.mesh), routes=False)
    rows = [{"op": op} for op, _ in plan.layers[0].scheduled_steps]
    for path, found in (("model.layers.0.mlp", len(rows)), ("model.other_layers.0.mlp", 0)):
        assert len(profile._exchanges({path: Times(exchanges=rows)})) == found
