"""Capacity and expert choice against slow references, and what is dropped contributes exactly nothing."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.errors import ConfigError
from moecompile.nn import Router
from moecompile.ops.choice import capacity
from tests.tiny import a_router, tokens

EXPERTS, D = 8, 8
F64 = torch.float64


def router(**options: Any) -> Router:
    made = a_router(D, EXPERTS, **{"top_k": 2, "dtype": F64, **options})
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0), dtype=F64))
    return made


@pytest.mark.parametrize(
    ("factor", "num_tokens", "top_k", "num_experts", "wanted"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 8, 1, 4, 3),  # 2.5
        (1.25, 16, 1, 4, 5),
        (1.0, 7, 1, 4, 2),  # 1.75
        (0.1, 1, 1, 64, 1),  # never less than one while there is a token
        (1.1, 10, 1, 1, 11),  # 1.1 * 10 is a little more than 11 in floating point
        (2.0, 0, 2, 4, 0),
    ],
)
def test_capacity_is_rounded_up(factor: float, num_tokens: int, top_k: int, num_experts: int, wanted: int) -> None:
    assert capacity(factor, num_tokens, top_k, num_experts) == wanted


# -- drops -----------------------------------------------------------------------------------------------------------


def kept_by_hand(weights: list[list[float]], ids: list[list[int]], limit: int, drop: str) -> set[tuple[int, int]]:
    """(token, expert) of the assignments that a plain loop keeps."""
    kept = set()
    for expert in range(EXPERTS):
        mine = [(t, weights[t][row.index(expert)]) for t, row in enumerate(ids) if expert in row]
        if drop == "score":
            mine.sort(key=lambda pair: -pair[1])
        kept |= {(t, expert) for t, _ in mine[:limit]}
    return kept


@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25, 4.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softmax_after_topk"])
def test_an_expert_keeps_its_first_or_its_best(score: str, top_k: int, factor: float, drop: str) -> None:
    options = {"top_k": top_k, "score": score, "scale": 1.5}
    dropless, limited = router(**options), router(**options, capacity_factor=factor, drop=drop)
    x = tokens(48, dtype=F64)
    all_weights, all_ids = dropless(x)
    weights, ids = limited(x.view(2, 24, D))  # capacity is that of all tokens of the forward
    limit = math.ceil(Fraction(factor) * 48 * top_k / EXPERTS)
    wanted = kept_by_hand(all_weights.tolist(), all_ids.tolist(), limit, drop)
    found = {(t, i) for t, row in enumerate(ids.tolist()) for i in row if i < EXPERTS}
    assert found == wanted
    kept = ids < EXPERTS
    assert torch.equal(weights[kept], all_weights[kept])  # weights of kept assignments are unchanged
    assert torch.equal(ids[kept], all_ids[kept])
    assert weights[~kept].abs().sum() == 0
    assert set(ids[~kept].tolist()) <= {EXPERTS}
    assert (len(found) < 48 * top_k) == bool((~kept).any())


def test_the_policies_keep_different_tokens() -> None:
    kept = [
        router(capacity_factor=0.5, drop=drop)(tokens(64, dtype=F64))[1] < EXPERTS for drop in ("position", "score")
    ]
    assert not torch.equal(*kept)
    assert kept[0].sum() == kept[1].sum()


def test_of_equal_weights_the_first_is_kept() -> None:
    layer = router(capacity_factor=1.0, drop="score", top_k=1)
    _, ids = layer(torch.ones(16, D, dtype=F64))  # all tokens alike: one expert, two places
    assert (ids[:, 0] < EXPERTS).tolist() == [True] * 2 + [False] * 14


def test_load_is_counted_before_drops() -> None:
    dropless, limited = router(), router(capacity_factor=0.5, drop="position")
    _, (_, ids) = (layer(tokens(48, dtype=F64)) for layer in (dropless, limited))
    assert torch.equal(dropless.meter.load, limited.meter.load)
    assert dropless.meter.sums[1] == 0
    assert limited.meter.sums[1] == (ids == EXPERTS).sum() > 0


@pytest.mark.parametrize("drop", ["position", "score"])
def test_gradients_flow_through_kept_weights_alone(drop: str) -> None:
    layer, x = router(capacity_factor=0.5, drop=drop, normalize=False), tokens(16, dtype=F64)

    def weights(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))[0]

    torch.autograd.gradcheck(weights, (layer.weight,))


def test_capacity_holds_in_evaluation_too() -> None:
    layer = router(capacity_factor=0.5, drop="position").eval()
    assert (layer(tokens(48, dtype=F64))[1] == EXPERTS).any()


def test_drop_and_capacity_belong_together() -> None:
    with pytest.raises(ConfigError, match="must be none if and only if capacity_factor is null"):
        router(capacity_factor=1.0)
    with pytest.raises(ConfigError, match="must be none if and only if capacity_factor is null"):
        router(drop="score")


# -- expert choice ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("factor", "taken"), [(None, 12), (1.0, 12), (0.5, 6), (1.3, 16), (8.0, 48)])
def test_every_expert_takes_its_best_tokens(score: str, factor: float | None, taken: int) -> None:
    drop = "position" if factor else "none"
    layer = router(choice="expert", score=score, normalize=False, scale=1.5, capacity_factor=factor, drop=drop)
    x = tokens(48, dtype=F64)
    weights, ids = layer(x)
    logits = x @ layer.weight.T
    scores = (logits.sigmoid() if score == "sigmoid" else logits.softmax(1)).tolist()
    assert ids.shape == weights.shape == (48, EXPERTS)
    for expert in range(EXPERTS):
        best = sorted(range(48), key=lambda t: -scores[t][expert])[:taken]
        column = ids[:, expert].tolist()
        assert column == [expert if t in best else EXPERTS for t in range(48)]
        for t in range(48):
            assert weights[t, expert].item() == pytest.approx(1.5 * scores[t][expert] if t in best else 0.0)


def test_expert_choice_is_even_by_itself() -> None:
    layer = router(choice="expert", normalize=False)
    layer(tokens(48, dtype=F64))
    assert layer.meter.load.tolist() == [12] * EXPERTS
    assert layer.meter.sums[:2].tolist() == [48, 0]  # a token that nobody took is not dropped


def test_gradients_of_expert_choice() -> None:
    layer, x = router(choice="expert", normalize=False), tokens(16, dtype=F64)

    def weights(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))[0]

    torch.autograd.gradcheck(weights, (layer.weight,))


def test_no_tokens() -> None:
    for layer in (router(choice="expert", normalize=False), router(capacity_factor=1.0, drop="score")):
        weights, ids = layer(torch.zeros(0, D, dtype=F64))
        assert weights.numel() == ids.numel() == 0
