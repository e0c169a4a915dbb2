"""What `trainer.compile=regions` does to a rewritten FFN: one graph for all token counts, forward and backward."""

from __future__ import annotations

import copy
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moecompile.pipeline import compile_model
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
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
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
