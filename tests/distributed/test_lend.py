"""Lent experts change where rows are computed, and nothing else: not the outputs, and no gradient.

The reference is the plain layer of `dispatch_job`, and one process for whole models; neither knows of slots.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec
from moecompile.passes.fuse import Fuse
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import bind_axes, device_mesh_of, shard
from moecompile.pipeline import plan_of
from moecompile.plan import LENDING
from moecompile.torch_private import in_backward
from moecompile.verify.checks import worst
from tests.distributed import dispatch_job as job
from tests.distributed import gradient_job as gradients
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.distributed.test_dispatch_kinds import MESHES, TOLERANCE
from tests.tiny import collective

ON_NODE, ON_TWO = MeshSpec(num_nodes=1, ranks_per_node=2, ep=2), MeshSpec(num_nodes=2, ranks_per_node=2, ep=4)


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: every kind that lends, with one and two slots, free and priced loans, whole and in chunks."""
    found = []
    for i, spec in enumerate(MESHES[world_size]):
        random = [case for case in job.random_cases(spec, 10 * world_size + i, 5) if case.kind in LENDING]
        cases = []
        for j, case in enumerate(random):
            most = case.num_experts - case.experts_per_rank
            slots = (1, 2) if world_size > 2 else (1 + j % 2,)
            cases += [replace(case, slots=min(number, most)) for number in slots]
            cases.append(replace(case, slots=1, loan_rows=(1, 2), chunks=1 + j % 3))
        found.append(cases)
    return found


def _modules(cases: list[Case], rank: int, *, fused: bool) -> nn.ModuleList:
    """The lowered graphs, lent, bound to process groups."""
    (spec,) = {case.mesh for case in cases}
    modules = [job.lowered(case, rank % spec.ep) for case in cases]
    if fused:
        regions = [Region(path="", graph=module, module=module, matches={}) for module in modules]
        modules = [Fuse().run(r, [c.layer()]).graph for r, c in zip(regions, cases, strict=True)]
    bound = nn.ModuleList(modules)
    bind_axes(bound, device_mesh_of(spec, "cpu"), spec.nodes_per_ep_group)
    return bound


def _errors(rank: int, world_size: int) -> list[tuple[Case, dict[str, float]]]:
    found = []
    for cases in filter(None, _cases(world_size)):
        for fused in (False, True) if world_size > 2 else (True,):  # flat is never fused
            for case, module in zip(cases, _modules(cases, rank, fused=fused), strict=True):
                found.append((case, job.compare(case, rank, *job.run(module, case, rank))))
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_equals_the_plain_layer(world_size: int) -> None:
    """Uneven token counts, ranks and experts without tokens, all to one expert, dropped assignments, chunks."""
    for rank, results in enumerate(run_distributed_test(_errors, world_size, timeout_s=170)):
        for case, errors in results:
            assert max(errors.values()) <= TOLERANCE, (rank, case, errors)


# -- what travels ----------------------------------------------------------------------------------------------------


def _hot(kind: str, spec: MeshSpec, **changes: Any) -> Case:
    """All tokens choose the last expert."""
    tokens = (24, 20, 28, 24)[: spec.world_size]
    case = Case(kind=kind, mesh=spec, experts_per_rank=2, top_k=1, tokens=tokens, routing="one expert", slots=1)
    return replace(case, **changes)


def _counted(rank: int, world_size: int) -> list[tuple[list[int], int, int]]:
    """Rows of each of this rank's slots, and messages in forward and backward: free loans, then unaffordable ones."""
    found = []
    for price in (0, 1000):
        cases = [_hot(kind, ON_TWO, loan_rows=(price, price)) for kind in sorted(LENDING)]
        for case, module in zip(cases, _modules(cases, rank, fused=False), strict=True):
            seen: list[Tensor] = []
            module.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
            with _messages() as sent:
                job.run(module, case, rank)
            found.append((seen[0].tolist(), sent[False], sent[True]))
    return found


class _messages:
    """Counts torch's own collectives; the key says whether it was in backward."""

    def __init__(self, *names: str) -> None:
        self.names = [collective(name) for name in names or ("all_to_all_single", "all_gather_single")]

    def __enter__(self) -> Counter[bool]:
        self.sent = Counter[bool]()
        self.originals = {name: getattr(dist, name) for name in self.names}
        for name, original in self.originals.items():
            setattr(dist, name, self._counting(original))
        return self.sent

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.sent[in_backward()] += 1
            return original(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


@pytest.mark.slow
def test_rows_of_a_hot_expert_are_spread_evenly_and_nothing_travels_if_it_does_not_pay() -> None:
    by_rank = run_distributed_test(_counted, 4, timeout_s=100)
    messages = {"dedup": (4, 3), "flat": (3, 2), "hierarchical": (8, 6)}  # without lending
    for i, (kind, (forward, backward)) in enumerate(messages.items()):
        lent, kept = [results[i] for results in by_rank], [results[i + 3] for results in by_rank]
        assert [rows for rows, _, _ in lent] == [[0, 0, 24]] * 3 + [[0, 24, 0]], kind
        assert [rows for rows, _, _ in kept] == [[0, 0, 0]] * 3 + [[0, 96, 0]], kind
        # One message of counts more, and the experts there and their gradients back.
        assert {(f, b) for _, f, b in lent} == {(forward + 2, backward + 1)}, kind
        assert {(f, b) for _, f, b in kept} == {(forward + 1, backward)}, kind


def _broken(rank: int, world_size: int) -> list[dict[str, float]]:
    """Gradients of borrowed experts are not sent home; the experts arrive in another order."""
    cases = [_hot(kind, ON_NODE) for kind in ("flat", "dedup")]
    found = []
    for case, module in zip(cases, _modules(cases, rank, fused=True), strict=True):
        for node in [n for n in module.graph.nodes if n.name.startswith("borrowed_") and n.name != "borrowed_table"]:
            with module.graph.inserting_after(node):
                cut = module.graph.call_method("detach", (node,))
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
        module.recompile()
        found.append(job.compare(case, rank, *job.run(module, case, rank)))
    return found


def test_a_gradient_that_is_not_sent_home_is_seen() -> None:
    by_rank = run_distributed_test(_broken, 2, timeout_s=60)
    for errors in by_rank[1]:  # the owner of the hot expert
        assert errors["output"] <= TOLERANCE
        assert errors["gate_up"] > 1e-3 and errors["down"] > 1e-3


# -- whole models ----------------------------------------------------------------------------------------------------

# On hardware that computes so slowly a loan always pays.
LEND = ["dispatch.balance=lend", "dispatch.slots=2", "hardware.tflops=1e-9"]
SHAPES = {
    "dedup": ["mesh.ranks_per_node=2", "dispatch.kind=dedup", *LEND],
    "flat": ["mesh.ranks_per_node=2", "dispatch.kind=flat", *LEND],
}
MORE = {
    "edp": ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=dedup", *LEND],
    "replicas": ["mesh.ranks_per_node=4", "mesh.ep=2", "mesh.dp_replicate=2", "dispatch.kind=flat", *LEND],
    "hierarchical": ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical", *LEND],
    "chunks": ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical", *LEND,
               "dispatch.overlap=chunks", "dispatch.chunks=2"],
}  # fmt: skip


def _train(rank: int, world_size: int, shapes: dict[str, list[str]]) -> dict[str, gradients.Trace]:
    return {name: gradients.sharded(rank, world_size, torch.float64, shape) for name, shape in shapes.items()}


def _check_training(world_size: int, shapes: dict[str, list[str]]) -> None:
    """Three steps, with accumulation, FSDP2, clipping and the correction bias."""
    wanted = gradients.reference(torch.float64)
    for name, got in run_distributed_test(_train, world_size, shapes, timeout_s=170)[0].items():
        assert got.losses == pytest.approx(wanted.losses, rel=TOLERANCE), name
        assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE), name
        assert worst(got.grads, wanted.grads) < (TOLERANCE, ""), name
        assert worst(got.weights, wanted.weights) < (TOLERANCE, ""), name


@pytest.mark.slow
def test_training_equals_one_process() -> None:
    _check_training(2, SHAPES)


@pytest.mark.slow
def test_training_with_sharded_experts_and_two_nodes_equals_one_process() -> None:
    _check_training(4, MORE)


@dataclass
class Step:
    """One forward and backward: loss, gradients, messages in either."""

    loss: float
    grads: dict[str, Tensor]
    forward: int
    backward: int


def _ways(rank: int, world_size: int) -> dict[str, Step]:
    found = {}
    for checkpointing in ("none", "keep_exchanges", "full"):
        model = gradients.build(torch.float64, SHAPES["dedup"])
        plan = plan_of(model)
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        if checkpointing != "none":
            recompute(model, plan, checkpointing)
        with _messages("all_to_all_single") as sent:  # FSDP gathers too
            loss = gradients.summed_loss(model.train(), *gradients.micro_batches(0)[rank])
            loss.backward()
        grads = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        found[checkpointing] = Step(loss.item(), grads, sent[False], sent[True])
    return found


def _whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


@pytest.mark.slow
def test_checkpointing_resends_what_it_says() -> None:
    steps = run_distributed_test(_ways, 2, timeout_s=170)[0]
    wanted, layers = steps["none"], 2
    for name, step in steps.items():
        assert step.loss == pytest.approx(wanted.loss, rel=1e-12), name
        assert worst(step.grads, wanted.grads)[0] < TOLERANCE, name
        assert step.forward == wanted.forward
    lent = wanted.forward - 4 * layers  # counts of rows, rows, assignments and sums; and experts, where a layer lends
    assert 1 <= lent <= layers
    backward = 3 * layers + lent
    assert [steps[how].backward for how in ("none", "keep_exchanges", "full")] == [
        backward, backward, backward + wanted.forward,
    ]  # fmt: skip


# -- compiled --------------------------------------------------------------------------------------------------------


def _compiled(rank: int, world_size: int) -> list[float]:
    """Largest differences of compiled regions, whole graphs; warnings are errors."""
    warnings.simplefilter("error", UserWarning)
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    found = []
    for kind, chunks in (("flat", 0), ("dedup", 0), ("dedup", 2)):
        case = Case(kind=kind, mesh=ON_NODE, experts_per_rank=2, top_k=2, tokens=(7, 9), seed=3, slots=1, chunks=chunks)
        for fused in (False, True) if not chunks else (False,):
            (module,) = _modules([case], rank, fused=fused)
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            for tokens, routing in (((7, 9), "uniform"), ((2, 12), "one expert"), ((5, 0), "uniform")):
                again = replace(case, tokens=tokens, routing=routing)
                module.zero_grad()
                got, sent = job.run(module, again, rank, forward=compiled)
                found.append(max(job.compare(again, rank, got, sent).values()))
    return found


@pytest.mark.slow
def test_compiled_regions_are_whole_graphs() -> None:
    for found in run_distributed_test(_compiled, 2, timeout_s=170):
        assert max(found) <= TOLERANCE, found
