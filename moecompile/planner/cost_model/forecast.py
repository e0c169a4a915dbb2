"""The forecast of a training step: its time by part, what imbalance costs, and what would make it faster.

1. Counts and seconds of the step (counts.py, seconds.py).                                          -> `step_of`
2. The same with the fullest rank's load, at the median and the 99th percentile of each workload.    -> `prices`
3. Each change of one setting, through the model again; those that help, best first.                 -> `changes`

The elasticity of a step to a part is the part's share of it: with 1% less of the part, the step has share% less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecompile.errors import ConfigError
from moecompile.load_history import LOAD_HISTORY
from moecompile.metrics_table import read_rows
from moecompile.plan import ExpertPlacement, LayerPlan, Plan, is_even
from moecompile.planner.cost_model.constants import calibrated
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.host import host_seconds
from moecompile.planner.cost_model.inputs import KINDS, Inputs, Software, inputs_of
from moecompile.planner.cost_model.seconds import step_seconds
from moecompile.planner.cost_model.shapes import ModelShape, layer_params, training_flops
from moecompile.planner.loads import read_loads
from moecompile.planner.params import BALANCED, Expected, routed
from moecompile.schema import Config
from moecompile.stages import Pipeline, in_words

# -- how uneven the load of ranks is: rows of the fullest EP rank over the mean -------------------------------------
#
# 1. Synthetic. Each of `_DRAWS` layers draws which experts are popular, then expected rows per expert:
#        balanced   the same for all
#        zipf       Gumbel top-k with weights 1 / (i + 1) ** skew, drawn for `_TOKENS` tokens
#        hot        every other token takes one expert, the rest is uniform              (ops/workload.py has both)
#    With even groups the same within each group, of which every token takes as many.
#    The fullest rank over the mean of each draw -> median and 99th percentile.                       -> `synthetic`
# 2. Measured: of every layer at every logged step of `load.npz`, rows per expert summed over each rank's experts. A
#    `metrics.csv` alone has the fullest expert of each layer, which is an upper bound for a rank.     -> `measured`

_DRAWS, _TOKENS = 200, 256
_PATH = "workload.load"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Rows of the fullest rank over the mean: the median and the 99th percentile over layers (and steps)."""

    name: str
    p50: float
    p99: float


@cache
def synthetic(
    kind: str, experts: int, ep: int, top_k: int, skew: float = 1.0, groups: int = 1, order: Sequence[int] = ()
) -> Load:
    """The imbalance of a synthetic workload (step 1); `kind` is balanced, zipf or hot.

    Args:
        groups: even groups. order: the expert at each position; empty: in the order of ids.
    """
    if kind == "balanced" or ep == 1:
        return Load(name=kind, p50=1.0, p99=1.0)
    generator = np.random.default_rng(0)
    if groups > 1:
        drawn = _zipf_of_groups if kind == "zipf" else _hot_of_groups
        held = list(order or range(experts))
        draws = [_fullest(rows[held], ep) for rows in drawn(generator, experts, top_k, groups, skew)]
    else:  # any expert may be the popular one, so the order does not matter
        rows = _zipf(generator, experts, top_k, skew) if kind == "zipf" else _hot(experts, top_k)
        draws = [_fullest(generator.permutation(rows), ep) for _ in range(_DRAWS)]
    return _load(kind, draws)


def measured(
    path: Path, experts: Sequence[int], ep: int, identity: Sequence[int] = (), orders: Sequence[Sequence[int]] = ()
) -> Load:
    """The imbalance of a run (step 2).

    Args:
        path: `metrics.csv` of a run directory, or a `load.npz`. experts: routed experts of the planned layers.
        identity: experts behind these that no rank computes; empty: none. orders: the expert at each position, by
            layer; empty: in the order of ids.

    Raises:
        ConfigError: there is no such file, or it is of another model.
    """
    if not path.is_file():
        raise ConfigError(_PATH, str(path), "is not a file", "Give the metrics.csv or load.npz of a run")
    beside = path.with_name(LOAD_HISTORY)
    if path.suffix == ".npz" or beside.is_file():
        found = path if path.suffix == ".npz" else beside
        rows = _rows(found, experts, identity or [0] * len(experts), orders or [()] * len(experts))
        return _load(found.name, [_fullest(row, ep) for row in rows])
    values = list(_violations(path, len(experts)))
    if not values:
        raise ConfigError(_PATH, str(path), "has no columns max_violation/LAYER", "Give the metrics.csv of an MoE run")
    return _load(f"{path.name} (fullest expert)", [min(1 + value, float(ep)) for value in values])


def _load(name: str, ratios: Sequence[float]) -> Load:
    p50, p99 = np.percentile(ratios, [50, 99])
    return Load(name=name, p50=float(p50), p99=float(p99))


def _fullest(rows: NDArray[np.float64], ep: int) -> float:
    per_rank = rows.reshape(ep, -1).sum(1)
    return float(per_rank.max() / per_rank.mean())


def _zipf(generator: np.random.Generator, experts: int, top_k: int, skew: float) -> NDArray[np.float64]:
    scores = generator.gumbel(size=(_TOKENS, experts)) - skew * np.log(np.arange(experts) + 1)
    chosen = np.argsort(-scores, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.float64)


def _hot(experts: int, top_k: int) -> NDArray[np.float64]:
    others = (top_k - 0.5) / (experts - 1) if experts > 1 else 0.0
    rows = np.full(experts, others)
    rows[0] = 0.5
    return rows


def _zipf_of_groups(
    generator: np.random.Generator, experts: int, top_k: int, groups: int, skew: float
) -> Iterator[NDArray[np.float64]]:
    noise, popularity = generator.gumbel(size=(_TOKENS, experts)), skew * np.log(np.arange(experts) + 1)
    for _ in range(_DRAWS):
        scores = (noise - generator.permutation(popularity)).reshape(_TOKENS, groups, -1)
        least = np.partition(scores, -(top_k // groups), axis=2)[..., -(top_k // groups), None]
        yield (scores >= least).sum(0).ravel().astype(np.float64)


def _hot_of_groups(
    generator: np.random.Generator, experts: int, top_k: int, groups: int, _skew: float
) -> Iterator[NDArray[np.float64]]:
    size, share = experts // groups, 0.5 if top_k < experts else 1.0
    for hot in generator.integers(experts, size=_DRAWS):
        rows = np.full((groups, size), top_k / experts)
        rows[hot // size] = (top_k / groups - share) / max(1, size - 1)
        rows[hot // size, hot % size] = share
        yield rows.ravel()


def _rows(
    path: Path, experts: Sequence[int], identity: Sequence[int], orders: Sequence[Sequence[int]]
) -> Iterator[NDArray[np.float64]]:
    """Rows by position, of every layer at every logged step."""
    layers = list(read_loads(path, _PATH).values())
    if len(layers) == len(identity):
        layers = [
            [row[: max(0, len(row) - last)] for row in steps] for steps, last in zip(layers, identity, strict=True)
        ]
    if (held := [len(steps[0]) if steps else 0 for steps in layers]) != list(experts):
        rule = f"is of another model: experts per layer are {_short(held)}, not {_short(experts)}"
        raise ConfigError(_PATH, str(path), rule, "Give the loads of a run of this model")
    for steps, order in zip(layers, orders, strict=True):
        yield from (row[list(order)] if order else row for row in steps if row.sum() > 0)


def _violations(path: Path, layers: int) -> Iterator[float]:
    rows = [{name: row[name] for name in row if name.startswith("max_violation/")} for row in read_rows(path)]
    names = {name for row in rows for name in row}
    if names and len(names) != layers:
        rule = f"is of another model: it has {len(names)} MoE layers, the plan has {layers}"
        raise ConfigError(_PATH, str(path), rule, "Give the metrics of a run of this model")
    for row in rows:
        yield from row.values()


def _short(numbers: Sequence[int]) -> str:
    different = sorted(set(numbers))
    return f"{len(numbers)} x {different[0]}" if len(different) == 1 else str(list(numbers))


# -- the forecast ---------------------------------------------------------------------------------------------------

BEST = 3
OVERLAP_UNITS = 20  # of DeepSeek-V3's exchanges
_HELPS = 0.99  # of the time
_ALIKE = 1.1  # operations of the dearest layer over those of the cheapest
COMMUNICATION = (
    "exchange within the node",
    "exchange across nodes",
    "tensor",
    "context",
    "stages",
    "weights",
    "reduction",
    "rows of tables",
)


@dataclass(frozen=True, kw_only=True)
class Price:
    """Seconds of a step under an imbalanced load, at the median and the 99th percentile of layers."""

    name: str
    p50_load: float
    p50_seconds: float
    p99_load: float
    p99_seconds: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change and the seconds of the step with it. fits: as of an estimate; empty if it was not planned."""

    change: str
    seconds: float
    fits: str = ""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """seconds: of a step. parts: its addends, seconds. flops: model operations per token, forward and backward, without
    recomputation. mfu: of the machine's peak in the numbers of its products.
    """

    seconds: float
    parts: Mapping[str, float]
    tokens_per_second_per_rank: float
    flops_per_token: float
    tflops_per_rank: float
    mfu: float
    micro_batches: int
    prices: tuple[Price, ...] = ()
    changes: tuple[Change, ...] = ()


def forecast(inputs: Inputs, loads: Sequence[Load], alternatives: Mapping[str, Inputs]) -> Forecast:
    """The forecast.

    Args:
        loads: whose imbalance is priced. alternatives: change -> what is forecast with it.
    """
    layout = inputs.layout
    parts = step_of(inputs)
    seconds = sum(parts.values())
    speed = layout.global_batch * layout.seq / layout.gpus / seconds
    flops = training_flops(inputs.model, layout.seq)
    return Forecast(
        seconds=seconds,
        parts=parts,
        tokens_per_second_per_rank=speed,
        flops_per_token=flops,
        tflops_per_rank=flops * speed / 1e12,
        mfu=flops * speed / inputs.machine.peak[inputs.software.bits],
        micro_batches=layout.num_micro,
        prices=tuple(prices(inputs, loads)),
        changes=changes(seconds, alternatives),
    )


def step_of(inputs: Inputs, load: float = 1.0) -> dict[str, float]:
    """The addends of the step, seconds, with exchanges by link class."""
    counts = count(inputs.model, inputs.layout, inputs.machine, inputs.software)
    if inputs.machine.host is not None:
        parts = host_seconds(inputs.model, inputs.layout, counts, inputs.machine, inputs.software, load)
    else:
        parts = step_seconds(counts, inputs.machine, inputs.software, calibrated(), inputs.layout.gpus, load)
    exchange, wire = parts.pop("exchange"), counts.wire
    intra, inter = inputs.machine.links.seconds(wire.intra, 0), inputs.machine.links.seconds(0, wire.inter)
    within = intra / (intra + inter) if intra + inter else 1.0
    rows = inputs.tables
    tables = inputs.machine.links.seconds(rows.intra_node, rows.inter_node)
    return {
        "exchange within the node": exchange * within, "exchange across nodes": exchange * (1 - within), **parts,
        **({"rows of tables": tables} if tables else {}),
    }  # fmt: skip


def prices(inputs: Inputs, loads: Sequence[Load]) -> Iterator[Price]:
    """Step 2."""
    for load in loads:
        p50, p99 = (sum(step_of(inputs, ratio).values()) for ratio in (load.p50, load.p99))
        yield Price(name=load.name, p50_load=load.p50, p50_seconds=p50, p99_load=load.p99, p99_seconds=p99)


def changes(seconds: float, alternatives: Mapping[str, Inputs]) -> tuple[Change, ...]:
    """Step 3: at most `BEST` changes that save 1% or more."""
    return tuple(helping(seconds, alternatives)[:BEST])


def helping(seconds: float, alternatives: Mapping[str, Inputs]) -> list[Change]:
    """The changes that save 1% or more, best first."""
    found = [Change(change=name, seconds=sum(step_of(inputs).values())) for name, inputs in alternatives.items()]
    return sorted((change for change in found if helps(change.seconds, seconds)), key=lambda change: change.seconds)


def helps(seconds: float, now: float) -> bool:
    """Whether these seconds of a step are worth a change."""
    return seconds < _HELPS * now


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Overrides that change a step: the key of its dispatch, and what switches recomputation off."""

    dispatcher: str = "dispatch.kind"
    no_recompute: str = "trainer.checkpointing=none"


def alternatives_of(inputs: Inputs, keys: Keys, pipeline: Pipeline | None) -> dict[str, Inputs]:
    """Changes of one setting, as overrides.

    Args:
        pipeline: of the plan.
    """
    found = {text: replace(inputs, software=software) for text, software in _software(inputs, keys)}
    for text, values in _layouts(inputs):
        try:
            found[text] = replace(inputs, layout=replace(inputs.layout, **values))
        except ConfigError:
            continue  # it does not divide
    if pipeline is not None:
        splits = {
            f"pipeline.layout='{in_words(each)}'": _with_stages(inputs, pipeline, each)
            for each in _splits(inputs, pipeline)
        }
        best = min(splits, key=lambda text: sum(step_of(splits[text]).values()), default=None)
        found |= {} if best is None else {best: splits[best]}
    return found


def _splits(inputs: Inputs, pipeline: Pipeline) -> Iterator[list[int]]:
    """Layers of each stage with more and with fewer in the last one, equal numbers in the others.

    A plan balances stages by parameters; in seconds the head is worth more layers, or fewer. Of layers that are alike,
    so that it alone differs. What is left over goes to later stages, whose ranks keep fewer micro-batches.
    """
    model, seq = inputs.model, inputs.layout.seq
    operations = [
        2 * layer_params(layer, model.hidden)[1] + (layer.mixer.core_flops(seq) if layer.mixer else 0.0)
        for layer in model.layers
    ]
    others, layers = len(pipeline.stages) - 1, sum(len(stage.layers) for stage in pipeline.stages)
    if (
        inputs.machine.host is None
        and layers == inputs.model.num_layers
        and max(operations) <= _ALIKE * min(operations)
    ):
        for last in range(1, layers - others + 1):
            each, more = divmod(layers - last, others)
            yield [*[each] * (others - more), *[each + 1] * more, last]


def _with_stages(inputs: Inputs, pipeline: Pipeline, layers: Sequence[int]) -> Inputs:
    places = tuple(sum(layers[i] for i in pipeline.stages_of(rank)) for rank in range(pipeline.ranks))
    return replace(inputs, layout=replace(inputs.layout, split=(places, pipeline.rank_with_loss)))


def _layouts(inputs: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    layout = inputs.layout
    yield f"data.micro_batch_size={2 * layout.micro_batch}", {"micro_batch": 2 * layout.micro_batch}
    for ep in {layout.ep // 2, layout.ep * 2} - {0}:
        if all(layer.ffn is None or layer.ffn.experts % ep == 0 for layer in inputs.model.layers):
            yield f"mesh.ep={ep}", {"ep": ep}


def _software(inputs: Inputs, keys: Keys) -> Iterator[tuple[str, Software]]:
    software = inputs.software
    if inputs.layout.ep > 1:
        for kind in KINDS:
            yield f"{keys.dispatcher}={kind}", replace(software, dispatcher=kind)
        if not software.overlap:
            text = f"stack.overlap=true stack.comm_units.value={OVERLAP_UNITS}"
            yield text, replace(software, overlap=True, comm_units=OVERLAP_UNITS)
    if software.recompute:
        yield keys.no_recompute, replace(software, recompute=())
    yield "stack.graph=[all]", replace(software, graph=("all",))
    if software.bits == 16 and inputs.machine.peak[8] > inputs.machine.peak[16]:
        yield "stack.bits=8", replace(software, bits=8)


def forecast_plan(shape: ModelShape, plan: Plan, config: Config) -> Forecast:
    """The forecast of a plan's training step.

    Raises:
        ConfigError: as `inputs_of`, or `workload.load` is not of this model.
    """
    inputs = inputs_of(shape, plan, config)
    return forecast(
        inputs, loads_of(plan, config, plan.mesh.ep), alternatives_of(inputs, keys_of(config), plan.pipeline)
    )


def keys_of(config: Config) -> Keys:
    """The overrides that change a step of this config."""
    given = config.stack
    return Keys(
        dispatcher="stack.dispatcher" if given.dispatcher else "dispatch.kind",
        no_recompute="trainer.checkpointing=none" if given.recompute is None else "stack.recompute=[]",
    )


EXPECTED = "zipf"


def expected_load(plan: Plan, config: Config, ep: int | None = None) -> Expected:
    """The load with which a plan must fit into memory: of the loads that are priced, that of a given run at its 99th
    percentile, as every step must fit, else zipf at its median: no training has balanced the router yet.

    Args:
        ep: an EP size, if not the plan's.

    Raises:
        ConfigError: `workload.load` is not of this model.
    """
    ep = plan.mesh.ep if ep is None else ep
    found = {load.name: load for load in loads_of(plan, config, ep)}
    if ep == 1 or not _uneven(plan, ep):
        return BALANCED
    if config.workload.load is not None:
        load = list(found.values())[-1]
        return Expected(load=max(1.0, load.p99), source=f"{load.name}, 99th percentile of layers and steps")
    return Expected(load=max(1.0, found[EXPECTED].p50), source=f"{EXPECTED}, the median layer")


def _uneven(plan: Plan, ep: int) -> list[LayerPlan]:
    """The layers that are not even on EP groups of `ep` ranks."""

    def placement(layer: LayerPlan) -> ExpertPlacement:
        is_planned = layer.placement.ep == ep  # else its order has no meaning
        return layer.placement if is_planned else ExpertPlacement(num_experts=layer.experts.num_routed, ep=ep)

    return [layer for layer in plan.layers if not is_even(layer.routing, placement(layer))]


def loads_of(plan: Plan, config: Config, ep: int) -> list[Load]:
    """Balanced, zipf and hot, and the load of a given run, on EP groups of `ep` ranks. The first three are of the first
    layer whose ranks may have unequal numbers of rows.

    Raises:
        ConfigError: `workload.load` is not of this model.
    """
    if not plan.layers:
        return []
    layer, skew = next(iter(_uneven(plan, ep)), plan.layers[0]), config.routing.skew
    top_k, groups, _, even = routed(layer)
    of_groups = (groups, layer.placement.order) if even else ()
    loads = [
        synthetic(kind, layer.experts.num_routed, ep, top_k, skew, *of_groups) for kind in ("balanced", "zipf", "hot")
    ]
    if config.workload.load is not None:
        experts = [each.experts.num_routed for each in plan.layers]
        identity = [each.experts.num_identity for each in plan.layers]
        orders = [each.placement.order for each in plan.layers]
        loads.append(measured(Path(config.workload.load), experts, ep, identity, orders))
    return loads
