"""Muse Spark normalizes the output of each expert before its weighted sum: on ranks its weight sees the rows of their
own experts alone, and its gradient is the sum of what they have seen."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import sum_replicated
from moecompile.verify import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test

pytest.importorskip("transformers.models.muse_spark")
pytestmark = pytest.mark.slow
VOCAB, MICRO_BATCHES = 64, 4
TWO = {
    "flat": ["mesh.ep=2", "dispatch.kind=flat"],
    "dedup, 2 chunks": ["mesh.ep=2", "dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
    "lent": ["mesh.ep=2", "dispatch.balance=lend", "hardware.tflops=1e-9"],  # so slow that a loan always pays
    "fsdp alone": ["mesh.ep=1"],
    "tp": ["mesh.ep=2", "mesh.tp=2"],
}  # fmt: skip


def built() -> nn.Module:
    """A tiny Muse Spark in float64, with experts in every layer and nothing at its initial value."""
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTextModel

    config = MuseSparkTextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, moe_intermediate_size=12, moe_hidden_size=16, num_local_experts=4, num_experts_per_tok=2,
        mlp_layer_types=["sparse"] * 2, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model: nn.Module = MuseSparkTextModel(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def backward(model: nn.Module, numbers: range) -> dict[str, Tensor]:
    """Gradients of the sum of squares over the micro-batches with these numbers."""
    for number in numbers:
        ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(number))
        model(input_ids=ids).last_hidden_state.square().mul(torch.arange(24)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def all_in_float64() -> Any:
    """Its norms and routers cast to fp32 whatever they are given; here `x.float()` casts no further down."""
    return mock.patch.object(Tensor, "float", Tensor.double)


def ranks(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """By dispatch."""
    found = {}
    for name, overrides in TWO.items():
        with all_in_float64():
            model = compile_model(
                built(),
                [*overrides, "mesh.ranks_per_node=2"],
                example={"input_ids": torch.ones(1, 9, dtype=torch.int64)},
            )
            plan = plan_of(model)
            shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"))
            mine, first = MICRO_BATCHES // plan.mesh.num_batches, plan.mesh.batch_index(rank)
            backward(model, range(first * mine, (first + 1) * mine))
            sum_replicated(model.parameters(), dist.group.WORLD)
            found[name] = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return found


def test_two_ranks_equal_transformers_in_one_process() -> None:
    with all_in_float64():
        wanted = {name: grad.clone() for name, grad in backward(built().train(), range(MICRO_BATCHES)).items()}
    norms = [name for name in wanted if "post_expert_norm" in name]
    assert len(norms) == 2 and all(wanted[name].abs().max() > 1 for name in norms)
    for name, grads in run_distributed_test(ranks, 2, timeout_s=120)[0].items():
        assert worst(grads, wanted) < (1e-10, ""), name
