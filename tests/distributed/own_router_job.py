"""Losses, capacity and metrics of models that are MoE already, against transformers' own modules in one process.

The reference uses nothing of moecompile: transformers' routers and eager experts, plain autograd, and losses, capacity
and counts that are written out here expert by expert, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.nn import LayerLoad, auxiliary_loss, update_balance
from moecompile.nn.context import own_positions
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import divide, sum_replicated
from moecompile.runtime.groups import Groups
from tests.distributed.gradient_job import full
from tests.existing_models import VOCAB, moe_model

STEPS, MICRO_BATCHES, ROWS, SEQ = 2, 4, 2, 12
ALL = {"micro_batch": 0.3, "sequence": 0.2, "global_batch": 0.4, "z": 0.05}
GATES = {"mixtral": "gate", "qwen3_moe": "gate", "olmoe": "gate", "deepseek_v3": "gate", "gpt_oss": "router"}
SIGMOID = ("deepseek_v3",)
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of a model's own router. padding: `none`, `left` or `right`."""

    architecture: str
    losses: dict[str, float] = field(default_factory=lambda: ALL)
    capacity: float | None = None
    drop: str = "position"
    padding: str = "none"

    @property
    def overrides(self) -> list[str]:
        """As a user gives them."""
        asked = [f"balance.losses.{name}={value}" for name, value in self.losses.items()]
        if self.capacity is not None:
            asked += [f"routing.capacity_factor={self.capacity}", f"routing.drop={self.drop}"]
        return asked


@dataclass(kw_only=True)
class Found:
    """What a run found. logits: of its micro-batches of the first step, at tokens. aux: sums over micro-batches of
    tokens times their auxiliary loss, per step. grads, loads: per step. dropped, entropy: per step and layer.
    """

    logits: dict[int, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    aux: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    loads: list[list[list[int]]] = field(default_factory=list)
    dropped: list[list[int]] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)


def micro_batches(case: Case, step: int) -> list[Batch]:
    """MICRO_BATCHES with different numbers of targets; the second has almost nothing but padding, if there is some."""
    generator = torch.Generator().manual_seed(100 + step)
    batches = []
    for i in range(MICRO_BATCHES):
        ids = torch.randint(1, VOCAB, (ROWS, SEQ + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
        batch["labels"][:, SEQ - 2 * i :] = -100
        if case.padding != "none":
            real = torch.arange(SEQ) < torch.tensor([[2 if i == 1 else SEQ - 3], [1 if i == 1 else SEQ - i]])
            real = real if case.padding == "right" else real.flip(1)
            batch |= {"attention_mask": real.long(), "position_ids": (real.long().cumsum(1) - 1).clamp_min(0)}
            batch["labels"][~real] = -100
        batches.append(batch)
    return batches


def real_of(batch: Batch) -> Tensor:
    """Which tokens are no padding, (B, S)."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


def logits_and_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats is summed over targets."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    labels = own_positions(model, batch["labels"])
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


class Plain:
    """One MoE layer of transformers, watched: its capacity, its losses and its counts."""

    def __init__(self, case: Case, experts: nn.Module, gate: nn.Module) -> None:
        self.case, self.inner = case, experts.forward
        self.logits = torch.empty(0)
        self.real = torch.empty(0)
        self.aux: Tensor = torch.empty(0)
        self.num_experts = next(experts.parameters()).shape[0]
        self.before = torch.full((self.num_experts,), 1 / self.num_experts, dtype=torch.float64)
        self.reset()
        gate.register_forward_hook(self._keep)
        experts.forward = self._forward  # type: ignore[method-assign]

    def reset(self) -> None:
        self.load, self.dropped, self.entropy, self.tokens = [0] * self.num_experts, 0, 0.0, 0

    def end_step(self) -> None:
        total = sum(self.load)
        self.before = torch.tensor([n / total for n in self.load], dtype=torch.float64)
        self.reset()

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self.logits = output[0]

    def _forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        real = self.real.flatten()
        kept = self._kept(ids, weights.detach(), real)
        self.aux = self._aux(ids, real)
        for t, chosen in enumerate(ids.tolist()):
            for k, expert in enumerate(chosen if real[t] else []):
                self.load[expert] += 1
                self.dropped += int(not kept[t, k])
        probs = self._probs(self.logits.detach())[real].double()
        self.entropy += float(-(probs * probs.log()).nan_to_num(0.0).sum())
        self.tokens += int(real.sum())
        return self.inner(hidden, ids, weights * kept.to(weights.dtype))

    def _kept(self, ids: Tensor, weights: Tensor, real: Tensor) -> Tensor:
        """(T, K) bool: each expert takes the first ceil(factor T K / E), or those with the largest weights."""
        kept = real.unsqueeze(1).expand_as(ids).clone()
        if self.case.capacity is None:
            return kept
        limit = math.ceil(self.case.capacity * int(real.sum()) * ids.shape[1] / self.num_experts)
        for expert in range(self.num_experts):
            places = [(t, k) for t in range(len(ids)) if real[t] for k in range(ids.shape[1]) if ids[t, k] == expert]
            if self.case.drop == "score":
                places.sort(key=lambda place: -float(weights[place]))
            for place in places[limit:]:
                kept[place] = False
        return kept

    def _probs(self, logits: Tensor) -> Tensor:
        if self.case.architecture in SIGMOID:
            return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        return logits.softmax(-1)

    def _aux(self, ids: Tensor, real: Tensor) -> Tensor:
        top_k, probs = ids.shape[1], self._probs(self.logits)
        tokens = [t for t in range(len(ids)) if real[t]]
        mean = torch.stack([probs[t] for t in tokens]).mean(0)
        counts = torch.stack([(ids[tokens] == e).sum() for e in range(self.num_experts)]).to(mean)
        parts = {
            "micro_batch": (self.num_experts * counts / (top_k * len(tokens)) * mean).sum(),
            "global_batch": (self.num_experts * self.before.to(mean) * mean).sum(),
            "z": torch.stack([self.logits[t].logsumexp(0) ** 2 for t in tokens]).mean(),
            "sequence": self._sequence(probs, top_k),
        }
        return sum((value * parts[name] for name, value in self.case.losses.items()), mean.new_zeros(()))

    def _sequence(self, probs: Tensor, top_k: int) -> Tensor:
        rows, length = self.real.shape
        losses = []
        for row in range(rows):
            tokens = [row * length + t for t in range(length) if self.real[row, t]]
            best = [i for t in tokens for i in probs[t].topk(top_k).indices.tolist()]
            counts = torch.tensor([best.count(e) for e in range(self.num_experts)]).to(probs)
            f = counts * self.num_experts / (top_k * len(tokens))
            losses.append((f * torch.stack([probs[t] for t in tokens]).mean(0)).sum())
        return torch.stack(losses).mean()


def reference(case: Case) -> Found:
    """One process runs all micro-batches in order, as accumulation."""
    model, found = moe_model(case.architecture, dtype=torch.float64).train(), Found()
    layers = [
        Plain(case, module.experts, getattr(module, GATES[case.architecture]))  # type: ignore[arg-type]
        for module in model.modules()
        if hasattr(module, "experts") and isinstance(module.experts, nn.Module)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, aux_total, count = 0.0, 0.0, 0
        for i, batch in enumerate(micro_batches(case, step)):
            for layer in layers:
                layer.real = real_of(batch)
            logits, loss = logits_and_loss(model, batch)
            aux, targets = sum(layer.aux for layer in layers), int((batch["labels"] != -100).sum())
            assert isinstance(aux, Tensor)
            (loss + targets * aux).backward()
            total, aux_total, count = total + loss.item(), aux_total + targets * float(aux.detach()), count + targets
            if step == 0:
                found.logits[i] = logits.detach()[real_of(batch)]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / count
        found.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        found.losses.append(total)
        found.aux.append(aux_total)
        found.loads.append([layer.load for layer in layers])
        found.dropped.append([layer.dropped for layer in layers])
        found.entropy.append([layer.entropy / layer.tokens for layer in layers])
        optimizer.step()
        for layer in layers:
            layer.end_step()
    found.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def ours(
    case: Case, overrides: list[str], again: str = "", break_it: Callable[[nn.Module], None] | None = None
) -> Found:
    """The same steps on this launch's ranks, or in this process without one. again: what is recomputed."""
    model, found, world = moe_model(case.architecture, dtype=torch.float64), Found(), dist.is_initialized()
    example = {name: tensor for name, tensor in micro_batches(case, 0)[0].items() if name != "labels"}
    compile_model(model, [*case.overrides, *overrides], example=example)
    plan = plan_of(model)
    groups = None
    if world:
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        groups = Groups.of(plan.mesh, "cpu")
    if again:
        recompute(model, plan, again)
    if break_it is not None:
        break_it(model)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64)
        for i, batch in enumerate(micro_batches(case, step)):
            if groups is not None and i % groups.num_batches != groups.batch_index:
                continue
            logits, loss = logits_and_loss(model, batch)
            own = (own_positions(model, batch["labels"]) != -100).sum()
            targets = own if groups is None else groups.of_micro_batch(own)
            aux = auxiliary_loss(model)
            aux = loss.new_zeros(()) if aux is None else aux
            (loss + targets * aux).backward()
            sums += torch.stack([loss.detach(), own * aux.detach().double(), own.double()])
            if step == 0:
                found.logits[i] = logits.detach()[own_positions(model, real_of(batch))]
        _finish(model, groups, sums)
        found.grads.append({name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        found.losses.append(float(sums[0]))
        found.aux.append(float(sums[1]))
        optimizer.step()
        _count(found, update_balance(model, groups.tokens if groups else None))
    found.weights = {name: full(p) for name, p in model.named_parameters()}
    return found


def _finish(model: nn.Module, groups: Groups | None, sums: Tensor) -> None:
    parameters = list(model.parameters())
    if groups is None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= sums[2]
        return
    dist.all_reduce(sums, group=groups.tokens)
    sum_replicated(parameters, groups.tokens)
    divide(parameters, float(sums[2]))


def _count(found: Found, loads: list[LayerLoad]) -> None:
    found.loads.append([load.load.tolist() for load in loads])
    found.dropped.append([load.dropped for load in loads])
    found.entropy.append([math.nan if load.entropy is None else load.entropy for load in loads])
