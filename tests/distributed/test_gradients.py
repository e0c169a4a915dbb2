"""N ranks equal one process: losses, every gradient, the clipped norm, bias updates and weights after three steps.

Unequal token counts, one rank without any target, gradient accumulation (two micro-batches a rank on four ranks). Once
without and once with all auxiliary losses, drops by capacity, and jitter.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from moecompile.nn import LayerLoad
from moecompile.verify import worst
from tests.distributed import gradient_job as job
from tests.distributed.harness import run_distributed_test

TWO_BY_TWO = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]
MESHES = {
    "ep4-flat": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=flat"],
    "ep4-dedup": [*TWO_BY_TWO, "mesh.ep=4", "dispatch.kind=dedup"],
    "ep2x2-flat": [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=flat"],
    "ep2x2-dedup": [*TWO_BY_TWO, "mesh.ep=2", "dispatch.kind=dedup"],
    "ep2x2-replicated": [*TWO_BY_TWO, "mesh.ep=2", "mesh.dp_replicate=2", "dispatch.kind=flat"],
    "ep1x4": [*TWO_BY_TWO, "mesh.ep=1"],
}
# relative to the largest entry of each tensor
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


AUX = {"none": (), "all": tuple(job.AUX)}
KINDS = pytest.mark.parametrize("aux", AUX)
CASES = pytest.mark.parametrize(
    ("aux", "dtype"),
    [
        pytest.param("all", torch.float64, id="all-fp64"),
        pytest.param("none", torch.float32, id="none-fp32", marks=pytest.mark.slow),
        pytest.param("all", torch.float32, id="all-fp32", marks=pytest.mark.slow),
        pytest.param("none", torch.float64, id="none-fp64", marks=pytest.mark.slow),
    ],
)


@cache
def reference(dtype: torch.dtype, aux: str = "none") -> job.Trace:
    return job.reference(dtype, AUX[aux])


@cache
def ranks(dtype: torch.dtype, aux: str) -> dict[str, list[job.Trace]]:
    """All meshes in one launch."""
    results = run_distributed_test(_all_meshes, 4, dtype, aux, timeout_s=180)
    return {name: [result[name] for result in results] for name in MESHES}


def _all_meshes(rank: int, world_size: int, dtype: torch.dtype, aux: str) -> dict[str, job.Trace]:
    return {name: job.sharded(rank, world_size, dtype, [*mesh, *AUX[aux]]) for name, mesh in MESHES.items()}


def assert_equal(got: job.Trace, wanted: job.Trace, tolerance: float) -> None:
    assert got.losses == pytest.approx(wanted.losses, rel=tolerance)
    assert got.norms == pytest.approx(wanted.norms, rel=tolerance)
    for step, kinds in enumerate(wanted.aux):
        assert got.aux[step] == pytest.approx(kinds, rel=tolerance)
    assert worst(got.grads, wanted.grads) < (tolerance, "")
    assert worst(got.second_grads, wanted.second_grads) < (tolerance, "")
    assert worst(got.weights, wanted.weights) < (tolerance, "")
    for ours, theirs in zip(got.loads, wanted.loads, strict=True):
        assert_same_loads(ours, theirs)


def assert_same_loads(got: list[LayerLoad], wanted: list[LayerLoad]) -> None:
    """Counts are integers: every token is counted on one rank, once."""
    assert [load.name for load in got] == [load.name for load in wanted]
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.load.tolist() == theirs.load.tolist()
        assert (ours.tokens, ours.dropped) == (theirs.tokens, theirs.dropped)
        assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-5)


@CASES
@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_equal_one_process(mesh: str, aux: str, dtype: torch.dtype) -> None:
    assert_equal(ranks(dtype, aux)[mesh][0], reference(dtype, aux), TOLERANCE[dtype])


@CASES
def test_all_ranks_report_the_same(aux: str, dtype: torch.dtype) -> None:
    for traces in ranks(dtype, aux).values():
        first = (traces[0].norms, traces[0].losses, traces[0].aux)
        assert all((trace.norms, trace.losses, trace.aux) == first for trace in traces)


def test_auxiliary_losses_drops_and_loads_are_there() -> None:
    """Else the comparison would say nothing of them."""
    trace = reference(torch.float64, "all")
    assert all(value > 0 for kinds in trace.aux for value in kinds.values())
    assert all(load.dropped > 0 for loads in trace.loads for load in loads)
    assert trace.loads[0][0].max_violation > 0.1  # so the global batch's loss has uneven fractions in the second step
    without = reference(torch.float64).grads
    name = "model.layers.2.mlp.router.weight"
    assert trace.grads[name].abs().max() > 10 * without[name].abs().max()


def test_experts_and_routers_have_large_gradients() -> None:
    """Else agreement would say little: rounding noise agrees with nothing, zeros with everything."""
    grads = reference(torch.float64).grads
    for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj", "shared_experts.up_proj.weight"):
        assert grads[f"model.layers.2.mlp.{name}"].abs().max() > 1e-5


MUTATIONS = ("divisor", "drop_exchange", "skip_router_sum")
AUX_MUTATIONS = ("aux_unweighted", "aux_times_ep", "same_noise")


def _mutated(rank: int, world_size: int, mutations: tuple[str, ...], aux: str) -> dict[str, job.Trace]:
    overrides = [*MESHES["ep4-flat"], *AUX[aux]]
    return {m: job.sharded(rank, world_size, torch.float64, overrides, mutate=m, steps=1) for m in mutations}


@pytest.mark.slow
def test_mutations_are_caught() -> None:
    """A wrong divisor, a lost all-to-all in backward and an unsummed router each break the agreement."""
    wanted = reference(torch.float64)
    broken = run_distributed_test(_mutated, 4, MUTATIONS, "none", timeout_s=120)[0]
    assert worst(broken["divisor"].grads, wanted.grads)[0] > 0.1
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        worst(broken["drop_exchange"].grads, wanted.grads)
    error, name = worst(broken["skip_router_sum"].grads, wanted.grads)
    assert error > 0.1 and name.endswith("router.weight")


@pytest.mark.slow
def test_mutations_of_auxiliary_losses_are_caught() -> None:
    """A loss that is not multiplied by its tokens, or by ep once more, and noise that repeats itself on every rank."""
    wanted = reference(torch.float64, "all")
    broken = run_distributed_test(_mutated, 4, AUX_MUTATIONS, "all", timeout_s=120)[0]
    for name in AUX_MUTATIONS:
        error, where = worst(broken[name].grads, wanted.grads)
        assert error > 0.1, (name, where)


def _checkpointed(rank: int, world_size: int, aux: str) -> job.Trace:
    overrides = ["mesh.ranks_per_node=2", "dispatch.kind=dedup", *AUX[aux]]
    return job.sharded(rank, world_size, torch.float64, overrides, checkpointing=True)


@KINDS
def test_activation_checkpointing_counts_nothing_twice(aux: str) -> None:
    """The forward that is run again: loads, drops, auxiliary losses and noise are those of the first one."""
    assert_equal(run_distributed_test(_checkpointed, 2, aux, timeout_s=120)[0], reference(torch.float64, aux), 1e-10)


def _encoder_decoder(rank: int, world_size: int) -> dict[str, job.Trace]:
    runs = {"ep4": (MESHES["ep4-dedup"], False), "ep2x2, checkpointed": (MESHES["ep2x2-flat"], True)}
    return {
        name: job.sharded(
            rank, world_size, torch.float64, [*mesh, *AUX["all"]], checkpointing=checkpointing, architecture="t5"
        )
        for name, (mesh, checkpointing) in runs.items()
    }


@pytest.mark.slow
def test_an_encoder_decoder_model_equals_one_process() -> None:
    """T5, whose layers hand their position bias on as a view, of which FSDP2 warns, and whose embeddings are tied."""
    wanted = job.reference(torch.float64, AUX["all"], "t5")
    assert {load.name.split(".")[0] for load in wanted.loads[0]} == {"encoder", "decoder"}
    for got in run_distributed_test(_encoder_decoder, 4, timeout_s=120)[0].values():
        assert_equal(got, wanted, 1e-10)
