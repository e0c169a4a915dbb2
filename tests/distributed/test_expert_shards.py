"""Stacks of experts that their ranks do not divide are cut within experts: exact, even, and as planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.tensors import load_weights, read_tensors, shapes, tensors_of, write_tensors
from moecompile.errors import PlanError
from moecompile.nn.adapters import init_adapters
from moecompile.passes import shard as sharding
from moecompile.passes.shard import device_mesh_of, expert_parameters, shard
from moecompile.pipeline import compile_model, make_plan, plan_of
from moecompile.plan import ExpertShards, on_one_process
from moecompile.torch_private import local_part
from moecompile.verify import worst
from tests.distributed import adapters_job, existing_job, fold_job
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.existing_models import CONFIGS, moe_inputs, moe_model
from tests.placements import random_placement
from tests.tiny import collective

TOLERANCE = 1e-10  # relative to the largest entry of each tensor, float64
ONE_EXPERT = ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=flat"]  # on a rank of two that share it
REPLICAS = ["mesh.ranks_per_node=4", "mesh.ep=1", "mesh.dp_replicate=2"]
LENT = ["dispatch.kind=dedup", "dispatch.balance=lend", "hardware.tflops=1e-9"]
# name -> architecture, experts, overrides
STEPS: dict[str, tuple[str, int, list[str]]] = {
    "transposed, with biases": ("gpt_oss", 2, ONE_EXPERT),
    "2 experts over 4 ranks": ("gpt_oss", 2, ["mesh.ranks_per_node=4", "mesh.ep=1"]),
    "3 experts over 2 ranks, 2 replicas": ("mixtral", 3, REPLICAS),
    "lent": ("mixtral", 2, [*ONE_EXPERT[:2], *LENT]),
    "placed": ("mixtral", 6, [*ONE_EXPERT, "{placement}"]),
}
SPLIT = fold_job.Case(architecture="mixtral", tp=2, ep=2, changes={"num_local_experts": 2})
SIX = {"num_local_experts": 6}


@contextmanager
def experts(architecture: str, number: int) -> Iterator[None]:
    with mock.patch.dict(CONFIGS[architecture], num_local_experts=number):
        yield


def four_ranks(rank: int, world_size: int, folder: str, placement: str) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": {}}
    for name, (architecture, number, overrides) in STEPS.items():
        given = [each.format(placement=placement) for each in overrides]
        with experts(architecture, number):
            found["steps"][name] = existing_job.sharded(rank, world_size, architecture, torch.float64, given)
    found["split"] = fold_job.step(SPLIT)
    with experts("gpt_oss", 2):
        found["adapters"] = adapters_job.sharded(rank, world_size, "gpt_oss", torch.float64, ONE_EXPERT)
        found["first values"] = _first_values()
        found["bytes"] = {name: _bytes(overrides) for name, overrides in BYTES.items()}
        found["refused"] = _refused()
    found["checkpoints"] = _checkpoints(Path(folder), placement)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    layers = make_plan(moe_model("mixtral", **SIX), ONE_EXPERT, example=_example("mixtral")).layers
    placement = random_placement(layers, folder / "placement.yaml", 3)
    return run_distributed_test(four_ranks, 4, str(folder), placement, timeout_s=240)


# -- gradients and steps ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_two_steps_equal_transformers_in_one_process(found: list[dict[str, Any]], name: str) -> None:
    architecture, number, _ = STEPS[name]
    with experts(architecture, number):
        wanted = existing_job.reference(architecture, torch.float64)
    got = found[0]["steps"][name]
    assert got.norms == pytest.approx(wanted.norms, rel=TOLERANCE)
    assert worst(got.grads, wanted.grads) < (TOLERANCE, "")
    assert worst(got.weights, wanted.weights) < (TOLERANCE, "")


@pytest.mark.slow
def test_so_do_tensor_parallelism_and_adapters(found: list[dict[str, Any]]) -> None:
    _, grads, norm = fold_job.reference(SPLIT)
    assert fold_job.worst(found[0]["split"]["grads"], grads) < (TOLERANCE, "")
    assert float(found[0]["split"]["norm"]) == pytest.approx(float(norm), rel=TOLERANCE)
    with experts("gpt_oss", 2):
        wanted = adapters_job.reference("gpt_oss", torch.float64)
    got = found[0]["adapters"]
    assert worst(got.grads, wanted.grads) < (TOLERANCE, "")
    assert worst(got.weights, wanted.weights) < (TOLERANCE, "")


def _example(architecture: str) -> dict[str, Tensor]:
    return moe_inputs(architecture, torch.ones(1, existing_job.SEQ, dtype=torch.int64))


def _first_values() -> tuple[bool, int]:
    """Whether adapters begin as in one process, and how many are cut within experts."""
    models = []
    for overrides in (["mesh.ranks_per_node=1"], ONE_EXPERT):
        model = moe_model("gpt_oss")
        compile_model(model, [*overrides, *adapters_job.OVERRIDES], example=_example("gpt_oss"))
        models.append(model)
    shard(models[1], plan_of(models[1]), device_mesh_of(plan_of(models[1]).mesh, "cpu"))
    for model in models:
        init_adapters(model, 5)
    whole, parts = (dict(model.named_parameters()) for model in models)
    stacked = [name for name in whole if ".experts.lora_A." in name]
    same = all(torch.equal(full(parts[name]), whole[name]) for name in stacked)
    return same, sum(local_part(parts[name]).shape[1:] != whole[name].shape[1:] for name in stacked)


@pytest.mark.slow
def test_adapters_begin_as_in_one_process(found: list[dict[str, Any]]) -> None:
    assert found[0]["first values"] == (True, 4)


# -- bytes ------------------------------------------------------------------------------------------------------------

BYTES = {
    "fp32": ONE_EXPERT,
    "adapters, bf16_params": [*ONE_EXPERT, *adapters_job.OVERRIDES, "trainer.precision=bf16_params"],
}


def _bytes(overrides: list[str]) -> tuple[ExpertShards | None, ExpertShards]:
    """Planned, and counted on this rank: stored, and what one forward and backward sends within pairs of ranks."""
    model = moe_model("gpt_oss")
    compile_model(model, overrides, example=_example("gpt_oss"))
    plan = plan_of(model)
    narrow = torch.bfloat16 if "trainer.precision=bf16_params" in overrides else None
    shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"), narrow)
    sent = Counter[str]()
    with _counting(sent):
        model(**_example("gpt_oss")).logits.sum().backward()
    stored = sum(local_part(owner.get_parameter(name)).nbytes for owner, name in expert_parameters(model))
    assert plan.estimate is not None
    # An output of a gather is what both ranks sent, an input of a reduction what goes to both.
    return plan.estimate.expert_shards, ExpertShards(
        ranks=2, stored=stored, gathered=sent["all_gather_single"] // 2 // 2, reduced=sent["reduce_scatter_single"] // 2,
        times_even=1.0,
    )  # fmt: skip


@contextmanager
def _counting(sent: Counter[str]) -> Iterator[None]:
    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if kwargs["group"].size() == 2:
                tensors = [*args, *kwargs.values()]
                sent[name] += max(each.nbytes for each in tensors if isinstance(each, Tensor))
            return call(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_single", "reduce_scatter_single"):
            patch.setattr(dist, collective(name), counted(name, getattr(dist, collective(name))))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_as_planned_on_every_rank(found: list[dict[str, Any]], name: str) -> None:
    for planned, counted in (of_rank["bytes"][name] for of_rank in found):
        assert planned == counted


def _refused() -> str:
    """What `shard` says if it cuts between experts all the same."""
    model = moe_model("gpt_oss")
    compile_model(model, ONE_EXPERT, example=_example("gpt_oss"))
    plan = plan_of(model)
    try:
        with mock.patch.object(sharding, "cut_dim", lambda shape, ranks: 0):
            shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_an_uneven_cut_is_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["refused"] == (
            "mesh.ep=2: a rank has 3,072 of the 6,144 numbers of model.layers.0.mlp.experts.gate_up_proj, 2.00 times its "
            "even share, so the plan's memory and bytes are not those of this model. "
            "Use mesh.ep and mesh.dp_replicate whose product is the number of ranks."
        )


# -- checkpoints ------------------------------------------------------------------------------------------------------

# Written and read in this order, experts cut between them or within.
LEGS: dict[str, list[str]] = {
    "within": ONE_EXPERT,
    "whole": [*ONE_EXPERT, "mesh.dp_replicate=2"],
    "placed within": [*ONE_EXPERT, "{placement}"],
    "placed between": [*ONE_EXPERT, "{placement}"],  # as earlier versions cut them
    "over all": ["mesh.ranks_per_node=4", "mesh.ep=1"],
}


def _checkpoints(root: Path, placement: str) -> dict[str, Any]:
    """Leg -> placements of a stack; and the logits of a placed one."""
    found: dict[str, Any] = {}
    before: Path | None = None
    for name, overrides in LEGS.items():
        model = moe_model("mixtral", **SIX)
        compile_model(model, [each.format(placement=placement) for each in overrides], example=_example("mixtral"))
        plan = plan_of(model)
        between = mock.patch.multiple(sharding, cut_dim=lambda shape, ranks: 0, check_even=lambda model, plan: None)
        with between if "between" in name else mock.MagicMock():
            shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        tensors = tensors_of(model, [optimizer])
        if before is not None:
            for tensor in tensors.values():
                local_part(tensor).zero_()
            read_tensors(before, tensors, orders=orders_of(model, tensors))
        before = root / name
        before.mkdir(exist_ok=True)
        write_tensors(before, tensors, orders=orders_of(model, tensors))
        stack = model.get_parameter("model.layers.0.mlp.experts.down_proj")
        assert isinstance(stack, DTensor)
        found[name] = [str(placement) for placement in stack.placements]
        if name == "placed within":
            found["logits"] = _logits(model)
    return found


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(**moe_inputs("mixtral", existing_job.micro_batches(0)[0][0])).logits
    return logits


@pytest.mark.slow
def test_checkpoints_do_not_know_the_cut(found: list[dict[str, Any]], folder: Path) -> None:
    cuts = found[0]["checkpoints"]
    assert cuts["within"] == cuts["placed within"] == ["S(1)", "S(0)"]
    assert cuts["over all"] == ["S(1)"] and cuts["placed between"] == ["_S(0, 2)", "S(0)"]
    first = _entries(folder / "within")
    for leg in LEGS:
        other = _entries(folder / leg)
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == [], leg

    # What task=export does: the model in one process, filled from the checkpoint.
    model = moe_model("mixtral", **SIX)
    plan = make_plan(model, ONE_EXPERT, example=_example("mixtral"))
    compile_model(model, example=_example("mixtral"), plan=on_one_process(plan))
    load_weights(folder / "placed within", model.state_dict())
    torch.testing.assert_close(_logits(model), cuts["logits"], rtol=1e-5, atol=1e-6)


def _entries(folder: Path) -> dict[str, Tensor]:
    found = {name: torch.empty(shape) for name, shape in shapes(folder).items()}
    read_tensors(folder, found, orders={})
    return found
