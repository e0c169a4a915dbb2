"""Types: what each value of a lowered graph holds, and where; checked forward and backward, without ranks.

A row of `ROWS` says for each op what it takes and gives, and what its backward takes and gives:

    pack_rows   values X, weights X, codes X, sizes X -> values X/p, source X/p, weights X/p, codes X/p, order X/p
                partial sums X/p, weights X/p -> partial sums X, weights X

`X` is a place, the way from a token to where a value is now; each step of it is a letter of `STEPS`. A step on the left
must be there already; one that is only on the right is made by the op. Places name the choice of experts that rows were
packed or sorted by, so rows of one layer or chunk do not fit the table of another.

What leads to the experts are copies of a token (values), what leads back are parts of its output (partial sums).
Gradients run the other way: the gradient of a copy is a part, and that of a part is a copy. So the dual of a dispatch
is a combine, and the same words type both.

Algorithm:
  1. What a graph is given has the type that its first reader says: expert ids, routing weights, or values of tokens.
  2. Each node, in order: its row, or the rule for ops that compute on each token by itself (`_dense`), gives its type.
     What fits neither is refused, with both types.
  3. What is returned is whole, at its token. An exchange that was started is waited for once.
  4. Backward, from the output: each gradient has the dual of its value's type; the weights of MoE layers get one.
  5. A weight's gradient is summed over the axes along which ranks have other rows at it, except those that own it. This
     must be what the plan reduces (`moecompile.plan.reductions`).
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils.hooks import RemovableHandle

from moecompile.errors import ConfigError, PassError
from moecompile.match.pointwise import is_pointwise, torch_name
from moecompile.match.regions import Region
from moecompile.mesh import Part, axes_that_split, dense_axes, expert_axes
from moecompile.nn import LatentDown, LatentUp, Router, SharedExperts
from moecompile.nn.existing import ExistingMeter, OneHotIds, SkippedIds, WideWeights
from moecompile.nn.experts import RowExperts
from moecompile.nn.identity import IdentityExperts
from moecompile.nn.own_router import OwnCapacity, OwnRouter
from moecompile.nn.padding import MaskRouting
from moecompile.nn.scaled_input import ScaleInput
from moecompile.passes.base import GRAD_TOKEN, experts_calls, is_ours, op_name, reached
from moecompile.plan import EXCHANGES, HALVES, LayerPlan
from moecompile.plan.plan import DENSE, EXPERTS, HEADS, INSIDE, ROUTER, SPLIT

SHOWN = "holds"
"""Key of a node's `meta`: its type in a few words, for listings."""

# -- types ------------------------------------------------------------------------------------------------------------

HOLDS = {
    "values": "hidden states of tokens, or copies of them",
    "outputs": "what one expert returns for a row, without its routing weight",
    "partial sums": "weighted sums over some of a token's experts",
    "weights": "routing weights",
    "ids": "chosen experts",
    "codes": "chosen experts, as they travel",
    "counts": "how many rows go to each expert, rank or node",
    "sizes": "split sizes of an exchange, on the host",
    "order": "which assignment a row is of",
    "source": "which row a copy is of",
    "parameters": "weights of the model",
    "loans": "which expert is in each slot",
    "handle": "what a back end keeps of a dispatch",
    "ticket": "an exchange in flight",
    "grad token": "where weight gradients are collected",
    "constant": "sizes, numbers: the same everywhere",
}
"""What a value holds."""
STEPS = {
    "o": "sorted by expert",
    "p": "packed for the ranks or nodes of an axis",
    "s": "sent over an axis",
    "g": "gathered from all ranks of an axis",
    "b": "in a block as long as that of any rank",
    "t": "this rank's slice of the tokens",
    "c": "a chunk of the tokens",
    "w": "this rank's columns, or heads",
    "r": "a part on each rank of an axis, to be summed",
    "q": "packed or sorted",
}
"""Letters of a place in a rule."""
_FANS = frozenset("opsgbr")  # steps that copy tokens, or leave some out: what comes back over them are parts
_DUAL = {"values": "partial sums", "partial sums": "values", "outputs": "values", "weights": "weights"}
_ON_TOKENS = frozenset(("values", "outputs", "partial sums", "weights", "ids", "codes"))
_ROWS_OF_TOKENS = ("values", "outputs", "partial sums")
_CHOICES = ("ids", "codes", "counts", "sizes")
_NOWHERE = ("constant", "parameters", "grad token", "ticket")


@dataclass(frozen=True)
class Choice:
    """A choice of experts. router: the node that made it ("" the model's own). by: the last node that changed it.
    what: whether experts go by ids, positions (`place`) or slots (`lend`).
    """

    router: str = ""
    by: str = ""
    what: str = "ids"


@dataclass(frozen=True)
class Step:
    """A step of a place. kind: a letter of `STEPS`. axis: that it is for, or which chunk of how many. choice: that rows
    are packed or sorted by.
    """

    kind: str
    axis: str = ""
    choice: Choice | None = None


Place = tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Type:
    """What a value holds, and where.

    Attributes:
        holds: a key of `HOLDS`.
        at: the place.
        same: mesh axes along which ranks have the same.
        choice, number: of ids, codes, counts and split sizes: which choice, of how many experts; of lent weights too.
        form: of counts and split sizes, the op that counted; of what is in flight, its start and the start's arguments;
            of weights, their name.
        axis: of split sizes, the axis that they are for; of counts, the axis that they were sent over.
        parts: of counts of all chunks, those of each.
        wire: whether it is in the precision of the wire.
    """

    holds: str
    at: Place = ()
    same: tuple[str, ...] = ()
    choice: Choice | None = None
    number: int = 0
    form: str = ""
    axis: str = ""
    parts: tuple[Type, ...] = ()
    wire: bool = False

    def __str__(self) -> str:
        """`partial sums at the owner, by expert`."""
        return self.shown()

    def shown(self, *, full: bool = False) -> str:
        """full: with the choice of experts that it depends on, for errors."""
        if self.holds in _NOWHERE:
            return self.holds
        words = [_place_text(self.at)]
        if self.holds in ("counts", "sizes") and self.axis:
            words = [f"{'for' if self.holds == 'sizes' else 'from'} {self.axis}", *words[0].split(", ")[1:]]
        words += [f"the same over {', '.join(self.same)}"] if self.same else []
        words += ["in flight"] if self.form and self.holds in _ON_TOKENS else []
        words += ["as on the wire"] if self.wire else []
        if full:
            words += self._full()
        return f"{self.holds} {', '.join(words)}"

    def _full(self) -> Iterator[str]:
        if self.form:
            yield f"of {self.form}"
        if self.number:
            yield f"of {self.number}"
        choices = [step.choice for step in self.at if step.choice is not None]
        choices += [] if self.choice is None or self.choice in choices else [self.choice]
        for choice in dict.fromkeys(choices):
            yield f"by {choice.what} of {choice.by or 'the model'}"


def _place_text(at: Place) -> str:
    where, more = "at its token", list[str]()
    for step in at:
        end = "node" if step.axis.endswith("_inter") else "owner"
        if step.kind in "ps":
            where, more = (
                f"{'for' if step.kind == 'p' else 'at'} the {end}",
                [word for word in more if word != "by expert"],
            )
        elif step.kind == "q":
            more.append("packed or by expert")
        else:
            more.append(_WORDS[step.kind].format(step.axis or "an axis"))
    return ", ".join([where, *more])


_WORDS = {
    "o": "by expert", "b": "in a block", "t": "cut over {}", "c": "chunk {}", "g": "gathered over {}",
    "w": "columns over {}", "r": "parts over {}",
}  # fmt: skip


def dual(of: Type) -> Type:
    """The type of the gradient of a value: a copy's is a part, and a part's is a copy."""
    return _whole(replace(of, holds=_DUAL[of.holds]))


def _whole(of: Type) -> Type:
    """The sum of all parts of a token is a value."""
    return replace(of, holds="values") if of.holds == "partial sums" and not _is_apart(of) else of


def _is_apart(of: Type) -> bool:
    """Whether it is on rows that have left their token."""
    return any(step.kind in _FANS for step in of.at)


# -- rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pattern:
    """`values X/p`: what is held, the letter of a place's beginning (empty: no place), the letters of its steps."""

    holds: str
    place: str
    steps: str
    may_lack: bool

    @property
    def words(self) -> tuple[str, ...]:
        """All that may be held."""
        return _ROWS_OF_TOKENS if self.holds in ("rows", "like") else (self.holds,)

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient goes through it."""
        return self.holds == "rows" or self.holds in _DUAL


_WORD = re.compile(r"(?P<holds>[a-z ]+?)(?: (?P<place>[X-Z])(?P<steps>(?:/[a-z])*))?(?P<lack>\?)?")


@cache
def _patterns(text: str) -> tuple[_Pattern, ...]:
    matches = [_WORD.fullmatch(word.strip()) for word in text.split(",") if word.strip()]
    return tuple(
        _Pattern(match["holds"], match["place"] or "", (match["steps"] or "").replace("/", ""), bool(match["lack"]))
        for match in matches
        if match is not None
    )


@dataclass(frozen=True)
class Row:
    """The rule of an op.

    forward: what its tensors hold, and where: those it is given -> those it returns. `rows` are values, outputs or
    partial sums, `like` gives a shape alone, and `?` may be missing. backward: gradients, of what it returns -> of what
    it is given. runs: the op of that row's kind that autograd runs. checks: what else must hold. made: what its results
    have beside their places.
    """

    forward: str
    backward: str = ""
    runs: str = ""
    checks: tuple[Callable[[Call], None], ...] = ()
    made: Callable[[Call, Type], Type] | None = None


@dataclass
class Call:
    """A node and what it is given.

    inputs: (name of the parameter, its type) of each tensor, in order. constants: name -> value of all others. bound:
    letter of the rule -> place or step. sources: the node of each input.
    """

    node: Node
    name: str
    layer: LayerPlan
    inputs: list[tuple[str, Type]] = field(default_factory=list)
    sources: list[Node] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None

    @property
    def axis(self) -> str:
        """The mesh axis of an exchange, a cut or a join; of another op, that of its split sizes or counts."""
        sizes = (each.axis for _, each in self.inputs if each.holds in ("sizes", "counts"))
        return str(self.constants.get("axis") or next(sizes, ""))

    @property
    def choice(self) -> Choice | None:
        """The choice of experts that it depends on."""
        return next((each.choice for _, each in self.inputs if each.holds in _CHOICES and each.choice), None)

    def given(self, *holds: str) -> Type:
        """The first input that holds one of these."""
        return next(each for _, each in self.inputs if each.holds in holds)

    def size(self, axis: str) -> int:
        """Ranks along an axis of the EP group."""
        placement = self.layer.placement
        parts = {"inter": placement.nodes, "intra": placement.ep // placement.nodes}
        return parts.get(axis.rpartition("_")[2], placement.ep)

    def refuse(self, rule: str, *got: Type) -> Refused:
        """The error, which names the op and what it is given."""
        given = f", and is given {' and '.join(each.shown(full=True) for each in got)}" if got else ""
        return Refused(f"{self.node.name} ({self.name}) {rule}{given}")


def _apply(call: Call, row: Row) -> list[Type]:
    """What an op with this row returns."""
    takes, gives = map(_patterns, row.forward.split("->"))
    _check_state(call)
    if len(call.inputs) > len(takes) or any(not pattern.may_lack for pattern in takes[len(call.inputs) :]):
        raise call.refuse(f"takes {row.forward.partition(' ->')[0]}", *(each for _, each in call.inputs))
    for pattern, (name, got) in zip(takes, call.inputs, strict=False):
        _fit(call, pattern, name, got)
    for check in row.checks:
        check(call)
    return [_result(call, row, pattern) for pattern in gives]


def _fit(call: Call, pattern: _Pattern, name: str, got: Type) -> None:
    """Binds the letters of a pattern to the place of what is given."""
    words = (*pattern.words, *(("values",) if pattern.holds == "partial sums" and not _is_apart(got) else ()))
    place, fits = got.at, got.holds in words and len(got.at) >= len(pattern.steps)
    for letter in reversed(pattern.steps) if fits else ():
        step, place = place[-1], place[:-1]
        fits = fits and step.kind in ("op" if letter == "q" else letter) and call.bound.setdefault(letter, step) == step
    if not fits or (pattern.place and call.bound.setdefault(pattern.place, place) != place):
        where = (call.bound.get(letter, Step(letter)) for letter in pattern.steps)
        wanted = Type(holds=" or ".join(pattern.words), at=(*call.bound.get(pattern.place, ()), *where))
        raise call.refuse(f"takes as {name} {wanted.shown(full=True)}", got)


def _result(call: Call, row: Row, pattern: _Pattern) -> Type:
    holds = call.inputs[0][1].holds if pattern.holds == "rows" else pattern.holds
    steps = [call.bound.setdefault(letter, _step(call, letter)) for letter in pattern.steps]
    place = (*call.bound[pattern.place], *steps) if pattern.place else ()
    same = next((each.same for _, each in call.inputs if each.holds in _ON_TOKENS), ())
    made = Type(holds=holds, at=place, same=same if holds in _ON_TOKENS else ())
    if holds in (*_CHOICES, "weights", "loans"):
        of = next((each for _, each in call.inputs if each.holds in _CHOICES), call.inputs[0][1])
        made = replace(made, choice=of.choice, number=of.number, form=of.form if holds in ("counts", "sizes") else "")
    return _whole(made if row.made is None else row.made(call, made))


def _step(call: Call, letter: str) -> Step:
    """The step that an op makes."""
    choice = call.choice if letter in "opb" else None
    return Step(letter, "" if letter in "ob" else call.axis, choice)


def _check_state(call: Call) -> None:
    """What is in flight is read by its wait alone; what is as on the wire by exchanges, and by what casts it back."""
    on_tokens = [(name, each) for name, each in call.inputs if each.holds in _ON_TOKENS]
    for name, got in on_tokens:
        if got.form:
            raise call.refuse(f"takes as {name} what has arrived", got)
        if got.wire and call.name not in _ON_THE_WIRE:
            raise call.refuse(f"takes as {name} what is cast back", got)
        if got.same != on_tokens[0][1].same and call.name != "join_tokens":
            raise call.refuse(f"takes {on_tokens[0][0]} and {name} of the same tokens", on_tokens[0][1], got)


# -- what else must hold of a call ------------------------------------------------------------------------------------


def _one_choice(call: Call) -> None:
    """Ids, codes, counts, split sizes and weights are of one choice of experts."""
    chosen = [each for _, each in call.inputs if each.holds in _CHOICES]
    for other in chosen[1:]:
        if other.choice != chosen[0].choice:
            raise call.refuse("takes what depends on one choice of experts", chosen[0], other)
    for weights in (each for _, each in call.inputs if each.holds == "weights"):
        if weights.choice and chosen[0].choice and weights.choice.router != chosen[0].choice.router:
            raise call.refuse("takes the weights of the experts that were chosen", weights, chosen[0])


def _numbers(call: Call) -> None:
    """Numbers of experts, ranks and nodes are those of the ids and of the placement."""
    placement, number = call.layer.placement, call.given("ids", "codes").number
    on_rank = number // placement.ep if call.given("ids", "codes").holds == "ids" else number
    wanted = {
        "num_experts": number, "num_local": on_rank, "num_ranks": placement.ep, "num_nodes": placement.nodes,
        "ranks_per_node": placement.ep // placement.nodes, "num_parts": call.size(call.axis),
    }  # fmt: skip
    for name, value in wanted.items():
        if call.constants.get(name, value) != value:
            raise call.refuse(f"has {name}={call.constants[name]}, where {value} is meant", call.given("ids", "codes"))


def _owner(call: Call) -> None:
    """An exchange crosses an axis that owns experts, with rows that no other rank has."""
    if re.sub("_(inter|intra)$", "", call.axis) not in axes_that_split(Part.EXPERTS):
        raise call.refuse(f"is over {call.axis}, whose ranks do not own different experts")
    for name, got in call.inputs:
        if got.holds in _ON_TOKENS and got.same:
            raise call.refuse(f"takes as {name} tokens of this rank alone (cut_tokens)", got)


def _travels(call: Call) -> None:
    """Rows and split sizes are of one choice, one axis, and the right column."""
    rows, sizes = call.inputs[0][1], call.given("sizes")
    step = next(each for each in reversed(rows.at) if each.kind in "op")
    column = _COLUMNS.get(sizes.form, (None, None))[not call.name.startswith("all_to_all")]
    if sizes.choice != step.choice or call.axis != sizes.axis or step.axis not in ("", sizes.axis):
        raise call.refuse(f"over {call.axis} takes the split sizes of its rows", rows, sizes)
    if column is None or (sizes.form == "count_experts") != (step.kind == "o"):
        raise call.refuse("takes the split sizes of its rows", rows, sizes)
    if call.constants["column"] != column:
        raise call.refuse(f"reads column {call.constants['column']}, where {column} is meant", sizes)


_COLUMNS = {"count_experts": (-1, None), **dict.fromkeys(("count_rows", "count_hops", "onward_counts"), (0, 1))}
"""By the op that counted: the column of rows, and of assignments."""


def _counted_by(*names: str) -> Callable[[Call], None]:
    def check(call: Call) -> None:
        for name, got in call.inputs:
            if got.holds in ("counts", "sizes") and got.form not in names:
                raise call.refuse(f"takes as {name} what {' or '.join(names)} counted", got)

    return check


def _own_counts(call: Call) -> None:
    if call.given("counts").axis:
        raise call.refuse("takes what this rank counted", call.given("counts"))


def _others_counts(call: Call) -> None:
    if not call.given("counts").axis:
        raise call.refuse("takes what other ranks counted", call.given("counts"))


def _whole_ep(call: Call) -> None:
    """One exchange of counts for all ranks of the EP group, or one for each level."""
    axis, form = call.axis, call.given("counts").form
    level = {"count_hops": "_inter", "onward_counts": "_intra"}.get(form, "")
    if axis != f"{call.layer.dispatch.axis}{level}":
        raise call.refuse(f"is over {axis}, where {call.layer.dispatch.axis}{level} is meant", call.given("counts"))


def _all_tokens(call: Call) -> None:
    """A router sees all tokens, before they are cut."""
    if set(call.inputs[0][1].same) != set(call.layer.cut_over):
        raise call.refuse("takes all tokens of the micro-batch", call.inputs[0][1])


def _cuts(call: Call) -> None:
    if call.axis not in call.inputs[0][1].same:
        raise call.refuse(f"cuts what is the same over {call.axis}", call.inputs[0][1])


def _joins(call: Call) -> None:
    rows, like = (each for _, each in call.inputs)
    if rows.at[-1].axis != call.axis or {*rows.same, call.axis} != set(like.same):
        raise call.refuse(f"joins slices over {call.axis}", rows, like)


def _as_sorted(call: Call) -> None:
    """Rows were sorted by the choice that the other input is of."""
    step = call.bound.get("o") or call.bound["q"]
    other = call.given("weights", "counts")
    of_one = other.choice == step.choice if other.holds == "counts" else _router(other.choice) == _router(step.choice)
    if not of_one:
        raise call.refuse("takes rows and the choice of experts that they are sorted by", call.inputs[0][1], other)


def _router(choice: Choice | None) -> str:
    return "" if choice is None else choice.router


def _comes_back(call: Call) -> None:
    rows = call.inputs[0][1]
    if rows.holds == "values" or rows.at[-1].axis != call.axis:
        raise call.refuse(f"brings back over {call.axis} what experts made of rows", rows)


def _narrow(call: Call) -> None:
    """Of the four ways of a step, rows to experts and gradients of what these return are in eight bits, if planned."""
    way = "narrow_gradient" if call.constants["reverse"] else "narrow"
    wanted = {way: call.layer.dispatch.wire.narrow} if call.layer.dispatch.wire.narrow else {}
    given = {name: call.constants[name] for name in ("narrow", "narrow_gradient") if call.constants.get(name)}
    if given != wanted:
        raise call.refuse(f"has {given or 'no format'} for rows on the wire, where {wanted or 'none'} is planned")


def _levels(call: Call) -> None:
    if any(step.kind == "g" and step.axis == call.axis for step in call.inputs[0][1].at):
        raise call.refuse(f"gathers what is not gathered over {call.axis} yet", call.inputs[0][1])


def _gathered_over(call: Call) -> None:
    if call.inputs[0][1].at[-1].axis != call.axis:
        raise call.refuse(f"brings back what came over {call.axis}", call.inputs[0][1])


def _begins_there(call: Call) -> None:
    """Rows that were gathered are of the tokens that were counted."""
    if call.bound["Y"][: len(call.bound["X"])] != call.bound["X"]:
        raise call.refuse("takes counts of the same tokens", call.inputs[0][1], call.given("counts"))


def _is_cast(call: Call) -> None:
    if not call.inputs[0][1].wire:
        raise call.refuse("casts back what is as on the wire", call.inputs[0][1])
    if call.inputs[1][1].wire:
        raise call.refuse("takes the precision of what is not on the wire", call.inputs[1][1])


def _is_not_cast(call: Call) -> None:
    if call.inputs[0][1].wire:
        raise call.refuse("casts what is not cast yet", call.inputs[0][1])


def _by_ids(call: Call) -> None:
    ids = call.given("ids")
    if ids.choice is None or ids.choice.what != "ids" or len(call.constants["positions_E"]) != ids.number:
        raise call.refuse(f"places {len(call.constants['positions_E'])} experts by their ids", ids)


def _pairs(call: Call) -> None:
    """What was sent, and what came from others, of each level."""
    for (_, sent), (_, received) in (call.inputs[:2], call.inputs[2:]):
        if sent.axis or not received.axis or _without_axis(sent) != _without_axis(received):
            raise call.refuse("takes counts, and what other ranks sent of the same", sent, received)


def _without_axis(of: Type) -> Type:
    return replace(of, axis="", parts=tuple(map(_without_axis, of.parts)))


# -- what a result has beside its place -------------------------------------------------------------------------------


def _counted(call: Call, made: Type) -> Type:
    return replace(made, form=call.name) if made.holds == "counts" else made


def _from_others(call: Call, made: Type) -> Type:
    """Counts as they were, sent over an axis."""
    return _sent(call.given("counts"), made.holds, call.axis)


def _sent(counts: Type, holds: str, axis: str) -> Type:
    return replace(counts, holds=holds, axis=axis, parts=tuple(_sent(part, holds, axis) for part in counts.parts))


def _onward(call: Call, made: Type) -> Type:
    counts = call.given("counts")
    return replace(made, form=call.name, number=counts.number // call.layer.placement.nodes)


def _tables(call: Call, made: Type) -> Type:
    received = call.inputs[1 if made.at == call.inputs[1][1].at else 3][1]
    return _sent(received, "sizes", received.axis)


def _for_a_part(call: Call, made: Type) -> Type:
    return replace(made, number=made.number // call.constants["num_parts"]) if made.holds == "codes" else made


def _of_rows(call: Call, made: Type) -> Type:
    """Rows of each expert that are here."""
    number = int(call.constants.get("num_local", call.constants.get("num_experts", 0)))
    return replace(made, number=number, form="") if made.holds == "counts" else made


def _of_local_rows(call: Call, made: Type) -> Type:
    number = made.number // call.layer.placement.ep
    return replace(made, number=number, form="") if made.holds == "counts" else made


def _on_this_rank(call: Call, made: Type) -> Type:
    made = replace(made, number=made.number // call.layer.placement.ep) if made.holds == "ids" else made
    return _as_sent(call, made) if made.holds == "values" else made


def _as_sent(call: Call, made: Type) -> Type:
    return replace(made, wire=call.inputs[0][1].wire)


def _on_the_wire(call: Call, made: Type) -> Type:
    return replace(made, wire=True)


def _cut(call: Call, made: Type) -> Type:
    return replace(made, same=tuple(axis for axis in made.same if axis != call.axis))


def _joined(call: Call, made: Type) -> Type:
    return replace(made, same=call.inputs[1][1].same)


def _joined_columns(call: Call, made: Type) -> Type:
    return replace(made, same=(*made.same, call.axis))


def _positions(call: Call, made: Type) -> Type:
    assert made.choice is not None
    return replace(made, choice=replace(made.choice, what="positions"))


def _slots(call: Call, made: Type) -> Type:
    assert made.choice is not None
    choice = replace(made.choice, what=f"slots of {made.choice.what}", by=call.node.name)
    return replace(made, choice=choice, number=made.number + call.layer.placement.ep * call.constants["slots"])


def _from_all(call: Call, made: Type) -> Type:
    return replace(made, form=call.given("counts").form) if made.holds == "counts" else made


def _routed(call: Call, made: Type) -> Type:
    """A choice by a router of this graph."""
    number = getattr(call.module, "num_experts", 0)
    return replace(made, choice=Choice(call.node.name, call.node.name), number=number if made.holds == "ids" else 0)


def _changed(call: Call, made: Type) -> Type:
    """A choice of which some assignments were dropped."""
    if made.holds not in ("ids", "weights"):
        return made
    before = call.given("ids")
    assert before.choice is not None
    number = call.module.num_experts if isinstance(call.module, IdentityExperts) else before.number
    return replace(made, choice=replace(before.choice, by=call.node.name), number=number if made.holds == "ids" else 0)


def _one_hot(call: Call, made: Type) -> Type:
    return _given_ids(call.layer, made, call.node.name)


def _given_ids(layer: LayerPlan, made: Type, name: str) -> Type:
    number = layer.experts.num_routed + layer.experts.num_identity
    return replace(made, choice=Choice("", name), number=number)


# -- the table --------------------------------------------------------------------------------------------------------

_IDS = (_one_choice, _numbers)
_ONCE = (_one_choice, _owner, _travels)
ROWS: dict[str, Row] = {
    # tokens
    "flatten_tokens": Row("rows X -> rows X", "rows X -> rows X"),
    "unflatten_tokens": Row("rows X, like X -> rows X", "rows X -> rows X"),
    "cut_tokens": Row(
        "values X, weights X, ids X -> values X/t, weights X/t, ids X/t",
        "values X/t, weights X/t -> values X, weights X", runs="gather_slices", checks=(_one_choice, _cuts), made=_cut,
    ),
    "join_tokens": Row(
        "values X/t, like X -> values X", "values X -> values X/t", runs="take_slice", checks=(_joins,), made=_joined
    ),
    "place_ids": Row("ids X -> ids X", checks=(_by_ids,), made=_positions),
    # counts
    "count_experts": Row("ids X -> counts X", checks=_IDS, made=_counted),
    "count_rows": Row("ids X -> codes X, counts X", checks=_IDS, made=_counted),
    "count_hops": Row("ids X -> codes X, counts X", checks=_IDS, made=_counted),
    "count_gathered": Row("ids X -> counts X", checks=_IDS, made=_counted),
    "exchange_counts": Row(
        "counts X -> counts X, sizes X", made=_from_others,
        checks=(_own_counts, _owner, _whole_ep, _counted_by("count_experts", "count_rows", "count_gathered")),
    ),
    "send_counts": Row(
        "counts X -> counts X", made=_from_others,
        checks=(_own_counts, _owner, _whole_ep, _counted_by("count_hops", "onward_counts")),
    ),
    "onward_counts": Row(
        "counts X -> counts X/p/s", checks=(_others_counts, _counted_by("count_hops")), made=_onward
    ),
    "read_tables": Row("counts X, counts X, counts Y, counts Y -> sizes X, sizes Y", checks=(_pairs,), made=_tables),
    # rows to experts, and back
    "permute": Row(
        "values X, ids X, sizes X? -> values X/o, order X/o, counts X/o", "partial sums X/o -> partial sums X",
        runs="sum_slots", checks=(*_IDS, _counted_by("count_experts")), made=_of_rows,
    ),
    "unpermute": Row(
        "outputs X/o, order X/o, weights X -> partial sums X", "values X -> values X/o, weights X",
        runs="unpermute_backward", checks=(_as_sorted,),
    ),
    "pack_rows": Row(
        "values X, weights X, codes X, sizes X -> values X/p, source X/p, weights X/p, codes X/p, order X/p",
        "partial sums X/p, weights X/p -> partial sums X, weights X",
        runs="sum_rows", checks=(*_IDS, _counted_by("count_rows", "count_hops", "onward_counts")), made=_for_a_part,
    ),
    "combine_rows": Row("partial sums X/p, source X/p, like X -> partial sums X", "values X -> values X/p"),
    "regroup": Row(
        "values X/q/s, counts X -> values X/q/s/o, order X/q/s/o, counts X/q/s/o",
        "partial sums X/q/s/o -> partial sums X/q/s",
        runs="ungroup", checks=(_others_counts, _counted_by("count_experts"), _as_sorted), made=_of_local_rows,
    ),
    "ungroup": Row("rows X/o, order X/o -> rows X", "values X -> values X/o"),
    "expand_rows": Row(
        "values X, weights X, codes X -> values X/o, weights X/o, source X/o, order X/o, counts X/o",
        "partial sums X/o, weights X/o -> partial sums X, weights X", runs="sum_rows", checks=_IDS, made=_of_rows,
    ),
    "reduce_rows": Row(
        "outputs X/o, weights X/o, source X/o, like X -> partial sums X", "values X -> values X/o, weights X/o"
    ),
    "sort_assignments": Row(
        "ids X, weights X -> weights X/o, source X/o, order X/o, counts X/o", "weights X/o -> weights X", checks=_IDS,
        made=_of_rows,
    ),
    "sort_received": Row(
        "weights X, codes X -> weights X/o, source X/o, order X/o, counts X/o", "weights X/o -> weights X", checks=_IDS,
        made=_of_rows,
    ),
    "experts": Row("values X/o, counts X/o -> outputs X/o", "values X/o -> partial sums X/o"),
    "experts, fused": Row(
        "values X, counts X/o, source X/o, weights X/o -> partial sums X", "values X -> partial sums X, weights X/o",
        runs="expert_ffn_backward",
    ),
    # exchanges
    "all_to_all": Row(
        "values X/q, sizes X -> values X/q/s", "partial sums X/q/s -> partial sums X/q", runs="all_to_all, reversed",
        checks=(_owner, _travels, _narrow), made=_as_sent,
    ),
    "all_to_all, reversed": Row(
        "rows X/q/s, sizes X -> rows X/q", "values X/q -> values X/q/s", runs="all_to_all",
        checks=(_owner, _travels, _comes_back, _narrow), made=_as_sent,
    ),
    "exchange_assignments": Row(
        "weights X/p, codes X/p, sizes X -> weights X/p/s, codes X/p/s", "weights X/p/s -> weights X/p",
        runs="all_to_all, reversed", checks=(_one_choice, _owner, _travels),
    ),
    "wire_cast": Row("rows X -> rows X", "rows X -> rows X", checks=(_is_not_cast,), made=_on_the_wire),
    "wire_uncast": Row("rows X, like Y -> rows X", "rows X -> rows X", checks=(_is_cast,)),
    # all tokens to all ranks
    "own_tokens": Row("ids X, sizes X -> order X/b", checks=(*_IDS, _counted_by("count_gathered"))),
    "pad_tokens": Row(
        "values X, weights X, ids X, order X/b, sizes X -> values X/b, weights X/b, ids X/b",
        "partial sums X/b, weights X/b -> partial sums X, weights X",
        runs="spread_tokens", checks=(_one_choice, _counted_by("count_gathered")),
    ),
    "spread_tokens": Row(
        "partial sums X/b, order X/b, like X -> partial sums X", "values X -> values X/b", runs="own_block"
    ),
    "all_gather": Row(
        "values X -> values X/g", "partial sums X/g -> partial sums X", runs="reduce_scatter", checks=(_owner, _levels),
        made=_as_sent,
    ),
    "gather_assignments": Row(
        "weights X, ids X -> weights X/g, ids X/g", "weights X/g -> weights X", runs="reduce_scatter",
        checks=(_one_choice, _owner, _levels),
    ),
    "take_local": Row(
        "values Y, weights Y, ids Y, counts X, sizes X -> values Y/o, weights Y/o, source Y/o, order Y/o, counts Y/o",
        "partial sums Y/o, weights Y/o -> partial sums Y, weights Y",
        runs="sum_rows", checks=(*_IDS, _others_counts, _counted_by("count_gathered"), _begins_there), made=_of_rows,
    ),
    "sort_gathered": Row(
        "weights Y, ids Y, counts X, sizes X -> weights Y/o, source Y/o, order Y/o, counts Y/o",
        "weights Y/o -> weights Y",
        checks=(*_IDS, _others_counts, _counted_by("count_gathered"), _begins_there), made=_of_rows,
    ),
    "reduce_scatter": Row(
        "partial sums X/g -> partial sums X", "values X -> values X/g", runs="all_gather",
        checks=(_owner, _gathered_over), made=_as_sent,
    ),
    # lending
    "gather_counts": Row(
        "counts X -> counts X/g, constant", checks=(_own_counts, _owner, _whole_ep, _counted_by("count_experts")),
        made=_from_all,
    ),
    "to_slots": Row("ids X, counts X/g, constant -> ids X, loans X", checks=(_one_choice,), made=_slots),
    # what autograd runs
    "sum_slots": Row("partial sums X/o, order X/o -> partial sums X"),
    "sum_rows": Row("partial sums X/q, source X/q -> partial sums X"),
    "gather_slices": Row("rows X/t -> rows X"),
    "take_slice": Row("rows X -> rows X/t", checks=(_cuts,), made=_cut),
    "own_block": Row("values X, order X/b -> values X/b"),
    # between split linears
    "cut_columns": Row(
        "values X -> values X/w", "values X/w -> values X", runs="join_columns", checks=(_cuts,), made=_cut
    ),
    "join_columns": Row("values X/w -> values X", "values X -> values X/w", runs="cut_columns", made=_joined_columns),
    "sum_ranks": Row("partial sums X/r -> partial sums X", "values X -> values X/r", made=_joined_columns),
    # a dispatch back end
    "dispatch_tokens": Row(
        "values X, ids X, weights X -> values X/p/s, ids X/p/s, weights X/p/s, handle X/p/s",
        "partial sums X/p/s, weights X/p/s -> partial sums X, weights X",
        runs="combine", checks=(*_IDS, _owner), made=_on_this_rank,
    ),
    "combine_tokens": Row(
        "partial sums X/p/s, handle X/p/s, like X -> partial sums X", "values X -> values X/p/s", runs="dispatch_again",
        checks=(_owner, _gathered_over), made=_as_sent,
    ),
}  # fmt: skip
"""By the name of the op. What its letters stand for: `STEPS`."""

MODULES: dict[type[nn.Module], Row] = {
    Router: Row(
        "values X, like X?, like X? -> weights X, ids X, weights X", "weights X, weights X -> values X",
        checks=(_all_tokens,), made=_routed,
    ),
    OwnRouter: Row("ids X, weights X, like X? -> values X"),
    ExistingMeter: Row("ids X, ids X, like X?, like X? -> constant"),
    OwnCapacity: Row(
        "ids X, weights X, like X? -> ids X, weights X", "weights X -> weights X", checks=(_one_choice,), made=_changed
    ),
    MaskRouting: Row(
        "ids X, weights X, like X? -> ids X, weights X", "weights X -> weights X", checks=(_one_choice,), made=_changed
    ),
    IdentityExperts: Row(
        "values X, ids X, weights X -> ids X, values X", "values X -> values X, weights X", checks=(_one_choice,),
        made=_changed,
    ),
    OneHotIds: Row("values X -> ids X", made=_one_hot),
    SkippedIds: Row("ids X, weights X -> ids X", checks=(_one_choice,), made=_changed),
    WideWeights: Row("weights X, like X -> weights X", "weights X -> weights X"),
    ScaleInput: Row("values X, weights X -> values X, weights X", "values X, weights X -> values X, weights X"),
}  # fmt: skip
"""Modules of MoE layers. Other modules follow the rule for ops on tokens."""


def table() -> str:
    """All rules as a Markdown table, an op a row."""
    rows = {f"`{name}`": row for name, row in ROWS.items()} | {kind.__name__: row for kind, row in MODULES.items()}
    lines = ["| op or module | takes -> gives | gradients | autograd runs |", "|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row.forward} | {row.backward} | {f'`{row.runs}`' if row.runs else ''} |")
    return "\n".join(lines) + "\n"


_ON_THE_WIRE = frozenset((
    "wire_cast", "wire_uncast", "all_to_all", "all_to_all, reversed", "all_gather", "reduce_scatter",
    "dispatch_tokens", "combine_tokens",
))  # fmt: skip
_registered: OrderedDict[int, tuple[str, Row]] = OrderedDict()


def register_type(op: Callable[..., Any], forward: str, backward: str = "") -> RemovableHandle:
    """Says what an op of yours takes and gives, for graphs that passes after `lower` insert it in.

    Args:
        op: a function or an op of `torch.ops`. forward, backward: as in a row of the table (docs/understand/types.md).

    Returns:
        A handle, as from `register_pattern`.

    Raises:
        ConfigError: a rule is not written so, or the op has one.
    """
    name = _name_of(op)
    if name in ROWS or name in dict(_registered.values()):
        raise ConfigError("op", name, "has a rule already", "Give the op another name, or remove the other rule")
    for path, text in (("forward", forward), ("backward", backward)):
        for side in text.split("->") if text else ():
            unknown = [each.holds for each in _patterns(side) if each.holds not in (*HOLDS, "rows", "like")]
            if text.count("->") != 1 or len(_patterns(side)) != len(side.split(",")) or unknown:
                rule = "must be like `values X, order X/o -> values X`"
                raise ConfigError(path, text, rule, f"Use {', '.join(HOLDS)}, X to Z, and {', '.join(STEPS)}")
    handle = RemovableHandle(_registered)
    _registered[handle.id] = (name, Row(forward, backward))
    return handle


def _name_of(op: Any) -> str:
    return getattr(op, "__name__", str(op)).split(".")[0]


# -- the checker ------------------------------------------------------------------------------------------------------


def check_types(name: str, region: Region, layers: Sequence[LayerPlan]) -> None:
    """Types every value of a lowered graph, forward and backward, and notes the types in the nodes' `meta`.

    Args:
        name: of the pass that an error is attributed to. layers: of the region, in graph order.

    Raises:
        PassError: something does not fit. The error has the op, what it takes and what it is given.
    """
    try:
        typed = Typed(region.graph, layers)
    except Refused as error:
        raise PassError(name, layers[0].site.fqn, f"types do not fit: {error}") from error
    for node, of in typed.types.items():
        node.meta[SHOWN] = str(of) if isinstance(of, Type) and node.op != "output" else ""


class Refused(Exception):
    """What does not fit, in words."""


class Typed:
    """A lowered graph and the type of each of its values (steps 1 to 4).

    types: a list for a node that returns several tensors. reached: the nodes whose values have a gradient.

    Raises:
        Refused: something does not fit.
    """

    def __init__(self, graph_module: GraphModule, layers: Sequence[LayerPlan]) -> None:
        self.graph_module, self.layers = graph_module, layers
        self.is_placed = any(layer.placement.order for layer in layers)
        self.types: dict[Node, Type | list[Type]] = {}
        self.calls: dict[Node, tuple[Call, Row]] = {}
        targets = list(dict.fromkeys(str(node.target) for node in experts_calls(graph_module)))
        self.experts = {target: layers[min(i, len(layers) - 1)] for i, target in enumerate(targets)}
        self.nearest = {is_back: self._nearest(targets, is_back=is_back) for is_back in (False, True)}
        self.same = layers[0].cut_over
        for node in graph_module.graph.nodes:
            self.types[node] = self._type_of(node)
        self._check_waits()
        self.reached = self._backward()

    # forward

    def _type_of(self, node: Node) -> Type | list[Type]:
        if node.op in ("placeholder", "get_attr", "output"):
            return {"placeholder": self._given, "get_attr": _weight, "output": self._returned}[node.op](node)
        if node.target is operator.getitem and isinstance(made := self.types[node.all_input_nodes[0]], list):
            return self._item(node, made)
        call = self.call(node)
        if (special := _SPECIAL.get(call.name)) is not None and (call.name != "cat" or _is_chunks(call)):
            return special(self, call)
        return self._experts(call) if isinstance(call.module, RowExperts) else self.by_row(call)

    def _item(self, node: Node, made: list[Type]) -> Type:
        source, which = node.args
        if not isinstance(which, int) or not 0 <= which < len(made):
            raise Refused(f"{node.name} reads item {which} of {source}, which returns {len(made)}")
        return made[which]

    def by_row(self, call: Call) -> Type | list[Type]:
        """What a call returns by its row, or by the rule for ops on tokens."""
        if (row := _row_of(call)) is None:
            return _dense(self, call)
        self.calls[call.node] = call, row
        made = _apply(call, row)
        return made if len(made) > 1 else made[0]

    def _nearest(self, targets: Sequence[str], *, is_back: bool) -> dict[Node, str]:
        """The experts that each node leads to first; is_back: the last ones that lead to it."""
        found: dict[Node, str] = {}
        pick = max if is_back else min
        for node in self.graph_module.graph.nodes if is_back else reversed(self.graph_module.graph.nodes):
            nearby = [found[each] for each in (node.all_input_nodes if is_back else node.users) if each in found]
            nearby += [str(node.target)] if node.op == "call_module" and node.target in targets else []
            if nearby:
                found[node] = pick(nearby, key=targets.index)
        return found

    def _given(self, node: Node) -> Type:
        """What the first op that knows its arguments reads it as (step 1), if need be in chunks."""
        itself = reached([node], lambda each: (user for user in each.users if op_name(user) in _CHUNKED))
        for user in (user for each in itself for user in each.users):
            call = self.call(user, typed=False)
            is_known = isinstance(call.module, tuple(MODULES)) or is_ours(user) or call.name.startswith(_BACKENDS)
            for (name, _), source in zip(call.inputs, call.sources, strict=True) if is_known else ():
                if source in itself and name.startswith(("ids", "kept")):
                    return _given_ids(self.layers[0], Type(holds="ids", same=self.same), node.name)
                if source in itself and name.startswith("weights"):
                    return Type(holds="weights", same=self.same, choice=Choice("", node.name))
        return Type(holds="values", same=self.same)

    def call(self, node: Node, *, typed: bool = True) -> Call:
        """A node and what it is given. typed: whether its inputs have types yet."""
        module = self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        call = Call(node, op_name(node) if module is None else type(module).__name__, self.layers[0], module=module)
        names = _names(node, module)
        for name, value in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
            nodes = list(_nodes(value))
            for source in nodes:
                of = self.types.get(source) if typed else Type(holds="values")
                if isinstance(of, list):
                    raise call.refuse(f"takes as {name} one tensor, and is given all that {source.name} returns")
                assert of is not None
                call.inputs.append((name, of))
                call.sources.append(source)
            if not nodes:
                call.constants[name] = value
        nearest = self.nearest[bool(call.constants.get("reverse"))].get(node)
        call.layer = self.layers[0] if nearest is None else self.experts[nearest]
        return call

    def _experts(self, call: Call) -> Type:
        """Experts of one rank, on rows in their order or, fused, on rows that they gather."""
        call.layer = self.experts[str(call.node.target)]
        given = [(source, name, of) for source, (name, of) in zip(call.sources, call.inputs, strict=True)]
        is_fused = any(name in ("source_R", "weights_R") for _, name, _ in given)
        call.name = "experts, fused" if is_fused else "experts"
        order = ("rows", "counts_S", "source_R", "weights_R")
        data = sorted((each for each in given if each[1] in order), key=lambda each: order.index(each[1]))
        call.sources, call.inputs = [source for source, _, _ in data], [(name, of) for _, name, of in data]
        made = _apply(call, ROWS[call.name])
        self.calls[call.node] = call, ROWS[call.name]
        borrowed = [of for _, name, of in given if name == "borrowed"]
        owner = self.graph_module.get_submodule(str(call.node.target))
        own = [of.form for _, name, of in given if name == "given"]
        own = own or [f"{call.node.target}.{name}" for name, _ in owner.named_parameters(recurse=False)]
        if borrowed and [of.form for of in borrowed] != own:
            raise call.refuse(f"borrows {', '.join(of.form for of in borrowed)}, where {', '.join(own)} are meant")
        _check_experts(call, call.inputs[1][1], borrowed, is_placed=self.is_placed)
        for _, name, of in given:
            holds = {"grad_token": "grad token", "given": "parameters", "borrowed": "parameters"}.get(name, of.holds)
            if of.holds != holds or (holds == "grad token" and of.form != str(call.node.target)):
                raise call.refuse(f"takes as {name} {holds} of its own", of)
        return made[0]

    def _returned(self, node: Node) -> Type:
        """Step 3."""
        for source in node.all_input_nodes:
            of = self.types[source]
            for each in of if isinstance(of, list) else [of]:
                is_whole = each.holds in ("values", "weights", "ids", *_NOWHERE) and not each.at and not each.wire
                if not is_whole or (each.holds in _ON_TOKENS and set(each.same) != set(self.same)):
                    wanted = Type(holds="values", same=self.same)
                    raise Refused(f"the graph returns {wanted}, and is given {each.shown(full=True)} ({source.name})")
        return Type(holds="constant")

    def _check_waits(self) -> None:
        for node, of in self.types.items():
            if isinstance(of, list) and of and of[-1].holds == "ticket":
                tokens = [user for user in node.users if user.args[1] == 0]
                waits = [user for token in tokens for user in token.users]
                if len(waits) != 1:
                    raise Refused(f"{node.name} ({op_name(node)}) is waited for {len(waits)} times, not once")

    # backward

    def _backward(self) -> set[Node]:
        """Step 4."""
        found: set[Node] = set()
        for node in reversed(self.types):
            if node.op == "output" or node in found:
                found.update(self._gradients(node, found))
        for node in self.types:
            module = self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, _TRAINED) and node not in found:
                raise Refused(f"{node.name} ({type(module).__name__}) gets no gradient from what the graph returns")
        return found

    def _gradients(self, node: Node, reached: set[Node]) -> Iterator[Node]:
        """The inputs that a node passes a gradient to."""
        if node in self.calls:
            made = self.types[node]
            read = {user.args[1] for user in node.users if user in reached} if isinstance(made, list) else set()
            back = {i: of for i, of in enumerate(made) if i in read} if isinstance(made, list) else {0: made}
            yield from _dual_inputs(*self.calls[node], back)
            yield from (each for each in node.all_input_nodes if self._holds(each) in ("parameters", "grad token"))
        elif op_name(node) not in _NO_GRADIENT | _SIZES and node.target is not getattr:
            yield from (each for each in node.all_input_nodes if self._holds(each) not in _CHOICES)

    def _holds(self, node: Node) -> str:
        of = self.types[node]
        return "" if isinstance(of, list) else of.holds

    # sums of gradients

    def sums(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Step 5: module, or parameter that is an argument -> its class in the plan, and the axes to sum over."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        for node in self.types:
            if node.op != "call_module" or not any(True for _ in self._weights(node)):
                continue
            given = (self.types[source] for source in node.all_input_nodes)
            rows = next(of for of in given if isinstance(of, Type) and of.holds in _ON_TOKENS)
            module, is_cut = (
                self.graph_module.get_submodule(str(node.target)),
                any(step.kind == "t" for step in rows.at),
            )
            kind = EXPERTS if isinstance(module, RowExperts) else ROUTER if isinstance(module, Router) else DENSE
            kind = INSIDE if kind == DENSE and is_cut else kind
            found[str(node.target)] = kind, sum_axes(rows, owned=(Part.EXPERTS,) if kind == EXPERTS else ())
        return found

    def _weights(self, node: Node) -> Iterator[object]:
        yield from self.graph_module.get_submodule(str(node.target)).parameters()
        yield from (each for each in node.all_input_nodes if self._holds(each) == "parameters")


def sum_axes(rows: Type, *, owned: tuple[Part, ...] = ()) -> tuple[str, ...]:
    """Axes over which the gradient of a weight is summed that is used on these rows.

    All along which ranks have other rows, except those that own it. Experts count in their own factorization.
    """
    axes = expert_axes() if Part.EXPERTS in owned else dense_axes()
    return tuple(axis for axis in axes if axis not in rows.same and axis not in axes_that_split(*owned))


def sums_outside(cut_over: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Class in the plan -> the axes to sum over, of weights outside of MoE layers.

    Args:
        cut_over: the axes along which ranks have the same tokens there.
    """
    tokens = Type(holds="values", same=cut_over)
    heads = Type(holds="values", at=(Step("w", ", ".join(cut_over)),))
    found = {DENSE: sum_axes(tokens)}
    if cut_over:
        found |= {SPLIT: sum_axes(heads, owned=(Part.WEIGHTS,)), HEADS: sum_axes(heads)}
    return found


# -- what a call is given ---------------------------------------------------------------------------------------------

_BACKENDS = ("dispatch_tokens", "combine_tokens")
_CHUNKED = ("split_tokens", "getitem")


def _weight(node: Node) -> Type:
    return Type(holds="parameters", form=str(node.target))


def _names(node: Node, module: nn.Module | None) -> Iterator[str]:
    """Names of positional arguments; the last one is that of all that follow."""
    names: tuple[str, ...] = ()
    if module is not None:
        names = _parameters(type(module).forward)[1:]
    elif is_ours(node) or op_name(node).startswith(_BACKENDS):
        names = _parameters(node.target)
    yield from names
    yield from itertools.repeat(names[-1] if names else "input")


@cache
def _parameters(called: Any) -> tuple[str, ...]:
    schema = getattr(getattr(called, "default", None), "_schema", None)
    names = [each.name for each in schema.arguments] if schema else inspect.signature(called).parameters
    return tuple(name for name in names if name != "mode")


def _nodes(value: object) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _nodes(each)
    elif isinstance(value, dict):
        yield from _nodes(list(value.values()))
    elif isinstance(value, slice):
        yield from _nodes([value.start, value.stop, value.step])


# -- ops that no row describes ----------------------------------------------------------------------------------------


def _split(typed: Typed, call: Call) -> list[Type]:
    (_, of), number = call.inputs[0], call.constants["num_chunks"]
    if of.holds not in ("values", "weights", "ids") or of.form:
        raise call.refuse("cuts values, weights and ids into chunks", of)
    return [replace(of, at=(*of.at, Step("c", f"{i} of {number}"))) for i in range(number)]


def _is_chunks(call: Call) -> bool:
    return any(of.at and of.at[-1].kind == "c" for _, of in call.inputs)


def _cat(typed: Typed, call: Call) -> Type:
    """All chunks in order."""
    first, number = call.inputs[0][1], len(call.inputs)
    whole = replace(first, at=first.at[:-1])
    for i, (_, of) in enumerate(call.inputs):
        wanted = replace(whole, at=(*whole.at, Step("c", f"{i} of {number}")))
        if of != wanted or of.form:
            raise call.refuse(f"joins all chunks in order: {wanted.shown(full=True)}", of)
    return whole


def _join_counts(typed: Typed, call: Call) -> Type:
    """The counts of all chunks, in order."""
    parts, placement = tuple(of for _, of in call.inputs), call.layer.placement
    first = parts[0]
    sizes = {"count_hops": placement.nodes, "onward_counts": placement.ep // placement.nodes}
    if call.constants["num_ranks"] != sizes.get(first.form, placement.ep):
        raise call.refuse(f"has num_ranks={call.constants['num_ranks']}", first)
    for i, of in enumerate(parts):
        at = tuple(Step("c", f"{i} of {len(parts)}") if step.kind == "c" else step for step in of.at)
        if replace(of, at=_no_chunk(of)) != replace(first, at=_no_chunk(first)) or of.at != at or of.axis:
            raise call.refuse(f"joins what each chunk counted, in order: {replace(first, at=at).shown(full=True)}", of)
    return replace(first, at=_no_chunk(first), parts=parts)


def _no_chunk(of: Type) -> Place:
    return tuple(step for step in of.at if step.kind != "c")


def _counts_of_chunk(typed: Typed, call: Call) -> Type:
    (_, of), number = call.inputs[0], call.constants["num_chunks"]
    if len(of.parts) != number or not 0 <= call.constants["chunk"] < number:
        raise call.refuse(f"takes counts of {number} chunks", of)
    return of.parts[int(call.constants["chunk"])]


def _local_weights(typed: Typed, call: Call) -> Type:
    (_, of) = call.inputs[0]
    if of.holds != "parameters" or of.number or call.constants["num_local"] != call.layer.placement.experts_per_rank:
        raise call.refuse(f"takes the weights of {call.layer.placement.experts_per_rank} experts", of)
    return replace(of, number=int(call.constants["num_local"]))


def _lend(typed: Typed, call: Call) -> list[Type]:
    *weights, loans = (of for _, of in call.inputs)
    _owner(call)
    if (
        loans.holds != "loans"
        or any(of.holds != "parameters" or not of.number for of in weights)
        or call.axis != call.layer.dispatch.axis
    ):
        raise call.refuse(f"takes weights of this rank, and loans, over {call.layer.dispatch.axis}", *weights, loans)
    return [replace(of, choice=loans.choice) for of in weights]


def _grad_token(typed: Typed, call: Call) -> Type:
    return Type(holds="grad token", form=str(call.sources[0].target))


def _start(typed: Typed, call: Call) -> list[Type]:
    """What is sent, with the exchange that its wait ends."""
    number = EXCHANGES[call.name.removesuffix("_start")].inputs
    sent = [of for _, of in call.inputs[:number]]
    if any(of.form for of in sent if of.holds in _ON_TOKENS):
        raise call.refuse("takes what has arrived", *sent)
    form = call.node.name
    return [replace(sent[0], form=form, parts=tuple(sent)), Type(holds="ticket", form=form)]


def _wait(typed: Typed, call: Call) -> Type | list[Type]:
    """The exchange itself, of what its start was given."""
    (_, token), (_, ticket) = call.inputs[:2]
    start = next((node for node in typed.types if node.name == token.form), None)
    name = call.name.removesuffix("_wait")
    number = EXCHANGES[name].inputs
    is_its = ticket.holds == "ticket" and ticket.form == token.form
    if start is None or not is_its or op_name(start) != f"{name}_start":
        raise call.refuse("takes what its start returned", token, ticket)
    if call.node.args[2:] != start.args[number:] or call.node.kwargs != start.kwargs:
        raise call.refuse(f"has other arguments than {start.name}: {call.node.args[2:]}, not {start.args[number:]}")
    of_start = typed.call(start)
    whole = Call(
        call.node, name, call.layer, of_start.inputs, list(call.sources[:1]) * len(of_start.inputs), of_start.constants
    )
    return typed.by_row(whole)


_SPECIAL: dict[str, Callable[[Typed, Call], Type | list[Type]]] = {
    "split_tokens": _split, "cat": _cat, "join_counts": _join_counts, "counts_of_chunk": _counts_of_chunk,
    "local_experts": _local_weights, "lend_experts": _lend, GRAD_TOKEN: _grad_token,
    **{start: _start for start, _ in HALVES.values()}, **{wait: _wait for _, wait in HALVES.values()},
}  # fmt: skip

_SIZES = frozenset(("size", "dim", "numel", "shape", "dtype", "device", "ndim", "is_floating_point", "requires_grad"))
_LINEAR = frozenset(
    ("neg", "mul", "div", "truediv", "to", "float", "half", "bfloat16", "double", "type_as", "contiguous")
)
_TRAINED = (Router, RowExperts, SharedExperts, LatentDown, LatentUp)
_NO_GRADIENT = frozenset(("detach", "detach_", "argmax", "argsort", "gt", "ge", "lt", "le", "eq", "ne", "zeros_like"))


def _dense(typed: Typed, call: Call) -> Type:
    """What computes on each token by itself: values stay at their token, and weights of the model are anywhere.

    On rows that have left their token, and on parts, it must be pointwise, and on partial sums linear.
    """
    name = torch_name(call.node, typed.graph_module.get_submodule) or call.name
    data = [of for _, of in call.inputs if of.holds not in _NOWHERE]
    if kept := [of for _, of in call.inputs if of.holds in ("ticket", "grad token")]:
        raise call.refuse("has no use for it", *kept)
    if name in _SIZES or not data:
        weights = [of for _, of in call.inputs if of.holds == "parameters"]
        return Type(holds="parameters" if weights and name not in _SIZES else "constant")
    _check_state(call)
    first, is_by_entry = data[0], is_pointwise(call.node, typed.graph_module.get_submodule) or _is_tagged(name)
    alike = all(replace(of, choice=None) == replace(first, choice=None) for of in data)
    if all(of.holds in ("values", "weights") and not _is_apart(of) for of in data):
        if any(of.at != first.at for of in data):
            raise call.refuse("computes on tokens of one place", *data)
        return first if alike and is_by_entry else Type(holds="values", at=first.at, same=first.same)
    is_row_wise = call.module is not None and len(call.inputs) == 1 and first.holds == "outputs"
    if not (is_by_entry or is_row_wise) or first.holds not in _ON_TOKENS - {"ids", "codes"}:
        raise call.refuse("has no rule (moecompile.register_type) for what is not values of tokens", *data)
    if not alike:
        raise call.refuse("computes on what is alike", *data)
    is_sum = name in ("add", "sub") and len(data) == len(call.node.args)
    if first.holds == "partial sums" and not is_sum and not (name in _LINEAR and len(data) == 1):
        raise call.refuse("is not linear, so it needs whole values", *data)
    return first


@cache
def _is_tagged(name: str) -> bool:
    """Whether torch says of the op of this name that it maps each entry by itself."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.pointwise in getattr(packet, each).tags for each in overloads)


# -- experts, and the backward of a row -------------------------------------------------------------------------------


def _check_experts(call: Call, counts: Type, borrowed: Sequence[Type], *, is_placed: bool) -> None:
    """Rows are those of this rank's experts, each once, in the planned order, and have crossed the whole EP group."""
    placement, dispatch = call.layer.placement, call.layer.dispatch
    crossed = [step.axis for step in counts.at if step.kind in "sg"]
    if len(set(crossed)) != len(crossed) or math.prod(map(call.size, crossed)) != placement.ep:
        raise call.refuse(f"takes rows from all {placement.ep} ranks of the EP group", counts)
    number = placement.experts_per_rank + dispatch.slots * bool(borrowed)
    if counts.number != number:
        raise call.refuse(f"takes rows of {number} experts", counts)
    what = "positions" if is_placed else "ids"
    what = f"slots of {what}" if borrowed else what
    if counts.choice is None or counts.choice.what != what or any(of.choice != counts.choice for of in borrowed):
        raise call.refuse(f"takes rows by {what}, and experts that were lent for them", counts, *borrowed)
    if any(of.same for _, of in call.inputs):
        raise call.refuse("takes each token once", call.inputs[0][1])


def _dual_inputs(call: Call, row: Row, reached: Mapping[int, Type]) -> Iterator[Node]:
    """The inputs that a gradient reaches; the gradient of each is of the dual type.

    Args:
        reached: of the returned tensors, those that have one.
    """
    takes, gives = map(_patterns, row.forward.split("->"))
    left, right = map(_patterns, row.backward.split("->")) if row.backward else ((), ())
    back = Call(call.node, f"backward of {call.name}", call.layer, bound=dict(call.bound))
    have = [i for i, pattern in enumerate(gives) if pattern.has_gradient] if row.backward else []
    for i in have:
        if i in reached:
            _fit(back, left[have.index(i)], "the gradient of its result", dual(reached[i]))
    given = list(zip(takes, call.sources, call.inputs, strict=False)) if row.backward else []
    of_rows = {gives[i].holds == "weights" for i in have}
    got = {gives[i].holds == "weights" for i in have if i in reached}
    for pattern, (source, (name, of)) in zip(right, [each[1:] for each in given if each[0].has_gradient], strict=False):
        _fit(back, pattern, f"the gradient of {name}", dual(of))
        is_weights = of.holds == "weights"
        if got and (is_weights in got or is_weights not in of_rows):
            yield source


def _row_of(call: Call) -> Row | None:
    """The row of an op of ours, of a back end, of a module of MoE layers or of a user's op; None: it has none.

    Raises:
        Refused: it must have one.
    """
    if call.module is not None:
        return next((row for kind, row in MODULES.items() if isinstance(call.module, kind)), None)
    users = dict(_registered.values())
    if call.node.op != "call_function" or not (is_ours(call.node) or call.name.startswith(_BACKENDS)):
        return users.get(call.name)
    if call.name == "all_to_all" and call.constants["reverse"]:
        call.name = "all_to_all, reversed"
    if call.name not in ROWS:
        raise call.refuse("has no rule: it needs a row in moecompile/passes/types.py")
    return ROWS[call.name]
