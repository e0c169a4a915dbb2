"""Two optimizer steps of models that are MoE already: transformers' own model in one process, ours on N ranks.

The reference side uses nothing of moecompile: transformers' eager experts, plain autograd, torch's own clipping, one
AdamW, and for DeepSeek-V3 the bias rule written out from the ids that the router returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.nn import meters_of, update_balance
from moecompile.nn.placement import by_id, expert_orders
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.routing import NO_BALANCE
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated
from tests.distributed.gradient_job import full
from tests.existing_models import VOCAB, moe_inputs, moe_model, stacked

STEPS, MICRO_BATCHES, BATCH, SEQ = 2, 4, 2, 12
CLIP, BIAS_RATE = 0.5, 0.05
BIAS = ["balance.rule=bias", f"balance.rate={BIAS_RATE}"]


@dataclass
class Trace:
    """What a run did. logits: of the first micro-batch. losses: summed, per step. loads: of the first step, by layer."""

    logits: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    loads: list[list[int]] = field(default_factory=list)


def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """MICRO_BATCHES x (input_ids, labels) with different token counts."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for i in range(MICRO_BATCHES):
        ids = torch.randint(1, VOCAB, (BATCH, SEQ + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[:, SEQ - 2 * i :] = -100
        batches.append((ids[:, :-1], labels))
    return batches


def _forward(model: nn.Module, architecture: str, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, cross entropy summed over the tokens that have a target)."""
    logits = model(**moe_inputs(architecture, ids)).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


class _OwnRule:
    """DeepSeek-V3's bias rule on transformers' routers: bias += rate * sign(mean load - load)."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = [m for _, m in model.named_modules() if hasattr(m, "e_score_correction_bias")]
        self.loads = [torch.zeros_like(gate.e_score_correction_bias) for gate in self.gates]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.register_forward_hook(self._counting(load))

    @staticmethod
    def _counting(load: Tensor) -> Any:
        def count(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            ids = next(t for t in output if t.dtype == torch.int64)
            load.add_(F.one_hot(ids, load.numel()).sum((0, 1)))

        return count

    def step(self) -> list[list[int]]:
        taken = [[int(n) for n in load] for load in self.loads]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.e_score_correction_bias += BIAS_RATE * (load.mean() - load).sign()
            load.zero_()
        return taken


def built(architecture: str, dtype: torch.dtype, *, wide_gates: bool) -> nn.Module:
    """wide_gates: in the next wider dtype, as transformers keeps DeepSeek-V3's in fp32 in a model of bf16."""
    model = moe_model(architecture, dtype=dtype)
    for name, module in model.named_modules():
        if wide_gates and name.endswith("mlp.gate"):
            module.to(torch.float64)
    return model


def reference(architecture: str, dtype: torch.dtype, *, wide_gates: bool = False) -> Trace:
    """One process runs all micro-batches in order, as accumulation."""
    model, trace = built(architecture, dtype, wide_gates=wide_gates).train(), Trace()
    rule = _OwnRule(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = 0.0, 0
        for ids, labels in micro_batches(step):
            logits, loss = _forward(model, architecture, ids, labels)
            loss.backward()
            total, count = total + loss.item(), count + int((labels != -100).sum())
            trace.logits = logits.detach().clone() if trace.logits is None else trace.logits
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
        if step == 0:
            trace.grads = stacked({name: p.grad.clone() for name, p in model.named_parameters()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        loads = rule.step()
        trace.loads = trace.loads or loads
        trace.losses.append(total)
    trace.weights = stacked({name: t.detach().clone() for name, t in model.state_dict().items()})
    return trace


def sharded(
    rank: int, world_size: int, architecture: str, dtype: torch.dtype, overrides: list[str], *, mutate: str = "",
    wide_gates: bool = False,
) -> Trace:  # fmt: skip
    """This rank's part of the same steps. `mutate` breaks one thing on purpose."""
    model, trace = built(architecture, dtype, wide_gates=wide_gates), Trace()
    bias = BIAS if architecture == "deepseek_v3" else []
    example = moe_inputs(architecture, torch.ones(1, SEQ, dtype=torch.int64))
    compile_model(model, [*overrides, *bias], example=example)
    plan = plan_of(model)
    shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-5)
    mine = MICRO_BATCHES // world_size
    for step in range(STEPS):
        optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64)
        for ids, labels in micro_batches(step)[rank * mine : (rank + 1) * mine]:
            logits, loss = _forward(model, architecture, ids, labels)
            loss.backward()
            sums += torch.tensor([loss.item(), int((labels != -100).sum())], dtype=torch.float64)
            trace.logits = logits.detach().clone() if trace.logits is None else trace.logits
        torch.distributed.all_reduce(sums)
        if mutate != "skip_router_sum":
            sum_replicated(parameters, dist.group.WORLD)
        divide(parameters, float(sums[1]) * (2 if mutate == "divisor" else 1))
        if step == 0:
            trace.grads = _by_id(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        trace.norms.append(float(clip_by_global_norm(parameters, CLIP, dist.group.WORLD)))
        optimizer.step()
        if mutate == "no_bias_rule":
            for _, meter in meters_of(model):
                meter.balance = NO_BALANCE
        loads = [load.load.tolist() for load in update_balance(model, torch.distributed.group.WORLD)]
        trace.loads = trace.loads or loads
        trace.losses.append(float(sums[0]))
    trace.weights = _by_id(model, model.state_dict())
    return trace if rank == 0 else Trace(losses=trace.losses, norms=trace.norms)


def _by_id(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, experts in the order of their ids."""
    orders = expert_orders(model)
    return {name: by_id(full(tensor), orders.get(name)) for name, tensor in tensors.items()}
