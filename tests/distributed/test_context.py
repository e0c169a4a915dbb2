"""Context parallelism with expert parallelism: logits, loss, every gradient and norm are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moecompile.errors import ConfigError
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import plan_of
from moecompile.runtime.gradients import sum_replicated
from moecompile.runtime.groups import Groups
from moecompile.runtime.strategy import ExpertParallelStrategy
from tests.distributed import context_job as job
from tests.distributed.context_job import Case, Step
from tests.distributed.fold_job import worst
from tests.distributed.handed_over import handed_over
from tests.distributed.harness import run_distributed_test

FAST = (
    Case(architecture="mixtral", cp=2, ep=2, ranks=2),
    Case(architecture="deepseek_v3", cp=2, ep=2, ranks=2, rows="packed"),
    Case(architecture="llama", cp=2, ep=2, ranks=2, losses={"micro_batch": 0.3, "z": 0.2}),
)


def ranks(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[Step]:
    return [job.step(case) for case in cases]


def in_fp32(case: Case, name: str) -> bool:
    """Whether transformers computes the gradient in fp32 in a model of float64: sums of it round by their order."""
    return case.architecture == "deepseek_v3" and name.endswith("mlp.gate.weight")


def check(case: Case, found: list[Step]) -> None:
    """found: of each rank."""
    wanted = job.reference(case)
    for of_rank in found:
        assert of_rank.loss == pytest.approx(wanted.loss, rel=1e-12)
        for got, logits, batch in zip(of_rank.logits, wanted.logits, job.micro_batches(case), strict=True):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
            assert float((got - logits)[real].abs().max()) <= 1e-10 * float(logits.abs().max())
        assert of_rank.norm == pytest.approx(wanted.norm, rel=1e-10)
        exact = {name: grad for name, grad in of_rank.grads.items() if not in_fp32(case, name)}
        for names, most in ((exact.keys(), 1e-10), (of_rank.grads.keys() - exact.keys(), 1e-6)):
            if names:
                error, name = worst({n: of_rank.grads[n] for n in names}, {n: wanted.grads[n] for n in names})
                assert error <= most, f"{case.name}: {name} is off by {error}"
        assert of_rank.grads.keys() == wanted.grads.keys()
        near, far, planned_near, planned_far = of_rank.rest["bytes"]
        assert (near, far) == (planned_near, planned_far) and near + far > 0


SLOW = (
    *(Case(architecture="mixtral", cp=cp, ep=ep) for cp, ep in ((2, 2), (4, 1), (4, 4))),
    Case(architecture="deepseek_v3", cp=2, ep=4, rows="left"),
    Case(architecture="qwen3_moe", cp=4, ep=2, rows="packed"),
    Case(architecture="qwen3_moe", cp=4, ep=4, rows="right", overrides=("data.mask_padding=always",)),
    Case(architecture="llama", cp=4, ep=2, losses={"micro_batch": 0.3, "z": 0.2}, rows="packed"),
    Case(architecture="llama", cp=4, ep=4, changes={"num_key_value_heads": 1}),
    Case(architecture="mixtral", cp=2, ep=2, overrides=("mesh.dp_replicate=2",)),
    Case(architecture="mixtral", cp=2, ep=2, changes={"sliding_window": 5}),
    Case(architecture="mixtral", cp=2, ep=4, overrides=("dispatch.kind=allgather",)),
    Case(
        architecture="llama",
        cp=4,
        ep=4,
        overrides=("mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical"),
    ),
    Case(architecture="qwen3_moe", cp=2, ep=4, checkpointing="full"),
    Case(architecture="mixtral", cp=2, ep=4, checkpointing="keep_exchanges", rows="left"),
    Case(architecture="gpt_oss", cp=2, ep=4, rows="right"),
    Case(architecture="mixtral", cp=2, tp=2, ep=4, rows="packed"),
    Case(
        architecture="deepseek_v3",
        cp=2,
        tp=2,
        ep=2,
        rows="left",
        checkpointing="full",
        changes={"num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    Case(architecture="llama", cp=2, tp=2, ep=1, losses={"micro_batch": 0.3, "z": 0.2}, rows="right"),
)
EIGHT = (
    Case(architecture="mixtral", cp=2, ep=8, ranks=8, changes={"num_local_experts": 8}),
    Case(architecture="deepseek_v3", cp=4, ep=2, ranks=8, changes={"num_attention_heads": 4, "num_key_value_heads": 4}),
    Case(architecture="qwen3_moe", cp=4, ep=8, ranks=8, rows="packed"),
    Case(architecture="qwen3_moe", cp=2, tp=2, ep=4, ranks=8, rows="packed"),
    Case(architecture="mixtral", cp=4, tp=2, ep=2, ranks=8, changes={"num_attention_heads": 8}),
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


def memory(rank: int, world_size: int) -> dict[int, int]:
    cases = (Case(architecture="mixtral", cp=cp, ep=4, changes={"num_key_value_heads": 4}) for cp in (1, 2, 4))
    return {case.cp: job.saved_bytes(case, 1000) for case in cases}


@pytest.mark.slow
def test_activations_of_a_rank_are_divided_by_cp() -> None:
    """Rows of 1000 tokens on 4 ranks, summed over them: experts have unequally many rows.

    Token ids and rotary embeddings stay whole, which is a larger part of so narrow a model than of others.
    """
    found = run_distributed_test(memory, 4, timeout_s=200)
    whole, two, four = (sum(of_rank[cp] for of_rank in found) for cp in (1, 2, 4))
    assert (whole / two, whole / four) == (pytest.approx(2, rel=0.05), pytest.approx(4, rel=0.05))


def passed_on(rank: int, world_size: int, case: Case, source: str | None, target: str) -> dict[str, Tensor]:
    """Reads `source`, or makes one step; writes `target`. Returns every entry whole."""
    model = job.compiled(case)
    plan = plan_of(model)
    shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    if source is None:
        job.logits_of(model, job.micro_batches(case)[plan.mesh.batch_index(rank)]).square().sum().backward()
        sum_replicated(model.parameters(), Groups.of(plan.mesh, "cpu").tokens)
        optimizer.step()
        optimizer.zero_grad()
    return handed_over(model, optimizer, source, target)


@pytest.mark.slow
def test_a_checkpoint_is_read_by_another_mesh(tmp_path: Path) -> None:
    first = Case(architecture="mixtral", cp=2, ep=4)
    wanted, *_ = run_distributed_test(passed_on, 4, first, None, str(tmp_path / "first"), timeout_s=200)
    assert all(value.any() for name, value in wanted.items() if "_proj.weight.exp_avg" in name)
    for source, target, case in (
        ("first", "without", Case(architecture="mixtral", cp=1, ep=2, ranks=2)),
        ("without", "again", Case(architecture="mixtral", cp=2, ep=1, ranks=2)),
    ):
        folders = str(tmp_path / source), str(tmp_path / target)
        for found in run_distributed_test(passed_on, case.ranks, case, *folders, timeout_s=200):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], value) for name, value in wanted.items()), target


class OnFour(ExpertParallelStrategy):
    world_size = 4  # type: ignore[assignment]


def test_a_mean_over_parts_of_sequences_is_refused() -> None:
    plan = plan_of(job.compiled(Case(architecture="mixtral", cp=2, ep=4)))
    OnFour(loss="sum")._check_world(plan)
    with pytest.raises(
        ConfigError, match=r"loss=mean: with mesh\.cp=2, ranks may have unequally many of a sequence's targets"
    ):
        OnFour(loss="mean")._check_world(plan)
