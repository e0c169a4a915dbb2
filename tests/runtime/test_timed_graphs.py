"""A timed forward computes what the graph computes, bit for bit, and says where the time went."""

from __future__ import annotations

import torch

import moecompile
from moecompile.runtime.profile import TimedGraphs
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
