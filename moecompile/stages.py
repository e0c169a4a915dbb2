"""Stages of a pipeline: which modules of the model each has, what it receives, and in which order its ranks compute.

Legend: P ranks along `pp`, v stages of a rank, M micro-batches of a step. Stages s = 0 .. P v - 1.

    1f1b          v = 1, stage s on rank s: P - 1 - rank forwards, then one forward and one backward in turns
                  (PipeDream-Flush, arXiv 2006.09503)
    interleaved   v > 1, on rank s mod P: forwards go through groups of P micro-batches, stage after stage of the rank;
                  backwards in the same way from its last stage (Megatron-LM, arXiv 2104.04473, section 2.2)
    dualpipev     v = 2, on rank s, and back: s = P .. 2 P - 1 on rank 2 P - 1 - s. The first rank has both ends of the
                  model, the last one hands over to itself. In the main phase the forward of one stage and the backward
                  of the other one are a pair, of which neither needs the other (DeepSeek's DualPipe, "cut in half";
                  DeepSeek-V3, arXiv 2412.19437, section 3.2.1); backwards are whole

Where M is no multiple of P, the interleaved order is that of the next multiple without what is not there: leaving out
whole micro-batches keeps an order valid. So does dualpipev's of fewer than 2 P.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import NamedTuple

from moecompile.errors import ConfigError, PlanError

TENSOR = "tensor"
NONE, EXCHANGES = OVERLAPS = "none", "exchanges"
"""What the two of a pair do at once: nothing; or one computes while exchanges of the other one are on the wire."""


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

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Paths of its layers."""
        return tuple(unit.path for unit in self.units if unit.is_layer)

    @property
    def has_root(self) -> bool:
        """Whether it has weights outside of layers: embedding, norm or head."""
        return any(not unit.is_layer for unit in self.units)

    def holds(self, path: str) -> bool:
        """Whether the module or weight at `path` belongs to it."""
        return f"{path}.".startswith(self._starts)

    @cached_property
    def _starts(self) -> tuple[str, ...]:
        return tuple(f"{unit.path}." for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """schedule: of `SCHEDULES`. stages: in the order of the model. ranks: along `pp`.

    tied: pairs of names of one weight, that of the first stage and that of the last one. overlap: of `OVERLAPS`.

    Raises:
        PlanError: an unknown schedule, or a number of stages that does not fit the ranks and the schedule.
    """

    schedule: str
    ranks: int
    stages: tuple[Stage, ...]
    tied: tuple[tuple[str, str], ...] = ()
    overlap: str = NONE

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            names = " or ".join(SCHEDULES)
            raise PlanError("pipeline.schedule", self.schedule, f"must be {names}", "Use one of these")
        if len(self.stages) % self.ranks or not SCHEDULES[self.schedule].has(self.per_rank):
            rule = f"has {len(self.stages)} stages for {self.ranks} ranks, and its schedule is {self.schedule}"
            raise PlanError("pipeline.stages", len(self.stages), rule, "Plan again for this mesh")
        if self.overlap not in OVERLAPS or (self.overlap != NONE and not SCHEDULES[self.schedule].pairs):
            rule = f"is not possible with the schedule {self.schedule}"
            raise PlanError("pipeline.overlap", self.overlap, rule, f"Use {NONE}")

    @property
    def per_rank(self) -> int:
        """Stages of a rank."""
        return len(self.stages) // self.ranks

    def stages_of(self, index: int) -> tuple[int, ...]:
        """The stages of the rank at `index` along pp, in the order of the model."""
        return _stages_of(self.schedule, index, self.ranks, self.per_rank)

    def rank_of(self, stage: int) -> int:
        """The place along pp of the ranks that have a stage."""
        return SCHEDULES[self.schedule].rank_of(stage, self.ranks)

    @property
    def rank_with_loss(self) -> int:
        """The place along pp of the ranks that have the last stage."""
        return self.rank_of(len(self.stages) - 1)

    def is_local(self, cut: int) -> bool:
        """Whether the stages on both sides of the cut before a stage are on one rank: nothing is sent."""
        return self.rank_of(cut - 1) == self.rank_of(cut)

    def goes_back(self, cut: int) -> bool:
        """Whether what crosses the cut before a stage goes to a rank that is earlier along pp."""
        return self.rank_of(cut) < self.rank_of(cut - 1)

    @property
    def tied_to_itself(self) -> bool:
        """Whether the first and the last stage are on one rank, where a weight of both is one."""
        return self.rank_of(0) == self.rank_with_loss

    def groups(self, index: int, micro_batches: int) -> list[tuple[Action, ...]]:
        """What the rank at `index` along pp computes in a step, in this order; of a pair neither needs the other."""
        return SCHEDULES[self.schedule].order(index, self.ranks, self.per_rank, micro_batches)

    def order(self, index: int, micro_batches: int) -> list[Action]:
        """The same, one after another: of a pair the forward first."""
        return list(chain.from_iterable(self.groups(index, micro_batches)))

    def in_flight(self, index: int, micro_batches: int) -> tuple[int, ...]:
        """For each stage of the rank at `index`, micro-batches that are kept for backward when their layers are most
        together: those of all of its stages, at the same moment.
        """
        layers = tuple(len(self.stages[i].layers) for i in self.stages_of(index))
        return _in_flight(self.schedule, index, self.ranks, self.per_rank, steady(self.ranks, micro_batches), layers)

    def waits(self, micro_batches: int, backward: float) -> float:
        """Micro-batches for which a rank waits in a step. backward: its time over that of a forward."""
        return SCHEDULES[self.schedule].waits(self.ranks, self.per_rank, micro_batches, backward)

    def paired(self, micro_batches: int) -> float:
        """The share of forwards and backwards that run beside another, a mean over ranks; 0 if none overlap."""
        return 0.0 if self.overlap == NONE else _paired(self.schedule, self.ranks, self.per_rank, micro_batches)

    @property
    def layout(self) -> str:
        """The stages as Megatron's users write them: `Et*3|(tt|)*2,m|L`-like, E embedding, t a layer, L the head."""
        return in_words([len(stage.layers) for stage in self.stages])


def in_words(layers: Sequence[int]) -> str:
    """`Pipeline.layout` of stages with so many layers."""
    words = ["t" if number == 1 else f"t*{number}" if number else "" for number in layers]
    return "E" + "|".join(words) + "L"


class Action(NamedTuple):  # a search makes millions
    """The forward or the backward of a micro-batch in a stage."""

    is_forward: bool
    stage: int
    micro_batch: int


Groups = list[tuple[Action, ...]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which stages a rank has, and in which order it computes.

    least, most: stages of a rank that it is made for. rank_of: (stage, P) -> the place along pp of its rank. order:
    (place along pp, P, v, M) -> what that rank computes, the forward of a pair first. waits: (P, v, M, time of a
    backward over that of a forward) -> micro-batches for which a rank waits in a step, if all stages take equally long
    and messages no time. pairs: whether the order has any; one rank alone can run it, for their sake.
    """

    least: int
    most: int
    rank_of: Callable[[int, int], int]
    order: Callable[[int, int, int, int], Groups]
    waits: Callable[[int, int, int, float], float]
    pairs: bool = False

    def has(self, per_rank: int) -> bool:
        """Whether it is made for so many stages of a rank."""
        return self.least <= per_rank <= self.most


def _in_a_circle(stage: int, ranks: int) -> int:
    return stage % ranks


def _there_and_back(stage: int, ranks: int) -> int:
    return min(stage, 2 * ranks - 1 - stage)


def _one_forward_one_backward(index: int, ranks: int, per_rank: int, micro_batches: int) -> Groups:
    warm_up = min(ranks - 1 - index, micro_batches)
    forwards = [Action(True, index, i) for i in range(micro_batches)]
    backwards = [Action(False, index, i) for i in range(micro_batches)]
    return [(action,) for action in _in_turns(forwards, backwards, warm_up)]


def _interleaved(index: int, ranks: int, per_rank: int, micro_batches: int) -> Groups:
    rounded = -(-micro_batches // ranks) * ranks
    places = [
        (chunk, group + i) for group in range(0, rounded, ranks) for chunk in range(per_rank) for i in range(ranks)
    ]
    forwards = [Action(True, chunk * ranks + index, i) for chunk, i in places]
    backwards = [Action(False, (per_rank - 1 - chunk) * ranks + index, i) for chunk, i in places]
    warm_up = min(2 * (ranks - 1 - index) + (per_rank - 1) * ranks, len(forwards))
    return [(action,) for action in _in_turns(forwards, backwards, warm_up) if action.micro_batch < micro_batches]


def _in_turns(forwards: Sequence[Action], backwards: Sequence[Action], warm_up: int) -> list[Action]:
    actions = list(forwards[:warm_up])
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [forward, backward]
    return actions + list(backwards[len(forwards) - warm_up :])


def _dual_pipe_v(index: int, ranks: int, per_rank: int, micro_batches: int) -> Groups:
    """F0, B1: the forward of the rank's first stage, the backward of its second one; the phases are DeepSeek's."""
    number, after = max(micro_batches, 2 * ranks), ranks - 1 - index
    alone = int(not after)  # the last rank begins the main phase one by one: the others wait for it
    main = number - 2 * ranks + index + 1 - alone
    phases = (
        (2 * after, ("F0",)),
        (index + 1, ("F0", "F1")),
        (after, ("B1", "F1")),
        (alone, ("F0", "B1", "F1B0")),
        (main, ("F0B1", "F1B0")),
        (after, ("B1", "F1B0")),
        (index + 1, ("B1", "B0")),
        (after, ("B0",)),
    )
    stages, come = (index, 2 * ranks - 1 - index), dict[str, int]()

    def next_of(word: str) -> Action:
        come[word] = come.get(word, -1) + 1
        return Action(word[0] == "F", stages[int(word[1])], come[word])

    words = (group for times, groups in phases for group in groups * times)
    groups = (tuple(next_of(group[i : i + 2]) for i in range(0, len(group), 2)) for group in words)
    there = (tuple(action for action in group if action.micro_batch < micro_batches) for group in groups)
    return [group for group in there if group]


def _ends(ranks: int, per_rank: int, micro_batches: int, backward: float) -> float:
    return (ranks - 1) / per_rank


def _dual_pipe_v_waits(ranks: int, per_rank: int, micro_batches: int, backward: float) -> float:
    return waits_of("dualpipev", ranks, per_rank, min(micro_batches, 2 * ranks), backward)  # more add none


_ANY = 2**31
SCHEDULES = {
    "1f1b": Schedule(least=1, most=1, rank_of=_in_a_circle, order=_one_forward_one_backward, waits=_ends),
    "interleaved": Schedule(least=2, most=_ANY, rank_of=_in_a_circle, order=_interleaved, waits=_ends),
    "dualpipev": Schedule(
        least=2, most=2, rank_of=_there_and_back, order=_dual_pipe_v, waits=_dual_pipe_v_waits, pairs=True
    ),
}


AUTO = "auto"
"""The word for the first schedule that is made for the stages of a rank."""


def has_stages(ranks: int, word: str) -> bool:
    """Whether a config with so many ranks along pp has stages: one rank has, if its schedule goes there and back."""
    return ranks > 1 or (word != AUTO and SCHEDULES[word].pairs)


def schedule_of(word: str, per_rank: int) -> tuple[str, int]:
    """The schedule, and the stages of a rank, of a config; 1 stays as it is, or is the only number of the schedule.

    Raises:
        ConfigError: the schedule is not made for so many.
    """
    if word == AUTO:
        return next(name for name, each in SCHEDULES.items() if each.has(per_rank)), per_rank
    of = SCHEDULES[word]
    if of.has(per_rank):
        return word, per_rank
    only = of.least == of.most
    if only and per_rank == 1:
        return word, of.least
    raise ConfigError(
        "pipeline.stages_per_rank", per_rank, f"pipeline.schedule={word} has {of.least}{'' if only else ' or more'}",
        f"Use pipeline.stages_per_rank={of.least}, or pipeline.schedule=auto",
    )  # fmt: skip


@cache
def _stages_of(schedule: str, index: int, ranks: int, per_rank: int) -> tuple[int, ...]:
    rank_of = SCHEDULES[schedule].rank_of
    return tuple(stage for stage in range(ranks * per_rank) if rank_of(stage, ranks) == index)


@cache  # a search asks for each layout
def _paired(schedule: str, ranks: int, per_rank: int, micro_batches: int) -> float:
    order = SCHEDULES[schedule].order
    groups = [group for index in range(ranks) for group in order(index, ranks, per_rank, micro_batches)]
    return sum(len(group) for group in groups if len(group) > 1) / sum(map(len, groups))


_STEADY = 4  # times the ranks; by then the first backwards have begun, and the last ones are not near


def steady(ranks: int, micro_batches: int) -> int:
    """So few micro-batches that a step with all of them only repeats what one with these does: one comes, one goes."""
    return micro_batches - max(0, micro_batches // ranks - _STEADY) * ranks


@cache  # a search asks for each layout
def _in_flight(
    schedule: str, index: int, ranks: int, per_rank: int, micro_batches: int, layers: tuple[int, ...]
) -> tuple[int, ...]:
    now = dict.fromkeys(_stages_of(schedule, index, ranks, per_rank), 0)
    weight = dict(zip(now, layers, strict=True))
    most, total, highest = tuple(now.values()), (0, 0), (0, 0)  # layers, micro-batches
    for action in chain.from_iterable(SCHEDULES[schedule].order(index, ranks, per_rank, micro_batches)):
        change = 1 if action.is_forward else -1
        now[action.stage] += change
        total = total[0] + change * weight[action.stage], total[1] + change
        if total > highest:
            most, highest = tuple(now.values()), total
    return most


def simulated(pipeline: Pipeline, micro_batches: int) -> list[tuple[int, Action]]:
    """All actions of a step as (index along pp, action), in an order in which each has what it needs.

    Raises:
        PlanError: ranks would wait for each other, or one computes something twice or not at all.
    """
    groups = [pipeline.groups(index, micro_batches) for index in range(pipeline.ranks)]
    last, done, run = len(pipeline.stages) - 1, set[Action](), list[tuple[int, Action]]()
    at_once = pipeline.overlap != NONE  # what both of a pair need is received before
    pending = [deque(own if at_once else [(action,) for action in chain.from_iterable(own)]) for own in groups]
    ready, waiting = deque(range(pipeline.ranks)), dict[Action, list[int]]()  # each action -> ranks that wait for it
    while ready:
        index = ready.popleft()
        while own := pending[index]:
            needs = chain.from_iterable(_needs(action, last) for action in own[0])
            if (missing := next((need for need in needs if need not in done), None)) is not None:
                waiting.setdefault(missing, []).append(index)
                break
            for action in own.popleft():
                done.add(action)
                run.append((index, action))
                ready.extend(waiting.pop(action, ()))
    if any(pending):
        rule = f"ranks would wait for each other after {len(run)} of {sum(map(len, chain(*groups)))} steps"
        raise PlanError("pipeline.schedule", pipeline.schedule, rule, "Use 1f1b")
    wanted = 2 * len(pipeline.stages) * micro_batches
    if len(done) != wanted or len(run) != wanted:
        rule = f"has {len(run)} forwards and backwards, {wanted} are needed"
        raise PlanError("pipeline.schedule", pipeline.schedule, rule, "Use 1f1b")
    return run


@cache
def waits_of(schedule: str, ranks: int, per_rank: int, micro_batches: int, backward: float) -> float:
    """`Schedule.waits`, by running the order: how much later the last rank ends than without waiting."""
    stages = ranks * per_rank
    pipeline = Pipeline(schedule=schedule, ranks=ranks, stages=(Stage(units=()),) * stages)
    ends, free = dict[Action, float](), [0.0] * ranks
    for index, action in simulated(pipeline, micro_batches):
        start = max([free[index], *(ends[need] for need in _needs(action, stages - 1))])
        ends[action] = free[index] = start + (1.0 if action.is_forward else backward)
    whole = per_rank * (1.0 + backward)
    return max(free) / whole - micro_batches


def _needs(action: Action, last: int) -> list[Action]:
    """What must have been computed before."""
    is_forward, stage, number = action
    if is_forward:
        return [Action(True, stage - 1, number)] if stage else []
    forward = Action(True, stage, number)
    return [forward] if stage == last else [forward, Action(False, stage + 1, number)]


def stage_of(pipeline: Pipeline, path: str) -> int | None:
    """The stage that holds the module or weight at `path`; None: no unit has it."""
    return next((i for i, stage in enumerate(pipeline.stages) if stage.holds(path)), None)


def crossings_of(pipeline: Pipeline) -> Iterator[tuple[int, float]]:
    """(stage, numbers per token that it receives), of each stage but the first one."""
    for i, stage in enumerate(pipeline.stages[1:], 1):
        yield i, sum(crossing.numbers for crossing in stage.receives)
