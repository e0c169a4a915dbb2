"""What is random in a router (jitter, workloads) and whether it comes out the same again; loads of the workloads."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moecompile.errors import ConfigError
from moecompile.nn import Router, set_random_key
from tests.tiny import a_router, tokens

EXPERTS, D = 8, 8
WORKLOADS = ["balanced", "zipf", "hot", "drift"]


def router(**options: Any) -> Router:
    made = a_router(D, options.pop("num_experts", EXPERTS), **{"top_k": 2, **options})
    nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def ids_of(layer: Router, num_tokens: int, step: int = 0) -> list[list[int]]:
    set_random_key(layer, seed=7, step=step, micro_batch=0)
    ids: list[list[int]] = layer(tokens(num_tokens))[1].tolist()
    assert all(len(set(row)) == layer.config.top_k for row in ids)
    return ids


def load(ids: list[list[int]], num_experts: int = EXPERTS) -> list[int]:
    counts = Counter(i for row in ids for i in row)
    assert set(counts) <= set(range(num_experts))
    return [counts[e] for e in range(num_experts)]


# -- jitter ----------------------------------------------------------------------------------------------------------


def test_jitter_multiplies_the_routers_input() -> None:
    """One expert with the weight 1 in one place reads back what the input was multiplied by."""
    layer = a_router(1, 1, top_k=1, jitter=0.1)
    nn.init.ones_(layer.weight)
    factors = layer.logits(torch.full((20_000, 1), 2.0)) / 2
    assert 0.9 <= factors.min() < 0.901
    assert 1.099 < factors.max() <= 1.1
    assert factors.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert factors.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.02)  # uniform


def test_jitter_in_training_alone() -> None:
    layer, plain = router(jitter=0.1), router()
    assert not torch.equal(layer.scores(tokens()), plain.scores(tokens()))
    assert torch.equal(layer.eval().scores(tokens()), plain.scores(tokens()))


def test_jitter_is_drawn_for_each_element_and_leaves_the_input_alone() -> None:
    layer = router(jitter=0.1)
    x = torch.ones(4, D)
    scores = layer.scores(x)
    assert len({tuple(row) for row in scores.tolist()}) == 4
    assert torch.equal(x, torch.ones(4, D))


def test_jitter_is_fp32_for_bf16_states() -> None:
    layer = a_router(1, 1, top_k=1, jitter=0.01)
    nn.init.ones_(layer.weight)
    logits = layer.logits(torch.ones(1000, 1, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert len(set(logits.flatten().tolist())) > 900  # bf16 has three values there


def test_the_gradient_passes_through_the_jitter() -> None:
    layer, x = router(jitter=0.1), tokens(4).requires_grad_()
    set_random_key(layer, 0, 0, 0)
    layer.logits(x).sum().backward()
    noise = torch.ops.moecompile.keyed_uniform(x.detach(), layer.key)
    wanted = (0.9 + 0.2 * noise) * layer.weight.detach().sum(0)
    assert torch.allclose(x.grad, wanted, atol=1e-6)


# -- keys ------------------------------------------------------------------------------------------------------------


def drawn(layer: nn.Module, key: tuple[int, int, int]) -> list[Tensor]:
    set_random_key(layer, *key)
    return [router.scores(tokens()) for router in layer]


def test_numbers_depend_on_the_key_and_the_layer_alone() -> None:
    layers = nn.ModuleList(router(jitter=0.1) for _ in range(2))
    first = drawn(layers, (1, 2, 3))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(drawn(layers, (1, 2, 3)), first, strict=True))
    assert not torch.equal(*first)  # layers have equal weights here, and differ in their noise
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert not torch.equal(drawn(layers, other)[0], first[0])
    torch.set_rng_state(state)


def test_the_global_random_state_is_left_alone_with_a_key() -> None:
    layer = router(jitter=0.1, workload="zipf")
    set_random_key(layer, 0, 0, 0)
    state = torch.get_rng_state()
    layer(tokens())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_key_the_global_random_state_decides() -> None:
    layer = router(jitter=0.1)
    torch.manual_seed(3)
    first = layer.scores(tokens())
    assert not torch.equal(layer.scores(tokens()), first)
    torch.manual_seed(3)
    assert torch.equal(layer.scores(tokens()), first)


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("workload", ["none", "zipf"])
def test_a_recomputed_forward_draws_the_same_numbers(workload: str, use_reentrant: bool, keyed: bool) -> None:
    """Else it would compute the gradient of another function."""
    grads = []
    for recompute in (False, True):
        layer, x = router(jitter=0.3, workload=workload, score="sigmoid"), tokens().requires_grad_()
        calls: list[int] = []
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        if keyed:
            set_random_key(layer, 0, 0, 0)
        run = lambda x, layer=layer: layer(x)[0]  # noqa: E731
        weights = checkpoint(run, x, use_reentrant=use_reentrant) if recompute else run(x)
        torch.rand(3)  # what others draw in between
        weights.square().sum().backward()
        assert len(calls) == 1 + recompute
        assert layer.meter.load.sum() == 6 * 2
        grads.append((x.grad, layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_jitter_changes_at_every_step() -> None:
    layers = nn.ModuleList([router(jitter=0.1)])
    seen = {tuple(drawn(layers, (0, step, 0))[0].flatten().tolist()) for step in range(5)}
    assert len(seen) == 5


# -- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_stay_the_scores_of_the_chosen(workload: str, normalize: bool) -> None:
    layer = router(workload=workload, normalize=normalize, dtype=torch.float64)
    x = tokens(16, dtype=torch.float64)
    set_random_key(layer, 0, 0, 0)
    weights, ids = layer(x)
    scores = (x @ layer.weight.T).softmax(1).gather(1, ids)
    assert torch.allclose(weights, scores / scores.sum(1, keepdim=True) if normalize else scores)
    weights.square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
    assert layer.meter.load.tolist() == load(ids.tolist())


@pytest.mark.parametrize(
    ("num_experts", "top_k", "groups", "top_groups", "num_tokens"),
    [
        (8, 2, 1, 1, 16), (8, 3, 1, 1, 8), (8, 8, 1, 1, 5), (8, 1, 1, 1, 24), (16, 4, 4, 2, 32), (16, 3, 4, 2, 64),
        (16, 5, 4, 3, 64), (12, 3, 4, 2, 4), (20, 5, 4, 3, 4), (16, 4, 4, 1, 16), (16, 4, 4, 4, 20), (12, 4, 6, 2, 18), (256, 8, 8, 4, 512), (32, 6, 8, 3, 512),
    ],
)  # fmt: skip
def test_balanced_is_exactly_even_and_keeps_the_group_limit(
    num_experts: int, top_k: int, groups: int, top_groups: int, num_tokens: int
) -> None:
    layer = router(
        workload="balanced", num_experts=num_experts, top_k=top_k, groups=groups, top_groups=top_groups
    )  # fmt: skip
    ids = ids_of(layer, num_tokens)
    assert load(ids, num_experts) == [num_tokens * top_k // num_experts] * num_experts
    size = num_experts // groups
    opened = [{i // size for i in row} for row in ids]
    assert max(map(len, opened)) <= top_groups
    if top_groups < groups:
        wanted = [{(t + j) % groups for j in range(min(top_groups, top_k))} for t in range(num_tokens)]
        assert opened == wanted


@pytest.mark.parametrize("workload", ["balanced", "zipf", "hot"])
def test_workloads_choose_as_many_experts_of_every_group(workload: str) -> None:
    layer = router(workload=workload, num_experts=16, top_k=8, groups=4, top_groups=4, even_groups=True)
    ids = ids_of(layer, 64)
    assert {tuple(sorted(i // 4 for i in row)) for row in ids} == {(0, 0, 1, 1, 2, 2, 3, 3)}
    assert all(len(set(row)) == 8 for row in ids)
    assert workload != "balanced" or load(ids, 16) == [32] * 16


@pytest.mark.parametrize("num_tokens", [1, 5, 7, 13])
def test_balanced_differs_by_one_at_most_where_it_cannot_be_even(num_tokens: int) -> None:
    counts = load(ids_of(router(workload="balanced", top_k=3), num_tokens))
    assert max(counts) - min(counts) == 1


def zipf(num_experts: int, skew: float) -> list[float]:
    p = [(i + 1) ** -skew for i in range(num_experts)]
    return [value / sum(p) for value in p]


def without_replacement(p: list[float], top_k: int) -> list[float]:
    """P(expert is among the first top_k drawn), by enumeration."""

    def first(left: dict[int, float], drawn: int) -> dict[int, float]:
        if drawn == 0:
            return dict.fromkeys(left, 0.0)
        total, found = sum(left.values()), Counter()
        for expert, weight in left.items():
            found[expert] += weight / total
            for other, value in first({e: w for e, w in left.items() if e != expert}, drawn - 1).items():
                found[other] += weight / total * value
        return found

    found = first(dict(enumerate(p)), top_k)
    return [found[e] for e in range(len(p))]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
def test_zipf_is_drawn_without_replacement(top_k: int, skew: float) -> None:
    num_tokens = 20_000
    counts = load(ids_of(router(workload="zipf", top_k=top_k, skew=skew), num_tokens))
    for count, p in zip(counts, without_replacement(zipf(EXPERTS, skew), top_k), strict=True):
        assert abs(count / num_tokens - p) < 4.5 * math.sqrt(p * (1 - p) / num_tokens)


@pytest.mark.parametrize("workload", ["zipf", "hot", "drift"])
def test_drawn_workloads_keep_the_group_limit(workload: str) -> None:
    layer = router(workload=workload, num_experts=16, top_k=3, groups=4, top_groups=2)
    ids = ids_of(layer, 256)
    assert max(len({i // 4 for i in row}) for row in ids) == 2
    assert len({i for row in ids for i in row}) == 16


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_hot_sends_half_of_the_tokens_to_expert_0(top_k: int) -> None:
    num_tokens = 10_000
    ids = ids_of(router(workload="hot", top_k=top_k), num_tokens)
    counts = load(ids)
    assert counts[0] == num_tokens // 2
    assert all((0 in row) == (t % 2 == 0) for t, row in enumerate(ids))
    rest = (num_tokens * top_k - counts[0]) / (EXPERTS - 1)
    assert all(abs(count - rest) < 5 * math.sqrt(rest) for count in counts[1:])


def test_drift_moves_the_busiest_expert_on_by_one_each_step() -> None:
    layer = router(workload="drift", top_k=1, skew=2.0)
    busiest = [max(range(EXPERTS), key=load(ids_of(layer, 2000, step)).__getitem__) for step in range(10)]
    assert busiest == [step % EXPERTS for step in range(10)]
    second = sorted(range(EXPERTS), key=load(ids_of(layer, 2000, 3)).__getitem__)[-2]
    assert second == 4


@pytest.mark.parametrize("workload", ["zipf", "hot", "drift"])
def test_workloads_draw_anew_at_every_step_and_micro_batch(workload: str) -> None:
    layer = router(workload=workload)
    seen = set()
    for step, micro_batch in ((0, 0), (1, 0), (0, 1)):
        set_random_key(layer, 0, step, micro_batch)
        seen.add(str(layer(tokens(32))[1].sort(1).values.tolist()))
    assert len(seen) == 3


# Kind -> experts that get three quarters of the choices (none: uniform) in (step, micro-batch).
BLOCKS = {
    "hot_block": {(0, 0): {0, 1}, (3, 5): {0, 1}},
    "hot_spread": {(0, 0): {0, 4}, (3, 5): {0, 4}},
    "ragged": {(0, 0): {0, 1}, (3, 1): {2, 3}, (0, 5): {2, 3}},
    "rotating": {(0, 3): {0, 1}, (2, 0): {4, 5}, (4, 0): {0, 1}},
    "burst": {(0, 0): set(), (2, 0): set(), (3, 0): {0, 1}, (7, 4): {0, 1}},
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_of_experts_gets_three_quarters(kind: str) -> None:
    num_tokens, layer = 4000, router(workload=kind, top_k=1, hot_experts=2)
    for (step, micro_batch), block in BLOCKS[kind].items():
        set_random_key(layer, 0, step, micro_batch)
        counts = load(layer(tokens(num_tokens))[1].tolist())
        for expert, count in enumerate(counts):
            p = (0.375 if expert in block else 0.25 / 6) if block else 1 / EXPERTS
            assert abs(count - p * num_tokens) < 5 * math.sqrt(p * num_tokens), (kind, step, micro_batch, expert)


def test_a_cold_block_gets_nothing() -> None:
    counts = load(ids_of(router(workload="cold_block", top_k=2, hot_experts=3), 2000))
    assert counts[-3:] == [0, 0, 0]
    assert all(abs(count - 800) < 5 * math.sqrt(800) for count in counts[:-3])


def test_a_block_is_smaller_than_the_layer() -> None:
    with pytest.raises(
        ConfigError, match=r"routing.hot_experts=8: must be fewer than experts.num_routed=8. Use at most 7"
    ):
        router(workload="hot_block", hot_experts=8)


def test_a_workload_may_overflow_the_capacity() -> None:
    layer = router(workload="hot", top_k=1, capacity_factor=1.0, drop="position", normalize=False)
    ids = ids_of_limited(layer, 64)
    assert ids.count(0) == 8  # of the 32 that want it
    assert layer.meter.load[0] == 32


def ids_of_limited(layer: Router, num_tokens: int) -> list[int]:
    set_random_key(layer, 0, 0, 0)
    ids: list[int] = layer(tokens(num_tokens))[1].flatten().tolist()
    return ids
