"""Losses, capacity and metrics of models that are MoE already: N ranks equal transformers' modules in one process."""

from __future__ import annotations

from functools import cache

import pytest

from moecompile.verify import worst
from tests.distributed import own_router_job as job
from tests.distributed.harness import run_distributed_test

# transformers computes softmax (Mixtral, Qwen3-MoE) or gates (DeepSeek-V3) in fp32 in every model.
TOLERANCE = {"gpt_oss": 1e-10, "mixtral": 1e-6, "qwen3_moe": 1e-6, "deepseek_v3": 1e-6, "olmoe": 1e-6}


def assert_equal(got: job.Found, wanted: job.Found, case: job.Case) -> None:
    tolerance = TOLERANCE[case.architecture]
    assert got.losses == pytest.approx(wanted.losses, rel=tolerance)
    assert got.aux == pytest.approx(wanted.aux, rel=tolerance)
    for i, logits in got.logits.items():
        assert float((logits - wanted.logits[i]).abs().max()) <= tolerance
    for mine, theirs in zip(got.grads, wanted.grads, strict=True):
        assert worst(mine, theirs) < (tolerance, "")
    assert worst(got.weights, wanted.weights) < (tolerance, "")
    assert (got.loads, got.dropped) == (wanted.loads, wanted.dropped)
    assert any(n for dropped in wanted.dropped for n in dropped) == (case.capacity is not None)
    for mine, theirs in zip(got.entropy, wanted.entropy, strict=True):
        assert mine == pytest.approx(theirs, rel=max(tolerance, 1e-9))


CASES = {
    "mixtral": job.Case(architecture="mixtral", capacity=0.75, padding="left"),
    "deepseek_v3": job.Case(architecture="deepseek_v3", capacity=0.75, drop="score", padding="right"),
    "gpt_oss": job.Case(architecture="gpt_oss", capacity=0.75, padding="left"),
    "qwen3_moe": job.Case(architecture="qwen3_moe", padding="right"),
}
ALWAYS = "data.mask_padding=always"
ONE_NODE = ["mesh.ranks_per_node=2"]
TWO = {  # case, what is recomputed, mesh and dispatch
    "ep 1": ("mixtral", "full", [*ONE_NODE, "mesh.ep=1"]),
    "ep 2": ("deepseek_v3", "", [*ONE_NODE, "dispatch.kind=dedup"]),
    "chunks": (
        "gpt_oss",
        "keep_exchanges",
        [*ONE_NODE, "dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
    ),
    "lent": ("gpt_oss", "", [*ONE_NODE, "dispatch.kind=flat", "dispatch.balance=lend", "hardware.tflops=1e-9"]),
}
TWO_BY_TWO = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]
FOUR_TOGETHER = ["mesh.ranks_per_node=4", "mesh.ep=4", "dispatch.kind=dedup"]
FOUR = {
    "ep 4": ("deepseek_v3", "", [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=hierarchical"]),
    "ep 4, gathered": ("gpt_oss", "", [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=allgather"]),
    "ep 2": ("mixtral", "", [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=dedup"]),
    "tp 2": ("mixtral", "", [*FOUR_TOGETHER, "mesh.tp=2"]),
    "cp 2": ("qwen3_moe", "", [*FOUR_TOGETHER, "mesh.cp=2", f"data.seq_len={job.SEQ}"]),
}


@cache
def reference(name: str) -> job.Found:
    return job.reference(CASES[name])


def _all(rank: int, world_size: int) -> dict[str, job.Found]:
    return {
        mesh: job.ours(CASES[name], [ALWAYS, *overrides], again)
        for mesh, (name, again, overrides) in (TWO if world_size == 2 else FOUR).items()
    }


def _check(ranks: list[dict[str, job.Found]]) -> None:
    for rank, found in enumerate(ranks):
        for mesh, got in found.items():
            name = (FOUR if len(ranks) == 4 else TWO)[mesh][0]
            if mesh == "cp 2":
                got.logits = {}  # of a part of the positions
            try:
                assert_equal(got, reference(name), CASES[name])
            except AssertionError as error:
                raise AssertionError(f"{name} on {mesh}, rank {rank}") from error


@pytest.mark.slow
def test_two_ranks() -> None:
    _check(run_distributed_test(_all, 2, timeout_s=300))


@pytest.mark.slow
def test_four_ranks() -> None:
    _check(run_distributed_test(_all, 4, timeout_s=300))
