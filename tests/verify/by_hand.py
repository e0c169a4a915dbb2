"""A small MoE and an expert parallelism of it that is written by hand, right and with known faults; without moecompile.

Experts are cut over `ep`: tokens of all its ranks are gathered, each rank computes its own experts, and the results are
summed and cut again. `dp` and `ep` have micro-batches of their own; `tp`, if there is one, shares them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moecompile.verify import Parallel

VOCABULARY, WIDTH, EXPERTS, LENGTH = 40, 8, 4, 12


class Exchange:
    """What one process does: nothing."""

    first = 0

    def gather(self, tokens: Tensor) -> Tensor:
        return tokens

    def sum_and_cut(self, tokens: Tensor) -> Tensor:
        return tokens


class MoE(nn.Module):
    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * WIDTH) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * 0.3)
        self.exchange = Exchange()
        self.counts_again = False
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.long) if counts else None)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, 1)
        scores_TE = self.router(x_TD).softmax(-1)
        ids_TK = scores_TE.topk(2).indices
        weights_TE = scores_TE * torch.zeros_like(scores_TE).scatter_(1, ids_TK, 1.0)
        if self.load is not None and (self.counts_again or torch._C._current_graph_task_id() == -1):
            self.load += torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
        every_TD, every_TE = self.exchange.gather(x_TD), self.exchange.gather(weights_TE)
        first = self.exchange.first
        parts = [
            every_TE[:, first + i, None] * (torch.relu(every_TD @ self.up[i]) @ self.down[i])
            for i in range(len(self.up))
        ]
        return x + self.exchange.sum_and_cut(torch.stack(parts).sum(0)).view_as(x)


class Model(nn.Module):
    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([MoE(counts), MoE(counts)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def tokens(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, is_right: bool) -> Tensor:
        ctx.group, ctx.is_right = group, is_right
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.contiguous().clone()
        if ctx.is_right:
            dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None, None


class _SumAndCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x.chunk(group.size())[group.rank()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = [torch.empty_like(grad) for _ in range(ctx.group.size())]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return torch.cat(parts), None


class Spread(Exchange):
    def __init__(self, group: Any, is_right: bool) -> None:
        self.group, self.is_right = group, is_right
        self.first = group.rank() * EXPERTS // group.size()

    def gather(self, tokens: Tensor) -> Tensor:
        return _Gather.apply(tokens, self.group, self.is_right)

    def sum_and_cut(self, tokens: Tensor) -> Tensor:
        return _SumAndCut.apply(tokens, self.group)


class Group:
    """The ranks of several axes of a mesh: sums over all of them."""

    def __init__(self, mesh: DeviceMesh, *axes: str) -> None:
        self.groups = [mesh.get_group(axis) for axis in axes if axis in (mesh.mesh_dim_names or ())]

    def sum(self, tensor: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(tensor, group=group)
        return tensor


class ExpertParallel(Parallel):
    """Experts over `ep`, everything else on every rank. Gradients are sums over micro-batches."""

    def __init__(self, model: Model, mesh: DeviceMesh, fault: str = "") -> None:
        super().__init__(
            module=model, finish=self.reduce, clip=self.clip_by_norm, counts=self.loads, optimizer=self.adamw
        )
        self.model, self.fault = model, fault
        self.ep, self.dp, self.everyone = mesh.get_group("ep"), Group(mesh, "dp"), Group(mesh, "dp", "ep")
        self.cut()
        self.experts = [weight for layer in model.layers for weight in (layer.up, layer.down)]
        cut = {id(weight) for weight in self.experts}
        self.dense = [weight for weight in model.parameters() if id(weight) not in cut]

    def cut(self) -> None:
        each = EXPERTS // self.ep.size()
        first = 0 if self.fault == "experts of rank 0" else self.ep.rank() * each
        for layer in self.model.layers:
            for name in ("up", "down"):
                setattr(layer, name, nn.Parameter(getattr(layer, name)[first : first + each].clone()))
            layer.exchange = Spread(self.ep, self.fault != "backward of gather")
            layer.counts_again = self.fault == "loads counted again"
        if self.fault == "weights untied":
            self.model.head.weight = nn.Parameter(self.model.embedding.weight.detach().clone())
        if self.fault == "a weight of its own":
            nn.init.normal_(self.model.layers[1].router.weight)

    def reduce(self, targets: int) -> None:
        for weight in self.dense:
            if self.fault != "router not summed" or weight.shape != (EXPERTS, WIDTH):
                self.everyone.sum(weight.grad)
        for weight in self.experts:
            self.dp.sum(weight.grad)
            if self.fault == "experts times ep":
                weight.grad *= self.ep.size()
            if self.fault == "experts halved on one rank" and self.ep.rank() == 1:
                weight.grad *= 0.5
        if self.fault == "no gradient for an expert" and self.ep.rank() == 0:
            self.experts[0].grad = None
        if self.fault == "not a number" and dist.get_rank() == 1:
            self.experts[0].grad[0, 0, 0] = float("nan")

    def clip_by_norm(self, most: float) -> Tensor:
        of_experts, of_dense = map(_square, (self.experts, self.dense))
        if self.fault != "norm of own experts":
            dist.all_reduce(of_experts, group=self.ep)
        norm = (of_experts + of_dense).sqrt()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm

    def loads(self) -> dict[str, Tensor]:
        loads = {f"layers.{i}.load": layer.load.clone() for i, layer in enumerate(self.model.layers)}
        return (
            loads
            if self.fault == "loads of one rank"
            else {name: self.everyone.sum(load) for name, load in loads.items()}
        )

    def adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        decay = 0.1 if self.fault == "another decay" else 0.01
        return torch.optim.AdamW(module.parameters(), lr=1e-3, eps=1e-5, weight_decay=decay)


def _square(weights: list[Any]) -> Tensor:
    return torch.stack([weight.grad.square().sum() for weight in weights if weight.grad is not None]).sum()
