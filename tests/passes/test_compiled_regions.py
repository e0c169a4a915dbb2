"""What `trainer.compile=regions` does to a rewritten FFN: one graph for all token counts, forward and backward."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moecompile.passes.base import run_on_model
from moecompile.passes.recompute import Recompute
from moecompile.passes.run import CompileRegions
from moecompile.pipeline import compile_model, plan_of
from moecompile.torch_private import compile_whole
from tests.tiny import COPY4, Gated, config

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
KINDS = {
    "softmax": [],
    "sigmoid, bias, capacity": ["routing.score=sigmoid", "balance.rule=bias", "routing.capacity_factor=1.25"],
}


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of all weights."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out * out).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at inputs that are no leaves
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_other_token_counts_compile_nothing_after_the_second_step(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters: Any = torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    counters.clear()
    plain = compile_model(nn.Sequential(Gated(), Gated()), config(*COPY4, *KINDS[kind]), example=torch.zeros(2, 8))
    model, compilations = copy.deepcopy(plain), []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # put back what `compile_whole` sets
        for region in [module for module in model.modules() if isinstance(module, fx.GraphModule)]:
            compile_whole(region)
        for num_tokens in (24, 40, 56, 17, 96, 33):
            x = torch.randn(num_tokens, 8)
            for got, wanted in zip(gradients(model, x), gradients(plain, x), strict=True):
                assert torch.allclose(got, wanted, atol=1e-5)
            compilations.append(counters["stats"]["unique_graphs"])
    assert counters["graph_break"] == {}
    assert compilations[0] >= 1
    assert compilations[1:] == compilations[1:2] * 5, compilations


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("checkpointing", "backend"),
    [("full", "aot_eager"), pytest.param("keep_exchanges", "inductor", marks=pytest.mark.slow)],
)
def test_a_compiled_region_is_computed_again(checkpointing: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph is within what wraps it, as with a budget that computes the experts of a layer again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    plain = compile_model(nn.Sequential(Gated(), Gated()), config(*COPY4), example=torch.zeros(2, 8))
    model = copy.deepcopy(plain)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run_on_model([CompileRegions(), Recompute(checkpointing=checkpointing)], model, plan_of(plain))
        x = torch.randn(24, 8)
        for got, wanted in zip(gradients(model, x), gradients(plain, x), strict=True):
            assert torch.allclose(got, wanted, atol=1e-5)
