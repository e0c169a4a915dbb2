"""Experts of which the weighted sum of outputs is not all, on ranks.

Muse Spark normalizes the output of each expert before its weighted sum: the norm's weight sees the rows of a rank's own
experts alone, and its gradient is the sum of what they have seen. Llama 4 scales what an expert reads in place of what
it returns, so that the router's gradient comes back with that of the rows.
"""

from __future__ import annotations

from itertools import product
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


def muse_spark() -> nn.Module:
    """With experts in every layer."""
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTextModel

    config = MuseSparkTextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, moe_intermediate_size=12, moe_hidden_size=16, num_local_experts=4, num_experts_per_tok=2,
        mlp_layer_types=["sparse"] * 2, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MuseSparkTextModel(config)


def llama4() -> nn.Module:
    """With experts in every other layer, attention in chunks, and one layer without positions."""
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextModel

    config = Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=12, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32, attention_chunk_size=4,
        num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Llama4TextModel(config)


MODELS = {"muse_spark": muse_spark, "llama4": llama4}


def built(name: str) -> nn.Module:
    """A tiny model in float64, with nothing at its initial value."""
    model = MODELS[name]().double()
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


def ranks(rank: int, world_size: int) -> dict[tuple[str, str], dict[str, Tensor]]:
    """By model and dispatch."""
    found = {}
    for (kind, name), overrides in ((key, TWO[key[1]]) for key in product(MODELS, TWO)):
        with all_in_float64():
            model = compile_model(
                built(kind),
                [*overrides, "mesh.ranks_per_node=2"],
                example={"input_ids": torch.ones(1, 9, dtype=torch.int64)},
            )
            plan = plan_of(model)
            shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"))
            mine, first = MICRO_BATCHES // plan.mesh.num_batches, plan.mesh.batch_index(rank)
            backward(model, range(first * mine, (first + 1) * mine))
            sum_replicated(model.parameters(), dist.group.WORLD)
            found[kind, name] = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return found


def test_two_ranks_equal_transformers_in_one_process() -> None:
    wanted: dict[str, dict[str, Tensor]] = {}
    for kind in MODELS:
        with all_in_float64():
            grads = backward(built(kind).train(), range(MICRO_BATCHES))
        wanted[kind] = {name: grad.clone() for name, grad in grads.items()}
    own = {"muse_spark": "post_expert_norm", "llama4": "router"}
    for kind, part in own.items():
        of_part = [name for name in wanted[kind] if part in name]
        assert len(of_part) == 2 and all(wanted[kind][name].abs().max() > 1 for name in of_part)
    for (kind, name), grads in run_distributed_test(ranks, 2, timeout_s=180)[0].items():
        assert worst(grads, wanted[kind]) < (1e-10, ""), (kind, name)
