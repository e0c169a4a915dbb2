"""Padded batches on ranks, of which one has almost nothing else, equal the same tokens without padding in one process:
logits, every gradient, loads; and the bytes sent are those of the tokens alone.

The reference of Mixtral is transformers' own model. That of the upcycled Llamas, which have no other, is ours for one
device, compiled without padding masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.nn import update_balance
from moecompile.ops import traffic
from moecompile.passes.recompute import recompute
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import sum_replicated
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.existing_models import moe_model
from tests.tiny import randomize, tiny_llama

TWO_BY_TWO = ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "mesh.ep=4"]
TWO_RANKS = {"dedup": ["mesh.ranks_per_node=2", "dispatch.kind=dedup"]}
MORE_ON_TWO = {
    "flat": ["mesh.ranks_per_node=2", "dispatch.kind=flat"],
    "chunks": ["mesh.ranks_per_node=2", "dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
    "ep 1": ["mesh.ranks_per_node=2", "mesh.ep=1"],
}
FOUR_RANKS = {
    "hierarchical": [*TWO_BY_TWO, "dispatch.kind=hierarchical"],
    "allgather": [*TWO_BY_TWO, "dispatch.kind=allgather"],
    "ep 2": ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=dedup"],
}
LLAMA = [
    "experts.num_routed=4", "routing.top_k=2", "experts.num_shared=1", "experts.granularity=2", "experts.init=random",
]  # fmt: skip
OPTIONS = {
    "mixtral": [], "llama": LLAMA, "latent": [*LLAMA, "experts.latent_size=12", "experts.latent_norm=true"],
}  # fmt: skip
FOUR = ["experts.num_routed=4", "routing.top_k=2"]
KINDS = {
    "capacity": [*FOUR, "routing.capacity_factor=0.75"],
    "capacity by score": [*FOUR, "routing.capacity_factor=0.75", "routing.drop=score"],
    "expert choice": [*FOUR, "routing.choice=expert", "routing.normalize=false", "routing.allow_future=true"],
    "identity": [*FOUR, "experts.num_identity=2"],
    "hash": [*FOUR, "routing.choice=hash"],
    "shared, routed": [*LLAMA, "experts.shared_routed=true", "routing.score=sigmoid"],
    "groups and a bias": [*FOUR, "routing.groups=2", "routing.top_groups=1", "routing.score=sigmoid", "balance=bias"],
}  # fmt: skip
OF_KINDS = {**TWO_RANKS, "lend": [*TWO_RANKS["dedup"], "dispatch.balance=lend", "dispatch.slots=1"]}
LENT = ("capacity", "hash", "shared, routed", "groups and a bias")
LENGTH, PADDED = (5, 1, 4, 2), 9  # real tokens of a sequence on each rank, and with padding
WIDE = {"dtype": torch.float64}


@dataclass
class Found:
    """What one rank found. sent: bytes to each rank."""

    logits: Tensor
    grads: dict[str, Tensor]
    loads: list[list[int]]
    tokens: list[int]
    sent: dict[int, int]


def model_of(name: str, overrides: list[str]) -> nn.Module:
    model = moe_model("mixtral", **WIDE) if name == "mixtral" else tiny_llama().double()
    compile_model(
        model, [*(OPTIONS | KINDS)[name], *overrides, "data.mask_padding=always"], example=inputs(0, is_padded=True)
    )
    randomize(model)
    return model


def inputs(rank: int, *, is_padded: bool) -> dict[str, Tensor]:
    """Two sequences; even ranks have their padding on the left."""
    length = LENGTH[rank]
    ids = torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(rank))
    if not is_padded:
        return {"input_ids": ids}
    sides = (PADDED - length, 0) if rank % 2 == 0 else (0, PADDED - length)
    mask = nn.functional.pad(torch.ones_like(ids), sides)
    position = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": nn.functional.pad(ids, sides, value=7), "attention_mask": mask, "position_ids": position}


def loss_of(model: nn.Module, rank: int, *, is_padded: bool) -> tuple[Tensor, Tensor]:
    """Logits of the real tokens, and the sum of their sines."""
    batch = inputs(rank, is_padded=is_padded)
    logits = model.train()(**batch, use_cache=False).logits
    if is_padded:
        logits = logits[batch["attention_mask"].bool()].view(2, LENGTH[rank], -1)
    return logits.detach(), logits.sin().sum()


def on_a_rank(rank: int, world_size: int, name: str, overrides: list[str], *, is_padded: bool, again: str) -> Found:
    model = model_of(name, overrides)
    plan = plan_of(model)
    shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    if again:
        recompute(model, plan, again)
    traffic.take()
    logits, loss = loss_of(model, rank, is_padded=is_padded)
    sent = traffic.take()
    loss.backward()
    sum_replicated(list(model.parameters()), dist.group.WORLD)
    grads = {path: full(p.grad) for path, p in model.named_parameters() if p.grad is not None}
    loads = update_balance(model, dist.group.WORLD)
    return Found(logits, grads, [load.load.tolist() for load in loads], [load.tokens for load in loads], sent)


def job(rank: int, world_size: int, meshes: dict[str, list[str]]) -> dict[tuple[str, ...], Found]:
    found: dict[tuple[str, ...], Found] = {}
    for name in list(OPTIONS)[: 2 if meshes == TWO_RANKS else 3]:
        for mesh, overrides in meshes.items():
            for is_padded, again in ((True, ""), (False, ""), (True, "keep_exchanges")):
                key = (name, mesh, "padded" if is_padded else "plain", again)
                found[key] = on_a_rank(rank, world_size, name, overrides, is_padded=is_padded, again=again)
    return found


def of_kinds(rank: int, world_size: int) -> dict[tuple[str, ...], Found]:
    found: dict[tuple[str, ...], Found] = {}
    for name in KINDS:
        for mesh in OF_KINDS if name in LENT else TWO_RANKS:
            for is_padded in (True, False):
                key = (name, mesh, "padded" if is_padded else "plain", "")
                found[key] = on_a_rank(rank, world_size, name, OF_KINDS[mesh], is_padded=is_padded, again="")
    return found


@cache
def ranks(mesh: str) -> list[dict[tuple[str, ...], Found]]:
    """All meshes of one launch."""
    meshes = next(meshes for meshes in (TWO_RANKS, MORE_ON_TWO, FOUR_RANKS) if mesh in meshes)
    return run_distributed_test(job, 4 if meshes is FOUR_RANKS else 2, meshes, timeout_s=240)


@cache
def reference(name: str, world_size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of each rank's tokens, and gradients, in one process without padding."""
    model = moe_model("mixtral", **WIDE) if name == "mixtral" else tiny_llama().double()
    if name != "mixtral":
        example = {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
        compile_model(model, [*(OPTIONS | KINDS)[name], "data.mask_padding=never"], example=example, until="rewrite")
    randomize(model)
    logits = []
    for rank in range(world_size):
        out, loss = loss_of(model, rank, is_padded=False)
        loss.backward()
        logits.append(out)
    return logits, {path: p.grad for path, p in model.named_parameters() if p.grad is not None}


def first_of(mesh: str) -> str:
    """The first mesh of the launch that has `mesh`."""
    return next(next(iter(meshes)) for meshes in (TWO_RANKS, MORE_ON_TWO, FOUR_RANKS) if mesh in meshes)


def check(name: str, mesh: str, world_size: int) -> None:
    compare(name, mesh, world_size, ranks(first_of(mesh)), ("", "keep_exchanges"))


def compare(
    name: str, mesh: str, world_size: int, of_ranks: list[dict[tuple[str, ...], Found]], recomputed: tuple[str, ...]
) -> None:
    logits, grads = reference(name, world_size)
    for rank, found in enumerate(of_ranks):
        plain = found[name, mesh, "plain", ""]
        for again in recomputed:
            padded = found[name, mesh, "padded", again]
            torch.testing.assert_close(padded.logits, logits[rank], rtol=0, atol=1e-10)
            assert padded.grads.keys() == grads.keys()
            for path, grad in grads.items():
                atol = 1e-10 * float(grad.abs().max())
                torch.testing.assert_close(padded.grads[path], grad, rtol=0, atol=atol, msg=path)
            assert padded.loads == plain.loads and padded.tokens == plain.tokens
            assert padded.tokens == [2 * sum(LENGTH[:world_size])] * len(padded.tokens)
            assert padded.sent == plain.sent


@pytest.mark.parametrize("mesh", TWO_RANKS)
@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_two_ranks(name: str, mesh: str) -> None:
    check(name, mesh, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MORE_ON_TWO)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_with_other_dispatch(name: str, mesh: str) -> None:
    check(name, mesh, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FOUR_RANKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_four_ranks(name: str, mesh: str) -> None:
    check(name, mesh, 4)


@pytest.mark.slow
def test_every_kind_of_router_on_two_ranks_and_with_lent_experts() -> None:
    of_ranks = run_distributed_test(of_kinds, 2, timeout_s=240)
    for name, mesh in {key[:2] for key in of_ranks[0]}:
        compare(name, mesh, 2, of_ranks, ("",))


def test_the_check_sees_padding_that_is_routed(monkeypatch: Any) -> None:
    """The silent bug: without the mask, loads, outputs and gradients differ."""
    model = moe_model("mixtral", **WIDE)
    compile_model(model, ["data.mask_padding=never"], example=inputs(0, is_padded=True))
    with pytest.warns(UserWarning, match="attention_mask has padding"):
        loss_of(model, 1, is_padded=True)
    assert update_balance(model)[0].tokens == 2 * PADDED
