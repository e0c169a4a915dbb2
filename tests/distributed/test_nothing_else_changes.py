"""Two ranks: FSDP's own hooks on a rewritten model, models of dense and MoE layers, experts that are the identity.

Every comparison is with the same weights rewritten for one process, which runs both ranks' batches as accumulation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from moecompile.nn import Experts, Router
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import sum_replicated
from moecompile.verify import worst
from tests.architectures import inputs_of, model_of
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.tiny import COPY4, config, randomize

LENGTH, TOLERANCE = 9, 2e-5
MESH = ["mesh.ranks_per_node=2", "dispatch.kind=dedup"]
SLICES = [
    "experts.init=virtual_group", "experts.granularity=4", "experts.num_routed=8", "routing.top_k=4",
]  # fmt: skip
# name -> architecture, changes to its config, overrides
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dense": ("llama", {}, COPY4),
    "existing": ("mixtral", {}, []),
    "dense layer of a mixed model": ("deepseek_v3", {}, [*COPY4, "experts.sites=dense"]),
    "both kinds of layer": ("deepseek_v3", {}, [*COPY4, "experts.sites=both"]),
    "every other layer, sliced": ("llama", {"num_hidden_layers": 4}, [*SLICES, "experts.layers=::2"]),
    "all but the first, dropped": (
        "llama", {"num_hidden_layers": 3}, [*SLICES, "experts.init=drop", "experts.layers='1:'"],
    ),
    "by pattern, unnormalised": (
        "llama", {}, [*COPY4, "routing.normalize=false", "experts.weight_scaling=expected", "experts.match='*.1.mlp'"],
    ),
}  # fmt: skip


@dataclass
class Result:
    """sites: of the plan. got, wanted: gradients by name; logits_error: of this rank's batch."""

    sites: list[str]
    logits_error: float
    got: dict[str, Tensor]
    wanted: dict[str, Tensor]
    notes: dict[str, bool] = field(default_factory=dict)


def batch(name: str, rank: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(rank))
    return inputs_of(name, ids)


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(**inputs).logits
    return logits, logits.square().sum()


def pair(case: str) -> tuple[nn.Module, nn.Module, str]:
    """The same weights, rewritten for one process and for two; experts and routers of our own all differ."""
    name, changes, overrides = CASES[case]
    one = model_of(name, **changes)
    two = copy.deepcopy(one)
    for model, mesh in ((one, []), (two, MESH)):
        compile_model(model, config(*overrides, *mesh), example=inputs_of(name))
        for i, module in enumerate(m for m in model.modules() if isinstance(m, (Experts, Router))):
            randomize(module, i)
    return one.train(), two.train(), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Summed over ranks and whole; zero where there is none."""
    sum_replicated(model.parameters(), dist.group.WORLD)
    return {n: full(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in model.named_parameters()}


def compared(case: str, rank: int, world_size: int, prepare: Any = None) -> Result:
    one, two, name = pair(case)
    plan = plan_of(two)
    shard(two, plan, device_mesh_of(plan.mesh, "cpu"))
    notes = prepare(two) if prepare else {}
    logits, loss = loss_of(two, batch(name, rank))
    loss.backward()
    got = gradients(two)
    errors = {}
    for other in range(world_size):
        wanted_logits, wanted_loss = loss_of(one, batch(name, other))
        wanted_loss.backward()
        errors[other] = float((wanted_logits - logits).abs().max())
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in one.named_parameters()}
    return Result([layer.site.fqn for layer in plan.layers], errors[rank], got, wanted, notes)


# -- FSDP's hooks ----------------------------------------------------------------------------------------------------


def prefetching(model: nn.Module) -> dict[str, bool]:
    """Explicit prefetch of the next layer, and a hook of the user's on a layer and inside of a rewritten one."""
    layers = list(model.model.layers)
    layers[0].set_modules_to_forward_prefetch([layers[1]])
    layers[1].set_modules_to_backward_prefetch([layers[0]])
    notes = {
        "prefetched before its turn": False,
        "layer hook": False,
        "experts hook": False,
        "unsharded in backward": False,
    }

    def before_second(module: nn.Module, args: Any) -> None:
        notes["layer hook"] = True

    def inside_first(module: nn.Module, args: Any, output: Any) -> None:
        notes["experts hook"] = True
        dense = layers[1].self_attn.q_proj.weight
        notes["prefetched before its turn"] = not isinstance(dense, DTensor) or layers[1]._get_fsdp_state() is not None

    layers[1].register_forward_pre_hook(before_second)
    inner = next(m for m in layers[0].modules() if type(m).__name__ in ("Experts", "ExistingExperts"))
    inner.register_forward_hook(inside_first)
    inner.register_full_backward_hook(lambda *_: notes.update({"unsharded in backward": True}))
    return notes


def summoned(rank: int) -> dict[str, bool]:
    """FSDP2's unshard and reshard by hand, and what a user does alone: fully_shard or FSDP1 around a rewritten model."""
    one, two, name = pair("dense")
    whole = {n: p.detach().clone() for n, p in one.named_parameters()}
    plan = plan_of(two)
    shard(two, plan, device_mesh_of(plan.mesh, "cpu"))
    layer = two.model.layers[0]
    assert isinstance(layer, FSDPModule)
    layer.unshard()
    weight = layer.self_attn.q_proj.weight
    notes = {
        "unsharded": not isinstance(weight, DTensor)
        and torch.equal(weight, whole["model.layers.0.self_attn.q_proj.weight"])
    }
    layer.reshard()
    notes["resharded"] = isinstance(layer.self_attn.q_proj.weight, DTensor)

    alone = copy.deepcopy(one)
    for module in (*alone.model.layers, alone):
        fully_shard(module)
    wrapped = FullyShardedDataParallel(copy.deepcopy(one), use_orig_params=True, device_id=torch.device("cpu"))
    wanted = one(**batch(name, rank)).logits
    for how, model in (("fully_shard alone", alone), ("FSDP1", wrapped)):
        logits, loss = loss_of(model, batch(name, rank))
        loss.backward()
        notes[how] = float((logits - wanted).abs().max()) <= 1e-5
    with FullyShardedDataParallel.summon_full_params(wrapped):
        notes["summoned"] = all(
            torch.equal(p, whole[n.replace("_fsdp_wrapped_module.", "")]) for n, p in wrapped.named_parameters()
        )
    return notes


def writes(rank: int) -> bool:
    """`generate` with prompts and numbers of tokens of its own on each rank: who is done takes part until all are."""
    one, two, _ = pair("existing")
    plan = plan_of(two)
    shard(two, plan, device_mesh_of(plan.mesh, "cpu"))
    prompt = torch.arange(1, 4 + rank).unsqueeze(0)
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": (3, 9)[rank], "do_sample": False}
    return torch.equal(two.eval().generate(prompt, **how), one.eval().generate(prompt, **how))


def _all(rank: int, world_size: int) -> tuple[dict[str, Result], dict[str, bool]]:
    results = {case: compared(case, rank, world_size) for case in CASES}
    for case in ("dense", "existing"):
        results[f"{case}, prefetching"] = compared(case, rank, world_size, prefetching)
    return results, {**summoned(rank), "written": writes(rank)}


@cache
def two_ranks() -> list[tuple[dict[str, Result], dict[str, bool]]]:
    return run_distributed_test(_all, 2, timeout_s=240)


SITES = {
    "dense layer of a mixed model": ["model.layers.0.mlp"],
    "both kinds of layer": ["model.layers.0.mlp", "model.layers.1.mlp.experts"],
    "every other layer, sliced": ["model.layers.0.mlp", "model.layers.2.mlp"],
    "all but the first, dropped": ["model.layers.1.mlp", "model.layers.2.mlp"],
    "by pattern, unnormalised": ["model.layers.1.mlp"],
}


@pytest.mark.parametrize("case", [*CASES, "dense, prefetching", "existing, prefetching"])
def test_two_ranks_equal_one_process(case: str) -> None:
    for results, _ in two_ranks():
        result = results[case]
        if case in SITES:
            assert result.sites == SITES[case]
        assert result.logits_error <= 1e-5
        assert result.got.keys() == result.wanted.keys()
        assert worst(result.got, result.wanted) < (TOLERANCE, "")
        experts = [name for name in result.wanted if name.endswith("experts.down_proj")]
        assert experts and all(result.wanted[name].abs().max() > 1e-6 for name in experts)
        assert all(result.notes.values()), result.notes


def test_unshard_by_hand_and_sharding_by_the_user() -> None:
    for _, notes in two_ranks():
        assert all(notes.values()) and len(notes) == 6, notes
