"""Tensor parallelism around MoE layers: loss, every gradient, norm and counts are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import plan_of
from tests.distributed import fold_job as job
from tests.distributed.fold_job import Case
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test

DENSE: dict[str, Any] = {  # every layer
    "first_k_dense_replace": 2, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2
}  # fmt: skip
LATENT = DENSE | {  # latent attention, in fp32 where it rotates
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
FAST = (
    Case(architecture="qwen3", tp=2, ep=2, ranks=2, tied=True, losses={"micro_batch": 0.3, "z": 0.2}),
    Case(architecture="mixtral", tp=2, ep=1, ranks=2),
    Case(architecture="glm4_moe", tp=2, ep=2, ranks=2, changes=DENSE | {"use_qk_norm": True}),  # not in its tp_plan
)
SLOW = (
    *(Case(architecture="llama", tp=tp, ep=ep) for tp in (2, 4) for ep in (1, 2, 4)),
    *(Case(architecture="qwen3", tp=tp, ep=ep) for tp, ep in ((2, 4), (4, 2))),
    *(Case(architecture="mixtral", tp=2, ep=ep) for ep in (1, 2, 4)),
    *(
        Case(
            architecture="deepseek_v3",
            tp=tp,
            ep=ep,
            changes={"num_attention_heads": 4, "num_key_value_heads": 4},
        )
        for tp, ep in ((2, 2), (2, 4), (4, 4))
    ),
    Case(architecture="llama", tp=2, ep=2, tied=True),
    Case(architecture="llama", tp=2, ep=4, tied=True, capacity=0.6, losses={"micro_batch": 0.3, "z": 0.2}),
    Case(architecture="qwen3", tp=2, ep=4, jitter=0.1),
    Case(architecture="llama", tp=2, ep=2, overrides=("mesh.dp_replicate=2",)),
    Case(architecture="llama", tp=2, ep=4, overrides=("dispatch.kind=flat",)),
    Case(architecture="llama", tp=2, ep=4, overrides=("dispatch.kind=allgather",)),
    Case(architecture="llama", tp=2, ep=4, overrides=("dispatch.overlap=chunks", "dispatch.chunks=2")),
    Case(architecture="llama", tp=2, ep=4, overrides=("data.mask_padding=always",)),
    Case(
        architecture="llama",
        tp=4,
        ep=4,
        overrides=("mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch.kind=hierarchical"),
    ),
    Case(architecture="qwen3", tp=2, ep=4, checkpointing="full"),
    Case(architecture="mixtral", tp=2, ep=4, checkpointing="keep_exchanges"),
    Case(architecture="olmo2", tp=2, ep=4),  # gathers its queries and keys
    Case(architecture="deepseek_v2", tp=2, ep=4, changes=LATENT, tolerance=1e-7),
)


def four_ranks(rank: int, world_size: int, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    return [job.step(case) for case in cases]


def check(case: Case, found: list[dict[str, Any]]) -> None:
    """found: of each rank."""
    loss, grads, norm = job.reference(case)
    for of_rank in found:
        assert of_rank["loss"] == pytest.approx(loss, rel=max(1e-12, case.tolerance / 100))
        assert float(of_rank["norm"]) == pytest.approx(float(norm), rel=case.tolerance)
        error, name = job.worst(of_rank["grads"], grads)
        assert error <= case.tolerance, f"{case.name}: {name} is off by {error}"
    num_tokens = sum(job.LENGTHS) * job.BATCH
    assert {tokens for of_rank in found for _, tokens in of_rank["loads"]} == {num_tokens}
    if case.capacity is None:  # experts compute each token once, on one of the ranks
        assert sum(of_rank["rows"] for of_rank in found) == sum(load for load, _ in found[0]["loads"])


@pytest.fixture(scope="module")
def two() -> list[list[dict[str, Any]]]:
    return run_distributed_test(four_ranks, 2, FAST, timeout_s=120)


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(case: Case, two: list[list[dict[str, Any]]]) -> None:
    check(case, [of_rank[FAST.index(case)] for of_rank in two])


@pytest.fixture(scope="module")
def four() -> list[list[dict[str, Any]]]:
    return run_distributed_test(four_ranks, 4, SLOW, timeout_s=500)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
def test_four_ranks_equal_one_process(case: Case, four: list[list[dict[str, Any]]]) -> None:
    check(case, [of_rank[SLOW.index(case)] for of_rank in four])


FAULTS = {
    "norms of heads": "self_attn.q_norm.weight", "inside MoE layers": "shared_experts.up_proj.weight",
    "spread": "input_layernorm.weight",
}  # fmt: skip


@pytest.mark.slow
def test_what_is_not_summed_over_tp_is_seen() -> None:
    cases = tuple(Case(architecture="qwen3", tp=2, ep=4, fault=fault) for fault in FAULTS)
    ((first), *_) = run_distributed_test(four_ranks, 4, cases, timeout_s=200)
    _, grads, _ = job.reference(cases[0])
    for found, (fault, name) in zip(first, FAULTS.items(), strict=True):
        error, _ = job.worst(
            {key: grad for key, grad in found["grads"].items() if key.endswith(name)},
            {key: grad for key, grad in grads.items() if key.endswith(name)},
        )
        assert error > 1e-3, fault


def beside_transformers(rank: int, world_size: int, folder: str) -> tuple[float, float]:
    """Largest difference of the logits and of two gradients from transformers' own TP with EP on the same ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    case = Case(architecture="mixtral", tp=2, ep=2, ranks=2)
    ids, _ = job.micro_batches()[0]
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager",
        distributed_config=DistributedConfig(tp_size=2, ep_size=2, ep_implementation="all_to_all"),
    ).train()  # fmt: skip
    model = job.compiled(case)
    plan = plan_of(model)
    ours = shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    logits = [each(input_ids=ids, use_cache=False).logits for each in (ours, theirs)]
    logits = [full(each) for each in logits if each.square().sum().backward() is None]
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight")
    grads = [[full(dict(each.named_parameters())[name].grad) for name in names] for each in (ours, theirs)]
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*grads, strict=True))
    return float((logits[0] - logits[1]).abs().max()), difference


@pytest.mark.slow
def test_it_computes_what_transformers_own_tp_with_ep_computes(tmp_path: Path) -> None:
    job.built(Case(architecture="mixtral", tp=2, ep=2)).save_pretrained(tmp_path)
    for logits, grads in run_distributed_test(beside_transformers, 2, str(tmp_path), timeout_s=120):
        assert logits <= 1e-12 and grads <= 1e-10
