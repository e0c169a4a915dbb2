"""One optimizer step's gradients under tensor parallelism, against one process that shares no code with it.

The reference of a model that is MoE already is transformers' own model. That of an upcycled one is transformers' dense
model with `PlainMoE` in place of each FFN: a loop over experts, its losses and its capacity written out. Both run all
micro-batches in order with plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from moecompile.nn import auxiliary_loss, meters_of, set_random_key, split, update_balance
from moecompile.passes import shard as passes_shard
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.plan import Plan
from moecompile.plan.plan import DENSE
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated
from moecompile.runtime.groups import Groups
from moecompile.torch_private import in_backward
from tests.distributed.gradient_job import full
from tests.existing_models import CONFIGS, moe_model

VOCAB, MICRO_BATCHES, BATCH = 64, 4, 1
LENGTHS = (7, 12, 1, 5)  # tokens of each micro-batch: odd, even, fewer than ranks
_DENSE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
UPCYCLE = [
    "experts.num_routed=8", "experts.granularity=2", "experts.init=virtual_group", "routing.top_k=2",
    "experts.num_shared=1", "routing.score=softmax", "balance.rule=none",
]  # fmt: skip
EXISTING = ["balance.rule=none"]
ROUTED, SHARED, LATENT = "experts", "shared_experts", ("latent_down", "latent_up")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a mesh of `ranks`; its micro-batches are split over TP groups, and accumulated by each of them.

    fault: a class of weights whose gradient is not summed over tp, or an op without its backward.
    """

    architecture: str
    tp: int
    ep: int
    overrides: tuple[str, ...] = ()
    tied: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    capacity: float | None = None
    jitter: float = 0.0
    ranks: int = 4
    tolerance: float = 1e-10
    checkpointing: str = "none"
    fault: str = ""

    @property
    def name(self) -> str:
        """`llama-tp2-ep4`, with what is special about it."""
        capacity = "" if self.capacity is None else f"capacity {self.capacity}"
        checkpointing = "" if self.checkpointing == "none" else self.checkpointing
        jitter = f"jitter {self.jitter}" if self.jitter else ""
        extra = [*self.overrides, *self.losses, capacity, jitter, "tied" * self.tied, checkpointing, self.fault]
        return "-".join(filter(None, (f"{self.architecture}-tp{self.tp}-ep{self.ep}", *extra)))


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) with unequal numbers of tokens; the last token of one has no target."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(1, VOCAB, (BATCH, length + 1), generator=generator)
        labels = ids[:, 1:].clone()
        if i == 1:
            labels[:, -3:] = -100
        batches.append((ids[:, :-1], labels))
    return batches


class _Wide:
    """torch, whose float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


@contextmanager
def wide(case: Case) -> Iterator[None]:
    """DeepSeek-V3's norms and its router would round what differs by 1e-16 to fp32: here they compute in float64."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    with pytest.MonkeyPatch.context() as patch:
        if case.architecture == "deepseek_v3":
            patch.setattr(modeling_deepseek_v3, "torch", _Wide())
        yield


def built(case: Case) -> nn.Module:
    """The model before compilation, float64, independently random."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if case.architecture in CONFIGS:
        return moe_model(case.architecture, dtype=torch.float64, **case.changes).train()
    settings = {**_DENSE, "vocab_size": VOCAB, "tie_word_embeddings": case.tied, **case.changes}
    config = AutoConfig.for_model(case.architecture, use_cache=False, eos_token_id=None, bos_token_id=None, **settings)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.15 if parameter.ndim > 1 else 1 + noise * 0.1)
    return model.train()


def overrides_of(case: Case) -> list[str]:
    """The overrides of a case on the ranks of one node."""
    base = [*UPCYCLE, f"routing.jitter={case.jitter}"]
    if case.architecture in CONFIGS:
        base = EXISTING
    mesh = [f"mesh.ranks_per_node={case.ranks}", f"mesh.ep={case.ep}", f"mesh.tp={case.tp}", "dispatch.kind=auto"]
    losses = [f"balance.losses.{name}={value}" for name, value in case.losses.items()]
    capacity = [] if case.capacity is None else [f"routing.capacity_factor={case.capacity}"]
    return [*base, *mesh, *losses, *capacity, *case.overrides]


def compiled(case: Case) -> nn.Module:
    """Lowered by the case's plan, with routers and experts that differ from each other."""
    model = compile_model(built(case), overrides_of(case), example={"input_ids": micro_batches()[0][0]})
    if case.architecture not in CONFIGS:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(f".{role}." in name for role in (ROUTED, "router", SHARED, *LATENT)):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


# -- the reference ---------------------------------------------------------------------------------------------------


class PlainMoE(nn.Module):
    """Softmax top-k over a loop of SwiGLU experts, plus a shared one. Weights are those of a compiled layer.

    With a projection down and one up, experts work between them.
    """

    def __init__(self, layer: nn.Module, case: Case) -> None:
        super().__init__()
        self.case = case
        for role in ("router", ROUTED, SHARED, *(name for name in LATENT if hasattr(layer, name))):
            holder = nn.Module()
            for name, value in layer.get_submodule(role).named_parameters():
                holder.register_parameter(name.replace(".", "__"), nn.Parameter(value.detach().clone()))
            self.add_module(role, holder)
        self.aux: Tensor | None = None
        self.key = torch.zeros(4, dtype=torch.int64)  # seed, step, micro-batch, layer

    def forward(self, x: Tensor) -> Tensor:
        tokens, router, routed = x.flatten(0, 1), self.router, self.experts
        seen = tokens
        if self.case.jitter:  # the numbers are the only thing that is shared with what is tested
            uniform = torch.ops.moecompile.keyed_uniform(tokens.detach(), self.key)
            seen = tokens * (1 + self.case.jitter * (2 * uniform - 1))
        logits = seen @ router.weight.T
        probs = logits.softmax(-1)
        num_experts = probs.shape[1]
        weights, ids = probs.topk(2)
        weights = weights / weights.sum(1, keepdim=True)
        kept = self._kept(ids, num_experts)
        outputs, inner = [], tokens @ self.latent_down.weight.T if hasattr(self, "latent_down") else tokens
        for token in range(tokens.shape[0]):
            row = torch.zeros_like(inner[token])
            for slot in range(ids.shape[1]):
                if kept[token, slot] and ids[token, slot] < len(routed.down_proj):
                    gate, up = (routed.gate_up_proj[ids[token, slot]] @ inner[token]).chunk(2)
                    row = row + weights[token, slot] * (routed.down_proj[ids[token, slot]] @ (F.silu(gate) * up))
            outputs.append(row)
        shared = self.shared_experts
        hidden = F.silu(tokens @ shared.gate_proj__weight.T) * (tokens @ shared.up_proj__weight.T)
        out = self._up(torch.stack(outputs)) + hidden @ shared.down_proj__weight.T
        identity = weights.masked_fill(ids < len(routed.down_proj), 0).sum(1, keepdim=True)
        out = out + identity * tokens  # experts that return their input
        losses = self.case.losses
        if losses:
            share = F.one_hot(ids, num_experts).sum((0, 1)).double() / ids.numel()
            aux = losses.get("micro_batch", 0.0) * num_experts * (share * probs.mean(0)).sum()
            self.aux = aux + losses.get("z", 0.0) * logits.logsumexp(-1).square().mean()
        return out.view_as(x)

    def _kept(self, ids: Tensor, num_experts: int) -> Tensor:
        """Which assignments are not dropped."""
        kept = torch.ones_like(ids, dtype=torch.bool)
        if self.case.capacity is not None:  # an expert keeps its first tokens
            most, used = max(1, int(-(-self.case.capacity * ids.numel() // num_experts))), [0] * num_experts
            for token in range(ids.shape[0]):
                for slot in range(ids.shape[1]):
                    expert = int(ids[token, slot])
                    kept[token, slot] = used[expert] < most
                    used[expert] += 1
        return kept

    def _up(self, combined: Tensor) -> Tensor:
        """The experts' sum in the model's width."""
        if not hasattr(self, "latent_up"):
            return combined
        if hasattr(self.latent_up, "norm_weight"):
            root = (combined.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            combined = combined / root * self.latent_up.norm_weight
        return combined @ self.latent_up.weight.T


def reference(case: Case) -> tuple[float, dict[str, Tensor], Tensor]:
    """Loss, every gradient by its name in the compiled model, and the norm of all, from one process."""
    with wide(case):
        return _reference(case)


def _reference(case: Case) -> tuple[float, dict[str, Tensor], Tensor]:
    model = built(case)
    layers: list[PlainMoE] = []
    if case.architecture not in CONFIGS:
        ours = compiled(case)
        for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
            layer.mlp = PlainMoE(ours.model.layers[i].mlp, case)  # type: ignore[union-attr,index]
            layers.append(layer.mlp)  # type: ignore[arg-type]
    total, num_tokens = 0.0, 0
    for number, (ids, labels) in enumerate(micro_batches()):
        for i, layer in enumerate(layers):
            layer.key = torch.tensor([7, 0, number, i])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count = int((labels != -100).sum())
        objective = loss + count * sum((layer.aux for layer in layers if layer.aux is not None), torch.zeros(()))
        objective.backward()
        total, num_tokens = total + loss.item(), num_tokens + count
    grads = {name.replace("__", "."): p.grad / num_tokens for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    return total, grads, norm


# -- the ranks -------------------------------------------------------------------------------------------------------


def step(case: Case) -> dict[str, Any]:
    """The same step on this launch's ranks: loss, gradients, norm, and what experts and meters saw."""
    with wide(case), pytest.MonkeyPatch.context() as patch:
        model = compiled(case)
        _break(patch, case.fault)
        return _step(case, model, plan_of(model))


def _step(case: Case, model: nn.Module, plan: Plan) -> dict[str, Any]:
    sharded = shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    if case.checkpointing != "none":
        recompute(sharded, plan, case.checkpointing)
    groups = Groups.of(plan.mesh, "cpu")
    numbered = enumerate(micro_batches())
    own = [(i, *batch) for i, batch in numbered if i % groups.num_batches == groups.batch_index]
    rows = _count_rows(sharded)
    sums = torch.zeros(2, dtype=torch.float64)
    for i, (number, ids, labels) in enumerate(own):
        set_random_key(sharded, 7, 0, number)
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(i == len(own) - 1, recurse=False)
        logits = sharded(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count = int((labels != -100).sum())
        aux = auxiliary_loss(sharded)
        (loss if aux is None else loss + count * aux).backward()
        sums += torch.tensor([loss.item(), count], dtype=torch.float64)
    parameters = list(sharded.parameters())
    sum_replicated(parameters, groups.tokens)
    torch.distributed.all_reduce(sums, group=groups.tokens)
    divide(parameters, sums[1])
    grads = {name: full(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
    norm = clip_by_global_norm(parameters, 1e30, groups.every)
    has_meters = bool(meters_of(sharded))
    loads = update_balance(sharded, groups.tokens) if has_meters else []
    num_experts = plan.layers[0].experts.num_routed  # those with weights
    return {
        "loss": sums[0].item(), "grads": grads, "norm": norm, "rows": sum(rows),
        "loads": [(int(load.load[:num_experts].sum()), load.tokens) for load in loads],
    }  # fmt: skip


def _break(patch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "spread":
        patch.setattr(split, "spread", lambda x, axis: x)
    elif fault:
        right = passes_shard.classes_of

        def wrong(model: nn.Module, plan: Plan) -> dict[nn.Parameter, str]:
            return {parameter: DENSE if kind == fault else kind for parameter, kind in right(model, plan).items()}

        patch.setattr(passes_shard, "classes_of", wrong)


def _count_rows(model: nn.Module) -> list[int]:
    """Filled by every forward, but not by its recomputation, with the rows that this rank's experts compute."""
    counted: list[int] = []

    def count(module: nn.Module, args: Any) -> None:
        if args and not in_backward():  # a call without rows begins the collection of weight gradients
            counted.append(int(args[1].sum()))

    for module in model.modules():
        if type(module).__name__ in ("Experts", "ExistingExperts"):
            module.register_forward_pre_hook(count)
    return counted


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference relative to each tensor's largest entry, and whose it is."""
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    floor = 1e-9 * max(float(grad.abs().max()) for grad in wanted.values())
    errors = {
        name: float((grad - wanted[name]).abs().max() / wanted[name].abs().max().clamp_min(floor))
        for name, grad in got.items()
    }
    name = max(errors, key=errors.__getitem__)
    return errors[name], name
