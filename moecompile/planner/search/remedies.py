"""What to change if a plan does not fit with the load that is to be expected. Each change was planned, and fits.

Where the layout is described, nothing is offered: it is not what the plan is of.

Algorithm:
  1. Layouts of more and more axes, with the same global batch, until some fit:
       a. EP size, micro-batch and checkpointing (and replicas or stages, if there are some): one of them, or more. With
          checkpointing=auto, and so with when weights are gathered and gradients reduced, each layout gets what fits
       b. also tensor parallelism
       c. (a) in bf16, if weights are wider
       d. (a) on twice as many nodes, on four times as many, ...
       e. (a) with moments in bf16, then in codes of 8 bits, if they are wider. Where (a) was not enough,
          it is told what each saves
  2. Of those that fit, fewer changes first. More changes are offered only where a step is faster with them.
  3. Each is planned as a command with it would be, which decides whether it is offered.
  4. The first that fits with an even load alone is offered last. If nothing fits, the least that was found is told.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from math import inf

from moecompile.errors import ConfigError, MoecompileError
from moecompile.plan import FITS, IF_EVEN, TOO_LARGE, Estimate, Plan, PlannedSite, Remedy
from moecompile.planner.build_plan import GIB, draft_plan
from moecompile.planner.cost_model.forecast import (
    BEST,
    Change,
    Forecast,
    alternatives_of,
    helping,
    helps,
    keys_of,
    step_of,
)
from moecompile.planner.cost_model.inputs import inputs_of
from moecompile.planner.cost_model.shapes import ModelShape
from moecompile.planner.memory import trained_bytes
from moecompile.planner.params import ModelFacts
from moecompile.planner.search.axes import axes_of
from moecompile.planner.search.chosen import with_settings
from moecompile.planner.search.found import Candidate, Rejected
from moecompile.planner.search.run import Search, runnable
from moecompile.schema import (
    MOMENTS,
    SEARCHED,
    Checkpointing,
    Config,
    Precision,
    SearchConfig,
    StateKind,
    check_moments,
    is_described,
    resolved,
)

OFFERED = 4
_NAMES = {
    "ep": "mesh.ep", "micro_batch": "micro-batch", "checkpointing": "checkpointing", "tp": "mesh.tp",
    "dp_replicate": "replicas", "pp": "mesh.pp", "stages": "stages of a rank",
}  # fmt: skip
_FEW = ("ep", "micro_batch", "checkpointing")
_GIVEN_PLAN = ("micro_batch", "checkpointing")
_OF_LAYOUT = ("mesh", "data", "trainer", "pipeline", "dispatch", "optimizer")
"""Groups whose keys may be changed, also those that were given."""
_DOUBLED, _MOST_NODES = 3, 65_536
_SEARCHED = ("mesh.ep", "mesh.dp_replicate")
_PRECISION, _NODES, _STATE = "trainer.precision", "mesh.num_nodes", "optimizer.state"


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is tried together. axes: that are searched. changed: keys that are set for all of it."""

    axes: Sequence[str]
    changed: Mapping[str, object]

    @property
    def text(self) -> str:
        """For display."""
        *names, last = (_NAMES[name] for name in self.axes)
        set_ = "".join(f", with {key}={value}" for key, value in self.changed.items())
        return f"{', '.join(names)}{' and ' * bool(names)}{last}{set_}"


def with_remedies(
    plan: Plan, sites: Sequence[PlannedSite], facts: ModelFacts, config: Config, shape: Callable[[Plan], ModelShape],
    again: Callable[[Config], Plan],
) -> Plan:  # fmt: skip
    """The plan, whose estimate says what to change if it does not fit.

    Args:
        plan: with its estimate. sites, facts, shape: as for `search`. config: of the plan. again: the plan of a changed
            config; if the plan was given (`config.plan`), with the same mesh.
    """
    if plan.estimate is None or plan.estimate.fits == FITS or not plan.layers or is_described(config.workload):
        return plan
    tried, remedies, least = list[str](), list[Remedy](), list[tuple[int, Mapping[str, object]]]()
    narrower = list(_narrower(config, trained_bytes(facts)))
    for stage in _stages(plan, config, narrower):
        rejected = Rejected()
        try:
            base, candidates = _candidates(stage, sites, facts, config, shape, rejected)
        except MoecompileError:  # this stage cannot be planned, such as more ranks than experts
            continue
        tried.append(f"{stage.text} ({rejected.total + len(candidates):,} layouts)")
        found = list(islice(_planned(candidates, stage, config, base, again), OFFERED))
        if plan.estimate.fits != IF_EVEN:  # Step 4
            remedies = remedies or [each for each in found if each.fits != FITS][:1]
        least += [] if rejected.least is None else [rejected.least]
        if any(each.fits == FITS for each in found):
            remedies = [*(each for each in found if each.fits == FITS), *remedies]
            break
    text = f"tried {'; '.join(tried)}" if tried else "nothing could be tried"
    if not remedies and least:
        needed, settings = min(least, key=lambda each: each[0])
        text += f"; the least is {needed / GIB:.3g} GiB, with {_text(settings)}"
    if len(tried) > 1 and (saved := list(_saved(plan.estimate, config, narrower, again))):
        text += f"; {' and '.join(saved)}"
    return replace(plan, estimate=replace(plan.estimate, remedies=tuple(remedies), tried=text))


def _saved(
    estimate: Estimate, config: Config, narrower: Sequence[StateKind], again: Callable[[Config], Plan]
) -> Iterator[str]:
    """What narrower moments alone save of the optimizer's memory."""
    for kind in narrower:
        changed = {_STATE: kind.value}
        with suppress(ConfigError):
            other = again(with_settings(config, changed)).estimate
            if other is not None:
                less = estimate.memory_bytes_per_rank.optimizer - other.memory_bytes_per_rank.optimizer
                yield f"{_text(changed)} alone saves {less / GIB:.3g} GiB"


def _stages(plan: Plan, config: Config, narrower: Sequence[StateKind]) -> Iterator[_Stage]:
    """Step 1."""
    if config.plan:
        yield _Stage(axes=_open(_GIVEN_PLAN, config), changed={})
        return
    stages = ("pp", "stages") if plan.pipeline is not None and config.pipeline.layout is None else ()
    few = _open((*_FEW, *["dp_replicate"] * (plan.mesh.dp_replicate > 1), *stages), config)
    yield _Stage(axes=few, changed={})
    yield _Stage(axes=("tp", *few), changed={})
    assert plan.estimate is not None
    if config.trainer.precision is not Precision.bf16_params:
        yield _Stage(axes=few, changed={_PRECISION: Precision.bf16_params.value})
    for doubled in range(1, _DOUBLED + 1):
        nodes = plan.mesh.num_nodes * 2**doubled
        if nodes <= _MOST_NODES:
            yield _Stage(axes=few, changed={_NODES: nodes})
    for kind in narrower:
        yield _Stage(axes=few, changed={_STATE: kind.value})


def _narrower(config: Config, trained: int) -> Iterator[StateKind]:
    """Kinds of moments that take less than those of the config; trained: bytes of a number that they may follow."""
    now = resolved(config.optimizer.state, 8 * trained) or StateKind.fp32
    for kind, row in MOMENTS.items():
        changed = replace(config, optimizer=replace(config.optimizer, state=kind))
        with suppress(ConfigError):
            check_moments(changed)
            if row.bits < MOMENTS[now].bits:
                yield kind


def _open(axes: tuple[str, ...], config: Config) -> tuple[str, ...]:
    """Without checkpointing, where that is chosen for each layout."""
    is_auto = config.trainer.checkpointing is Checkpointing.auto
    return tuple(axis for axis in axes if axis != "checkpointing" or not is_auto)


def _candidates(
    stage: _Stage, sites: Sequence[PlannedSite], facts: ModelFacts, config: Config,
    shape: Callable[[Plan], ModelShape], rejected: Rejected,
) -> tuple[Plan, list[Candidate]]:  # fmt: skip
    """The plan that training must not change, and the layouts of a stage that fit."""
    start = with_settings(config, stage.changed)
    given = [key for key in config.given if key.partition(".")[0] not in _OF_LAYOUT]  # what says which model it is
    start = replace(start, given=given, search=SearchConfig(axes=list(stage.axes)))
    base, _ = draft_plan(sites, start, facts)
    axes = axes_of(start, base.layers, base.mesh.ep, facts)
    search = Search(
        sites=sites, facts=facts, config=start, layers=base.layers, shape=shape, axes=axes, rounds=False
    )  # fmt: skip
    return base, list(runnable(search, rejected))


def _planned(
    candidates: Sequence[Candidate], stage: _Stage, config: Config, base: Plan, again: Callable[[Config], Plan]
) -> Iterator[Remedy]:  # fmt: skip
    """Steps 2 and 3."""
    changes = [(each, {**stage.changed, **_changed(each.settings, base, config, stage)}) for each in candidates]
    changes.sort(key=lambda each: (each[0].fits != FITS, len(each[1]), each[0].seconds))
    best: dict[str, float] = {}
    for candidate, changed in changes:
        if candidate.seconds >= best.get(candidate.fits, inf):
            continue
        try:
            estimate = again(with_settings(config, changed)).estimate
        except ConfigError:
            continue
        if estimate is None or estimate.fits == TOO_LARGE:
            continue
        best[candidate.fits] = candidate.seconds
        yield _remedy(changed, candidate.seconds, estimate)


def _remedy(changed: Mapping[str, object], seconds: float, estimate: Estimate) -> Remedy:
    total, uneven = estimate.memory_bytes_per_rank.total, estimate.memory_bytes_uneven
    return Remedy(change=_text(changed), total=total, uneven=uneven, seconds=seconds, fits=estimate.fits)


def _changed(settings: Mapping[str, object], base: Plan, config: Config, stage: _Stage) -> dict[str, object]:
    """The settings that differ from what the config says. Beside other nodes, the EP size is always said: a preset says
    it for its own alone.
    """
    found = {}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        now = getattr(getattr(config, group), name)
        now = now.value if isinstance(now, Enum) else now
        if key == "mesh.ep" and now in ("auto", "search"):
            now = base.mesh.ep
        if value != now or (key == "mesh.ep" and _NODES in stage.changed):
            found[key] = value
    return found


def _text(settings: Mapping[str, object]) -> str:
    """As overrides of a command line: stages have a `|`."""
    return " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())


# -- what would make a step faster -----------------------------------------------------------------------------------


def with_changes(
    forecast: Forecast, plan: Plan, config: Config, shape: Callable[[Plan], ModelShape], again: Callable[[Config], Plan]
) -> Forecast:
    """The forecast with changes that were planned: those that fit as the plan does, with their real seconds.

    A change of one setting may change what the plan chooses with it, such as when weights are gathered. Changes of
    `stack`, which describe other software, are not planned, and neither is a layout that is described.

    Args: those of `with_remedies`.
    """
    if plan.estimate is None or is_described(config.workload):
        return forecast
    inputs = inputs_of(shape(plan), plan, config)
    pinned = {key: plan.mesh.size(key.partition(".")[2]) for key in _SEARCHED if config.mesh.ep == SEARCHED}
    found = list[Change]()
    for change in helping(forecast.seconds, alternatives_of(inputs, keys_of(config), plan.pipeline)):
        if change.change.startswith("stack."):
            found.append(change)
            continue
        key, _, value = shlex.split(change.change)[0].partition("=")
        settings: dict[str, object] = {**pinned, key: int(value) if value.isdigit() else value}
        with suppress(MoecompileError):  # what cannot be planned helps nobody
            changed = with_settings(config, settings)
            other = again(changed)
            seconds = sum(step_of(inputs_of(shape(other), other, changed)).values())
            if other.estimate is not None and _fits_as_well(other.estimate, plan.estimate):
                found.append(Change(change=_text(settings), seconds=seconds, fits=other.estimate.fits))
    found = sorted((each for each in found if helps(each.seconds, forecast.seconds)), key=lambda each: each.seconds)
    return replace(forecast, changes=tuple(found[:BEST]))


def _fits_as_well(other: Estimate, now: Estimate) -> bool:
    order = (TOO_LARGE, IF_EVEN, FITS)
    return order.index(other.fits) >= order.index(now.fits)
