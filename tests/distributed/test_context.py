"""Context parallelism with expert parallelism: logits, loss, every gradient and norm are those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import context_job as job
from tests.distributed.context_job import Case, Step
from tests.distributed.fold_job import worst
from tests.distributed.harness import run_distributed_test

FAST = (
    Case(architecture="mixtral", cp=2, ep=2, ranks=2),
    Case(architecture="deepseek_v3", cp=2, ep=2, ranks=2, rows="packed"),
    Case(architecture="llama", cp=2, ep=2, ranks=2, losses={"micro_batch": 0.3, "z": 0.2}),
)


def ranks(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[Step]:
    return [job.step(case) for case in cases]


def check(case: Case, found: list[Step]) -> None:
    """found: of each rank."""
    wanted = job.reference(case)
    for of_rank in found:
        assert of_rank.loss == pytest.approx(wanted.loss, rel=1e-12)
        for got, logits, batch in zip(of_rank.logits, wanted.logits, job.micro_batches(case), strict=True):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
            assert float((got - logits)[real].abs().max()) <= 1e-10 * float(logits.abs().max())
        assert of_rank.norm == pytest.approx(wanted.norm, rel=1e-10)
        error, name = worst(of_rank.grads, wanted.grads)
        assert error <= 1e-10, f"{case.name}: {name} is off by {error}"
        near, far, planned_near, planned_far = of_rank.rest["bytes"]
        assert (near, far) == (planned_near, planned_far) and near + far > 0


SLOW = (
    *(Case(architecture="mixtral", cp=cp, ep=ep) for cp in (2, 4) for ep in (1, 2, 4)),
    *(Case(architecture="deepseek_v3", cp=cp, ep=4, rows=rows) for cp, rows in ((2, "full"), (2, "left"))),
    Case(architecture="qwen3_moe", cp=2, ep=2, rows="right"),
    Case(architecture="qwen3_moe", cp=4, ep=4, rows="packed"),
    Case(architecture="qwen3_moe", cp=4, ep=4, rows="left", overrides=("data.mask_padding=always",)),
    Case(architecture="llama", cp=2, ep=4, losses={"micro_batch": 0.3, "z": 0.2}),
    Case(architecture="llama", cp=4, ep=2, losses={"micro_batch": 0.3, "z": 0.2}, rows="packed"),
    Case(architecture="llama", cp=4, ep=4, rows="right", overrides=("data.mask_padding=always",)),
    Case(architecture="llama", cp=4, ep=4, changes={"num_key_value_heads": 1}),
    Case(architecture="mixtral", cp=2, ep=2, overrides=("mesh.dp_replicate=2",)),
    Case(architecture="mixtral", cp=2, ep=2, changes={"sliding_window": 5}),
    Case(architecture="mixtral", cp=2, ep=4, overrides=("dispatch.kind=allgather",)),
    Case(architecture="llama", cp=2, ep=4, overrides=("dispatch.overlap=chunks", "dispatch.chunks=2")),
    Case(
        architecture="llama",
        cp=4,
        ep=4,
        overrides=("mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical"),
    ),
    Case(architecture="qwen3_moe", cp=2, ep=4, checkpointing="full"),
    Case(architecture="mixtral", cp=2, ep=4, checkpointing="keep_exchanges"),
)
EIGHT = (
    Case(architecture="mixtral", cp=2, ep=8, ranks=8, changes={"num_local_experts": 8}),
    Case(architecture="mixtral", cp=4, ep=2, ranks=8),
    Case(architecture="deepseek_v3", cp=4, ep=4, ranks=8, changes={"num_attention_heads": 4, "num_key_value_heads": 4}),
    Case(architecture="qwen3_moe", cp=4, ep=8, ranks=8, rows="packed"),
    Case(architecture="llama", cp=2, ep=8, ranks=8, losses={"micro_batch": 0.3, "z": 0.2}),
)


@pytest.fixture(scope="module")
def two() -> list[list[Step]]:
    return run_distributed_test(ranks, 2, FAST, timeout_s=120)


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(case: Case, two: list[list[Step]]) -> None:
    check(case, [of_rank[FAST.index(case)] for of_rank in two])


@pytest.fixture(scope="module")
def four() -> list[list[Step]]:
    return run_distributed_test(ranks, 4, SLOW, timeout_s=500)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_four_ranks_equal_one_process(case: Case, four: list[list[Step]]) -> None:
    check(case, [of_rank[SLOW.index(case)] for of_rank in four])


@pytest.fixture(scope="module")
def eight() -> list[list[Step]]:
    return run_distributed_test(ranks, 8, EIGHT, timeout_s=500)


@pytest.mark.slow
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_eight_ranks_equal_one_process(case: Case, eight: list[list[Step]]) -> None:
    check(case, [of_rank[EIGHT.index(case)] for of_rank in eight])
