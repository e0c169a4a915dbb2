"""What ranks begin with and what is not trained: frozen and unused weights, modes, weights that differ over ranks."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

import moecompile
from moecompile.errors import PlanError
from moecompile.nn import LoadMeter, Router, routers_of
from moecompile.passes.same_weights import check_same_weights, ranks_that_differ, tensor_hash
from moecompile.runtime.gradients import sum_replicated
from moecompile.verify import worst
from tests.distributed import manual_job as job
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.tiny import fake_rank

WORLD = 2
MESH = ["mesh.ranks_per_node=2"]
FROZEN = ("model.blocks.0.experts.", "model.embed.weight", "model.blocks.1.router.")


class Automatic(job.Pair):
    """Automatic optimization; parts are frozen, parts are never used, one weight is used on rank 1 alone."""

    look: str = ""

    def __init__(self, mesh: list[str]) -> None:
        super().__init__(mesh, job.Recipe(partial(lambda side, i: None), job.one_optimizer))
        self.automatic_optimization = True
        self.users = {1}  # ranks that use `other`
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, self.trainer.global_rank)

    def loss(self, batch: Any, rank: int) -> Tensor:
        loss = job.cross_entropy(self, *batch, mean=True)
        if self.look:
            self.train(self.look == "no_grad")
            with torch.set_grad_enabled(self.look == "eval with gradients"):
                self.model(2 * batch[0])
            self.train()
        return loss + (self.other(batch[0][:, :3]).square().mean() if rank in self.users else 0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.keep_grads()


def fit(module: Automatic, **kwargs: Any) -> Trainer:
    trainer = Trainer(strategy="expert_parallel", devices=WORLD, **job.CPU, **({"max_epochs": 1} | kwargs))
    trainer.fit(module)
    return trainer


def on_one(epochs: int = 1) -> Automatic:
    module = Automatic([])
    optimizer = module.configure_optimizers()
    every = [job.data(rank) for rank in range(WORLD)]
    for i in [*range(job.STEPS)] * epochs:
        optimizer.zero_grad()
        piece = slice(i * job.BATCH, (i + 1) * job.BATCH)
        for rank, (x, y) in enumerate(every):
            loss = module.loss((x[piece], y[piece]), rank)
            ((loss + moecompile.auxiliary_loss(module)) / WORLD).backward()
        module.keep_grads()
        optimizer.step()
        moecompile.update_balance(module)
    return module


def ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, mesh in {"ep2": MESH, "ep1x2": [*MESH, "mesh.ep=1"]}.items():
        module = Automatic(mesh)
        trainer = fit(module)
        weights = {key: full(t) for key, t in module.state_dict().items()}
        trainer.save_checkpoint(f"{folder}/{name}")
        again = Automatic(mesh)
        second = Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=2, **job.CPU)
        second.fit(again, ckpt_path=f"{folder}/{name}")
        out[name] = {"grads": module.grads, "weights": weights}
        out[name]["resumed"] = {key: full(t) for key, t in again.state_dict().items()}
    for look in ("eval", "no_grad", "eval with gradients"):
        module = Automatic(MESH)
        module.look = look
        fit(module)
        weights = {key: full(t) for key, t in module.state_dict().items()}
        out[look] = {"weights": weights, "grads": module.grads[0]}
    out["differs"] = [_message(partial(_differing, kind, rank)) for kind in ("value", "buffer", "shape", "outside")]
    out["same"] = _message(lambda: check_same_weights(Automatic([])))
    out["api"] = _message(partial(_api, rank))
    out["narrow"] = {dtype: _narrow(rank, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)}
    out["modes"] = _modes()
    return out


def _message(call: Any) -> str:
    try:
        call()
    except PlanError as error:
        return str(error)
    return ""


def _differing(kind: str, rank: int) -> None:
    module = Automatic(MESH)
    with torch.no_grad():
        if kind == "value" and rank == 1:
            module.model.blocks[1].experts.down_proj[3, 2, 1] += 1e-15  # one bit
            module.model.head.bias += 1
        if kind == "buffer" and rank == 1:
            module.model.blocks[0].router.correction_bias[2] = 1
        if kind == "outside" and rank == 1:
            module.also_unused.weight.copy_(module.also_unused.weight.flip(0))
        if kind == "shape" and rank == 1:
            module.other = nn.Linear(3, 3)
    fit(module)


def _api(rank: int) -> None:
    torch.manual_seed(rank)
    moecompile.compile_model(
        job.Model().double(), [*job.OVERRIDES, *MESH], example=torch.zeros(1, 6).double(), until="shard"
    )


def _narrow(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of two weights, and of one that rank 0 has not used, and of one that nobody has."""
    parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype)) for _ in range(3)]
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).to(dtype)
    parameters[0].grad = grad.clone()
    parameters[1].grad = grad.clone() if rank == 1 else None
    wide = grad.double()
    dist.all_reduce(wide)
    sum_replicated(parameters, dist.group.WORLD)
    first, second, third = (parameter.grad for parameter in parameters)
    assert first is not None and torch.equal(first, wide.to(dtype))
    return first, second, third


def _modes() -> dict[str, Any]:
    """A model that comes in evaluation mode, as from from_pretrained."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning.pytorch").addHandler(handler)
    module = Automatic(MESH)
    module.model.drop = nn.Dropout(0.5)
    module.model.eval()
    trainer = fit(module)
    frozen = Automatic(MESH)
    for parameter in frozen.model.parameters():
        parameter.requires_grad_(False)
    frozen.users = {0, 1}
    frozen.model.eval()
    fit(frozen)
    return {
        "said": [record for record in records if "evaluation mode" in record],
        "loads": [load.tokens for load in trainer.strategy.loads],
        "aux": sorted(trainer.strategy.aux_losses),
        "bias": float(full(routers_of(module.model)[0][1].correction_bias).abs().max()),
        "training": sorted(
            {type(m).__name__ for m in module.model.modules() if m.training and isinstance(m, (Router, LoadMeter))}
            | {type(m).__name__ for m in module.model.modules() if m.training} & {"Dropout", "Linear"}
        ),
        "frozen": any(m.training for m in frozen.model.modules()),
    }


@cache
def results(folder: str) -> list[dict[str, Any]]:
    return run_distributed_test(ranks, WORLD, folder, timeout_s=200)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results(str(tmp_path_factory.mktemp("weights")))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["ep2", "ep1x2"])
def test_frozen_and_unused_weights_equal_one_process(found: list[dict[str, Any]], mesh: str) -> None:
    wanted, longer, start = on_one(), on_one(epochs=2), Automatic([])
    last = {name: t.detach() for name, t in wanted.state_dict().items()}
    after = {name: t.detach() for name, t in longer.state_dict().items()}
    for result in found:
        for ours, theirs in zip(result[mesh]["grads"], wanted.grads, strict=True):
            assert {name for name, grad in ours.items() if grad is None} == {
                name for name, grad in theirs.items() if grad is None
            }
            assert worst(present(ours), present(theirs)) < (1e-10, "")
        assert worst(result[mesh]["weights"], last) < (1e-10, "")
        assert worst(result[mesh]["resumed"], after) < (1e-10, "")
    untouched = [name for name, _ in start.named_parameters() if name.startswith(FROZEN) or "unused" in name]
    assert {"model.unused.weight", "also_unused.weight", "model.blocks.0.experts.down_proj"} <= set(untouched)
    for name in untouched:
        assert torch.equal(found[0][mesh]["weights"][name], start.get_parameter(name)), name
    assert found[0][mesh]["grads"][0]["other.weight"] is not None  # which rank 0 has not used


def present(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("look", ["eval", "no_grad", "eval with gradients"])
def test_a_look_at_outputs_within_a_step_changes_nothing(found: list[dict[str, Any]], look: str) -> None:
    """In training mode it counts, as every such forward does, so the bias and the next steps are others."""
    wanted = found[0]["ep2"]
    assert worst(present(found[0][look]["grads"]), present(wanted["grads"][0])) < (1e-12, "")
    if look != "no_grad":
        assert worst(found[0][look]["weights"], wanted["weights"]) < (1e-12, "")


@pytest.mark.slow
def test_ranks_that_begin_with_other_weights_are_told(found: list[dict[str, Any]]) -> None:
    fix = (
        "Set one seed before the model is built on every rank (lightning.seed_everything), or load the same checkpoint."
    )
    for result in found:
        value, buffer, shape, outside = result["differs"]
        rule = "ranks start from different weights: does not have the values of rank 0 on rank 1"
        assert value == f"model=model.blocks.1.experts.down_proj: {rule} and 1 more. {fix}"
        assert buffer == f"model=model.blocks.0.router.correction_bias: {rule}. {fix}"
        assert outside == f"model=also_unused.weight: {rule}. {fix}"
        assert shape == f"model=Automatic: ranks 1 have other weights by name or shape. {fix}"
        assert result["same"] == ""
        assert result["api"].startswith("model=embed.weight: ranks start from different weights")


@pytest.mark.slow
def test_narrow_gradients_are_summed_in_fp32(found: list[dict[str, Any]]) -> None:
    """And one that no rank has stays None."""
    for dtype, (first, second, third) in found[0]["narrow"].items():
        assert first.dtype == dtype and third is None
        assert torch.equal(second, torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype))


@pytest.mark.slow
def test_routing_trains_in_whatever_mode_a_model_came(found: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(found):
        modes = result["modes"]
        assert all(tokens == 2 * job.BATCH for tokens in modes["loads"]) and modes["loads"]
        assert modes["aux"] == ["micro_batch", "z"] and modes["bias"] > 0
        assert modes["training"] == ["LoadMeter", "Router"]  # dropout stays as it came
        assert not modes["frozen"]
        assert len(modes["said"]) == (1 if rank == 0 else 0)
        assert all(said.startswith("The routers of 2 MoE layers were in evaluation mode") for said in modes["said"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_hash_depends_on_values_and_places(dtype: torch.dtype) -> None:
    for size in (1, 7, 1023, 5000, 40_000):
        tensor = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * 100).to(dtype)
        same = torch.stack((tensor, tensor), 1)[:, 0]  # not contiguous
        assert tensor_hash(same) == tensor_hash(tensor) == tensor_hash(torch.cat((tensor[:1], tensor))[1:])
        for place in {0, size // 2, size - 1}:
            other = tensor.clone()
            other[place] = 0 if other[place] else 1
            assert tensor_hash(other) != tensor_hash(tensor)
    if dtype == torch.float32:
        assert tensor_hash(torch.zeros(4)) == tensor_hash(torch.zeros(4)) != tensor_hash(-torch.zeros(4))
        assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor(2.0))
        rows = torch.randn(2048, 16)
        assert tensor_hash(rows) != tensor_hash(rows.flip(0))


def test_ranks_that_agree_do_not_collect_what_all_of_them_have() -> None:
    """A row of each of 16,384 ranks took 30 s of a rehearsal; unequal ones are named above."""
    gathers = ("all_gather", "all_gather_into_tensor", "all_gather_object")
    with fake_rank(3, 16_384), ExitStack() as stack:
        for name in gathers:
            stack.enter_context(mock.patch.object(dist, name, side_effect=AssertionError))
        check_same_weights(nn.Linear(4, 4))
        assert ranks_that_differ("a plan's hash") == ""
