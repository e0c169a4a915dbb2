"""What a layer is predicted to keep for backward against what it does keep, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.bench import measure_layers
from moecompile.bench.measure import kept_bytes
from moecompile.compose import compose_config
from moecompile.models.build import build_model, example_inputs
from moecompile.ops.collect import Collected
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_with_report, make_plan
from moecompile.pipeline.captured import planning_facts
from moecompile.plan import on_one_process
from moecompile.planner import RunFacts
from moecompile.planner.memory import backward_bytes, layer_bytes, left_bytes, moe_bytes
from moecompile.schema import Config
from tests.distributed.harness import run_distributed_test
from tests.tiny import Gated

CPU = torch.device("cpu")
RUN = [
    "bench.rounds=1",
    "bench.warmup=1",
    "bench.machine=false",
    "data.global_batch_size=4",
    "model.config.num_hidden_layers=2",
]
SMALL = ["model.config.hidden_size=128", "model.config.intermediate_size=256"]


def kept(overrides: list[str]) -> tuple[float, float]:
    """Predicted and measured bytes of the first distinct layer, its input left out."""
    config = compose_config(["task=bench", *RUN, *overrides])
    model = build_model(config.model, config.seed)
    example = example_inputs(model, config.data.seq_len)
    plan = make_plan(model, config, example=example)
    (cost, *_) = measure_layers(model, plan, config, example, CPU)
    run = run_facts(config, cost.tokens)
    layer = on_one_process(plan).layer(cost.sites[0])
    predicted = moe_bytes(layer, on_one_process(plan).mesh, run)
    return predicted, cost.moe_kept - cost.tokens * layer.site.d_model * run.compute_bytes


def run_facts(config: Config, tokens: int) -> RunFacts:
    precision = config.trainer.precision.value
    return RunFacts(
        tokens_per_rank=tokens,
        compute_bytes=2 if precision == "bf16_params" else 4,
        is_mixed=precision == "bf16_mixed",
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16_params", "bf16_mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["experts.num_routed=32", "routing.top_k=6", "data.micro_batch_size=1"],
        ["experts=deepseek_moe", "routing=deepseek_v3", "routing.max_nodes=null", "model.config.intermediate_size=320"],
        ["routing.score=softmax_after_topk", "data.micro_batch_size=2"],
        ["experts.latent_size=64", "experts.latent_norm=true"],
    ],
    ids=["copies", "many experts, few tokens", "shared, sigmoid", "softmax of the chosen", "latent"],
)
def test_a_fused_layer_keeps_what_is_predicted(settings: list[str], precision: str) -> None:
    predicted, measured = kept([*SMALL, *settings, f"trainer.precision={precision}"])
    assert predicted == pytest.approx(measured, rel=0.05)


def swiglu(**changes: bool) -> nn.Module:
    """A Llama with experts of another kind where `changes` says so."""
    from tests.tiny import tiny_llama

    return tiny_llama(hidden_act="gelu" if changes.get("gelu") else "silu", mlp_bias=changes.get("bias", False))


@pytest.mark.parametrize("changes", [{}, {"gelu": True}, {"bias": True}])
def test_the_plan_counts_one_op_where_the_pass_makes_one(changes: dict[str, bool]) -> None:
    _agrees(swiglu(**changes), is_one_op=not changes)


def test_experts_of_the_model_are_counted_so_too() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    _agrees(MixtralForCausalLM(MixtralConfig(**sizes)), is_one_op=True)
    _agrees(GptOssForCausalLM(GptOssConfig(**sizes, head_dim=8)), is_one_op=False)  # biases, a clamped activation


def _agrees(model: nn.Module, *, is_one_op: bool) -> None:
    config = compose_config(["data.seq_len=64", "trainer.checkpointing=none"])
    example = example_inputs(model, 8)
    _, facts = planning_facts(model, config, example)
    compiled = compile_with_report(model, config, example=example)
    for graph in compiled.graphs["fused"].values():
        (call,) = [node for node in graph.graph.nodes if str(node.target).endswith("experts")]
        assert ("source_R" in call.kwargs) == is_one_op
    plan, run = compiled.plan, RunFacts(tokens_per_rank=4 * 64)
    assert [layer.fused for layer in plan.layers] == [is_one_op] * 2
    backward = backward_bytes(plan.layers[0], plan.mesh, RunFacts(tokens_per_rank=4 * 64, accumulation=4))
    layers = layer_bytes((), plan.mesh, facts, RunFacts(tokens_per_rank=4 * 64, micro_batch_size=4)).values()
    rest = sum(of.kept(None) - of.ffn for of in layers)
    rest += max(256 * 4 * 3 * 61, backward, *(of.made for of in layers))
    assert plan.estimate is not None
    found = plan.estimate.memory_bytes_per_rank.activations
    assert found == pytest.approx(rest + 2 * moe_bytes(plan.layers[0], plan.mesh, run))
    if is_one_op:
        unfused = moe_bytes(replace(plan.layers[0], fused=False), plan.mesh, run)
        assert found < rest + 2 * unfused


def test_one_product_of_all_experts_has_all_their_rows_at_once() -> None:
    model = swiglu()
    plan = compile_with_report(model, compose_config(["routing.top_k=2"]), example=example_inputs(model, 8)).plan
    (layer, *_), run = plan.layers, RunFacts(tokens_per_rank=100, compute_bytes=2)
    model_dim, hidden = layer.site.d_model, layer.experts.d_expert
    on_cpu, on_gpu = (backward_bytes(layer, replace(plan.mesh, device=device), run) for device in ("cpu", "cuda"))
    rows = max(model_dim + 2 * (model_dim + 4 * hidden), 2 * model_dim + 2 * (model_dim + 2 * hidden))
    assert on_gpu - on_cpu == 100 * 2 * (rows - 2 * (2 * model_dim + hidden)) > 0
    wide = replace(run, compute_bytes=4)  # in fp32 an expert at a time
    assert backward_bytes(layer, replace(plan.mesh, device="cuda"), wide) == backward_bytes(layer, plan.mesh, wide)


KINDS = ("flat", "dedup", "allgather")


def _kept_on_ranks(rank: int, world_size: int) -> dict[str, tuple[float, int]]:
    """Kind of dispatch -> bytes that one layer is predicted to keep, and keeps; balanced load."""
    tokens, found = 4096, {}
    for kind in KINDS:
        config = ["mesh.ranks_per_node=2", f"dispatch.kind={kind}", "experts.num_routed=8", "routing.top_k=2"]
        torch.manual_seed(0)
        ffn = Gated(64, 256)
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(rank))
        compiled = compile_with_report(ffn, [*config, "routing.workload=balanced"], example=x[:4])
        (layer,) = compiled.plan.layers
        shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
        compiled.model(x)  # gathers weights, and compiles what is compiled on first use
        weights = [*compiled.model.parameters(), *compiled.model.buffers(), x]
        shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        run = RunFacts(tokens_per_rank=tokens)
        found[kind] = moe_bytes(layer, compiled.plan.mesh, run), kept_bytes(partial(compiled.model, x), shards)
    return found


def test_every_dispatch_keeps_what_is_predicted_on_two_ranks() -> None:
    for found in run_distributed_test(_kept_on_ranks, 2):
        for kind, (predicted, measured) in found.items():
            assert predicted == pytest.approx(measured, rel=0.1), (kind, found)


LEFT = {
    "dedup": (0, 1),
    "flat": (0,),
}  # of what an experts op leaves in backward, the tensors that forward did not save


def _left_on_ranks(rank: int, world_size: int) -> dict[str, tuple[float, int]]:
    """Kind of dispatch -> bytes that are predicted to wait for the weight gradients of one layer, and do."""
    tokens, found = 4096, {}
    take, seen = Collected.take, list[int]()

    def counting(self: Collected) -> dict[str | int, list[tuple[Tensor, ...]]]:
        left = take(self)
        seen.append(sum(call[i].nbytes for calls in left.values() for call in calls for i in LEFT[kind]))
        return left

    Collected.take = counting
    for kind in LEFT:
        config = ["mesh.ranks_per_node=2", f"dispatch.kind={kind}", "experts.num_routed=8", "routing.top_k=2",
                  "dispatch.overlap=chunks", "dispatch.chunks=2", "routing.workload=balanced"]  # fmt: skip
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(rank))
        compiled = compile_with_report(Gated(64, 256), config, example=x[:4])
        shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
        compiled.model(x).sum().backward()
        (layer,), run = compiled.plan.layers, RunFacts(tokens_per_rank=tokens)
        found[kind] = left_bytes(layer, compiled.plan.mesh, run), seen.pop()
    return found


def test_what_waits_for_the_weight_gradients_is_predicted() -> None:
    for found in run_distributed_test(_left_on_ranks, 2):
        for kind, (predicted, measured) in found.items():
            assert predicted == pytest.approx(measured, rel=0.1), (kind, found)


def test_fsdp_gathers_weights_that_are_stored_in_bf16_on_one_rank_too() -> None:
    held = {}
    for stored in (torch.float32, torch.bfloat16):
        config, example = ["mesh=cpu_1", "trainer.precision=bf16_params"], torch.zeros(1, 64, dtype=stored)
        plan = make_plan(Gated(64, 256).to(stored), config, example=example)
        assert plan.estimate is not None
        held[stored] = plan.estimate.memory_bytes_per_rank
    assert held[torch.bfloat16].grads == held[torch.float32].grads  # both are reduced in fp32
    sharded = sum(p.numel() for p in Gated(64, 256).parameters())
    assert held[torch.bfloat16].weights > 2 * 2 * sharded
