"""Models that are MoE already on N ranks equal transformers' own in one process: logits, gradients, norms, weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moecompile.verify import worst
from tests.distributed import existing_job as job
from tests.distributed.harness import run_distributed_test

TWO_BY_TWO = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]
TWO = {
    "flat": ["mesh.ranks_per_node=2", "dispatch.kind=flat"],
    "dedup": ["mesh.ranks_per_node=2", "dispatch.kind=dedup"],
    "dedup, 2 chunks": ["mesh.ranks_per_node=2", "dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
}
FOUR = {
    "ep4-hierarchical": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=hierarchical"],
    "ep4-allgather": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=allgather"],
    "ep2x2": [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=flat"],
}
ARCHITECTURES = ("mixtral", "gpt_oss", "deepseek_v3", "switch_transformers")
TOLERANCE = 2e-5  # relative to the largest entry of each tensor, fp32


@cache
def reference(architecture: str) -> job.Trace:
    return job.reference(architecture, torch.float32)


@cache
def two_ranks() -> dict[tuple[str, str], job.Trace]:
    return run_distributed_test(_two, 2, timeout_s=180)[0]


def _two(rank: int, world_size: int) -> dict[tuple[str, str], job.Trace]:
    found = {
        (architecture, mesh): job.sharded(rank, world_size, architecture, torch.float32, overrides)
        for architecture in ARCHITECTURES
        for mesh, overrides in TWO.items()
    }
    wide = job.sharded(rank, world_size, "deepseek_v3", torch.float32, TWO["flat"], wide_gates=True)
    return found | {("deepseek_v3", "wide gates"): wide}


def _four(rank: int, world_size: int) -> dict[str, job.Trace]:
    return {
        mesh: job.sharded(rank, world_size, "deepseek_v3", torch.float32, overrides) for mesh, overrides in FOUR.items()
    }


def assert_equal(got: job.Trace, wanted: job.Trace) -> None:
    assert got.logits is not None and wanted.logits is not None
    assert float((got.logits - wanted.logits).abs().max()) <= 1e-5
    assert got.losses == pytest.approx(wanted.losses, rel=TOLERANCE)
    assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
    assert worst(got.grads, wanted.grads) < (TOLERANCE, "")
    assert worst(got.weights, wanted.weights) < (TOLERANCE, "")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", TWO)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_ranks_equal_transformers_in_one_process(architecture: str, mesh: str) -> None:
    assert_equal(two_ranks()[architecture, mesh], reference(architecture))


@pytest.mark.slow
def test_weights_of_another_dtype_stay_whole() -> None:
    """transformers keeps DeepSeek-V3's gates in fp32 in a model of bf16; FSDP2 takes one dtype."""
    got = two_ranks()["deepseek_v3", "wide gates"]
    assert_equal(got, job.reference("deepseek_v3", torch.float32, wide_gates=True))
    (name,) = (name for name in got.weights if name.endswith("gate.weight"))
    assert got.weights[name].dtype == torch.float64


def test_the_models_own_bias_follows_the_global_load() -> None:
    got, wanted = two_ranks()["deepseek_v3", "flat"], reference("deepseek_v3")
    assert got.loads == wanted.loads
    (name,) = (name for name in wanted.weights if name.endswith("e_score_correction_bias"))
    assert torch.equal(got.weights[name], wanted.weights[name])
    assert wanted.weights[name].abs().max() > 0


@pytest.mark.slow
def test_four_ranks_on_two_nodes() -> None:
    for trace in run_distributed_test(_four, 4, timeout_s=180)[0].values():
        assert_equal(trace, reference("deepseek_v3"))


# On hardware that computes so slowly a loan always pays.
LENT = ["mesh.ranks_per_node=2", "dispatch.balance=lend", "hardware.tflops=1e-9"]
LENDING = {"flat": ["dispatch.kind=flat"], "dedup": ["dispatch.kind=dedup"]}


def _lent(rank: int, world_size: int) -> dict[tuple[str, str], job.Trace]:
    """Fused and not, with biases, transposed, interleaved, top-1 with drops."""
    return {
        (architecture, kind): job.sharded(rank, world_size, architecture, torch.float32, [*LENT, *overrides])
        for architecture in ARCHITECTURES
        for kind, overrides in LENDING.items()
    }


@pytest.mark.slow
def test_lent_experts_equal_transformers_in_one_process() -> None:
    for (architecture, kind), trace in run_distributed_test(_lent, 2, timeout_s=170)[0].items():
        assert_equal(trace, reference(architecture))
        assert trace.grads, (architecture, kind)


def test_experts_and_routers_have_large_gradients() -> None:
    """Else agreement would say little."""
    grads = reference("mixtral").grads
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        assert grads[f"model.layers.1.mlp.{name}"].abs().max() > 1e-4


def _mutated(rank: int, world_size: int) -> dict[str, job.Trace]:
    names = ("divisor", "no_bias_rule")
    return {
        name: job.sharded(rank, world_size, "deepseek_v3", torch.float32, TWO["flat"], mutate=name) for name in names
    }


def test_mutations_are_caught() -> None:
    wanted, broken = reference("deepseek_v3"), run_distributed_test(_mutated, 2, timeout_s=120)[0]
    assert worst(broken["divisor"].grads, wanted.grads)[0] > 0.1
    error, name = worst(broken["no_bias_rule"].weights, wanted.weights)
    assert error > 0.1 and name.endswith("e_score_correction_bias")
