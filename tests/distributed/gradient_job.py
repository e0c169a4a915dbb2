"""The same three optimizer steps on one process and on N ranks, for comparison.

The reference side uses nothing of moecompile but the rewritten model: plain autograd over all micro-batches in order,
torch's own clipping, one AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moecompile.mesh import MeshSpec
from moecompile.nn import Experts, Router, update_balance
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated

STEPS, MICRO_BATCHES, BATCH, SEQ, VOCAB = 3, 8, 2, 12, 64
CLIP = 0.5
BIAS_RATE = 0.01
OVERRIDES = [
    "experts.num_routed=8", "experts.granularity=5", "experts.num_shared=1", "experts.init=virtual_group",
    "experts.layers='1:'", "routing.top_k=4", "routing.score=sigmoid", "routing.scale=2.5", "routing.groups=2",
    "routing.top_groups=1", "balance.rule=bias", f"balance.rate={BIAS_RATE}",
]  # fmt: skip


@dataclass
class Trace:
    """What a run did. losses: summed over all tokens, per step; grads: of the first step, before clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def build(dtype: torch.dtype, overrides: list[str]) -> nn.Module:
    """A dense DeepSeek-V3 language model, rewritten, with independently random experts and routers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=3, first_k_dense_replace=3, hidden_size=32, intermediate_size=80,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, vocab_size=VOCAB, max_position_embeddings=SEQ,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    compile_model(model, [*OVERRIDES, *overrides], example={"input_ids": torch.zeros(1, SEQ, dtype=torch.int64)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (Experts, Router)):
                for parameter in module.parameters():
                    std = 0.2 if isinstance(module, Router) else 0.15
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """MICRO_BATCHES x (input_ids, labels); token counts differ; two neighbours (one rank of four) have no target."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for i in range(MICRO_BATCHES):
        ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, SEQ - i :] = -100
        if i in (2, 3):
            labels[:] = -100
        batches.append((ids[:, :-1], labels))
    return batches


def summed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens that have a target."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def reference(dtype: torch.dtype) -> Trace:
    """One process runs all micro-batches in order, as accumulation."""
    model, trace = build(dtype, []), Trace()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    rates = dict.fromkeys((name for name, m in model.named_modules() if isinstance(m, Router)), BIAS_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = 0.0, 0
        for ids, labels in micro_batches(step):
            loss = summed_loss(model, ids, labels)
            loss.backward()
            total, count = total + loss.item(), count + int((labels != -100).sum())
        for parameter in model.parameters():
            parameter.grad /= count
        if step == 0:
            trace.grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        update_balance(model, rates)
        trace.losses.append(total)
        trace.norms.append(float(norm))
    trace.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return trace


def sharded(rank: int, world_size: int, dtype: torch.dtype, mesh: list[str], *, mutate: str = "") -> Trace:
    """This rank's part of the same steps. `mutate` breaks one thing on purpose."""
    model, trace = build(dtype, mesh), Trace()
    plan = plan_of(model)
    spec: MeshSpec = plan.mesh
    if mutate == "drop_exchange":
        _drop_backward_exchange(model)
    shard(model, plan, device_mesh_of(spec, "cpu"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)
    rates = {f"{layer.site.fqn}.router": layer.balance.rate for layer in plan.layers}
    mine = MICRO_BATCHES // world_size
    for step in range(STEPS):
        optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64)
        for ids, labels in micro_batches(step)[rank * mine : (rank + 1) * mine]:
            loss = summed_loss(model, ids, labels)
            loss.backward()
            sums += torch.tensor([loss.item(), int((labels != -100).sum())], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        if mutate != "skip_router_sum":
            sum_replicated(parameters)
        divide(parameters, float(sums[1]) * (2 if mutate == "divisor" else 1))
        if step == 0:
            trace.grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        norm = clip_by_global_norm(parameters, CLIP)
        optimizer.step()
        update_balance(model, rates, torch.distributed.group.WORLD)
        trace.losses.append(float(sums[0]))
        trace.norms.append(float(norm))
    trace.weights = {name: full(t) for name, t in model.state_dict().items()}
    return trace if rank == 0 else Trace(losses=trace.losses, norms=trace.norms)


def full(tensor: Tensor) -> Tensor:
    """A DTensor gathered, a plain tensor as it is."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _drop_backward_exchange(model: nn.Module) -> None:
    """Cuts the gradient of the first combine exchange: forward stays right, the remote experts' gradients are lost."""
    for module in model.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in reversed(module.graph.nodes):
                if "all_to_all" in node.name:
                    with module.graph.inserting_after(node):
                        cut = module.graph.call_method("detach", (node,))
                    node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
                    module.recompile()
                    return
