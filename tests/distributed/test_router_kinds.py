"""Every kind of router on four ranks equals one process that runs the ranks' micro-batches in order.

Compared in float64: outputs, every gradient with all auxiliary losses, what the meters counted, and what the balance
update made of it. Capacity, drops and expert choice are those of each source micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moecompile
from moecompile.nn import Experts, LayerLoad, Router, SharedExperts, auxiliary_loss, set_random_key, update_balance
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.runtime.gradients import sum_replicated
from moecompile.verify import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.tiny import TinyGPT, config, ids, max_diff, randomize

pytestmark = pytest.mark.slow
WORLD, STEPS, VOCAB = 4, 2, 31
EP4 = ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "mesh.ep=4"]
EXPERTS = ["experts.num_routed=8", "experts.init=random", "routing.top_k=3"]
ALL_LOSSES = {"micro_batch": 0.3, "sequence": 0.2, "global_batch": 0.1, "z": 0.01}
KINDS = {
    "capacity": [
        "routing.capacity_factor=0.6", "routing.jitter=0.1", "experts.num_shared=1", "experts.shared_gate=true",
        "balance.rule=bias", "balance.update=proportional", "balance.rate=0.1",
    ],
    "capacity by score, over the chosen": [
        "routing.capacity_factor=0.6", "routing.drop=score", "routing.score=softmax_after_topk", "routing.bias=true",
        "routing.groups=4", "routing.top_groups=2",
    ],
    "expert choice": ["routing.choice=expert", "routing.normalize=false", "routing.allow_future=true"],
    "as many of each group": [
        "routing.top_k=4", "routing.groups=2", "routing.even_groups=true", "routing.capacity_factor=0.6",
        "balance.rule=bias", "balance.rate=0.1",
    ],
    "hot": ["routing.workload=hot", "routing.capacity_factor=1.0"],
}  # fmt: skip
DISPATCHES = ("flat", "dedup", "hierarchical", "allgather")


@dataclass
class Trace:
    """outputs of each micro-batch of step 0; grads of the last step, with those of the losses; loads of all steps."""

    outputs: list[Tensor] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    loads: list[LayerLoad] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def build(kind: str, *overrides: str) -> nn.Module:
    given = config(*EXPERTS, *KINDS[kind], *overrides)
    for name, coefficient in ALL_LOSSES.items():
        if kind != "expert choice" or name == "z":
            setattr(given.balance.losses, name, coefficient)
    torch.manual_seed(0)
    model = moecompile.compile_model(TinyGPT(vocab=VOCAB).double(), given, example=ids())
    for i, module in enumerate(
        module for module in model.modules() if isinstance(module, (Experts, Router, SharedExperts))
    ):
        randomize(module, seed=i)
    return model


def micro_batch(step: int, number: int) -> Tensor:
    """Lengths differ between ranks."""
    return ids(2, 5 + number, VOCAB, seed=10 * step + number)


def run(model: nn.Module, step: int, number: int, trace: Trace) -> None:
    set_random_key(model, 3, step, number)
    x = micro_batch(step, number)
    out = model(x)
    if step == 0:
        trace.outputs.append(out.detach().clone())
    aux = auxiliary_loss(model)
    assert aux is not None
    (out.square().sum() + x.numel() * aux).backward()


def one_process(kind: str) -> Trace:
    model, trace = build(kind), Trace()
    for step in range(STEPS):
        model.zero_grad()
        for number in range(WORLD):
            run(model, step, number, trace)
        trace.loads += update_balance(model)
    trace.grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    trace.buffers = {
        name: b.clone() for name, b in model.state_dict().items() if "correction" in name or "load" in name
    }
    return trace


def ranks(rank: int, world_size: int) -> dict[str, dict[str, Trace]]:
    """Kind -> dispatch -> what this rank did."""
    return {kind: {dispatch: sharded(rank, kind, dispatch) for dispatch in DISPATCHES} for kind in KINDS}


def sharded(rank: int, kind: str, dispatch: str) -> Trace:
    model, trace = build(kind, *EP4, f"dispatch.kind={dispatch}"), Trace()
    plan = moecompile.plan_of(model)
    shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    for step in range(STEPS):
        model.zero_grad()
        run(model, step, rank, trace)
        sum_replicated(model.parameters(), dist.group.WORLD)
        trace.loads += update_balance(model, torch.distributed.group.WORLD)
    trace.grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    trace.buffers = {
        name: b.clone() for name, b in model.state_dict().items() if "correction" in name or "load" in name
    }
    return trace


@cache
def launched() -> list[dict[str, dict[str, Trace]]]:
    return run_distributed_test(ranks, WORLD, timeout_s=170)


@cache
def results(kind: str) -> tuple[Trace, list[dict[str, Trace]]]:
    """One process, and dispatch -> trace of each rank."""
    return one_process(kind), [traces[kind] for traces in launched()]


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(kind: str, dispatch: str) -> None:
    wanted, by_rank = results(kind)
    traces = [traces[dispatch] for traces in by_rank]
    for number, trace in enumerate(traces):
        assert max_diff(trace.outputs[0], wanted.outputs[number]) <= 1e-12 * float(wanted.outputs[number].abs().max())
    assert worst(traces[0].grads, wanted.grads) < (1e-10, "")
    for trace in traces:
        assert trace.buffers.keys() == wanted.buffers.keys()
        assert worst(trace.buffers, wanted.buffers) < (1e-12, "")


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_meters_equal_one_process(kind: str, dispatch: str) -> None:
    """All but the nodes that tokens reach: one process has one."""
    wanted, by_rank = results(kind)
    for traces in by_rank:
        assert len(traces[dispatch].loads) == len(wanted.loads) == 2 * STEPS
        for got, load in zip(traces[dispatch].loads, wanted.loads, strict=True):
            assert got.name == load.name
            assert torch.equal(got.load, load.load)
            assert (got.tokens, got.dropped) == (load.tokens, load.dropped)
            assert got.entropy == pytest.approx(load.entropy, rel=1e-12)
            assert got.node_tokens.shape == (2,)
            assert load.node_tokens.max() <= got.node_tokens.sum() <= 2 * load.node_tokens.max()


def test_the_cases_are_hard() -> None:
    """Else agreement would say little."""
    for kind in KINDS:
        wanted, _ = results(kind)
        assert all((load.dropped > 0) == (kind != "expert choice") for load in wanted.loads)
        assert all(grad.abs().max() > 0 for name, grad in wanted.grads.items() if "router" in name or "experts" in name)
    assert results("capacity")[0].buffers["blocks.0.mlp.router.correction_bias"].abs().max() > 0
    wanted, by_rank = results("capacity by score, over the chosen")
    for got, load in zip(by_rank[0]["flat"].loads, wanted.loads, strict=True):
        assert got.node_tokens.sum() > 1.1 * load.node_tokens.max()  # some tokens do reach two nodes


def test_experts_choose_in_each_micro_batch() -> None:
    """Expert choice over all ranks at once would be another model: here each takes its share of each micro-batch."""
    wanted, _ = results("expert choice")
    tokens = [micro_batch(0, number).numel() for number in range(WORLD)]
    taken = sum(-(-count * 3 // 8) for count in tokens)
    assert wanted.loads[0].load.tolist() == [taken] * 8
    assert dataclasses.asdict(wanted.loads[0])["tokens"] == sum(tokens)
