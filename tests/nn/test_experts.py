"""Experts and shared experts against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.errors import MoecompileError
from moecompile.nn import Experts, SharedExperts
from tests.tiny import randomize

D, FF, E = 6, 10, 4


class SiLUMul(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


def experts(gated: bool, bias_up: bool, bias_down: bool) -> Experts:
    made = Experts(
        D, FF, E, gated=gated, activation=SiLUMul() if gated else nn.GELU(),
        bias_up=bias_up, bias_down=bias_down, dtype=torch.float64,
    )  # fmt: skip
    randomize(made)
    return made


def loop(module: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """One row at a time."""
    out, i = [], 0
    for expert, count in enumerate(counts):
        for row in rows[i : i + count]:
            in_bias, out_bias = getattr(module, f"{module.in_name}_bias"), module.down_proj_bias
            hidden = getattr(module, module.in_name)[expert] @ row
            hidden = hidden + in_bias[expert] if in_bias is not None else hidden
            hidden = F.silu(hidden[:FF]) * hidden[FF:] if module.gated else F.gelu(hidden)
            result = module.down_proj[expert] @ hidden
            out.append(result + out_bias[expert] if out_bias is not None else result)
        i += count
    return torch.stack(out)


@pytest.mark.parametrize("gated", [False, True], ids=["up_down", "gated"])
@pytest.mark.parametrize(("bias_up", "bias_down"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 6, 0], [1, 0, 0, 0]])
def test_experts_equal_a_loop(gated: bool, bias_up: bool, bias_down: bool, counts: list[int]) -> None:
    grads = []
    for forward in (lambda m, r: m(r, torch.tensor(counts)), lambda m, r: loop(m, r, counts)):
        module = experts(gated, bias_up, bias_down)
        rows = torch.randn(
            sum(counts), D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        out = forward(module, rows)
        out.square().sum().backward()
        grads.append([out, rows.grad, *(p.grad for p in module.parameters())])
    assert len(grads[0]) == 2 + 2 + bias_up + bias_down
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_names_and_shapes_of_the_weights() -> None:
    shapes = {name: tuple(p.shape) for name, p in experts(True, True, True).named_parameters()}
    assert shapes == {
        "gate_up_proj": (E, 2 * FF, D), "gate_up_proj_bias": (E, 2 * FF), "down_proj": (E, D, FF), "down_proj_bias": (E, D),
    }  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in experts(False, False, False).named_parameters()}
    assert shapes == {"up_proj": (E, FF, D), "down_proj": (E, D, FF)}


def test_no_rows_at_all() -> None:
    module = experts(True, True, True)
    rows = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    module(rows, torch.zeros(E, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in module.parameters())


NO_MODE = {
    "lent and last": ({"borrowed", "grad_token"}, "backend, borrowed and grad_token exclude each other"),
    "lent to a back end": ({"source_R", "weights_R", "backend", "max_per_token", "borrowed"}, "exclude each other"),
    "sources without weights": ({"source_R"}, "source_R goes with weights_R"),
    "a bound without a back end": ({"source_R", "weights_R", "max_per_token"}, "and backend with max_per_token"),
    "a back end of rows": ({"backend", "max_per_token"}, "a backend computes fused experts"),
}


@pytest.mark.parametrize("name", NO_MODE)
def test_modes_that_exclude_each_other(name: str) -> None:
    given, message = NO_MODE[name]
    with pytest.raises(MoecompileError, match=message):
        experts(True, False, False)(torch.zeros(1, D), torch.ones(E), **dict.fromkeys(given, "any"))


@pytest.mark.parametrize("gated", [False, True], ids=["up_down", "gated"])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_experts_are_a_dense_ffn(gated: bool, bias: bool) -> None:
    module = SharedExperts(
        D, FF, gated=gated, activation=SiLUMul() if gated else nn.GELU(), bias_up=bias, bias_down=bias
    )  # fmt: skip
    randomize(module)
    x = torch.randn(2, 3, D)
    hidden = F.silu(module.gate_proj(x)) * module.up_proj(x) if gated else F.gelu(module.up_proj(x))
    assert torch.equal(module(x), F.linear(hidden, module.down_proj.weight, module.down_proj.bias))
    assert len(list(module.parameters())) == (2 + gated) * (1 + bias)
