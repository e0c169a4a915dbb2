"""The collectives of one optimizer step by the plan, for each kind and mesh axis: how many, over how many ranks, and
the bytes that a rank gives to them, its own part included. `task=rehearse` compares a rank's program with them.

With r rows per token that a rank gives to an exchange (`rows_given`), T tokens, f the rows of its experts over the mean
of all ranks, D the width of a row and b bytes of a number; with checkpointing=full a forward is sent twice:

1. Exchanges of rows. There: r T D b, and f times that on the way back, in which the rank sends the rows that it has
   received; backward sends the same in reverse. With allgather a rank gives its block, and gets the blocks of all; in
   reverse it gives those.
2. Beside the rows: assignments (routing weight and id) there, and the gradients of their weights back. Counts.
                                                                          -> `bytes_given`, `counts_given` of traffic.py
3. FSDP gathers weights and reduces gradients, in fp32, as often as planner/schedule.py says, padded as
   planner/shards.py says.                                                                        -> `_fsdp`
4. Gradients of routers, and of what else is whole on every rank, are summed in fp32; with them counts of the load, and
   a few numbers of a step.                                                                       -> `_sums`
5. In a pipeline: what crosses a cut, and its gradient back, once for each micro-batch; the shapes of the first, and
   with each gradient the weight of the auxiliary losses. Gradients of tied weights are summed.   -> `step_of_rank`
6. Rows of embedding tables: ids and rows in forward, gradients of rows in backward (lookups.py).       -> `_lookups`
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moecompile.mesh import MeshSpec, Part, axes_that_split
from moecompile.plan import EXCHANGES, LayerPlan, Plan
from moecompile.plan.plan import DENSE, ROUTER
from moecompile.planner.lookups import ID_BYTES, asked
from moecompile.planner.memory import own_params, row_load, sends_again, tokens_of_a_rank, whole_params
from moecompile.planner.params import FP32_BYTES, ModelFacts, RunFacts, trained_params
from moecompile.planner.pipeline import OfRank
from moecompile.planner.shards import expert_shards, expert_share, padded_experts
from moecompile.planner.traffic import COUNT_BYTES, bytes_given, counts_given
from moecompile.routing import BINS
from moecompile.stages import Pipeline

TABLE_ROWS = "rows of tables"
ROWS, COUNTS, GATHERED, REDUCED, SUMMED = "rows", "counts", "weights gathered", "gradients reduced", "gradients summed"
FORTH, FORTH_IN, BACK, BACK_IN = "sent on", "received", "gradients sent back", "gradients received"
SHAPE_BYTES, WEIGHT_BYTES = 8 * (3 + 8), 8
"""Of a message: what tells the shape of a tensor, and the weight of the auxiliary losses."""
EXACT, SUMS = 0.01, 0.15
"""How much more bytes a program may send than planned, and less: rounding of rows; sums beside a few numbers."""
FEW = 2**16
"""Bytes of a step's flags and numbers that are summed, beside those of gradients."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Collectives of one kind over one axis. calls: None: not planned. within: as a part of the bytes; few: besides."""

    kind: str
    axis: str
    ranks: int
    calls: int | None
    bytes: float
    within: float = EXACT
    few: int = 0


def planned_step(plan: Plan, facts: ModelFacts, run: RunFacts) -> list[Planned]:
    """The collectives of one optimizer step; of `run`, `accumulation` is the number of micro-batches."""
    found: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in plan.layers:
        for kind, axis, calls, bytes_ in _exchanges(layer, plan.mesh, run):
            found[kind, axis][0] += run.accumulation * calls
            found[kind, axis][1] += run.accumulation * bytes_
    exchanges = [
        Planned(kind=kind, axis=axis, ranks=_ranks(axis, plan.mesh), calls=round(calls), bytes=bytes_)
        for (kind, axis), (calls, bytes_) in found.items()
    ]
    others = (*_lookups(plan, facts, run), *_fsdp(plan, facts, run), *_replicas(plan, facts), *_sums(plan, facts))
    return exchanges + [each for each in others if each.ranks > 1]


def step_of_rank(plan: Plan, of: OfRank, run: RunFacts) -> list[Planned]:
    """Those of the ranks at one place of a pipeline, with their messages (step 5)."""
    if plan.pipeline is None:
        return planned_step(plan, of.facts, run)
    stage = replace(plan, layers=of.layers, mesh=of.mesh, pipeline=None)
    found = [*_of_ends(planned_step(stage, of.facts, of.run(run, plan.pipeline)), stage, of, run)]
    found += _messages(plan.pipeline, of.index, run)
    if of.tied:  # whether both have a gradient, and its sum
        calls, bytes_ = 2 * len(plan.pipeline.tied), of.tied * of.facts.bytes_per_param / of.mesh.size(Part.STORED)
        found.append(Planned(kind=SUMMED, axis="tied", ranks=2, calls=calls, bytes=bytes_, few=FEW))
    return found


def _of_ends(planned: Sequence[Planned], stage: Plan, of: OfRank, run: RunFacts) -> Iterator[Planned]:
    """With weights of the root in two of its stages and reduce=each, it is reduced in both, and over replicas too."""
    if of.roots < 2 or run.reduce != "each":
        yield from planned
        return
    root = whole_params(stage.layers, stage.mesh, of.facts)[1] * FP32_BYTES
    for each in planned:
        if each.kind == REDUCED and each.axis != "edp":
            assert each.calls is not None
            tied = run.accumulation * of.tied_here * FP32_BYTES
            yield replace(each, calls=each.calls + run.accumulation, bytes=each.bytes + tied)
        elif each.kind == SUMMED and each.axis == "dp_replicate" and each.within == EXACT:  # of sharded weights
            again = (run.accumulation - 1) * root + run.accumulation * of.tied_here * FP32_BYTES
            yield replace(each, bytes=each.bytes + again / stage.mesh.size(Part.STORED))
        else:
            yield each


def _messages(pipeline: Pipeline, index: int, run: RunFacts) -> Iterator[Planned]:
    """Step 5, of the rank at `index` along pp."""
    forth: list[tuple[int, float]] = [(0, 0.0)] * len(pipeline.stages)
    back = list(forth)
    for i, stage in enumerate(pipeline.stages[1:], 1):
        if pipeline.is_local(i):
            continue
        tensors = sum(len(crossing.places) for crossing in stage.receives)
        numbers = sum(crossing.numbers for crossing in stage.receives)
        bytes_ = run.accumulation * numbers * run.tokens_per_rank * run.compute_bytes
        forth[i] = run.accumulation * tensors + 1, bytes_ + tensors * SHAPE_BYTES
        back[i] = run.accumulation * (tensors + 1), bytes_ + run.accumulation * WEIGHT_BYTES
    stages = pipeline.stages_of(index)
    nexts = [stage + 1 for stage in stages if stage + 1 < len(pipeline.stages)]
    for kind, over, at in (
        (FORTH, forth, nexts),
        (FORTH_IN, forth, stages),
        (BACK, back, stages),
        (BACK_IN, back, nexts),
    ):
        calls, bytes_ = sum(over[i][0] for i in at), sum(over[i][1] for i in at)
        if calls:
            yield Planned(kind=kind, axis="pp", ranks=pipeline.ranks, calls=calls, bytes=bytes_, within=0.0)


def _ranks(axis: str, mesh: MeshSpec) -> int:
    nodes = mesh.nodes_per_ep_group
    return {"ep": mesh.ep, "ep_inter": nodes, "ep_intra": mesh.ep // nodes}[axis]


def _exchanges(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> Iterator[tuple[str, str, float, float]]:
    """(kind, axis, calls, bytes) of one layer and micro-batch (steps 1 and 2)."""
    if not layer.steps:
        return
    dispatch, forwards = layer.dispatch, 1 + sends_again(layer, run)
    for op, axis in layer.scheduled_steps:
        if EXCHANGES[op.removesuffix("_start")].sends == "counts":
            numbers = counts_given(dispatch.kind, layer.placement, axis.removeprefix(dispatch.axis))
            yield COUNTS, axis, forwards, forwards * dispatch.chunks * numbers * COUNT_BYTES
        else:
            yield ROWS, axis, forwards + 1, 0.0
    widths = dispatch.wire.row_bytes(layer.row_site.d_model, run.compute_bytes)
    given = bytes_given(
        dispatch.kind, layer.placement, layer.routing, mesh, widths, forwards=forwards, fullest=row_load(layer, run)
    )
    for part, bytes_ in given.items():
        yield ROWS, f"{dispatch.axis}{part}", 0, tokens_of_a_rank(mesh, run) * bytes_


def _lookups(plan: Plan, facts: ModelFacts, run: RunFacts) -> Iterator[Planned]:
    """Step 6."""
    mesh, calls, bytes_ = plan.mesh, 0, 0.0
    for fact in facts.spread:
        forwards = 1 + (run.checkpointing == "full" and not fact.is_root)
        given, width, is_trained = (
            asked(fact.lookup, run.tokens_per_rank),
            fact.lookup.width,
            fact in facts.trained_tables,
        )
        reads = fact.lookup.reads
        once = given * (ID_BYTES + width * run.compute_bytes) + reads * mesh.size(Part.ROWS) * COUNT_BYTES
        calls += run.accumulation * reads * (2 * forwards + is_trained)
        back = is_trained * given * width * max(FP32_BYTES, run.compute_bytes)
        bytes_ += run.accumulation * (forwards * once + back)
    axis = "_".join(mesh.axes(Part.ROWS))
    yield Planned(kind=TABLE_ROWS, axis=axis, ranks=mesh.size(Part.ROWS) if calls else 1, calls=calls, bytes=bytes_)


def _fsdp(plan: Plan, facts: ModelFacts, run: RunFacts) -> Iterator[Planned]:
    """Step 3, where dense weights are not split and all are trained."""
    mesh, layers = plan.mesh, max(facts.num_layers, len(plan.layers))
    if not _is_whole(plan, facts):
        return
    in_layers, root = whole_params(plan.layers, mesh, facts)
    shards = expert_shards(plan.layers, mesh, facts, run)
    (sums,) = (each for each in plan.reductions if each.parameters == DENSE)
    of_stage = [axis for axis in sums.sharded_over if axis not in axes_that_split(Part.LAYERS)]
    axis, ranks = "_".join(of_stage), mesh.size(Part.STORED)
    if mesh.ep > 1:  # else experts are gathered with the layer's dense weights
        in_layers -= sum(padded_experts(layer, mesh) for layer in plan.layers)
    of_layers, of_root = (1, 1) if run.gather == "step" else (2 * run.accumulation, run.accumulation)
    has_root = root > 0  # stages in the middle of a pipeline have layers alone
    reductions = run.accumulation if run.reduce == "each" else 1
    yield Planned(
        kind=GATHERED, axis=axis, ranks=ranks, calls=of_layers * layers + of_root * has_root,
        bytes=(of_layers * in_layers + of_root * root) * run.compute_bytes / ranks,
    )  # fmt: skip
    yield Planned(
        kind=REDUCED, axis=axis, ranks=ranks, calls=reductions * (layers + has_root),
        bytes=reductions * (in_layers + root) * FP32_BYTES,
    )  # fmt: skip
    if shards is not None and mesh.ep > 1:
        whole, number = shards.ranks / (shards.ranks - 1), len(plan.layers)
        yield Planned(
            kind=GATHERED, axis="edp", ranks=shards.ranks, calls=of_layers * number,
            bytes=of_layers * shards.gathered * whole / shards.ranks,
        )  # fmt: skip
        yield Planned(
            kind=REDUCED, axis="edp", ranks=shards.ranks, calls=reductions * number,
            bytes=reductions * shards.reduced * whole,
        )  # fmt: skip


def _is_whole(plan: Plan, facts: ModelFacts) -> bool:
    """Whether dense weights are not split, and all weights are trained."""
    return not plan.mesh.axes(Part.WEIGHTS) and facts.adapters is None and not facts.frozen


def _sums(plan: Plan, facts: ModelFacts) -> Iterator[Planned]:
    """Step 4."""
    (router,) = (each for each in plan.reductions if each.parameters == ROUTER)
    trained = trained_params(plan.layers, facts)
    numbers = trained.router + trained.apart
    counted = sum(_counted(layer) for layer in plan.layers)
    bytes_ = numbers * FP32_BYTES + counted * COUNT_BYTES
    axis, ranks = "_".join(router.sum_over), plan.mesh.size(*router.sum_over)
    yield Planned(kind=SUMMED, axis=axis, ranks=ranks, calls=None, bytes=bytes_, within=SUMS, few=FEW)


def _replicas(plan: Plan, facts: ModelFacts) -> Iterator[Planned]:
    """Step 3, where weights are sharded over replicas: their shards' gradients are summed."""
    if not _is_whole(plan, facts):
        return
    mesh = plan.mesh
    bytes_ = own_params(plan.layers, mesh, facts, expert_share(plan.layers, mesh), trained=True) * FP32_BYTES
    yield Planned(kind=SUMMED, axis="dp_replicate", ranks=mesh.dp_replicate, calls=None, bytes=bytes_, few=FEW)


def _counted(layer: LayerPlan) -> int:
    """Numbers of the load."""
    bins = BINS if layer.balance.rule == "quantile" else 0
    return (layer.experts.num_routed + layer.experts.num_identity) * (1 + bins)


def rehearsed_run(run: RunFacts, plan: Plan, checkpointing: str, number: int, load: float) -> RunFacts:
    """The run of a plan, with so many micro-batches in a step, and this load."""
    return replace(
        run,
        reduce=plan.reduce,
        gather=plan.gather,
        checkpointing=checkpointing,
        recomputed=plan.recomputed,
        accumulation=number,
        row_load=load,
    )
