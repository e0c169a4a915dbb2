"""Back ends of tests/backends.py in place of our dispatch and our experts: everything equals the plain layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import moecompile
from moecompile.mesh import MeshSpec
from moecompile.passes.base import run_on_model
from moecompile.passes.run import on_every_rank
from moecompile.passes.shard import device_mesh_of
from moecompile.torch_private import local_part
from tests import backends
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import ids

DISPATCH = "tests.backends:once_per_rank"
IN_FLIGHT = "tests.backends:in_flight"
EXPERTS = "tests.backends:one_by_one"
MESHES = {2: [MeshSpec(num_nodes=1, ranks_per_node=2, ep=2)], 4: [
    MeshSpec(num_nodes=2, ranks_per_node=2, ep=4), MeshSpec(num_nodes=2, ranks_per_node=2, ep=2),
]}  # fmt: skip


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: our exchanges with other experts, other exchanges with our experts, and both."""
    found = []
    for mesh in MESHES[world_size]:
        of_mesh = []
        for case in job.random_cases(mesh, 50 * world_size, 5):
            if case.kind != "flat":
                of_mesh.append(replace(case, experts_backend=EXPERTS))
            if case.kind in ("dedup", "hierarchical"):
                of_mesh += [replace(case, backend=DISPATCH), replace(case, backend=DISPATCH, experts_backend=EXPERTS)]
                of_mesh += [replace(case, backend=IN_FLIGHT, chunks=chunks) for chunks in (1, 3)]
                slots = min(2, case.num_experts - case.experts_per_rank)
                of_mesh += [
                    replace(case, backend=DISPATCH, slots=1), replace(case, backend=IN_FLIGHT, slots=slots, chunks=2),
                ]  # fmt: skip
        found.append(of_mesh)
    return found


def _wrong(rank: int, world_size: int) -> dict[str, float]:
    """Of a back end that returns gradients in another order."""
    case = next(c for c in job.random_cases(MESHES[world_size][0], 7, 1) if c.kind == "dedup" and min(c.tokens) > 1)
    return job.errors_of([replace(case, backend="tests.backends:wrong_way")], rank)[0]


def _errors(rank: int, world_size: int) -> tuple[list[tuple[Case, dict[str, float]]], dict[str, float]]:
    found = [each for cases in _cases(world_size) for each in zip(cases, job.errors_of(cases, rank), strict=True)]
    return found, _wrong(rank, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_other_back_ends_equal_the_plain_layer(world_size: int) -> None:
    """Also drops, ranks without tokens, top-1 to top-8: output and every gradient; and a wrong one is seen."""
    for rank, (results, wrong) in enumerate(run_distributed_test(_errors, world_size, timeout_s=170)):
        assert wrong["output"] <= 1e-10 and wrong["x"] > 1e-3
        assert {(bool(case.backend), bool(case.experts_backend)) for case, _ in results} == {
            (True, True), (True, False), (False, True),
        }  # fmt: skip
        for case, errors in results:
            assert max(errors.values()) <= 1e-10, (rank, case, errors)


def _recomputed(rank: int, world_size: int) -> dict[str, tuple[dict[str, int], dict[str, Tensor]]]:
    """For each way to recompute: how often each call was made in forward and backward, and every gradient."""
    found = {}
    for name in ("none", "full", "keep_exchanges"):
        model = moe_model("mixtral", dtype=torch.float64)
        overrides = ["mesh.ranks_per_node=2", f"dispatch.backend={IN_FLIGHT}", "dispatch.overlap=chunks"]
        moecompile.compile_model(model, overrides, example=moe_inputs("mixtral", ids()))
        plan = moecompile.plan_of(model.train())
        run_on_model(on_every_rank(device_mesh_of(plan.mesh, "cpu"), checkpointing=name), model, plan)
        backends.in_flight.made.clear()
        model(**moe_inputs("mixtral", ids() + rank)).logits.square().mean().backward()
        gradients = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
        found[name] = dict(backends.in_flight.made), {k: local_part(g).clone() for k, g in gradients.items()}
    assert backends.in_flight.now == 0 and backends.in_flight.most > 1
    return found


def test_what_a_back_end_returned_is_kept_for_backward() -> None:
    """Its calls are not made again, and every gradient is what it is without recomputation."""
    for found in run_distributed_test(_recomputed, 2, timeout_s=170):
        forward = found["none"][0]["dispatch_again"]  # one for each combine
        assert {name: calls["dispatch"] // forward for name, (calls, _) in found.items()} == {
            "none": 1, "full": 2, "keep_exchanges": 1,
        }  # fmt: skip
        assert len(found["none"][1]) > 10
        for _, gradients in found.values():
            assert gradients.keys() == found["none"][1].keys()
            assert all(torch.equal(g, found["none"][1][path]) for path, g in gradients.items())
