"""Adapters on N ranks equal transformers and peft in one process: logits, losses, every gradient, norms, two steps."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moecompile.verify import worst
from tests.distributed import adapters_job as job
from tests.distributed.existing_job import Trace
from tests.distributed.harness import run_distributed_test

ONE = {"local": ["mesh.ranks_per_node=1"]}
TWO = {
    "ep2": ["mesh.ranks_per_node=2"],
    "ep1": ["mesh.ranks_per_node=2", "mesh.ep=1"],
    "2 chunks": ["mesh.ranks_per_node=2", "dispatch.overlap=chunks", "dispatch.chunks=2"],
}
FOUR = {
    "ep4": ["mesh.ranks_per_node=4"],
    "ep2, edp2": ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=flat"],
    "ep4 on two nodes": ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "mesh.ep=4", "dispatch.kind=hierarchical"],
    "ep2, dp_replicate2": ["mesh.ranks_per_node=4", "mesh.ep=2", "mesh.dp_replicate=2"],
}
ARCHITECTURES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_moe")
TOLERANCE = 1e-10  # relative to the largest entry of each tensor, float64


@cache
def reference(architecture: str) -> Trace:
    return job.reference(architecture, torch.float64)


def _all(rank: int, world_size: int, meshes: dict[str, list[str]], names: tuple[str, ...]) -> dict[str, Trace]:
    return {
        f"{name}, {mesh}": job.sharded(rank, world_size, name, torch.float64, overrides)
        for name in names
        for mesh, overrides in meshes.items()
    }


def assert_equal(got: Trace, wanted: Trace) -> None:
    assert got.logits is not None and wanted.logits is not None
    assert float((got.logits - wanted.logits).abs().max()) <= 1e-12
    assert got.losses == pytest.approx(wanted.losses, rel=TOLERANCE)
    assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
    assert got.grads.keys() == wanted.grads.keys() == got.weights.keys()
    assert worst(got.grads, wanted.grads) < (TOLERANCE, "")
    assert worst(got.weights, wanted.weights) < (TOLERANCE, "")


def _checked(world_size: int, meshes: dict[str, list[str]], names: tuple[str, ...]) -> None:
    for case, trace in run_distributed_test(_all, world_size, meshes, names, timeout_s=240)[0].items():
        assert_equal(trace, reference(case.partition(",")[0]))


@pytest.mark.slow
def test_two_ranks_equal_peft_in_one_process() -> None:
    _checked(2, {"2 chunks": TWO["2 chunks"]}, ("mixtral",))
    _checked(2, {"ep2": TWO["ep2"]}, ("deepseek_v3",))


@pytest.mark.slow
def test_other_meshes_and_families() -> None:
    _checked(1, ONE, ARCHITECTURES)
    _checked(2, TWO, ARCHITECTURES)
    _checked(4, FOUR, ARCHITECTURES)


def test_every_adapter_has_a_gradient() -> None:
    """Else agreement would say little."""
    for name, grad in reference("mixtral").grads.items():
        assert grad.abs().max() > 1e-5, name


MUTATIONS = {"frozen_experts": "weights", "swapped_columns": "grads"}
"""What is broken -> the field of the trace that is not that of PEFT then."""


def _mutated(rank: int, world_size: int) -> dict[str, Trace]:
    return {m: job.sharded(rank, world_size, "mixtral", torch.float64, TWO["ep2"], mutate=m) for m in MUTATIONS}


@pytest.mark.slow
def test_mutations_are_caught() -> None:
    wanted, broken = reference("mixtral"), run_distributed_test(_mutated, 2, timeout_s=120)[0]
    lost = wanted.grads.keys() - broken["frozen_experts"].grads.keys()
    assert len(lost) == 8 and all(".experts.lora_" in name for name in lost)
    for name, field in MUTATIONS.items():
        assert worst(getattr(broken[name], field), getattr(wanted, field))[0] > 1e-3, name
