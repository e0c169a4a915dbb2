"""The host waits for the device once a layer and forward, for the split sizes, and never in backward.

It waits for a copy to pinned memory that was started before rows were put in order, not for the rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import fx, nn

from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec
from moecompile.ops import expert_ffn, grouped
from moecompile.ops.cpu.blocks import Block
from moecompile.passes.base import experts_calls
from moecompile.passes.fuse import Fuse
from moecompile.passes.shard import bind_axes, device_mesh_of
from moecompile.pipeline import transform
from moecompile.plan import IN_FLIGHT, LENDING
from tests.distributed import dispatch_job as job
from tests.distributed.device import CopyEvent, DeviceTensor, HostWaits
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.tiny import Gated, config

SPEC = MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)
CASES = [
    Case(kind=kind, mesh=SPEC, experts_per_rank=2, top_k=3, tokens=(5, 7, 0, 6), routing=routing, seed=4)
    for kind in job.KINDS
    for routing in ("uniform", "drops")
]  # fmt: skip
LENT = [replace(case, slots=1) for case in CASES if case.kind in LENDING and case.routing == "uniform"]
LENT += [replace(case, slots=1, chunks=2) for case in CASES if case.kind == "dedup"]
CASES += [replace(case, chunks=chunks) for case in CASES if case.kind in IN_FLIGHT for chunks in (1, 2)]
CASES += LENT


class _BlockOfHeld(Block):
    @classmethod
    def whole(cls, counts_E: torch.Tensor) -> Block:
        return Block.whole(getattr(counts_E, "held", counts_E))


Found = tuple[list[str], list[str], list[str], bool]


def _fused(case: job.Case, rank: int) -> fx.GraphModule:
    graph_module = job.lowered(case, rank)
    region = Region(path="", graph=graph_module, module=graph_module, matches={})
    return Fuse().run(region, [case.layer()]).graph


def _waits(rank: int, world_size: int) -> list[Found]:
    """For each case, lowered and then fused: waits in forward, what ran on the device while the counts were on their
    way, waits in backward, and whether the result is that of plain tensors.
    """
    modules = nn.ModuleList(job.lowered(case, rank) for case in CASES)
    modules.extend(_fused(case, rank) for case in CASES)
    bind_axes(modules, device_mesh_of(SPEC, "cpu"), SPEC.nodes_per_ep_group)
    grouped.Block = _BlockOfHeld  # the plain loop of matmuls stands for a kernel that takes the counts from the device
    expert_ffn.at_once = lambda like, *sizes: True  # as on a GPU
    torch.Event, torch.accelerator.current_stream = CopyEvent, torch.device
    found = []
    for case, module in zip(CASES * 2, modules, strict=True):
        wanted, _ = job.run(module, case, rank)
        x, weights, grad = (DeviceTensor(tensor) for tensor in case.inputs(rank))
        with HostWaits():
            for name, parameter in list(module.experts.named_parameters()):
                setattr(module.experts, name, nn.Parameter(DeviceTensor(parameter.detach())))
        with HostWaits() as forward:
            out = module(x.requires_grad_(), DeviceTensor(case.ids(rank)), weights.requires_grad_())
        with HostWaits() as backward:
            out.backward(grad)
        # On a device, own and borrowed experts are one call, which adds up in another order than two.
        equal = partial(torch.allclose, rtol=1e-12, atol=1e-12) if case.slots else torch.equal
        same = equal(out.held.detach(), wanted["output"]) and equal(x.grad.held, wanted["x"])
        found.append((forward.found, forward.meanwhile, backward.found, same))
    return found


@pytest.fixture(scope="module")
def found() -> list[list[Found]]:
    return run_distributed_test(_waits, 4, timeout_s=120)


IDS = [
    f"{case.kind}-{case.routing}-{case.chunks}-{case.slots}-{form}" for form in ("lowered", "fused") for case in CASES
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2 * len(CASES)), ids=IDS)
def test_one_wait_a_layer(number: int, found: list[list[Found]]) -> None:
    for by_case in found:
        forward, meanwhile, backward, same = by_case[number]
        assert forward == ["event"]  # the table of split sizes
        assert backward == []
        assert same
        if "allgather" not in IDS[number]:  # which must know the longest micro-batch before it can do anything
            assert {"aten::sort", "aten::argsort"} & set(meanwhile)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_whole_layer_on_one_rank_waits_for_nothing(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Router, load meter, sorting, experts and sum."""
    monkeypatch.setattr(expert_ffn, "at_once", lambda like, *sizes: True)
    monkeypatch.setattr(grouped, "Block", _BlockOfHeld)
    x, grad = torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    graph = transform(fx.symbolic_trace(Gated()), config("experts.num_routed=4", f"routing.score={score}"))
    (call,) = experts_calls(graph)
    assert "source_R" in call.kwargs  # the fused op, whose path on a device is taken
    wanted = graph(x).detach()
    with HostWaits():
        for module in list(graph.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(DeviceTensor(parameter.detach())))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, DeviceTensor(buffer))
    there = DeviceTensor(x)
    with HostWaits() as forward:
        out = graph(there.requires_grad_())
    with HostWaits() as backward:
        out.backward(DeviceTensor(grad))
    assert (forward.found, backward.found) == ([], [])
    assert torch.allclose(out.held.detach(), wanted) and there.grad is not None


def test_every_way_to_wait_is_seen() -> None:
    """Else the count would say nothing."""
    numbers = torch.tensor([3, 0, 2])
    ways = {
        "item": lambda t: int(t.sum()), "tolist": lambda t: t.tolist(), "cpu": lambda t: t.cpu(),
        "mask": lambda t: t[t > 0], "nonzero": lambda t: t.nonzero(), "if": lambda t: bool(t.any()),
        "repeat": lambda t: t.repeat_interleave(t), "select": lambda t: t.masked_select(t > 0),
    }  # fmt: skip
    for name, way in ways.items():
        with HostWaits() as waits:
            way(DeviceTensor(numbers))
        assert waits.found, name
    with HostWaits() as waits:
        torch.empty(3, dtype=torch.int64).copy_(DeviceTensor(numbers), non_blocking=True)
    assert waits.found == ["aten::copy_"]  # to memory that is not pinned
    with HostWaits() as waits:
        DeviceTensor(numbers).sort().values.cumsum(0)
    assert not waits.found
