"""Experts where a placement says: the same outputs, gradients, checkpoints and models as in the order of ids."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.checkpoint import placed
from moecompile.checkpoint.placed import orders_of
from moecompile.checkpoint.tensors import load_weights, read_tensors, shapes, tensors_of, write_tensors
from moecompile.compose import compose_config
from moecompile.mesh import MeshSpec
from moecompile.models.build import build_model, example_inputs
from moecompile.passes import shard as sharding
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, make_plan, plan_of
from moecompile.plan import LENDING, on_one_process
from moecompile.verify import worst
from tests.distributed import dispatch_job, existing_job
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test
from tests.distributed.options_job import SMALL, Step, one_step
from tests.distributed.resume_job import losses, run
from tests.existing_models import moe_inputs, moe_model
from tests.placements import random_placement

TOLERANCE = 1e-10

# -- one layer --------------------------------------------------------------------------------------------------------

MESHES = {
    2: [MeshSpec(ranks_per_node=2, ep=2)],
    4: [MeshSpec(num_nodes=2, ranks_per_node=2, ep=4), MeshSpec(num_nodes=2, ranks_per_node=2, ep=2)],
}


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh: every kind with random placements; lending and chunks where the kind has them."""
    found = []
    for i, mesh in enumerate(MESHES[world_size]):
        cases = []
        for j, case in enumerate(dispatch_job.random_cases(mesh, 77 + i, 4)):
            order = tuple(random.Random(j).sample(range(case.num_experts), case.num_experts))
            cases.append(replace(case, order=order))
            if case.kind in LENDING:
                cases.append(replace(cases[-1], slots=1, chunks=1 + j % 3))
        found.append(cases)
    return found


def _layers(rank: int, world_size: int) -> list[tuple[Case, dict[str, float]]]:
    return [
        pair for cases in _cases(world_size) for pair in zip(cases, dispatch_job.errors_of(cases, rank), strict=True)
    ]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_placed_layer_equals_the_plain_one(world_size: int) -> None:
    """Outputs, gradients of each rank's own experts, and every byte, with the ranks that the order names."""
    for rank, results in enumerate(run_distributed_test(_layers, world_size, timeout_s=170)):
        for case, errors in results:
            assert max(errors.values()) <= TOLERANCE, (rank, case, errors)
        assert {case.kind for case, _ in results} >= {"flat", "dedup", "allgather"}


# -- a training step --------------------------------------------------------------------------------------------------

LENT = ["dispatch.balance=lend", "hardware.tflops=1e-9"]
STEPS: dict[int, dict[str, list[str]]] = {
    2: {
        "flat": ["mesh=cpu_1x2", "dispatch=flat"],
        "chunks": ["mesh=cpu_1x2", "dispatch=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
        "lent": ["mesh=cpu_1x2", "dispatch=dedup", *LENT],
    },
    4: {
        "hierarchical": ["mesh=cpu_2x2", "dispatch=hierarchical", "trainer.checkpointing=keep_exchanges"],
        "lent": ["mesh=cpu_2x2", "dispatch=hierarchical", *LENT],
        "allgather": ["mesh=cpu_2x2", "dispatch=allgather"],
        "edp": ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=dedup"],
        "replicated": ["mesh=cpu_2x2", "mesh.ep=2", "mesh.dp_replicate=2", "dispatch=flat"],
    },
}  # fmt: skip
GROUPS = ["routing.groups=2", "routing.top_groups=1"]  # the model, which must not follow the mesh


def _plan(overrides: list[str]) -> Any:
    config = compose_config([*SMALL, *overrides])
    model = build_model(config.model, config.seed)
    return make_plan(model, config, example=example_inputs(model, config.data.seq_len))


def _files(folder: Path, variants: dict[str, list[str]]) -> dict[str, str]:
    return {
        name: random_placement(_plan([*GROUPS, *overrides]).layers, folder / f"{name}.yaml", seed)
        for seed, (name, overrides) in enumerate(variants.items())
    }


def _steps(rank: int, world_size: int, folder: str, files: dict[str, str]) -> dict[str, Step]:
    variants = STEPS[world_size]
    first = next(iter(variants.values()))
    batch = f"data.global_batch_size={4 * world_size}"
    found = {"by id": one_step([*GROUPS, *first, batch], Path(folder))}
    for name, overrides in variants.items():
        found[name] = one_step([*GROUPS, *overrides, batch, files[name]], Path(folder))
    with pytest.MonkeyPatch.context() as patch:  # ranks hold other experts than the ids say
        patch.setattr(sharding, "order_of", lambda call: ())
        name, overrides = next(iter(variants.items()))
        found["broken"] = one_step([*GROUPS, *overrides, batch, files[name]], Path(folder))
    return found if rank == 0 else {}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_has_the_same_gradients(world_size: int, tmp_path: Path) -> None:
    files = _files(tmp_path, STEPS[world_size])
    found = run_distributed_test(_steps, world_size, str(tmp_path), files, timeout_s=400)[0]
    wanted, broken = found.pop("by id"), found.pop("broken")
    assert len(wanted.grads) > 20 and sum(map(sum, wanted.loads)) > 0
    for name, step in found.items():
        assert worst(step.grads, wanted.grads) < (TOLERANCE, ""), name
        assert step.loads == wanted.loads, name
    assert worst(broken.grads, wanted.grads)[0] > 0.1


# -- models that are MoE already --------------------------------------------------------------------------------------

ARCHITECTURES = ("mixtral", "gpt_oss", "deepseek_v3", "switch_transformers")
KINDS = {"flat": ["dispatch.kind=flat"], "dedup": ["dispatch.kind=dedup"]}


def _existing(rank: int, world_size: int, files: dict[str, str]) -> dict[str, existing_job.Trace]:
    found = {}
    for i, architecture in enumerate(ARCHITECTURES):
        overrides = ["mesh.ranks_per_node=2", *list(KINDS.values())[i % 2], files[architecture]]
        found[architecture] = existing_job.sharded(rank, world_size, architecture, torch.float32, overrides)
    return found


@cache
def _moe_plan(architecture: str) -> Any:
    example = moe_inputs(architecture, torch.ones(1, existing_job.SEQ, dtype=torch.int64))
    return make_plan(moe_model(architecture), ["mesh.ranks_per_node=2"], example=example)


@pytest.mark.slow
def test_existing_experts_equal_transformers_in_one_process(tmp_path: Path) -> None:
    """Two steps of stacked and of separate experts, with biases, transposed, with drops, with the bias rule."""
    files = {
        name: random_placement(_moe_plan(name).layers, tmp_path / f"{name}.yaml", seed + 1)
        for seed, name in enumerate(ARCHITECTURES)
    }
    for name, got in run_distributed_test(_existing, 2, files, timeout_s=180)[0].items():
        wanted = existing_job.reference(name, torch.float32)
        assert got.losses == pytest.approx(wanted.losses, rel=2e-5)
        assert worst(got.grads, wanted.grads) < (2e-5, ""), name
        assert worst(got.weights, wanted.weights) < (2e-5, ""), name
        assert not wanted.loads or not wanted.loads[0] or got.loads == wanted.loads


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _trained(overrides: list[str]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model after a step of its optimizer with gradients that depend on the global rows."""
    config = compose_config([*SMALL, *GROUPS, *overrides])
    model = build_model(config.model, config.seed)
    compile_model(model, config, example=example_inputs(model, config.data.seq_len))
    plan = plan_of(model)
    shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return model, optimizer


def _written(rank: int, world_size: int, folder: str, files: dict[str, str]) -> dict[str, Any]:
    """Saved in the order of ids, read and saved by placed models on two meshes, read back in the order of ids."""
    root, found = Path(folder), dict[str, Any]()
    legs = {"by id": ["mesh=cpu_2x2"], "ep4": ["mesh=cpu_2x2", files["ep4"]], "edp": [*EDP, files["edp"]]}
    before: Path | None = None
    for name, overrides in {**legs, "again": ["mesh=cpu_2x2"]}.items():
        model, optimizer = _trained(overrides)
        tensors = tensors_of(model, [optimizer])
        orders = orders_of(model, tensors)
        found[name] = len(orders)
        if before is not None:
            for tensor in tensors.values():
                getattr(tensor, "_local_tensor", tensor).zero_()
            read_tensors(before, tensors, orders=orders)
        before = root / name
        before.mkdir(exist_ok=True)
        write_tensors(before, tensors, orders=orders)
        if name == "ep4":
            model.eval()
            config = compose_config([*SMALL, *GROUPS])
            with torch.no_grad():
                found["logits"] = model(**example_inputs(model, config.data.seq_len)).logits
            write_tensors(root / "broken", tensors, orders={})  # as if the rows were in the order of ids
    return found


EDP = ["mesh=cpu_2x2", "mesh.ep=2", "dispatch=flat"]


def _entries(folder: Path) -> dict[str, Tensor]:
    found = {name: torch.empty(shape) for name, shape in shapes(folder).items()}
    read_tensors(folder, found, orders={})
    return found


@pytest.mark.slow
def test_checkpoints_are_by_id_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    files = _files(tmp_path, {"ep4": ["mesh=cpu_2x2"], "edp": EDP})
    found = run_distributed_test(_written, 4, str(tmp_path), files, timeout_s=300)[0]
    assert found["by id"] == found["again"] == 0 and found["ep4"] == found["edp"] == 6  # weights, and two moments each
    first = _entries(tmp_path / "by id")
    for leg in ("ep4", "edp", "again"):
        other = _entries(tmp_path / leg)
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == [], leg
    broken = _entries(tmp_path / "broken")
    wrong = {name.rpartition("experts.")[2] for name in first if not torch.equal(first[name], broken[name])}
    assert wrong == {
        f"{weight}{kind}" for weight in ("gate_up_proj", "down_proj") for kind in ("", ".exp_avg", ".exp_avg_sq")
    }

    # What task=export does: the model in one process, filled from the placed run's checkpoint.
    config = compose_config([*SMALL, *GROUPS, "mesh=cpu_1"])
    model = build_model(config.model, config.seed)
    example = example_inputs(model, config.data.seq_len)
    compile_model(model, example=example, plan=on_one_process(_plan([*GROUPS, "mesh=cpu_2x2", files["ep4"]])))
    load_weights(tmp_path / "ep4", model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**example).logits, found["logits"], rtol=1e-5, atol=1e-6)


def test_runs_of_rows_are_one_chunk_each() -> None:
    parts = placed._Parts({"a": (2, 3, 0, 1)})
    chunks = parts.chunks("a", torch.zeros(8, 5))
    assert [(list(chunk.offsets), list(chunk.sizes)) for chunk in chunks] == [([4, 0], [4, 5]), ([0, 0], [4, 5])]


# -- runs -------------------------------------------------------------------------------------------------------------

COMMON = ["trainer.max_steps=5", "trainer.save_interval=1", "trainer.keep_last=0", "balance.losses.global_batch=0.1"]
KEPT = ["optimizer.kind=muon"]


def _runs(rank: int, world_size: int, folder: str, files: dict[str, str]) -> None:
    root = Path(folder)
    ep4 = [*COMMON, *KEPT, *GROUPS, "mesh=cpu_2x2"]
    run(ep4, root / "whole")
    run([*ep4, files["ep4"], f"trainer.resume={root}/whole/checkpoints/step-2"], root / "placed")
    edp = [*COMMON, *KEPT, *GROUPS, *EDP]
    run([*edp, files["edp"], f"trainer.resume={root}/placed/checkpoints/step-3"], root / "other")
    run([*ep4, f"trainer.resume={root}/other/checkpoints/step-4"], root / "back")


@pytest.mark.slow
def test_a_run_goes_on_with_another_placement_or_without(tmp_path: Path) -> None:
    files = _files(tmp_path, {"ep4": ["mesh=cpu_2x2"], "edp": EDP})
    run_distributed_test(_runs, 4, str(tmp_path), files, timeout_s=400)
    whole = losses(tmp_path / "whole")
    assert len(whole) == 5
    for leg in ("placed", "other", "back"):
        assert losses(tmp_path / leg) == pytest.approx(whole, abs=1e-5), leg
