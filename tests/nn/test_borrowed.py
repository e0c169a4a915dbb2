"""Modules of experts with borrowed ones: the same as if the rank had them all, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts, MatrixExperts

D, WIDTH, OWN = 4, 6, 2
COUNTS = torch.tensor([3, 1, 2, 0])  # two own experts, one borrowed, one slot that is empty
F64 = torch.float64


class Activation(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Own(nn.Module):
    act_fn = activation_fn = staticmethod(F.silu)


def stacked(*shape: int, seed: int) -> Tensor:
    """Of three experts."""
    return torch.randn(3, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


FORMS = {
    "gated": ((2 * WIDTH, D), (D, WIDTH)),
    "biases": ((2 * WIDTH, D), (2 * WIDTH,), (D, WIDTH), (D,)),
    "transposed": ((D, 2 * WIDTH), (WIDTH, D)),
    "matrices": ((WIDTH, D), (WIDTH, D), (WIDTH, D)),
}


def call(form: str, rows: Tensor, counts: Tensor, weights: list[Tensor], borrowed: list[Tensor] | None) -> Tensor:
    """The module of this form with `weights` of its local experts."""
    num_experts, own = weights[0].shape[0], Own()
    if form in ("gated", "biases"):
        biases = form == "biases"
        experts = Experts(
            D, WIDTH, num_experts, gated=True, activation=Activation(), bias_up=biases, bias_down=biases, dtype=F64
        )
        names = [name for name, _ in experts.named_parameters(recurse=False)]
        arguments = dict(zip(names, weights, strict=True))
        out: Tensor = torch.func.functional_call(experts, arguments, (rows, counts), {"borrowed": borrowed})
        return out
    if form == "transposed":
        module = ExistingExperts(num_experts, own, ("gate_up_proj", "down_proj"), transposed=True)
    else:
        module = MatrixExperts(num_experts, own, ("gate", "up", "down"))
        weights = [weight.flatten(0, 1) for weight in weights]
    result: Tensor = module(rows, counts, *weights, borrowed=borrowed)
    return result


@pytest.mark.parametrize("form", FORMS)
def test_borrowed_experts_compute_as_if_they_were_here(form: str) -> None:
    everything = [stacked(*shape, seed=i).requires_grad_() for i, shape in enumerate(FORMS[form])]
    rows = torch.randn(6, D, dtype=F64, generator=torch.Generator().manual_seed(9)).requires_grad_()
    wanted = call(form, rows, COUNTS[:3], everything, None)
    grads = torch.autograd.grad(wanted.square().sum(), [rows, *everything])
    got = call(form, rows, COUNTS, [w[:OWN] for w in everything], [w[OWN:] for w in everything])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    for grad, expected in zip(torch.autograd.grad(got.square().sum(), [rows, *everything]), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_borrowed_is_the_plain_module(form: str) -> None:
    weights = [stacked(*shape, seed=i)[:OWN] for i, shape in enumerate(FORMS[form])]
    rows = torch.randn(4, D, dtype=F64, generator=torch.Generator().manual_seed(9))
    nothing = [weight[:0] for weight in weights]
    counts = torch.tensor([3, 1, 0, 0])
    assert torch.equal(call(form, rows, counts, weights, nothing), call(form, rows, counts[:2], weights, None))
