"""Meters, the correction-bias rules and the global load, by hand; auxiliary losses over layers."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import moecompile
from moecompile.errors import MoecompileError
from moecompile.nn import (
    LayerLoad,
    LoadMeter,
    Router,
    auxiliary_loss,
    auxiliary_losses,
    meters_of,
    routers_of,
    update_balance,
)
from moecompile.nn.existing import own_biases
from moecompile.routing import BalanceSpec
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import a_router, ids, one_rank, tokens

ALL_LOSSES = {"micro_batch": 0.3, "sequence": 0.2, "global_batch": 0.1, "z": 0.01}


def model(*loads: list[int], rates: list[float] | float = 0.0, **options: Any) -> nn.Module:
    """One router per list, with that load; paths are `0`, `1` ..."""
    each = [rates] * len(loads) if isinstance(rates, float) else rates
    routers = nn.Sequential(
        *(
            a_router(8, len(load), top_k=1, bias_rate=rate, **options)
            for load, rate in zip(loads, each, strict=True)
        )
    )  # fmt: skip
    for router, load in zip(routers, loads, strict=True):
        nn.init.normal_(router.weight)
        router.meter.load.copy_(torch.tensor(load))
    return routers


def layer_load(load: list[int], **changes: Any) -> LayerLoad:
    values = {
        "name": "x", "load": torch.tensor(load), "tokens": 4, "dropped": 0, "entropy": None, "node_tokens": torch.tensor([4]),
    }  # fmt: skip
    return LayerLoad(**{**values, **changes})


# -- the rule --------------------------------------------------------------------------------------------------------


def test_bias_moves_towards_the_mean_by_its_sign() -> None:
    routers = model([6, 2, 4, 4], rates=0.5)
    update_balance(routers)
    assert routers[0].correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]  # mean 4: too full, too empty, just right
    routers[0].balance = dataclasses.replace(routers[0].balance, rate=0.25)
    routers[0].meter.load.copy_(torch.tensor([10, 0, 0, 0]))
    update_balance(routers)
    assert routers[0].correction_bias.tolist() == [-0.75, 0.75, 0.25, 0.25]


def test_a_proportional_bias_moves_by_the_error_over_the_mean() -> None:
    routers = model([6, 2, 4, 4], rates=0.5, bias_update="proportional")
    update_balance(routers)
    assert routers[0].correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]  # 0.5 * (4 - load) / 4
    update_balance(routers)  # nothing was counted: nothing moves, and nothing is divided by zero
    assert routers[0].correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_a_recentred_bias_keeps_its_differences() -> None:
    routers = model([6, 2, 4, 4], rates=0.5)
    routers[0].balance = dataclasses.replace(routers[0].balance, recenter=True)
    routers[0].correction_bias.copy_(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    update_balance(routers)
    assert routers[0].correction_bias.tolist() == [-1.0, 0.0, -0.5, 1.5]  # [0.5, 1.5, 1, 3] minus 1.5


def test_quantiles_do_not_count_a_recomputed_forward() -> None:
    router = Router(8, 4, a_router(8, 4, score="sigmoid").config, BalanceSpec(rule="quantile", rate=0.0))
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    with set_checkpoint_early_stop(False):  # else the recomputed forward would end before it counts
        checkpoint(lambda x: router(x)[0], tokens(6).requires_grad_(), use_reentrant=False).sum().backward()
    assert router.meter.required.sum(1).tolist() == [6] * 4
    update_balance(nn.Sequential(router))
    assert router.correction_bias.abs().max() > 0
    assert router.correction_bias.mean().abs() < 1e-6
    assert not router.meter.required.any()
    solved = router.correction_bias.clone()
    update_balance(nn.Sequential(router))  # a step without a token says nothing
    assert torch.equal(router.correction_bias, solved)


def test_a_router_without_a_rate_keeps_its_bias() -> None:
    routers = model([5, 1], [5, 1], rates=[0.5, 0.0])
    loads = update_balance(routers)
    assert [router.correction_bias.tolist() for router in routers] == [[-0.5, 0.5], [0, 0]]
    assert [load.name for load in loads] == ["0", "1"]


def test_the_bias_of_a_model_in_bf16_follows_its_load() -> None:
    """At 1 a number of bf16 has a step of 0.0078, so that 0.001 would be rounded away for ever."""
    made = moe_model("deepseek_v3", dtype=torch.bfloat16).train()
    x = moe_inputs("deepseek_v3", ids())
    moecompile.compile_model(made, ["balance.rule=bias", "balance.rate=0.001"], example=x)
    for _, bias in own_biases(made):
        bias.fill_(1.0)
    made(**x)
    counted = [meter.load.tolist() for meter, _ in own_biases(made)]
    update_balance(made)
    for (_, bias), load in zip(own_biases(made), counted, strict=True):
        mean = sum(load) / len(load)
        assert len(set(load)) > 1
        assert bias.tolist() == pytest.approx([1 + 0.001 * ((n < mean) - (n > mean)) for n in load], abs=1e-6)


def test_counters_start_again_and_the_loads_are_returned() -> None:
    routers = model([5, 1], [0, 3, 3])
    routers[1].meter.sums.copy_(torch.tensor([6.0, 1.0, 3.0]))
    loads = update_balance(routers)
    assert [load.load.tolist() for load in loads] == [[5, 1], [0, 3, 3]]
    assert (loads[1].tokens, loads[1].dropped, loads[1].entropy) == (6, 1, 0.5)
    assert all(counter.sum() == 0 for router in routers for counter in router.meter.buffers())
    assert [load.load.sum().item() for load in update_balance(routers)] == [0, 0]


def test_accumulated_micro_batches_count_as_one_step() -> None:
    routers = model([0, 0, 0], rates=1.0)
    for seed in range(3):
        routers[0](tokens(seed=seed))
    (load,) = update_balance(routers)
    assert load.load.sum() == load.tokens == 18
    assert routers[0].correction_bias.tolist() == (6 - load.load).sign().tolist()


def test_counts_are_summed_over_a_group(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        (load,) = update_balance(model([3, 1]), dist.group.WORLD)
    assert load.load.tolist() == [3, 1]


def test_all_layers_share_one_all_reduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    with one_rank(tmp_path):
        monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: calls.append(args))
        update_balance(model([3, 1], [1, 2, 3], [4, 4]), dist.group.WORLD)
    assert len(calls) == 1


def test_the_global_load_is_kept_where_a_loss_needs_it() -> None:
    routers = model([6, 2], losses={"global_batch": 0.1})
    assert routers[0].global_load.tolist() == [0.5, 0.5]  # even before the first step
    update_balance(routers)
    assert routers[0].global_load.tolist() == [0.75, 0.25]
    update_balance(routers)  # a step without a token says nothing about the load
    assert routers[0].global_load.tolist() == [0.75, 0.25]
    assert "0.global_load" in routers.state_dict()
    assert "0.global_load" not in model([6, 2]).state_dict()


def test_the_rule_balances_a_skewed_router() -> None:
    """Constant tokens that all prefer two experts: after some steps all are used about equally."""
    for update in ("sign", "proportional"):
        router = a_router(8, 4, top_k=2, score="sigmoid", bias_rate=0.02, bias_update=update)
        nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
        router.correction_bias.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        routers, violations = nn.Sequential(router), []
        for step in range(200):
            router(tokens(64, seed=step))
            violations += [load.max_violation for load in update_balance(routers)]
        assert violations[0] == pytest.approx(1.0, abs=0.05)
        assert sum(violations[-20:]) / 20 < 0.25


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "violation"), [([4, 4], 0.0), ([8, 0], 1.0), ([6, 2, 4, 4], 0.5), ([0, 0], 0.0)])
def test_max_violation(load: list[int], violation: float) -> None:
    assert layer_load(load).max_violation == pytest.approx(violation)


def test_drop_rate_and_nodes_per_token() -> None:
    load = layer_load([6, 2], dropped=2, node_tokens=torch.tensor([4, 2]))
    assert (load.drop_rate, load.nodes_per_token) == (0.25, 1.5)
    nothing = layer_load([0, 0], tokens=0, node_tokens=torch.tensor([0, 0]))
    assert (nothing.drop_rate, nothing.nodes_per_token) == (0.0, 0.0)


def test_a_meter_counts_by_hand() -> None:
    """4 experts on 2 nodes (0 1 | 2 3); 4 is nobody."""
    meter = LoadMeter(4, 2, "cpu")
    chosen = torch.tensor([[0, 1], [0, 2], [3, 2]])
    kept = torch.tensor([[0, 1], [4, 2], [4, 4]])
    meter(chosen, kept)
    assert meter.load.tolist() == [2, 1, 2, 1]  # before drops
    assert meter.node_tokens.tolist() == [1, 1]  # after: token 0 on node 0, token 1 on node 1, token 2 nowhere
    assert meter.sums.tolist() == [3, 3, 0]
    meter(chosen)
    assert meter.node_tokens.tolist() == [1 + 2, 1 + 2]
    placed = LoadMeter(4, 2, "cpu")
    placed.place((0, 2, 1, 3))  # experts 0 and 2 on node 0
    placed(chosen, kept)
    assert placed.load.tolist() == [2, 1, 2, 1] and placed.sums.tolist() == [3, 3, 0]
    assert placed.node_tokens.tolist() == [2, 1]  # token 0 on both nodes, token 1 on node 0
    (load,) = update_balance(nn.Sequential(meter))
    assert (load.name, load.tokens, load.dropped, load.entropy) == ("0", 6, 3, None)
    assert load.nodes_per_token == 1.0


def test_a_meter_counts_in_training_only() -> None:
    meter = LoadMeter(4, 1, "cpu").eval()
    meter(torch.tensor([[0, 1]]))
    assert meter.load.sum() == 0


def test_experts_must_lie_evenly_on_nodes() -> None:
    with pytest.raises(ValueError, match="6 experts cannot be split evenly over 4 nodes"):
        LoadMeter(6, 4, "cpu")


def test_entropy_is_that_of_the_scores() -> None:
    router = a_router(8, 4, top_k=2)
    nn.init.zeros_(router.weight)
    router(tokens())
    (load,) = update_balance(router)
    assert load.entropy == pytest.approx(math.log(4))
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    for score in ("softmax", "sigmoid", "softmax_after_topk"):
        router.config = dataclasses.replace(router.config, score=score)
        router(tokens())
        logits = (tokens() @ router.weight.T).double()
        raw = logits.sigmoid() if score == "sigmoid" else logits.softmax(1)
        wanted = [-sum(p * math.log(p) for p in (row / row.sum()).tolist()) for row in raw]
        (load,) = update_balance(router)
        assert load.entropy == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_nodes_that_tokens_reach() -> None:
    """Against a plain count of distinct nodes, with drops."""
    router = a_router(8, 8, top_k=3, capacity_factor=0.75, drop="position", num_nodes=4)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    _, ids = router(tokens(64))
    reached = [{i // 2 for i in row if i < 8} for row in ids.tolist()]
    (load,) = update_balance(router)
    assert load.node_tokens.tolist() == [sum(node in nodes for nodes in reached) for node in range(4)]
    assert load.nodes_per_token == sum(map(len, reached)) / 64
    assert load.dropped == int((ids == 8).sum()) > 0
    assert load.drop_rate == load.dropped / (64 * 3)


def test_meters_are_named_by_their_owner() -> None:
    layer = nn.ModuleDict(
        {"router": a_router(8, 4, top_k=1), "other": nn.Linear(2, 2), "count": LoadMeter(4, 1, "cpu")}
    )
    parent = nn.ModuleDict({"layer": layer, "meter": LoadMeter(4, 1, "cpu")})
    assert [name for name, _ in meters_of(parent)] == ["layer.router", "layer.count", ""]
    assert [name for name, _ in routers_of(parent)] == ["layer.router"]
    assert [load.name for load in update_balance(parent)] == ["layer.router", "layer.count", ""]


def test_a_model_without_routers() -> None:
    assert update_balance(nn.Linear(2, 2)) == []
    assert auxiliary_loss(nn.Linear(2, 2)) is None
    assert auxiliary_losses(nn.Linear(2, 2)) == {}


def test_casts_and_moves_do_not_round_counters() -> None:
    router = a_router(8, 4, top_k=1, losses={"global_batch": 0.1})
    nn.init.normal_(router.weight)
    router.meter.sums.fill_(2**24 + 1)
    weight = router.weight.detach().clone()
    router.bfloat16()
    assert torch.equal(router.weight, weight)
    assert {t.dtype for t in (router.weight, router.correction_bias, router.global_load)} == {torch.float32}
    assert (router.meter.sums.dtype, router.meter.sums[0].item()) == (torch.float64, 2**24 + 1)
    router.double()
    assert router.weight.dtype == torch.float64
    router.float()
    assert (router.weight.dtype, router.meter.sums.dtype) == (torch.float32, torch.float64)


# -- auxiliary losses over layers -------------------------------------------------------------------------------------


def two_layers(**losses: float) -> nn.Module:
    layers = nn.ModuleList(a_router(8, 4, top_k=2, losses=losses) for _ in range(2))
    for i, layer in enumerate(layers):
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(i))
    return layers


def forward(layers: nn.Module, x: Tensor | None = None) -> None:
    for layer in layers:
        layer(tokens() if x is None else x)


def test_losses_are_summed_over_layers_and_by_kind() -> None:
    layers = two_layers(**ALL_LOSSES)
    forward(layers)
    kinds = auxiliary_losses(layers)
    assert list(kinds) == list(ALL_LOSSES)
    assert not any(loss.requires_grad for loss in kinds.values())
    total = auxiliary_loss(layers)
    assert total is not None
    assert total.item() == pytest.approx(sum(float(loss) for loss in kinds.values()))
    assert total.item() == pytest.approx(sum(layer.aux_loss.item() for layer in layers))
    total.backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers)


def test_no_losses_in_evaluation() -> None:
    layers = two_layers(z=0.1)
    forward(layers)
    with torch.no_grad():
        forward(layers.eval())
        assert auxiliary_loss(layers) is None
        assert auxiliary_losses(layers) == {}
    forward(two_layers())
    assert auxiliary_loss(two_layers()) is None


@pytest.mark.parametrize("mode", ["eval", "no_grad", "both"])
def test_a_look_at_outputs_before_backward_leaves_the_losses(mode: str) -> None:
    """Outputs are often logged between forward and backward."""
    layers = two_layers(**ALL_LOSSES)
    forward(layers)
    wanted = auxiliary_loss(layers)
    layers.train(mode == "no_grad")
    with torch.set_grad_enabled(mode == "eval"):
        forward(layers, 2 * tokens())
    assert torch.equal(auxiliary_loss(layers), wanted)
    layers.train()
    assert torch.equal(auxiliary_loss(layers), wanted)
    auxiliary_loss(layers).backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers)


def test_a_model_is_copied_and_pickled_after_a_forward() -> None:
    layers = two_layers(**ALL_LOSSES)
    forward(layers)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert auxiliary_loss(other) is None
        forward(other)
        assert torch.equal(auxiliary_loss(other), auxiliary_loss(layers))


def test_gradients_of_losses_survive_activation_checkpointing() -> None:
    grads = []
    for recompute in (False, True):
        layers, x = two_layers(**ALL_LOSSES), tokens().requires_grad_()
        h = x
        for layer in layers:
            run = lambda h, layer=layer: h + layer(h)[0].sum(1, keepdim=True)  # noqa: E731
            h = checkpoint(run, h, use_reentrant=False) if recompute else run(h)
        (h.square().sum() + auxiliary_loss(layers)).backward()
        assert all(layer.meter.load.sum() == 6 * 2 for layer in layers)
        grads.append([x.grad, *(layer.weight.grad for layer in layers)])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_a_recomputed_forward_leaves_the_loss_alone() -> None:
    layers = two_layers(z=0.1)[:1]
    x = tokens().requires_grad_()
    with set_checkpoint_early_stop(False):  # else recomputation may end before it comes to the losses
        out = checkpoint(lambda x: layers[0](x)[0], x, use_reentrant=False)
    before = layers[0].aux_losses
    (out.square().sum() + auxiliary_loss(layers)).backward()
    assert layers[0].aux_losses is before  # the one of the recomputed forward would keep its graph alive


def test_reentrant_checkpointing_would_lose_the_loss_and_is_refused() -> None:
    layers, x = two_layers(z=0.1), tokens().requires_grad_()
    checkpoint(lambda x: layers[1](x)[0], x, use_reentrant=True)
    with pytest.raises(MoecompileError, match=r"1: the auxiliary loss has no gradient.*use_reentrant=False"):
        auxiliary_loss(layers)
    with torch.no_grad():
        assert auxiliary_loss(layers) is not None  # where nobody asks for gradients
