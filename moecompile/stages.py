"""Stages of a pipeline: which modules of the model each has, what it receives, and in which order its ranks compute.

Legend: P ranks along `pp`, v stages of a rank, M micro-batches of a step. Stage s = 0 .. P v - 1 is on rank s mod P.

    1f1b          v = 1: P - 1 - rank forwards, then one forward and one backward in turns (PipeDream-Flush,
                  arXiv 2006.09503)
    interleaved   v > 1: forwards go through groups of P micro-batches, stage after stage of the rank; backwards in the
                  same way from its last stage (Megatron-LM, arXiv 2104.04473, section 2.2)

Where M is no multiple of P, the interleaved order is that of the next multiple without what is not there: leaving out
whole micro-batches keeps an order valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from moecompile.errors import PlanError

TENSOR = "tensor"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A module that belongs to one stage: a layer, an embedding, the last norm, the head.

    path: of the module. is_layer: whether it is one of the layers, which pass hidden states on. form: of its output,
    `tensor`, `tuple`, `list`, or another type by its name. size: entries of the tuple or list.
    """

    path: str
    is_layer: bool
    form: str
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Tensors of a unit's output that a later stage needs.

    unit: its path. places: which entries of the output; of a tensor, (0,). numbers: of all of them, per token.
    """

    unit: str
    places: tuple[int, ...]
    numbers: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """units: in the order of their calls. receives: what crosses the cut before it."""

    units: tuple[Unit, ...]
    receives: tuple[Crossing, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of its layers."""
        return tuple(unit.path for unit in self.units if unit.is_layer)

    def holds(self, path: str) -> bool:
        """Whether the module or weight at `path` belongs to it."""
        return any(path == unit.path or path.startswith(f"{unit.path}.") for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """schedule: of `SCHEDULES`. stages: in the order of the model. ranks: along `pp`.

    tied: pairs of names of one weight, that of the first stage and that of the last one.

    Raises:
        PlanError: an unknown schedule, or a number of stages that does not fit the ranks and the schedule.
    """

    schedule: str
    ranks: int
    stages: tuple[Stage, ...]
    tied: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            names = " or ".join(SCHEDULES)
            raise PlanError("pipeline.schedule", self.schedule, f"must be {names}", "Use one of these")
        if len(self.stages) % self.ranks or (self.schedule == "1f1b") != (len(self.stages) == self.ranks):
            rule = f"has {len(self.stages)} stages for {self.ranks} ranks, and its schedule is {self.schedule}"
            raise PlanError("pipeline.stages", len(self.stages), rule, "Plan again for this mesh")

    @property
    def per_rank(self) -> int:
        """Stages of a rank."""
        return len(self.stages) // self.ranks

    def stages_of(self, index: int) -> tuple[int, ...]:
        """The stages of the rank at `index` along pp."""
        return tuple(range(index, len(self.stages), self.ranks))

    def rank_of(self, stage: int) -> int:
        """The place along pp of the ranks that have a stage."""
        return stage % self.ranks

    def order(self, index: int, micro_batches: int) -> list[Action]:
        """What the rank at `index` along pp computes in a step, in this order."""
        return SCHEDULES[self.schedule](index, self.ranks, self.per_rank, micro_batches)

    def in_flight(self, index: int, micro_batches: int) -> tuple[int, ...]:
        """For each stage of the rank at `index`, micro-batches that are kept for backward when they are most together.

        Together: all of its stages count, each with its own layers, at the same moment.
        """
        return _in_flight(self.schedule, index, self.ranks, self.per_rank, micro_batches)

    @property
    def layout(self) -> str:
        """The stages as Megatron's users write them: `Et*3|(tt|)*2,m|L`-like, E embedding, t a layer, L the head."""
        words = []
        for i, stage in enumerate(self.stages):
            number = len(stage.layers)
            word = "t" if number == 1 else f"t*{number}" if number else ""
            words.append(("E" if i == 0 else "") + word + ("L" if i == len(self.stages) - 1 else ""))
        return "|".join(words)


@dataclass(frozen=True)
class Action:
    """The forward or the backward of a micro-batch in a stage."""

    is_forward: bool
    stage: int
    micro_batch: int


def _one_forward_one_backward(index: int, ranks: int, per_rank: int, micro_batches: int) -> list[Action]:
    warm_up = min(ranks - 1 - index, micro_batches)
    forwards = [Action(True, index, i) for i in range(micro_batches)]
    backwards = [Action(False, index, i) for i in range(micro_batches)]
    return _in_turns(forwards, backwards, warm_up)


def _interleaved(index: int, ranks: int, per_rank: int, micro_batches: int) -> list[Action]:
    rounded = -(-micro_batches // ranks) * ranks
    places = [
        (chunk, group + i) for group in range(0, rounded, ranks) for chunk in range(per_rank) for i in range(ranks)
    ]
    forwards = [Action(True, chunk * ranks + index, i) for chunk, i in places]
    backwards = [Action(False, (per_rank - 1 - chunk) * ranks + index, i) for chunk, i in places]
    warm_up = min(2 * (ranks - 1 - index) + (per_rank - 1) * ranks, len(forwards))
    return [action for action in _in_turns(forwards, backwards, warm_up) if action.micro_batch < micro_batches]


def _in_turns(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> list[Action]:
    actions = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [forward, backward]
    return actions + list(backwards[len(forwards) - warm_up :])


SCHEDULES = {"1f1b": _one_forward_one_backward, "interleaved": _interleaved}
"""Name -> the order of a rank: (index along pp, P, v, M)."""


@cache  # a search asks for each layout
def _in_flight(schedule: str, index: int, ranks: int, per_rank: int, micro_batches: int) -> tuple[int, ...]:
    now = dict.fromkeys(range(index, ranks * per_rank, ranks), 0)
    most = tuple(now.values())
    for action in SCHEDULES[schedule](index, ranks, per_rank, micro_batches):
        now[action.stage] += 1 if action.is_forward else -1
        most = max(most, tuple(now.values()), key=sum)
    return most


def simulated(pipeline: Pipeline, micro_batches: int) -> list[tuple[int, Action]]:
    """All actions of a step as (index along pp, action), in an order in which each has what it needs.

    Raises:
        PlanError: ranks would wait for each other, or one computes something twice or not at all.
    """
    orders = [pipeline.order(index, micro_batches) for index in range(pipeline.ranks)]
    last, done, run = len(pipeline.stages) - 1, set[Action](), list[tuple[int, Action]]()
    pending = [list(order) for order in orders]
    while any(pending):
        ready = [index for index, left in enumerate(pending) if left and _needs(left[0], last) <= done]
        if not ready:
            rule = f"ranks would wait for each other after {len(run)} of {sum(map(len, orders))} steps"
            raise PlanError("pipeline.schedule", pipeline.schedule, rule, "Use 1f1b")
        for index in ready:
            action = pending[index].pop(0)
            done.add(action)
            run.append((index, action))
    wanted = 2 * len(pipeline.stages) * micro_batches
    if len(done) != wanted or len(run) != wanted:
        rule = f"has {len(run)} forwards and backwards, {wanted} are needed"
        raise PlanError("pipeline.schedule", pipeline.schedule, rule, "Use 1f1b")
    return run


def _needs(action: Action, last: int) -> set[Action]:
    """What must have been computed before."""
    if action.is_forward:
        return {replace(action, stage=action.stage - 1)} if action.stage else set()
    needs = {replace(action, is_forward=True)}
    return needs if action.stage == last else needs | {replace(action, stage=action.stage + 1)}


def stage_of(pipeline: Pipeline, path: str) -> int | None:
    """The stage that holds the module or weight at `path`; None: no unit has it."""
    return next((i for i, stage in enumerate(pipeline.stages) if stage.holds(path)), None)


def crossings_of(pipeline: Pipeline) -> Iterator[tuple[int, float]]:
    """(stage, numbers per token that it receives), of each stage but the first one."""
    for i, stage in enumerate(pipeline.stages[1:], 1):
        yield i, sum(crossing.numbers for crossing in stage.receives)
