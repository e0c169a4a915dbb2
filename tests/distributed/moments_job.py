"""Steps with given gradients on sharded weights and on whole ones, for every way to keep moments and bf16 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.compose import compose_config
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.weight_groups import make_optimizer
from moecompile.schema import Config
from moecompile.torch_private import local_part
from tests.distributed.gradient_job import full
from tests.distributed.optimizer_job import _distributed, gradient

STEPS = 4
_LLAMA: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "vocab_size": 102,
}  # fmt: skip
_SHARED = (
    "experts.granularity=2", "experts.init=virtual_group", "experts.num_shared=1", "experts.shared_gate=true",
    "routing.top_k=2", "balance.rule=none",
)  # fmt: skip


def _mesh(ep: int, **sizes: int) -> tuple[str, ...]:
    more = tuple(f"mesh.{name}={size}" for name, size in sizes.items())
    return ("mesh.num_nodes=1", "mesh.ranks_per_node=4", f"mesh.ep={ep}", *more)


MESHES = {
    "between": (*_mesh(2), *_SHARED, "experts.num_routed=4"),
    "within": (*_mesh(2), *_SHARED, "experts.num_routed=2", "routing.top_k=1"),  # an expert on two ranks
    "replicas": (*_mesh(2, dp_replicate=2), *_SHARED, "experts.num_routed=4"),
    "tp": (*_mesh(4, tp=2), *_SHARED, "experts.num_routed=4"),
}
BF16 = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to keep them. dtype: of the weights that are stored."""

    settings: tuple[str, ...]
    dtype: torch.dtype = torch.float32


KINDS = {
    "bf16": Kind(settings=("optimizer.state=bf16",)),
    "int8": Kind(settings=("optimizer.state=int8",)),
    "int8, muon": Kind(settings=("optimizer=muon", "optimizer.state=int8")),
    "fp32, weights bf16": Kind(settings=("optimizer.state=fp32",), dtype=BF16),
    "master": Kind(settings=("optimizer.bf16_weights=master", "optimizer.state=bf16"), dtype=BF16),
    "stochastic": Kind(settings=("optimizer.bf16_weights=stochastic", "optimizer.state=int8"), dtype=BF16),
    "stochastic, muon": Kind(settings=("optimizer=muon", "optimizer.bf16_weights=stochastic"), dtype=BF16),
}
CASES = [(mesh, kind) for mesh in MESHES for kind in KINDS]
FROZEN, LATE = "q_proj", "k_proj"  # never trained; without a gradient in the first step
OTHER_BLOCKS = "o_proj"  # of its rows of 64 numbers, a rank has 32 with tp=2


def config_of(mesh: str, kind: str) -> Config:
    return compose_config([*MESHES[mesh], *KINDS[kind].settings, "optimizer.lr=0.01"])


def model_of(mesh: str, kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = AutoConfig.for_model("llama", use_cache=False, **_LLAMA)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(sizes).to(KINDS[kind].dtype).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(FROZEN not in name)
    ids = torch.arange(8).view(1, 8)
    compiled: nn.Module = compile_model(model, config_of(mesh, kind), example={"input_ids": ids})
    return compiled


@dataclass(kw_only=True)
class Run:
    """After the steps. weights, moments: whole. held: bytes of this rank's moments and copies; planned: of the fullest."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    held: int
    planned: int


def stepped(mesh: str, kind: str, *, is_sharded: bool) -> Run:
    model = model_of(mesh, kind)
    plan = plan_of(model)
    if is_sharded:
        shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    optimizer = make_optimizer(model, config_of(mesh, kind))
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if not parameter.requires_grad or (step == 0 and LATE in name):
                continue
            whole = gradient(name, parameter.shape, step).to(parameter.dtype)
            if parameter.ndim == 2:
                whole[step % 5 :: 5] = 0  # tokens that are not in the batch
            parameter.grad = _distributed(whole, parameter.detach()) if isinstance(parameter, DTensor) else whole
        optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {f"{names[p]}.{k}": v for p, state in optimizer.state.items() for k, v in state.items() if k != "step"}
    assert plan.estimate is not None
    return Run(
        weights={name: full(parameter) for name, parameter in model.named_parameters()},
        moments={name: full(value) for name, value in states.items()},
        held=sum(local_part(value).nbytes for value in states.values()),
        planned=plan.estimate.memory_bytes_per_rank.optimizer,
    )  # fmt: skip


def four_ranks(rank: int, world_size: int) -> dict[tuple[str, str], tuple[Run, Run | None, list[int]]]:
    """Case -> the run on this rank, that in one process on rank 0, and the bytes that each rank holds."""
    found = {}
    for mesh, kind in CASES:
        here = stepped(mesh, kind, is_sharded=True)
        held: list[Any] = [None] * world_size
        dist.all_gather_object(held, here.held)
        found[mesh, kind] = (here, stepped(mesh, kind, is_sharded=False) if rank == 0 else None, held)
    return found
