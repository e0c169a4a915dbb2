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
        self.fault = ""
        self.register_buffer("load", torch.zeros(EXPERTS, dtype=torch.long) if counts else None)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, 1)
        scores_TE = self.router(x_TD).softmax(-1)
        ids_TK = scores_TE.topk(2).indices
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, ids_TK, 1.0)
        weights_TE = scores_TE * chosen_TE
        if self.fault == "slots that were not chosen":
            weights_TE = weights_TE + (scores_TE - scores_TE.detach()) * (1 - chosen_TE)  # nothing but a gradient
        if self.fault == "weights cut off":
            weights_TE = weights_TE.detach()
        if self.load is not None and (self.fault == "loads counted again" or torch._C._current_graph_task_id() == -1):
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
    """Experts over `ep`, everything else on every rank. Gradients are sums over micro-batches.

    by_targets: they are divided by the targets of all ranks.
    """

    def __init__(self, model: Model, mesh: DeviceMesh, fault: str = "", by_targets: bool = False) -> None:
        super().__init__(
            module=model, finish=self.reduce, clip=self.clip_by_norm, counts=self.loads, optimizer=self.adamw
        )
        self.model, self.fault, self.by_targets = model, fault, by_targets
        self.ep, self.dp, self.everyone = mesh.get_group("ep"), Group(mesh, "dp"), Group(mesh, "dp", "ep")
        self.cut()
        self.experts = [weight for layer in model.layers for weight in (layer.up, layer.down)]
        cut = {id(weight) for weight in self.experts}
        self.dense = [weight for weight in model.parameters() if id(weight) not in cut]
        if fault == "experts frozen":
            for weight in self.experts:
                weight.requires_grad_(False)
        if fault == "accumulated as an average":
            for weight in model.parameters():
                weight.register_post_accumulate_grad_hook(_halve)
        if fault == "batch of rank 0":
            model.register_forward_pre_hook(self.batch_of_first, with_kwargs=True)

    def cut(self) -> None:
        each = EXPERTS // self.ep.size()
        first = 0 if self.fault == "experts of rank 0" else self.ep.rank() * each
        for layer in self.model.layers:
            for name in ("up", "down"):
                setattr(layer, name, nn.Parameter(getattr(layer, name)[first : first + each].clone()))
            layer.exchange = Spread(self.ep, self.fault != "backward of gather")
            layer.fault = self.fault
        if self.fault == "layers by local index":
            for name in ("up", "down"):
                getattr(self.model.layers[1], name).data.copy_(getattr(self.model.layers[0], name).data)
        if self.fault == "weights untied":
            self.model.head.weight = nn.Parameter(self.model.embedding.weight.detach().clone())
        if self.fault == "a weight of its own":
            nn.init.normal_(self.model.layers[1].router.weight)

    def batch_of_first(self, module: nn.Module, args: Any, named: dict[str, Tensor]) -> Any:
        ids = named["input_ids"].clone()
        dist.broadcast(ids, group=self.ep, group_src=0)
        return args, {"input_ids": ids}

    def reduce(self, targets: int) -> None:
        self.divide(targets)
        for weight in self.dense:
            if weight.grad is not None and not (self.fault == "router not summed" and weight.shape == (EXPERTS, WIDTH)):
                self.everyone.sum(weight.grad)
        for weight in self.experts:
            if weight.grad is None:
                continue
            self.dp.sum(weight.grad)
            if self.fault == "experts times ep":
                weight.grad *= self.ep.size()
            if self.fault == "experts over ep":
                weight.grad /= self.ep.size()
            if self.fault == "experts halved on one rank" and self.ep.rank() == 1:
                weight.grad *= 0.5
        if self.fault == "no gradient for an expert" and self.ep.rank() == 0:
            self.experts[0].grad = None
        if self.fault == "not a number" and dist.get_rank() == 1:
            self.experts[0].grad[0, 0, 0] = float("nan")

    def divide(self, targets: int) -> None:
        """By the targets of all ranks, before gradients are summed."""
        if not self.by_targets:
            return
        number = torch.tensor(float(targets))
        if self.fault == "divided by own targets":
            number *= dist.get_world_size()
        else:
            self.everyone.sum(number)
        for weight in self.model.parameters():
            weight.grad /= number.clamp(min=1)

    def clip_by_norm(self, most: float) -> Tensor:
        of_experts, of_dense = map(_square, (self.experts, self.dense))
        if self.fault not in ("norm of own experts", "norm averaged"):
            dist.all_reduce(of_experts, group=self.ep)
        if self.fault == "tied weight twice in the norm":
            of_dense += _square([self.model.head.weight])
        norm = (of_experts + of_dense).sqrt()
        if self.fault == "norm averaged":
            dist.all_reduce(norm, group=self.ep)
            norm /= self.ep.size()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        return norm

    def loads(self) -> dict[str, Tensor]:
        loads = {f"layers.{i}.load": layer.load.clone() for i, layer in enumerate(self.model.layers)}
        if self.fault == "loads of one rank":
            return loads
        if self.fault == "loads in bfloat16":
            loads = {name: load.bfloat16() for name, load in loads.items()}
        return {name: self.everyone.sum(load).long() for name, load in loads.items()}

    def adamw(self, module: nn.Module) -> torch.optim.Optimizer:
        decay = 0.1 if self.fault == "another decay" else 0.01
        weights = self.dense if self.fault == "optimizer without experts" else module.parameters()
        optimizer = torch.optim.AdamW(weights, lr=1e-3, eps=1e-5, weight_decay=decay)
        if self.fault == "moments lost":
            optimizer.register_step_post_hook(lambda optimizer, args, named: optimizer.state.clear())
        return optimizer


def _halve(weight: Tensor) -> None:
    """After each backward: what has been accumulated is scaled again."""
    assert weight.grad is not None
    weight.grad *= 0.5


def _square(weights: list[Any]) -> Tensor:
    return sum((weight.grad.square().sum() for weight in weights if weight.grad is not None), torch.zeros(()))
