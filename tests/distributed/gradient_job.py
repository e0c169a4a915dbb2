"""The same three optimizer steps on one process and on N ranks, for comparison.

The reference side uses nothing of moecompile but the rewritten model: plain autograd over all micro-batches in order,
torch's own clipping, one AdamW. Auxiliary losses, which both sides get from the routers, enter as the reference says:
times the token count of their micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from moecompile.mesh import MeshSpec
from moecompile.nn import Experts, LayerLoad, Router, auxiliary_loss, auxiliary_losses, set_random_key, update_balance
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated

STEPS, MICRO_BATCHES, BATCH, SEQ, VOCAB = 3, 8, 2, 12, 64
CLIP = 0.5
BIAS_RATE = 0.01
SEED = 11
OVERRIDES = [
    "experts.num_routed=8", "experts.granularity=5", "experts.num_shared=1", "experts.init=virtual_group",
    "experts.layers='1:'", "routing.top_k=4", "routing.score=sigmoid", "routing.scale=2.5", "routing.groups=2",
    "routing.top_groups=1", "balance.rule=bias", f"balance.rate={BIAS_RATE}",
]  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 3, "hidden_size": 32, "intermediate_size": 80,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": SEQ,
    },
    "t5": {
        "num_layers": 2, "num_decoder_layers": 2, "d_model": 32, "d_ff": 80, "d_kv": 16, "num_heads": 2,
        "dropout_rate": 0.0, "vocab_size": VOCAB,
    },
}  # fmt: skip
# Every auxiliary loss, so large that it decides the routers' gradients; drops; noise.
LOSSES = {"micro_batch": 2.0, "sequence": 3.0, "global_batch": 4.0, "z": 0.5}
AUX = [
    *(f"balance.losses.{kind}={coefficient}" for kind, coefficient in LOSSES.items()), "routing.capacity_factor=1.0",
    "routing.drop=score", "routing.jitter=0.1", "experts.init=random", "routing.score=softmax",
]  # fmt: skip


@dataclass
class Trace:
    """What a run did.

    losses: summed over all tokens, per step. aux: the same of each kind of auxiliary loss. norms: before clipping.
    grads, second_grads: of the first two steps, before clipping. loads: of all steps.
    """

    losses: list[float] = field(default_factory=list)
    aux: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    second_grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    loads: list[list[LayerLoad]] = field(default_factory=list)


def build(dtype: torch.dtype, overrides: list[str], architecture: str = "deepseek_v3") -> nn.Module:
    """A dense model, rewritten, with independently random experts and routers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config).to(dtype)
    compile_model(model, [*OVERRIDES, *overrides], example=inputs_of(model, *micro_batches(0)[0]))
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


def inputs_of(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A decoder of its own reads 0 and then what it should have written."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids}
    written = torch.cat((torch.zeros(len(labels), 1, dtype=torch.int64), labels[:, :-1].clamp_min(0)), dim=1)
    return {"input_ids": ids, "decoder_input_ids": written}


def summed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the tokens that have a target."""
    logits = model(**inputs_of(model, ids, labels), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def objective(loss: Tensor, num_tokens: int, model: nn.Module, mutate: str = "") -> Tensor:
    """The loss with the auxiliary losses of the last forward, on the scale of a sum over tokens."""
    aux = auxiliary_loss(model)
    if aux is None:
        return loss
    factor = {"aux_unweighted": 1, "aux_times_ep": 4 * num_tokens}.get(mutate, num_tokens)
    return loss + factor * aux


def reference(dtype: torch.dtype, overrides: tuple[str, ...] = (), architecture: str = "deepseek_v3") -> Trace:
    """One process runs all micro-batches in order, as accumulation."""
    model, trace = build(dtype, list(overrides), architecture), Trace()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count, aux = 0.0, 0, dict.fromkeys(LOSSES, 0.0)
        for i, (ids, labels) in enumerate(micro_batches(step)):
            set_random_key(model, SEED, step, i)
            loss, num_tokens = summed_loss(model, ids, labels), int((labels != -100).sum())
            objective(loss, num_tokens, model).backward()
            total, count = total + loss.item(), count + num_tokens
            for kind, value in auxiliary_losses(model).items():
                aux[kind] += num_tokens * value.item()
        for parameter in model.parameters():
            parameter.grad /= count
        _keep_grads(trace, step, {name: p.grad.clone() for name, p in model.named_parameters()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        trace.loads.append(update_balance(model))
        trace.losses.append(total)
        trace.aux.append(aux)
        trace.norms.append(float(norm))
    trace.weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return trace


def sharded(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    overrides: list[str],
    *,
    mutate: str = "",
    checkpointing: bool = False,
    steps: int = STEPS,
    architecture: str = "deepseek_v3",
) -> Trace:
    """This rank's part of the same steps, or of the first `steps`. `mutate` breaks one thing on purpose."""
    model, trace = build(dtype, overrides, architecture), Trace()
    if checkpointing:
        model.gradient_checkpointing_enable()
    plan = plan_of(model)
    spec: MeshSpec = plan.mesh
    if mutate == "drop_exchange":
        _drop_backward_exchange(model)
    shard(model, plan, device_mesh_of(spec, "cpu"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)
    mine = MICRO_BATCHES // world_size
    for step in range(steps):
        optimizer.zero_grad()
        sums = torch.zeros(2 + len(LOSSES), dtype=torch.float64)
        for i in range(rank * mine, (rank + 1) * mine):
            ids, labels = micro_batches(step)[i]
            set_random_key(model, SEED, step, 0 if mutate == "same_noise" else i)
            loss, num_tokens = summed_loss(model, ids, labels), int((labels != -100).sum())
            objective(loss, num_tokens, model, mutate).backward()
            aux = auxiliary_losses(model)
            weighted = [num_tokens * float(aux.get(kind, 0.0)) for kind in LOSSES]
            sums += torch.tensor([loss.item(), num_tokens, *weighted], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        if mutate != "skip_router_sum":
            sum_replicated(parameters, dist.group.WORLD)
        divide(parameters, float(sums[1]) * (2 if mutate == "divisor" else 1))
        _keep_grads(trace, step, {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        norm = clip_by_global_norm(parameters, CLIP, dist.group.WORLD)
        optimizer.step()
        trace.loads.append(update_balance(model, torch.distributed.group.WORLD))
        trace.losses.append(float(sums[0]))
        trace.aux.append(dict(zip(LOSSES, sums[2:].tolist(), strict=True)))
        trace.norms.append(float(norm))
    trace.weights = {name: full(t) for name, t in model.state_dict().items()}
    return trace if rank == 0 else Trace(losses=trace.losses, norms=trace.norms, aux=trace.aux)


def _keep_grads(trace: Trace, step: int, grads: dict[str, Tensor]) -> None:
    if step < 2:
        setattr(trace, ("grads", "second_grads")[step], grads)


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
