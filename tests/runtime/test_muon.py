"""Muon in one process is torch's own Muon on the matrices that it takes; what torch does not take is a loop over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moecompile.nn.matrices import Layout
from moecompile.runtime.muon import Muon, orthogonalized, scale_of
from moecompile.torch_private import local_part

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], count: int = 3) -> None:
    for step in range(count):
        generator = torch.Generator().manual_seed(step + 1)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_muon(scale: str, nesterov: bool) -> None:
    """Which computes in bf16: equal up to what bf16 rounds, of steps that are about 0.02 large."""
    shapes = ((16, 40), (40, 16), (24, 24))
    ours, theirs, before = weights(*shapes), weights(*shapes), weights(*shapes)
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    reference = torch.optim.Muon(theirs, adjust_lr_fn=scale, **options)
    groups = [{"params": ours, "kind": "muon"}]
    steps(Muon(groups, dict.fromkeys(ours, Layout()), scale=scale, precision="bf16", **options), ours)
    steps(reference, theirs)
    for got, wanted, start in zip(ours, theirs, before, strict=True):
        moved = (wanted - start).detach().abs().max()
        assert float((got - wanted).detach().abs().max()) <= 0.02 * float(moved)


def test_singular_values_become_about_one() -> None:
    x = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    values = torch.linalg.svdvals(orthogonalized(x, 5, COEFFICIENTS, torch.float32))
    assert values[3].abs().max() == 0  # an expert without tokens stays where it is
    assert values[[0, 1, 2, 4]].min() > 0.6 and values.max() < 1.3


def test_each_matrix_is_scaled_by_its_own_norm() -> None:
    x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] *= 1e-6
    together = orthogonalized(x, 5, COEFFICIENTS, torch.float64)
    for one, matrix in zip(together, x, strict=True):
        torch.testing.assert_close(one, orthogonalized(matrix, 5, COEFFICIENTS, torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("layout", "shape", "matrix"),
    [
        (Layout(), (6, 4), lambda w, _: w),
        (Layout(transposed=True), (2, 4, 6), lambda w, e: w[e].T),
        (Layout(parts=2), (2, 6, 4), lambda w, e: w[e, 3:]),
        (Layout(parts=2, interleaved=True, transposed=True), (2, 4, 6), lambda w, e: w[e, :, 1::2].T),
        (Layout(joined=2), (12, 4), lambda w, e: w[6 * e : 6 * e + 6]),
    ],
)
def test_matrices_are_views_of_what_they_say(layout: Layout, shape: tuple[int, ...], matrix: Any) -> None:
    weight = torch.arange(float(torch.Size(shape).numel())).view(shape)
    view = layout.matrices(weight, layout.joined)
    last = view.reshape(-1, *view.shape[-2:])[-1]  # of the last expert, and of its parts the second
    torch.testing.assert_close(last, matrix(weight, 1))
    view.fill_(7.0)
    assert bool((weight == 7).all())


def test_scales_are_those_of_their_papers() -> None:
    assert scale_of("match_rms_adamw", 100, 25) == pytest.approx(2.0)
    assert scale_of("original", 100, 25) == pytest.approx(2.0)
    assert scale_of("original", 25, 100) == 1.0


def test_the_rest_is_torchs_adamw_and_a_closure_is_run() -> None:
    ours, theirs = weights((5, 3), (7,)), weights((5, 3), (7,))
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer = Muon([{"params": ours, "kind": "adamw"}], {}, **options)
    steps(optimizer, ours)
    steps(torch.optim.AdamW(theirs, fused=True, **options), theirs)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert set(optimizer.state[ours[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.step(lambda: 5.0) == 5.0


def test_weights_without_a_gradient_stay_and_have_no_state() -> None:
    used, unused = weights((4, 6), (4, 6))
    before = unused.detach().clone()
    groups = [{"params": [used, unused], "kind": "muon"}]
    optimizer = Muon(groups, {used: Layout(), unused: Layout()})
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(unused, before) and unused not in optimizer.state
    assert {name: local_part(value).shape for name, value in optimizer.state[used].items()} == {
        "momentum_buffer": used.shape
    }
