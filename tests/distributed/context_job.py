"""One optimizer step under context parallelism, against one process that shares no code with it.

The reference runs whole micro-batches in order with plain autograd: transformers' own model where it is MoE already,
else `PlainMoE` of fold_job.py in place of each FFN. Rows are padded (left or right, one with almost no tokens) or packed
(positions start again).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import moecompile
from moecompile.mesh import LinkClass
from moecompile.nn import auxiliary_loss, meters_of, set_random_key, update_balance
from moecompile.nn.padding import ENCODER, padding_of
from moecompile.ops import context_traffic
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import plan_of
from moecompile.plan import Plan
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated
from moecompile.runtime.groups import Groups
from tests.distributed import fold_job
from tests.distributed.gradient_job import full
from tests.existing_models import CONFIGS

ROWS, MICRO_BATCHES = 2, 4
LENGTHS = (8, 16, 24, 8)  # multiples of the most ranks of a CP group
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a mesh of `ranks`. rows: `full`, `left` or `right` (padded) or `packed`."""

    architecture: str
    cp: int
    ep: int
    tp: int = 1
    ranks: int = 4
    rows: str = "full"
    overrides: tuple[str, ...] = ()
    losses: dict[str, float] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        """`mixtral-4-cp2-ep4`, with what is special about it."""
        extra = [f"tp{self.tp}"] * (self.tp > 1) + [*self.overrides, *self.losses, *map(str, self.changes.values())]
        extra += [each for each in (self.rows, self.checkpointing) if each not in ("full", "none")]
        return "-".join([f"{self.architecture}-{self.ranks}-cp{self.cp}-ep{self.ep}", *extra])

    @property
    def folded(self) -> fold_job.Case:
        """The same model for the helpers of fold_job.py."""
        return fold_job.Case(
            architecture=self.architecture, tp=self.tp, ep=self.ep, ranks=self.ranks, losses=self.losses, changes=self.changes,
            overrides=(*self.overrides, f"mesh.cp={self.cp}", "data.seq_len=16"),
        )  # fmt: skip


def micro_batches(case: Case) -> list[Batch]:
    """Whole rows, with labels that are shifted already, and unequally many targets."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, fold_job.VOCAB, (ROWS, length + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone()}
        batch["labels"][0, length // 2 - number :] = -100
        if case.rows == "packed":
            ends = torch.tensor([[length // 2 + 1], [3]])
            place = torch.arange(length).expand(ROWS, -1)
            batch["position_ids"] = torch.where(place < ends, place, place - ends)
        elif case.rows != "full":
            real = torch.arange(length) < torch.tensor([[length - 3], [1 + number]])
            mask = real if case.rows == "right" else real.flip(1)
            batch["attention_mask"] = mask.long()
            batch["labels"][~mask] = -100
        batches.append(batch)
    return batches


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Those that the model computes on this rank."""
    found: Tensor = model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False).logits
    return found


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats, summed over targets."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@dataclass(kw_only=True)
class Step:
    """What one side computed: loss, its gradients, their norm, and the logits of each micro-batch."""

    loss: float
    grads: dict[str, Tensor]
    norm: float
    logits: list[Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


def reference(case: Case) -> Step:
    """One process."""
    model = fold_job.built(case.folded)
    layers: list[fold_job.PlainMoE] = []
    if case.architecture not in CONFIGS:
        ours = compiled(case)
        for i, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
            layer.mlp = fold_job.PlainMoE(ours.model.layers[i].mlp, case.folded)  # type: ignore[union-attr,index]
            layers.append(layer.mlp)  # type: ignore[arg-type]
    total, num_tokens, kept = 0.0, 0, []
    for batch in micro_batches(case):
        logits = logits_of(model, batch)
        loss, count = summed(logits, batch["labels"]), int((batch["labels"] != -100).sum())
        aux = sum((layer.aux for layer in layers if layer.aux is not None), torch.zeros(()))
        (loss + count * aux).backward()
        total, num_tokens = total + loss.item(), num_tokens + count
        kept.append(logits.detach())
    grads = {name.replace("__", "."): p.grad / num_tokens for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    return Step(loss=total, grads=grads, norm=float(norm), logits=kept)


def compiled(case: Case) -> nn.Module:
    """Lowered by the case's plan."""
    return fold_job.compiled(case.folded)


def step(case: Case) -> Step:
    """The same step on this launch's ranks."""
    model = compiled(case)
    plan = plan_of(model)
    sharded = shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    if case.checkpointing != "none":
        recompute(sharded, plan, case.checkpointing)
    groups = Groups.of(plan.mesh, "cpu")
    own = [(i, b) for i, b in enumerate(micro_batches(case)) if i % groups.num_batches == groups.batch_index]
    sums, kept = torch.zeros(2, dtype=torch.float64), dict[int, Tensor]()
    context_traffic.take()
    for i, (number, batch) in enumerate(own):
        set_random_key(sharded, 7, 0, number)
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(i == len(own) - 1, recurse=False)
        with packed_padding(sharded, batch):
            logits = logits_of(sharded, batch)
        labels = moecompile.own_positions(sharded, batch["labels"])
        loss, count = summed(logits, labels), (labels != -100).sum()
        aux = auxiliary_loss(sharded)
        (loss if aux is None else loss + groups.of_micro_batch(count) * aux).backward()
        sums += torch.stack((loss.detach(), count.double()))
        kept[number] = logits.detach()
    parameters = list(sharded.parameters())
    sum_replicated(parameters, groups.tokens)
    torch.distributed.all_reduce(sums, group=groups.tokens)
    divide(parameters, sums[1])
    grads = {name: full(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
    norm = clip_by_global_norm(parameters, 1e30, groups.every)
    loads = update_balance(sharded, groups.tokens) if meters_of(sharded) else []
    rest = {"loads": [load.tokens for load in loads], "bytes": _bytes(plan, own)}
    return Step(loss=sums[0].item(), grads=grads, norm=float(norm), logits=_whole(kept, plan), rest=rest)


@contextmanager
def packed_padding(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Nothing is padding in these packed rows, whose call has no mask."""
    padding = padding_of(model)
    if padding is None or "position_ids" not in batch:
        yield
        return
    padding.start({ENCODER: torch.ones_like(batch["input_ids"], dtype=torch.bool)})
    try:
        yield
    finally:
        padding.end()


def _bytes(plan: Plan, own: list[tuple[int, Batch]]) -> tuple[float, float, float, float]:
    """Bytes that left this rank over cp: counted and planned, on its node and beyond."""
    rank, near, far = torch.distributed.get_rank(), 0, 0
    for peer, sent in context_traffic.take().items():
        link = plan.mesh.link(rank, peer)
        near, far = near + sent * (link is LinkClass.INTRA_NODE), far + sent * (link is LinkClass.INTER_NODE)
    assert plan.estimate is not None
    planned = plan.estimate.cp_bytes_per_token
    tokens = sum(batch["input_ids"].numel() for _, batch in own) // plan.mesh.cp
    return near, far, planned.intra_node * tokens, planned.inter_node * tokens


def _whole(kept: dict[int, Tensor], plan: Plan) -> list[Tensor]:
    """The logits of all micro-batches, of all positions. Ranks of a TP group, which are neighbours, have the same."""
    gathered: list[Any] = [None] * plan.mesh.world_size
    torch.distributed.all_gather_object(gathered, kept)
    return [
        torch.cat([of_rank[number] for of_rank in gathered[:: plan.mesh.tp] if number in of_rank], 1)
        for number in range(len(LENGTHS))
    ]


def saved_bytes(case: Case, length: int) -> int:
    """Bytes of the activations that autograd keeps after a forward of `length` tokens on this rank, each storage once.

    Weights, which FSDP gathers and frees, are left out.
    """
    model = compiled(case)
    plan = plan_of(model)
    shapes = {frozenset(p.shape) for p in model.parameters()}
    sharded = shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if frozenset(tensor.shape) not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(1, fold_job.VOCAB, (1, length), generator=torch.Generator().manual_seed(plan.mesh.cp))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = logits_of(sharded, {"input_ids": ids})
    logits.sum().backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
