"""Auxiliary losses against transformers' own functions and against slow float64 references written from the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.errors import ConfigError
from moecompile.nn import Router, update_balance
from tests.tiny import a_router

EXPERTS, TOP_K, D = 8, 3, 6
SHAPES = [(12, D), (3, 7, D), (2, 2, 5, D)]
SCORES = ["softmax", "sigmoid", "softmax_after_topk", "sqrt_softplus", "sigmoid_after_topk"]


def router(score: str = "softmax", bias: float = 0.0, **options: Any) -> Router:
    """Random weights in float64, and correction biases of standard deviation `bias`."""
    generator = torch.Generator().manual_seed(0)
    made = a_router(D, EXPERTS, **{"top_k": TOP_K, "score": score, "dtype": torch.float64, **options})
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator, dtype=torch.float64))
        made.correction_bias.copy_(torch.randn(EXPERTS, generator=generator) * bias)
    return made


def hidden(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def aux(layer: Router, x: Tensor) -> Tensor:
    layer(x)
    assert layer.aux_loss is not None
    return layer.aux_loss


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_micro_batch_equals_mixtral_divided_by_top_k(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer, x = router(losses={"micro_batch": 0.5}, top_k=top_k), hidden(3, 7, D)
    logits = (x @ layer.weight.T).flatten(0, 1)
    wanted = load_balancing_loss_func((logits,), EXPERTS, top_k)
    got = aux(layer, x)
    assert got.item() == pytest.approx(0.5 * wanted.item() / top_k, rel=1e-6)
    grads = [torch.autograd.grad(loss, layer.weight)[0] for loss in (got, 0.5 / top_k * wanted)]
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["micro_batch", "sequence"])
def test_top_1_equals_switch(kind: str) -> None:
    """Switch's function takes the mean over sequences, so one sequence is the micro-batch."""
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func

    layer, x = router(losses={kind: 1.0}, top_k=1, normalize=False), hidden(3 if kind == "sequence" else 1, 9, D)
    probs = (x @ layer.weight.T).softmax(-1)
    wanted = load_balancing_loss_func(probs, probs.argmax(-1))
    assert aux(layer, x).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_z_loss_equals_switch() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    layer, x = router(losses={"z": 0.25}), hidden(3, 7, D)
    assert aux(layer, x).item() == pytest.approx(0.25 * router_z_loss_func(x @ layer.weight.T).item(), rel=1e-12)


# -- slow references -------------------------------------------------------------------------------------------------


def distribution(layer: Router, token: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Logits, scores as they are chosen by, and the scores that sum to 1, of one token."""
    logits = [sum(w * v for w, v in zip(row, token, strict=True)) for row in layer.weight.tolist()]
    if layer.config.score in ("sigmoid", "sigmoid_after_topk"):
        scores = [1 / (1 + math.exp(-z)) for z in logits]
        return logits, scores if layer.config.score == "sigmoid" else logits, [s / sum(scores) for s in scores]
    if layer.config.score == "sqrt_softplus":
        scores = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
        return logits, scores, [s / sum(scores) for s in scores]
    exponentials = [math.exp(z) for z in logits]
    probs = [e / sum(exponentials) for e in exponentials]
    return logits, probs if layer.config.score == "softmax" else logits, probs


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def balance(f: list[float], rows: list[list[float]]) -> float:
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return sum(a * b for a, b in zip(f, mean, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
def test_micro_batch_counts_the_chosen_experts_before_drops(score: str, shape: tuple[int, ...]) -> None:
    options = {"groups": 4, "top_groups": 2, "capacity_factor": 0.75, "drop": "position"}
    layer, x = router(score, bias=0.3, losses={"micro_batch": 1.0}, **options), hidden(*shape)
    dropless = router(score, bias=0.3, groups=4, top_groups=2)
    ids = dropless(x)[1].tolist()
    counts = [sum(row.count(e) for row in ids) for e in range(EXPERTS)]
    f = [EXPERTS * count / (TOP_K * len(ids)) for count in counts]
    probs = [distribution(layer, token)[2] for token in x.reshape(-1, D).tolist()]
    assert aux(layer, x).item() == pytest.approx(balance(f, probs), rel=1e-12)
    assert layer.meter.sums[1] > 0  # something was dropped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("even_groups", [False, True])
def test_sequence_counts_the_scores_alone(score: str, shape: tuple[int, ...], even_groups: bool) -> None:
    """Correction bias and group limit move the choice, but not this loss; even groups are part of it."""
    options = {"groups": 2, "top_groups": 2, "even_groups": True} if even_groups else {"groups": 4, "top_groups": 2}
    top_k, half = 4 if even_groups else TOP_K, EXPERTS // 2
    layer = router(score, bias=1.0, losses={"sequence": 1.0}, top_k=top_k, **options)
    x, per_sequence = hidden(*shape), []
    for sequence in x.reshape(-1, *shape[-2:]).tolist():
        found = [distribution(layer, token) for token in sequence]
        counts = [0] * EXPERTS
        for _, scores, _ in found:
            of_halves = [*best(scores[:half], 2), *(half + i for i in best(scores[half:], 2))]
            for expert in of_halves if even_groups else best(scores, top_k):
                counts[expert] += 1
        f = [EXPERTS * count / (top_k * len(sequence)) for count in counts]
        per_sequence.append(balance(f, [probs for _, _, probs in found]))
    assert aux(layer, x).item() == pytest.approx(sum(per_sequence) / len(per_sequence), rel=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_global_batch_multiplies_the_load_of_the_step_before(score: str) -> None:
    layer, x = router(score, losses={"global_batch": 1.0}), hidden(2, 5, D)
    assert aux(layer, x).item() == pytest.approx(1.0)  # even before the first step
    counts = [0] * EXPERTS
    layer.meter.load.zero_()
    for seed in range(3):  # three micro-batches make the step
        for row in layer(hidden(4, 5, D, seed=seed))[1].tolist():
            for expert in row:
                counts[expert] += 1
    update_balance(layer)
    f = [EXPERTS * count / sum(counts) for count in counts]
    probs = [distribution(layer, token)[2] for token in x.reshape(-1, D).tolist()]
    assert aux(layer, x).item() == pytest.approx(balance(f, probs), rel=1e-6)
    aux(layer, hidden(2, 5, D, seed=9))  # what this step counts changes nothing yet
    assert aux(layer, x).item() == pytest.approx(balance(f, probs), rel=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_z_is_the_square_of_the_log_partition(score: str) -> None:
    layer, x = router(score, losses={"z": 1.0}), hidden(3, 7, D)
    logits = [distribution(layer, token)[0] for token in x.reshape(-1, D).tolist()]
    wanted = sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits) / len(logits)
    assert aux(layer, x).item() == pytest.approx(wanted, rel=1e-12)


# -- what every loss has ----------------------------------------------------------------------------------------------

ALL = {"micro_batch": 0.3, "sequence": 0.2, "global_batch": 0.1, "z": 0.01}


@pytest.mark.parametrize("score", SCORES)
def test_balance_losses_are_one_when_the_load_is_even(score: str) -> None:
    layer = router(score, losses=dict.fromkeys(("micro_batch", "sequence", "global_batch"), 1.0))
    with torch.no_grad():
        layer.weight.zero_()
    layer(hidden(2, 8, D))
    assert [loss.item() for loss in layer.aux_losses.values()] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", [*ALL, "all"])
def test_gradients_equal_finite_differences(score: str, name: str) -> None:
    losses = ALL if name == "all" else {name: 1.0}
    layer = router(score, bias=0.2, groups=4, top_groups=2, losses=losses)
    if layer.global_load is not None:
        layer.global_load.copy_(torch.arange(1, EXPERTS + 1) / 36)
    x = hidden(2, 3, D).requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        torch.func.functional_call(layer, {"weight": weight}, (x,))
        return layer.aux_loss

    torch.autograd.gradcheck(loss, (x, layer.weight))


def test_several_losses_are_added_with_their_coefficients() -> None:
    x = hidden(2, 5, D)
    alone = {name: aux(router(losses={name: 1.0}), x).item() for name in ALL}
    layer = router(losses=ALL)
    total = aux(layer, x).item()
    assert total == pytest.approx(sum(ALL[name] * value for name, value in alone.items()))
    assert {name: loss.item() for name, loss in layer.aux_losses.items()} == pytest.approx(
        {name: ALL[name] * value for name, value in alone.items()}
    )
    assert len({round(value, 6) for value in alone.values()}) == len(ALL)  # else they could be one


def test_losses_are_fp32_in_a_bf16_model_and_under_autocast() -> None:
    layer = router(losses=ALL, dtype=torch.bfloat16)
    x = hidden(2, 5, D).bfloat16()
    wanted = aux(layer, x)
    assert wanted.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aux(layer, x), wanted)


def test_no_tokens_give_zero_and_not_nan() -> None:
    layer = router(losses=ALL)
    loss = aux(layer, hidden(2, 0, D))
    loss.backward()
    assert loss.item() == 0
    assert layer.weight.grad.abs().max() == 0


def test_one_token_without_any_other_dimension() -> None:
    layer = router(losses=ALL)
    assert aux(layer, hidden(D)).item() == pytest.approx(aux(layer, hidden(1, D)).item())


def test_expert_choice_has_no_balance_loss() -> None:
    with pytest.raises(ConfigError, match="their load is even by itself"):
        router(choice="expert", losses={"sequence": 0.1})
    assert aux(router(choice="expert", losses={"z": 0.1}), hidden(2, 5, D)) > 0
