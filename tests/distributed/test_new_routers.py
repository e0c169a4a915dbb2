"""Routers of 2025 and 2026 on 1, 2 and 4 ranks equal a plain loop over tokens, which shares nothing with the package.

Compared in float64, with padding, over two micro-batches a rank or more: outputs, every gradient, the correction bias
after every step, and loads. Quantile balancing is compared with the exact quantile of the concatenated global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from moecompile.nn import Experts, LayerLoad, Router, SharedExperts, routers_of, set_random_key, update_balance
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.runtime.gradients import sum_replicated
from moecompile.verify import worst
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.tiny import Gated, randomize

pytestmark = pytest.mark.slow
STEPS, MICRO_BATCHES, VOCAB, D, EXPERTS, TOP_K = 3, 4, 31, 8, 8, 3
RATE = 0.05
SIZES = [f"experts.num_routed={EXPERTS}", "experts.init=random", f"routing.top_k={TOP_K}"]
KINDS = {
    "quantile": ["routing.score=sigmoid", "balance=quantile"],
    "deepseek_v4": [
        "routing.score=sqrt_softplus", "routing.scale=1.5", "balance=bias", f"balance.rate={RATE}",
        "balance.recenter=true", "+per_layer.first.layers='0:1'", "+per_layer.first.routing.choice=hash",
        "+per_layer.first.balance.rule=none", "+per_layer.first.balance.recenter=false",
    ],
    "gemma4": ["routing.norm=true", "routing.expert_scale=true"],
    "cohere2_moe": ["routing.score=sigmoid_after_topk"],
    "inkling": [
        "routing.score=sigmoid", "routing.scale=1.5", "experts.granularity=4", "experts.num_shared=2",
        "experts.shared_routed=true",
    ],
    "llama4": ["routing.score=sigmoid_after_topk", "routing.normalize=false"],
}  # fmt: skip
MESHES = {
    1: ["mesh.ranks_per_node=1"],
    2: ["mesh.ranks_per_node=2", "mesh.ep=2"],
    4: ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "mesh.ep=4", "dispatch.kind=hierarchical"],
}


class Model(nn.Module):
    """Two residual FFNs between an embedding and a head, with the argument names of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB, bias=False)
        self.ffns = nn.ModuleList(Gated(D, 16) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for ffn in self.ffns:
            x = x + ffn(x)
        return self.head(x)


def micro_batch(step: int, number: int) -> dict[str, Tensor]:
    """Padding on the left, on the right, everywhere but in one place, and nowhere."""
    generator = torch.Generator().manual_seed(10 * step + number)
    ids, mask = torch.randint(0, VOCAB, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.int64)
    if number == 0:
        mask[0, :3] = 0
    elif number == 1:
        mask[1, 4:] = 0
    elif number == 2:
        mask[:] = 0
        mask[0, 0] = 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Trace:
    """outputs of real tokens, grads and loads of each step (micro-batches in order); biases before and after it."""

    outputs: list[dict[int, Tensor]] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    loads: list[list[LayerLoad]] = field(default_factory=list)
    biases: list[list[Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def trained(rank: int, world_size: int, kind: str) -> Trace:
    """Gradients of all steps on this rank's micro-batches; weights stay, so that only biases move."""
    torch.manual_seed(0)
    model = Model().double()
    moecompile.compile_model(model, [*SIZES, *KINDS[kind], *MESHES[world_size]], example=micro_batch(0, 0))
    for i, module in enumerate(m for m in model.modules() if isinstance(m, (Experts, Router, SharedExperts))):
        randomize(module, seed=i, std=0.5 if isinstance(module, Router) else 0.3)
    trace = Trace(weights={name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    group, plan = (dist.group.WORLD if world_size > 1 else None), moecompile.plan_of(model)
    if world_size > 1:
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    own = MICRO_BATCHES // world_size
    for step in range(STEPS):
        model.zero_grad()
        trace.outputs.append({})
        trace.biases.append([router.correction_bias.clone() for _, router in routers_of(model)])
        for number in range(rank * own, (rank + 1) * own):
            set_random_key(model, 3, step, number)
            batch = micro_batch(step, number)
            out = model(**batch)[batch["attention_mask"] != 0]
            trace.outputs[-1][number] = out.detach().clone()
            out.square().sum().backward()
        if group is not None:
            sum_replicated(model.parameters(), group)
        trace.grads.append({name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        trace.loads.append(update_balance(model, group))
    trace.biases.append([router.correction_bias.clone() for _, router in routers_of(model)])
    return trace


def ranks(rank: int, world_size: int) -> dict[str, Trace]:
    return {kind: trained(rank, world_size, kind) for kind in KINDS}


# -- the reference ---------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    """What one step of the plain loop computes. required: layer -> a row for each token of the biases that experts
    require. chosen: layer -> experts of each token.
    """

    outputs: dict[int, Tensor]
    grads: dict[str, Tensor]
    required: list[list[list[float]]]
    chosen: list[list[list[int]]]


def plain(kind: str, weights: dict[str, Tensor], step: int, biases: list[Tensor]) -> Plain:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items() if "correction" not in name}
    found = Plain({}, {}, [[], []], [[], []])
    total = torch.zeros((), dtype=torch.float64)
    for number in range(MICRO_BATCHES):
        batch, rows = micro_batch(step, number), []
        for token in batch["input_ids"][batch["attention_mask"] != 0].tolist():  # padding is not even looked at
            x = leaves["embed.weight"][token]
            for layer in range(2):
                part = {n.split(".", 2)[2]: leaf for n, leaf in leaves.items() if n.startswith(f"ffns.{layer}.")}
                x = x + one_layer(kind, part, x, token, layer, biases[layer], found)
            rows.append(leaves["head.weight"] @ x)
        found.outputs[number] = torch.stack(rows)
        total = total + found.outputs[number].square().sum()
    names = list(leaves)
    grads = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    found.grads = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return found


def one_layer(
    kind: str, part: dict[str, Tensor], x: Tensor, token: int, layer: int, bias: Tensor, found: Plain
) -> Tensor:
    hidden = x
    if kind == "gemma4":
        hidden = x / (x.pow(2).mean() + 1e-6).sqrt() * part["router.norm_scale"] / math.sqrt(D)
    logits = part["router.weight"] @ hidden
    scores = {
        "quantile": lambda: 1 / (1 + (-logits).exp()),
        "deepseek_v4": lambda: (1 + logits.exp()).log().sqrt(),
        "gemma4": lambda: logits.exp() / logits.exp().sum(),
    }.get(kind, lambda: 1 / (1 + (-logits).exp()))()
    biased = [s + b for s, b in zip(scores.tolist(), bias.tolist(), strict=True)]
    ranked = sorted(range(EXPERTS), key=lambda e: -biased[e])
    chosen = by_hash(token, layer) if kind == "deepseek_v4" and layer == 0 else ranked[:TOP_K]
    found.chosen[layer].append(chosen)
    found.required[layer].append([biased[ranked[TOP_K]] - score for score in scores.tolist()])
    total = scores.new_ones(()) if kind == "llama4" else torch.stack([scores[e] for e in chosen]).sum()
    out = torch.zeros_like(x)
    if kind == "inkling":
        beside = 1 / (1 + (-(part["router.shared_weight"] @ x)).exp())
        total = total + beside.sum()
        width = part["shared_experts.up_proj.weight"].shape[0] // 2
        for piece, score in enumerate(beside):
            rows = slice(piece * width, (piece + 1) * width)
            gate, up = (part[f"shared_experts.{name}_proj.weight"][rows] @ x for name in ("gate", "up"))
            down = part["shared_experts.down_proj.weight"][:, rows]
            out = out + 1.5 * score / total * (down @ (F.silu(gate) * up))
    for expert in chosen:
        weight = scores[expert] / total * (1.5 if kind in ("deepseek_v4", "inkling") else 1.0)
        if kind == "gemma4":
            weight = weight * part["router.expert_scale"][expert]
        gate, up = (part["experts.gate_up_proj"][expert] @ x).chunk(2)
        out = out + weight * (part["experts.down_proj"][expert] @ (F.silu(gate) * up))
    return out


def by_hash(token: int, layer: int) -> list[int]:
    def mixed(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    start, taken = mixed((token + mixed(layer + 1)) % 2**64), []
    for last in range(EXPERTS - TOP_K, EXPERTS):
        drawn = mixed((start + last) % 2**64) % 2**63 % (last + 1)
        taken.append(last if drawn in taken else drawn)
    return taken


# -- the comparison --------------------------------------------------------------------------------------------------


@cache
def launched(world_size: int) -> list[dict[str, Trace]]:
    if world_size == 1:
        return [ranks(0, 1)]
    return run_distributed_test(ranks, world_size, timeout_s=120)


def joined(kind: str, world_size: int) -> list[Trace]:
    return [traces[kind] for traces in launched(world_size)]


@pytest.mark.parametrize("world_size", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_loop(kind: str, world_size: int) -> None:
    traces = joined(kind, world_size)
    first = traces[0]
    for step in range(STEPS):
        wanted = plain(kind, first.weights, step, first.biases[step])
        outputs = {number: out for trace in traces for number, out in trace.outputs[step].items()}
        assert sorted(outputs) == list(range(MICRO_BATCHES))
        for number, out in outputs.items():
            assert (out - wanted.outputs[number]).abs().max() <= 1e-12 * wanted.outputs[number].abs().max()
        assert first.grads[step].keys() == wanted.grads.keys()
        assert worst(first.grads[step], wanted.grads) < (1e-10, "")
        for layer in range(2):
            counts = torch.tensor([sum(row.count(e) for row in wanted.chosen[layer]) for e in range(EXPERTS)])
            assert all(torch.equal(trace.loads[step][layer].load, counts) for trace in traces)
            before, after = first.biases[step][layer], first.biases[step + 1][layer]
            check_bias(kind, layer, before, after, counts, wanted.required[layer])
            assert all(torch.equal(trace.biases[step + 1][layer], after) for trace in traces)


def check_bias(kind: str, layer: int, before: Tensor, after: Tensor, counts: Tensor, required: list[Any]) -> None:
    if kind == "deepseek_v4" and layer == 1:
        wanted = before + RATE * (counts.double().mean() - counts).sign()
        assert (after - (wanted - wanted.mean())).abs().max() <= 1e-15
    elif kind == "quantile":
        place = math.ceil(len(required) * TOP_K / EXPERTS)  # as many tokens require at most the solved bias
        exact = torch.tensor([sorted(column)[place - 1] for column in zip(*required, strict=True)]).double()
        bin_width = float(before.max() - before.min() + 2) / 1000
        error = after - (exact - exact.mean())
        assert float(error.max() - error.min()) <= 2 * bin_width  # either way, and all are centred by the same
        assert after.mean().abs() <= 1e-15
        assert float(after.abs().max()) > 10 * bin_width  # else the bound would say little
    else:
        assert torch.equal(after, before)


def test_every_mesh_solves_the_same_bias() -> None:
    for kind in ("quantile", "deepseek_v4"):
        for step in range(STEPS + 1):
            one, *others = (joined(kind, world_size)[0].biases[step] for world_size in MESHES)
            for other in others:
                assert all((a - b).abs().max() <= 1e-14 for a, b in zip(one, other, strict=True))
