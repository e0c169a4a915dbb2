"""Every dispatch kind over real ranks: outputs, all gradients and all bytes, on many meshes in one launch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moecompile.mesh import LinkClass, MeshSpec
from moecompile.passes.shard import bind_axes, device_mesh_of
from moecompile.plan import EXACT, IN_FLIGHT, KINDS
from moecompile.planner import Wire, forward_traffic
from moecompile.verify.narrow_rows import nearest
from tests.distributed import dispatch_job as job
from tests.distributed.dispatch_job import Case
from tests.distributed.harness import run_distributed_test

TOLERANCE = 1e-10


def mesh(num_nodes: int, ranks_per_node: int, ep: int | None = None) -> MeshSpec:
    return MeshSpec(num_nodes=num_nodes, ranks_per_node=ranks_per_node, ep=ep or num_nodes * ranks_per_node)


# world size -> meshes; with a smaller ep several EP groups stand side by side
MESHES = {
    2: [mesh(1, 2), mesh(2, 1)],
    3: [mesh(1, 3), mesh(3, 1)],
    4: [mesh(1, 4), mesh(2, 2), mesh(4, 1), mesh(4, 1, ep=2), mesh(2, 2, ep=2)],
    5: [mesh(1, 5)],
    6: [mesh(2, 3), mesh(3, 2)],
    7: [mesh(1, 7)],
    8: [mesh(1, 8), mesh(2, 4), mesh(4, 2), mesh(4, 2, ep=4)],
}


def _random_cases(rank: int, world_size: int) -> list[tuple[Case, dict[str, float]]]:
    found = []
    for cases in _cases(world_size):
        found += list(zip(cases, job.errors_of(cases, rank), strict=True))
    return found


def _cases(world_size: int) -> list[list[Case]]:
    """By mesh."""
    number = 10 if world_size == 8 else 5
    return [job.random_cases(spec, 10 * world_size + i, number) for i, spec in enumerate(MESHES[world_size])]


@pytest.mark.parametrize("world_size", [pytest.param(n, marks=() if n == 4 else pytest.mark.slow) for n in MESHES])
def test_every_kind_equals_the_plain_layer(world_size: int) -> None:
    """Uneven token counts, ranks and experts without tokens, all to one expert, dropped assignments, top-1 to top-8."""
    for rank, results in enumerate(run_distributed_test(_random_cases, world_size, timeout_s=170)):
        for case, errors in results:
            assert max(errors.values()) <= TOLERANCE, (rank, case, errors)


def test_the_cases_hold_what_they_promise() -> None:
    cases = [case for world_size in MESHES for cases in _cases(world_size) for case in cases]
    assert {case.kind for case in cases} == set(job.KINDS)
    assert {case.routing for case in cases} == set(job.ROUTINGS)
    assert {case.top_k for case in cases} >= set(range(1, 9))
    assert {case.num_nodes for case in cases if case.kind == "hierarchical"} == {2, 3, 4}
    assert any(0 in case.tokens and any(case.tokens) for case in cases)
    assert any(not any(case.tokens) for case in cases)
    assert any(max(case.tokens) > min(case.tokens) > 0 for case in cases)


# -- what is broken is seen ------------------------------------------------------------------------------------------


def _detach(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Backward loses the exchange."""
    _insert(graph_module, node, lambda graph: graph.call_method("detach", (node,)))


def _swap(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Rows arrive in another order."""
    _insert(graph_module, node, lambda graph: graph.call_method("flip", (node, 0)))


def _insert(graph_module: fx.GraphModule, node: fx.Node, make: Callable[[fx.Graph], fx.Node]) -> None:
    with graph_module.graph.inserting_after(node):
        changed = make(graph_module.graph)
    node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)
    graph_module.recompile()


CHANGES = {"detach": _detach, "swap": _swap}


def _sound(kind: str) -> Case:
    return Case(kind=kind, mesh=mesh(2, 2), experts_per_rank=2, top_k=3, tokens=(5, 7, 4, 6), seed=3)


@cache
def _places() -> list[tuple[str, str, int]]:
    """(kind, change, exchange) of everything that is broken, one at a time."""
    return [
        (kind, change, place)
        for kind in job.KINDS
        for change in CHANGES
        for place in range(len(job.row_exchanges(job.lowered(_sound(kind), 0))))
    ]


def _broken(rank: int, world_size: int) -> list[dict[str, float]]:
    places = iter(_places())

    def change(case: Case, module: fx.GraphModule) -> None:
        _, name, place = next(places)
        CHANGES[name](module, job.row_exchanges(module)[place])

    return job.errors_of([_sound(kind) for kind, _, _ in _places()], rank, change=change)


def test_a_broken_exchange_is_seen() -> None:
    """Each exchange of each kind, cut in backward, or with its rows in another order."""
    assert len(_places()) == 2 * (2 + 3 + 6 + 6)
    by_rank = run_distributed_test(_broken, 4, timeout_s=100)
    for place, errors in zip(_places(), zip(*by_rank, strict=True), strict=True):
        assert max(error[name] for error in errors for name in error if name != "bytes") > 1e-3, place


# -- narrow rows -----------------------------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    """bf16 on the way there, and for the gradient on the way back."""

    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        return rows.bfloat16().to(rows.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.bfloat16().to(grad.dtype)


class _Ways(torch.autograd.Function):
    """One function for the way there, and another one for the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _narrow(spec: MeshSpec, wire_dtype: str, dtype: torch.dtype) -> list[Case]:
    return [
        Case(kind=kind, mesh=spec, experts_per_rank=2, top_k=4, tokens=(9, 5, 0, 7), seed=8, wire_dtype=wire_dtype, dtype=dtype)
        for kind in job.kinds_on(spec)
    ]  # fmt: skip


def _rounding_errors(rank: int, world_size: int) -> list[tuple[Case, dict[str, float], float]]:
    """float64 activations over a bf16 wire: against the reference that rounds, and how far rounding moves it."""
    found = []
    for spec in (mesh(2, 2), mesh(1, 4)):
        cases = _narrow(spec, "bf16", torch.float64)
        cases += [replace(case, chunks=3) for case in cases if case.kind in IN_FLIGHT]
        for case, errors in zip(cases, job.errors_of(cases, rank, travel=_Round.apply), strict=True):
            rounded, exact = job.reference(case, rank, _Round.apply), job.reference(case, rank)
            found.append((case, errors, max(job.error(rounded[name], exact[name]) for name in exact)))
    return found


def test_bf16_rows_are_rounded_where_they_travel_and_nowhere_else() -> None:
    for results in run_distributed_test(_rounding_errors, 4, timeout_s=60):
        for case, errors, moved in results:
            assert max(errors.values()) <= TOLERANCE < 1e-3 < moved, (case, errors)


def _in_eight_bits(rank: int, world_size: int) -> list[tuple[Case, dict[str, float], float]]:
    """float64 activations; the other two ways of a step are in bf16, or with EXACT as they are."""
    found = []
    for spec in (mesh(2, 2), mesh(1, 4)):
        for name, dtype in (("fp8", torch.bfloat16), ("fp8_128", torch.bfloat16), ("fp8" + EXACT, torch.float64)):
            cases = [case for case in _narrow(spec, name, torch.float64) if not KINDS[case.kind].no_narrow]
            # Lent experts add to the sum of another rank, which is rounded there if it is sent in bf16.
            lent = ((0, 1), (2, 1)) if dtype is torch.float64 else ()
            cases += [replace(case, chunks=n, slots=m) for case in cases for n, m in ((3, 0), *lent)]
            rounds = partial(nearest, name=name.removesuffix(EXACT), dtype=dtype)
            casts = partial(_cast, dtype=dtype)
            there, back = (partial(_ways, there=a, back=b) for a, b in ((rounds, casts), (casts, rounds)))
            for case, errors in zip(cases, job.errors_of(cases, rank, travel=there, back=back), strict=True):
                rounded, exact = job.reference(case, rank, there, back), job.reference(case, rank)
                moved = max(job.error(rounded[each], exact[each]) for each in exact)
                found.append((case, errors, moved))
    return found


def _cast(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype).to(rows.dtype)


def _ways(rows: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return _Ways.apply(rows, there, back)


def test_rows_in_eight_bits_are_rounded_there_and_their_gradients_on_the_way_back() -> None:
    """In chunks and with lent experts too; the bytes are those of one byte a number and of the scales."""
    for results in run_distributed_test(_in_eight_bits, 4, timeout_s=100):
        for case, errors, moved in results:
            assert max(errors.values()) <= TOLERANCE < 1e-2 < moved, (case, errors)


def _same_bits(rank: int, world_size: int) -> list[tuple[Case, bool]]:
    auto, wide = (_narrow(mesh(2, 2), wire_dtype, torch.float32) for wire_dtype in ("auto", "fp32"))
    pairs = zip(auto, job.results_of(auto, rank), job.results_of(wide, rank), strict=True)
    return [(case, all(torch.equal(a[name], b[name]) for name in a)) for case, (a, _), (b, _) in pairs]


def test_fp32_rows_stay_fp32() -> None:
    for results in run_distributed_test(_same_bits, 4, timeout_s=60):
        assert all(same for _, same in results), results


# -- measured and predicted ------------------------------------------------------------------------------------------


def _measured(rank: int, world_size: int) -> list[dict[LinkClass, int]]:
    """Bytes that leave this rank, by link class, of each kind: 600 tokens a rank, top-3 of 8 experts."""
    spec = mesh(2, 2)
    found = []
    for _, sent in job.results_of(_even(spec), rank):
        by_link = dict.fromkeys(LinkClass, 0)
        for peer, number in sent.items():
            by_link[spec.link(rank, peer)] += number
        found.append(by_link)
    return found


def _even(spec: MeshSpec) -> list[Case]:
    return [
        Case(kind=kind, mesh=spec, experts_per_rank=2, top_k=3, tokens=(600,) * spec.world_size, dtype=torch.float32)
        for kind in job.kinds_on(spec)
    ]


def test_bytes_of_even_routing_are_as_predicted() -> None:
    spec = mesh(2, 2)
    by_rank = run_distributed_test(_measured, 4, timeout_s=60)
    wire = Wire(d_model=job.D_MODEL, tokens_per_rank=600)
    for i, case in enumerate(_even(spec)):
        layer = case.layer()
        predicted = forward_traffic(case.kind, layer.placement, layer.routing, spec, wire)
        for link, wanted in (
            (LinkClass.INTRA_NODE, predicted.intra_node),
            (LinkClass.INTER_NODE, predicted.inter_node),
        ):
            measured = sum(found[i][link] for found in by_rank) / (600 * 4)
            assert measured == pytest.approx(wanted, rel=0.03), (case.kind, link)


# -- compiled --------------------------------------------------------------------------------------------------------


def _compiled(rank: int, world_size: int) -> list[tuple[str, float]]:
    """Each kind as one compiled graph without breaks, against the same graph interpreted."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    spec, found = mesh(2, 2), []
    made_for = [*map(_sound, job.KINDS), replace(_sound("dedup"), wire_dtype="fp8")]
    modules = torch.nn.ModuleList(job.lowered(case, rank) for case in made_for)
    bind_axes(modules, device_mesh_of(spec, "cpu"), spec.nodes_per_ep_group)
    for sound, module in zip(made_for, modules, strict=True):
        kind = sound.kind
        wanted, _ = job.run(module, sound, rank)
        module.zero_grad()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        got, _ = job.run(module, sound, rank, compiled)
        found += [(kind, job.error(got[name], wanted[name])) for name in wanted]
        for i, tokens in enumerate(((9, 12, 5, 7), (4, 3, 11, 6), (8, 13, 2, 10))):
            case = replace(sound, tokens=tokens, seed=20 + i)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):  # the first one makes sizes symbols
                module.zero_grad()
                got, _ = job.run(module, case, rank, compiled)
            module.zero_grad()
            wanted, _ = job.run(module, case, rank)
            found += [(kind, job.error(got[name], wanted[name])) for name in wanted]
    return found


@pytest.mark.slow
def test_every_kind_compiles_without_breaks_and_for_all_token_counts() -> None:
    for results in run_distributed_test(_compiled, 4, timeout_s=170):
        assert all(error == 0 for _, error in results), results
