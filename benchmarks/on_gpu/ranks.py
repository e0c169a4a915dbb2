"""Two ranks with gloo on one device, sharded by FSDP2 and expert parallelism, against one process on the CPU.

NCCL refuses two ranks on one GPU; gloo takes their tensors over the host. So this is a check of the exchanges and of
the reductions with tensors on a GPU, not of speed.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from moecompile.compose import compose_config
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.plan import Plan, on_one_process
from moecompile.runtime.gradients import sum_replicated
from moecompile.runtime.ranks import free_port
from moecompile.schema import Config
from moecompile.tasks.verify import shrink
from moecompile.verify.job import build, noiseless_plan
from moecompile.verify.ranks import full

RANKS = 2
TOLERANCE = 1e-5
"""Norm of the difference over the norm, fp32 against float64."""
KINDS = ("flat", "dedup", "allgather")
SMALL = [
    "recipe=mixtral_ep", "mesh=cpu_1x2", "model.config.num_hidden_layers=2", "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
]  # fmt: skip


def check(kind: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Runs forward and backward of a small model with one kind of dispatch, and compares losses and gradients."""
    mp.spawn(_rank, args=(kind, str(device), free_port(), str(folder)), nprocs=RANKS)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    wanted = _alone(_config(kind))
    errors = {"loss": max(_error(got["losses"], wanted["losses"]) for got in ranks)}
    for name, value in wanted["grads"].items():
        errors["gradients"] = max(errors.get("gradients", 0.0), _error(ranks[0]["grads"][name], value))
    same = set(ranks[0]["grads"]) == set(wanted["grads"])
    return {"ok": same and all(error <= TOLERANCE for error in errors.values()), "kind": kind, **errors}


def _rank(rank: int, kind: str, device: str, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place.index or 0)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        config = _config(kind)
        plan = noiseless_plan(config)
        model = build(config, plan, torch.float32).to(place)
        shard(model, plan, device_mesh_of(plan.mesh, place.type))
        losses = torch.zeros(RANKS, dtype=torch.float64, device=place)
        losses[rank] = _backward(model, _tokens(config)[rank].to(place))
        dist.all_reduce(losses)
        assert dist.group.WORLD is not None
        sum_replicated(model.parameters(), dist.group.WORLD)
        grads = {name: full(p.grad).cpu() for name, p in model.named_parameters() if p.grad is not None}
        torch.save({"losses": losses.cpu(), "grads": grads}, Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def _alone(config: Config) -> dict[str, Any]:
    plan: Plan = on_one_process(noiseless_plan(config))
    model = build(config, plan, torch.float32).double()  # the same values: entries are made distinct in float32
    losses = torch.stack([_backward(model, tokens) for tokens in _tokens(config)])
    return {"losses": losses, "grads": {n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def _config(kind: str) -> Config:
    config, _ = shrink(compose_config([*SMALL, f"dispatch={kind}"]), 1)
    return copy.deepcopy(config)


def _tokens(config: Config) -> Tensor:
    """(ranks, B, S)."""
    shape = (RANKS, config.data.micro_batch_size, config.data.seq_len)
    return torch.randint(config.data.vocab_size or 256, shape, generator=torch.Generator().manual_seed(1))


def _backward(model: nn.Module, tokens: Tensor) -> Tensor:
    """The sum of the losses of all tokens, after its backward."""
    model.eval()  # no auxiliary losses: these are per rank
    logits = model(input_ids=tokens, use_cache=False).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = nn.functional.cross_entropy(wide, tokens.roll(-1, 1).flatten(), reduction="sum")
    loss.backward()
    return loss.detach().double()


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
