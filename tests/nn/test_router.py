"""The router against a slow reference in plain Python, and its precision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.nn import Router
from tests.tiny import a_router, tokens

EXPERTS, TOP_K, TOKENS, D = 16, 4, 64, 8


def router(seed: int = 0, spread: float = 0.0, **options: Any) -> Router:
    """Random weights, and correction biases of standard deviation `spread`."""
    options = {"top_k": TOP_K, **options}
    made = a_router(D, EXPERTS, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        made.correction_bias.copy_(torch.randn(EXPERTS, generator=generator) * spread)
    return made


def by_id(weights_TK: Tensor, ids_TK: Tensor, num_experts: int = EXPERTS) -> Tensor:
    """(T, E) with zeros where an expert was not chosen: the order of the slots does not matter."""
    assert all(len(set(row)) == len(row) for row in ids_TK.tolist()), "an expert was chosen twice"
    weights = weights_TK.detach()
    return torch.zeros(len(ids_TK), num_experts, dtype=weights.dtype).scatter(1, ids_TK, weights)


# -- a slow reference ------------------------------------------------------------------------------------------------


def reference(layer: Router, x: list[float]) -> dict[int, float]:
    """Expert -> routing weight of one token, in Python floats (float64)."""
    weight, bias = layer.weight.tolist(), layer.correction_bias.tolist()
    shift = [0.0] * EXPERTS if layer.bias is None else layer.bias.tolist()
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, shift, strict=True)]
    if layer.config.score == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    elif layer.config.score == "sqrt_softplus":
        scores = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
    elif layer.config.score.endswith("after_topk"):
        scores = logits
    else:
        exponentials = [math.exp(z - max(logits)) for z in logits]
        scores = [e / sum(exponentials) for e in exponentials]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = layer.num_experts // layer.config.groups
    groups = [range(g * size, (g + 1) * size) for g in range(layer.config.groups)]
    best = {"max": 1, "top2": 2, "topk_over_m": layer.config.top_k // layer.config.top_groups}[layer.config.group_score]
    ranked = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:best]))
    candidates = [e for group in ranked[: layer.config.top_groups] for e in group]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: layer.config.top_k]
    if layer.config.even_groups:
        each = layer.config.top_k // layer.config.groups
        chosen = [e for group in groups for e in sorted(group, key=lambda e: -choice[e])[:each]]
    if layer.config.score == "softmax_after_topk":
        scores = [math.exp(z) for z in logits]
    if layer.config.score == "sigmoid_after_topk":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    normalize = layer.config.normalize or layer.config.score == "softmax_after_topk"
    total = sum(scores[e] for e in chosen) if normalize else 1.0
    return {e: scores[e] / total * layer.config.scale for e in chosen}


COMBINATIONS = list(
    itertools.product(
        ("softmax", "sigmoid", "softmax_after_topk", "sqrt_softplus", "sigmoid_after_topk"),
        (True, False),
        ((1, 1), (4, 2), (2, 1), (4, 4)),
        ("max", "top2", "topk_over_m"),
        (0.0, 0.3),
    )
)


@pytest.mark.parametrize(("score", "normalize", "limit", "group_score", "bias"), COMBINATIONS)
def test_equals_the_slow_reference(
    score: str, normalize: bool, limit: tuple[int, int], group_score: str, bias: float
) -> None:
    layer = router(
        spread=bias, score=score, normalize=normalize, scale=1.5, groups=limit[0], top_groups=limit[1],
        group_score=group_score, dtype=torch.float64, bias=bias > 0,
    )  # fmt: skip
    x = tokens(24, dtype=torch.float64)
    weights, ids = layer(x)
    assert weights.dtype == torch.float64
    for row, token in zip(by_id(weights, ids), x.tolist(), strict=True):
        wanted = reference(layer, token)
        assert {e for e in range(EXPERTS) if row[e]} == set(wanted)
        for expert, value in wanted.items():
            assert row[expert].item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after_topk"])
def test_as_many_experts_of_every_group(score: str, groups: int) -> None:
    layer = router(
        spread=0.3, score=score, groups=groups, top_groups=groups, top_k=4, even_groups=True, dtype=torch.float64
    )
    x = tokens(24, dtype=torch.float64)
    weights, ids = layer(x)
    for row, token in zip(by_id(weights, ids), x.tolist(), strict=True):
        wanted = reference(layer, token)
        assert {e: row[e].item() for e in range(EXPERTS) if row[e]} == pytest.approx(wanted, rel=1e-12)
    weights.square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0
    free = router(spread=0.3, score=score, groups=groups, top_groups=groups, top_k=4, dtype=torch.float64)
    assert not torch.equal(free(x)[1].sort().values, ids.sort().values)


def test_group_scores_choose_differently() -> None:
    """Else the three could be one, and no test above would notice."""
    chosen = []
    for group_score in ("max", "top2", "topk_over_m"):
        layer = router(score="sigmoid", groups=2, top_groups=1, group_score=group_score, top_k=4)
        chosen.append({tuple(sorted(row)) for row in layer(tokens(TOKENS))[1].tolist()})
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]


def test_closed_groups_lose_against_negative_scores() -> None:
    """With a fill of 0 a closed group would win against corrected scores that are all negative."""
    layer = router(score="sigmoid", groups=4, top_groups=1, group_score="max")
    layer.correction_bias.fill_(-5.0)
    _, ids = layer(tokens(TOKENS))
    assert {len(set(row)) for row in (ids // 4).tolist()} == {1}


def test_the_bias_shifts_the_choice_and_not_the_weights() -> None:
    plain, shifted = router(score="sigmoid", normalize=False), router(score="sigmoid", normalize=False)
    shifted.correction_bias[3] = 10.0
    weights, ids = shifted(tokens(TOKENS))
    assert (ids == 3).any(1).all()
    all_scores = plain.scores(tokens(TOKENS))
    assert torch.equal(weights, all_scores.gather(1, ids))


def test_gradients_reach_the_weight_but_never_the_bias() -> None:
    layer = router(spread=0.1, score="sigmoid")
    layer(tokens())[0].square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
    assert not layer.correction_bias.requires_grad


@pytest.mark.parametrize("shape", [(2, 12, D), (2, 3, 4, D), (24, D)])
def test_leading_dimensions_are_tokens_in_order(shape: tuple[int, ...]) -> None:
    layer, x = router(), tokens(24)
    wanted, wanted_ids = layer(x)
    weights, ids = layer(x.view(shape))
    assert (weights.shape, ids.shape) == ((24, TOP_K), (24, TOP_K))
    assert torch.equal(by_id(weights, ids), by_id(wanted, wanted_ids))


def test_the_bias_has_a_gradient() -> None:
    layer = router(bias=True)
    weights, ids = layer(tokens())
    (weights * ids).sum().backward()
    assert layer.bias.grad.abs().max() > 0
    assert [name for name, _ in router().named_parameters()] == ["weight"]


def test_one_expert() -> None:
    layer = a_router(D, 1, top_k=1)
    torch.nn.init.normal_(layer.weight)
    weights, ids = layer(tokens())
    assert torch.equal(weights, torch.ones(6, 1))
    assert ids.sum() == 0


def test_scores_that_all_underflow_do_not_divide_by_zero() -> None:
    layer = a_router(D, 4, top_k=2, score="sigmoid")
    torch.nn.init.constant_(layer.weight, -1e4)
    weights, _ = layer(torch.ones(3, D))
    assert torch.equal(weights, torch.zeros(3, 2))


# -- precision -------------------------------------------------------------------------------------------------------


def test_arithmetic_is_fp32_in_a_bf16_model() -> None:
    """bf16 hidden states go in, and nothing is rounded to bf16 after that."""
    layer = router(score="sigmoid", dtype=torch.bfloat16)
    assert layer.weight.dtype == layer.correction_bias.dtype == torch.float32
    x = tokens(TOKENS).bfloat16()
    weights, ids = layer(x)
    wanted, wanted_ids = layer(x.float())
    assert weights.dtype == torch.float32
    assert torch.equal(by_id(weights, ids), by_id(wanted, wanted_ids))
    assert not torch.equal(weights, weights.bfloat16().float())


def test_arithmetic_is_fp32_after_the_model_was_cast() -> None:
    """`model.bfloat16()` leaves the router's weight and the scores as they are."""
    layer = router(score="sigmoid")
    wanted = layer.scores(tokens().bfloat16())
    assert torch.equal(layer.bfloat16().scores(tokens().bfloat16()), wanted)
    assert wanted.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after_topk"])
def test_autocast_changes_nothing(score: str, dtype: torch.dtype) -> None:
    layer = router(score=score, dtype=dtype, bias=True)
    wanted, wanted_ids = layer(tokens(TOKENS, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        weights, ids = layer(tokens(TOKENS, dtype=dtype))
    assert weights.dtype == dtype
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(weights, wanted)
