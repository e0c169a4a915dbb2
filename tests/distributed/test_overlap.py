"""Exchanges in flight over real ranks: the same outputs, gradients and bytes as the plain layer, and no rank left waiting."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.mesh import MeshSpec
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import bind_axes, device_mesh_of, shard
from moecompile.pipeline import plan_of
from moecompile.plan import ATTENTION, EXPERTS, IN_FLIGHT, LAYER, NORMS, Recomputed
from moecompile.torch_private import in_backward
from moecompile.verify import worst
from tests.distributed import dispatch_job as job
from tests.distributed import gradient_job as gradients
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.distributed.test_dispatch_kinds import MESHES, TOLERANCE
from tests.ops.test_collect import Ops

CHUNKS = (1, 2, 3, 4)


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: every kind whose exchanges can be in flight, in 1 to 4 chunks of 0 to 9 tokens."""
    found = []
    for i, spec in enumerate(MESHES[world_size]):
        cases = [case for case in job.random_cases(spec, 10 * world_size + i, 5) if case.kind in IN_FLIGHT]
        found.append([replace(case, chunks=chunks) for case in cases for chunks in CHUNKS])
    return found


def _errors(rank: int, world_size: int) -> list[tuple[Case, dict[str, float]]]:
    return [result for cases in _cases(world_size) for result in zip(cases, job.errors_of(cases, rank), strict=True)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_kind_equals_the_plain_layer(world_size: int) -> None:
    for rank, results in enumerate(run_distributed_test(_errors, world_size, timeout_s=170)):
        for case, errors in results:
            assert max(errors.values()) <= TOLERANCE, (rank, case, errors)


# -- whole models ----------------------------------------------------------------------------------------------------

CHUNKED = ["dispatch.overlap=chunks", "dispatch.chunks=2"]
SHAPES = {
    "dedup": ["mesh.ranks_per_node=2", "dispatch.kind=dedup", *CHUNKED],
    "flat-shared": ["mesh.ranks_per_node=2", "dispatch.kind=flat", "dispatch.overlap=shared"],
}


def _train(rank: int, world_size: int, shapes: dict[str, list[str]]) -> dict[str, gradients.Trace]:
    return {name: gradients.sharded(rank, world_size, torch.float64, shape) for name, shape in shapes.items()}


@pytest.mark.slow
def test_training_equals_one_process() -> None:
    """Three steps, with accumulation, FSDP2, clipping and the correction bias."""
    wanted, by_shape = gradients.reference(torch.float64), run_distributed_test(_train, 2, SHAPES, timeout_s=170)[0]
    for name, got in by_shape.items():
        assert got.losses == pytest.approx(wanted.losses, rel=TOLERANCE), name
        assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE), name
        assert worst(got.grads, wanted.grads) < (TOLERANCE, ""), name
        assert worst(got.weights, wanted.weights) < (TOLERANCE, ""), name


@pytest.mark.slow
def test_training_over_two_levels_equals_one_process() -> None:
    shapes = {
        f"{chunks}": ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical",
                      "dispatch.overlap=chunks", f"dispatch.chunks={chunks}", *gradients.AUX]
        for chunks in (2, 4)
    }  # fmt: skip
    wanted = gradients.reference(torch.float64, tuple(gradients.AUX))
    for name, got in run_distributed_test(_train, 4, shapes, timeout_s=170)[0].items():
        assert worst(got.grads, wanted.grads) < (TOLERANCE, ""), name
        assert worst(got.weights, wanted.weights) < (TOLERANCE, ""), name


@dataclass
class Step:
    """loss and gradients of one forward and backward, and how often rows were sent in either."""

    loss: float
    grads: dict[str, Tensor]
    forward: int
    backward: int


def _step(model: nn.Module, rank: int) -> Step:
    """Counts at torch's own collective."""
    sent = Counter[bool]()
    original = dist.all_to_all_single

    def counting(*args: Any, **kwargs: Any) -> Any:
        sent[in_backward()] += 1
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        loss = gradients.summed_loss(model, *gradients.micro_batches(0)[rank])
        loss.backward()
    finally:
        dist.all_to_all_single = original
    grads = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Step(loss.item(), grads, sent[False], sent[True])


def _whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()


def _ways(rank: int, world_size: int) -> dict[str, Step]:
    found = {}
    for name, overlap in {"none": [], "chunks": CHUNKED}.items():
        for checkpointing in ("none", "keep_exchanges", "full"):
            model = gradients.build(torch.float64, ["mesh.ranks_per_node=2", "dispatch.kind=dedup", *overlap])
            plan = plan_of(model)
            shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
            if checkpointing != "none":
                recompute(model, plan, checkpointing)
            found[f"{name} {checkpointing}"] = _step(model.train(), rank)
        for sends in (False, True):  # the first layer with experts in parts, the other one whole
            model = gradients.build(torch.float64, ["mesh.ranks_per_node=2", "dispatch.kind=dedup", *overlap])
            parts = (ATTENTION, NORMS, EXPERTS)
            modules = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp")
            layers = [layer.site.fqn.removesuffix(".mlp") for layer in plan.layers]
            plan = replace(plan_of(model), recomputed=(
                Recomputed(parts=parts, sends=sends, modules=modules, layers=(layers[0],)),
                Recomputed(parts=(LAYER,), sends=sends, modules=("",), layers=(layers[1],)),
            ))  # fmt: skip
            shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
            recompute(model, plan, "budget")
            found[f"{name} budget{' sends' * sends}"] = _step(model.train(), rank)
    return found


@pytest.mark.slow
def test_checkpointing_resends_what_it_says() -> None:
    steps = run_distributed_test(_ways, 2, timeout_s=170)[0]
    wanted = steps["none none"]
    for name, step in steps.items():
        assert step.loss == pytest.approx(wanted.loss, rel=1e-12), name
        assert worst(step.grads, wanted.grads)[0] < TOLERANCE, name
    layers = 2
    # Forward: counts, and rows, assignments and partial sums of each chunk. Backward: the last three.
    assert (wanted.forward, wanted.backward) == (4 * layers, 3 * layers)
    ways = ("none", "keep_exchanges", "budget", "full", "budget sends")
    assert [steps[f"chunks {how}"].forward for how in ways] == [7 * layers] * 5
    assert [steps[f"chunks {how}"].backward for how in ways] == [*[6 * layers] * 3, *[13 * layers] * 2]


def _watched(rank: int, world_size: int) -> tuple[dict[str, float], list[float]]:
    """Errors under anomaly mode, which reads every gradient, and the largest entry of each token's gradient."""
    spec = MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)
    case = Case(kind="dedup", mesh=spec, experts_per_rank=2, top_k=2, tokens=(7, 9), chunks=2, seed=3)
    module, seen = job.lowered(case, rank), list[float]()

    def watch(token: Tensor) -> Tensor:
        token.register_hook(lambda grad: seen.append(float(grad.abs().max())))
        return token

    for start in [node for node in module.graph.nodes if "all_to_all_start" in str(node.target)]:
        token = next(item for item in start.users if item.args[1] == 0)
        with module.graph.inserting_after(token):
            watched = module.graph.call_function(watch, (token,))
        token.replace_all_uses_with(watched, delete_user_cb=lambda user, watched=watched: user is not watched)
    module.recompile()
    bind_axes(module, device_mesh_of(spec, "cpu"), 1)
    with torch.autograd.set_detect_anomaly(True):
        got, sent = job.run(module, case, rank)
    return job.compare(case, rank, got, sent), seen


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_hooks_and_anomaly_mode_see_no_buffer_in_flight() -> None:
    for errors, seen in run_distributed_test(_watched, 2, timeout_s=60):
        assert max(errors.values()) <= TOLERANCE, errors
        assert seen == [0.0] * 4


def _events(rank: int, world_size: int) -> dict[str, list[str]]:
    """What ran in backward, in order: starts and waits of gradients, and the products of experts."""
    spec = MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)
    found = {}
    for kind in ("flat", "dedup"):
        for chunks in (1, 2, 4):
            case = Case(kind=kind, mesh=spec, experts_per_rank=2, top_k=2, tokens=(7, 9), chunks=chunks, seed=3)
            module = job.lowered(case, rank)
            bind_axes(module, device_mesh_of(spec, "cpu"), 1)
            x, weights, grad = case.inputs(rank)
            out = module(x.requires_grad_(), case.ids(rank), weights.requires_grad_())
            with Ops() as ops:
                out.backward(grad)
            kept = ("gradient_", "grouped_mm")
            found[f"{kind} {chunks}"] = [name for name in ops.names if name.startswith(kept)]
    return found


def test_the_gradients_dispatch_starts_before_the_weight_gradients() -> None:
    """And none is waited for that could not have been, before they are done."""
    for by_case in run_distributed_test(_events, 2, timeout_s=100):
        for name, events in by_case.items():
            kind, chunks = name.split()
            sent = int(chunks) * (2 if kind == "flat" else 3)  # rows both ways; dedup: weights, on their way back
            products = [i for i, event in enumerate(events) if event == "grouped_mm_weight_grads"]
            assert events.count("gradient_start") == events.count("gradient_wait") == sent, name
            assert len(products) == 2, name  # of gate and up, of down
            assert "gradient_start" not in events[products[0] :], (name, events)
            assert "grouped_mm_input_grad" not in events[products[0] :], (name, events)
            # The dispatches of the last chunks that started in forward before the first wait: one, or two.
            still = min(2, int(chunks)) * (1 if kind == "flat" else 2)
            assert events[products[-1] + 1 :] == ["gradient_wait"] * still, (name, events)


def _compiled(rank: int, world_size: int, backend: str) -> list[float]:
    """Largest differences of compiled regions, whole graphs, on three token counts; warnings are errors."""
    warnings.simplefilter("error", UserWarning)
    spec = MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)
    found = []
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    for kind in ("flat", "dedup"):
        case = Case(kind=kind, mesh=spec, experts_per_rank=2, top_k=2, tokens=(7, 9), chunks=2, seed=3)
        module = job.lowered(case, rank)
        bind_axes(module, device_mesh_of(spec, "cpu"), 1)
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        others = [(5, 0), (1, 12)] if backend == "aot_eager" else []  # inductor fails on tensors without rows
        for tokens in ((7, 9), (2, 12), *others):
            again = replace(case, tokens=tokens)
            module.zero_grad()
            got, sent = job.run(module, again, rank, forward=compiled)
            found.append(max(job.compare(again, rank, got, sent).values()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_regions_are_whole_graphs(backend: str) -> None:
    for found in run_distributed_test(_compiled, 2, backend, timeout_s=170):
        assert max(found) <= TOLERANCE, found
