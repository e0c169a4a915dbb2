"""Whether the ranks of a pipeline, as they were seen one by one, would run together: every send has its receive.

What was seen of a rank is a program: it posts messages, takes part in collectives, and waits. The programs are run
against each other as strictly as any back end does, with rules that NCCL and gloo keep and, in parts, relax:
  1. In a group a rank does one thing after another, in the order in which it began them.
  2. A message is done when both ranks have come to it: no back end has to keep it in between. Both must say that it is
     the same: of the same stage and micro-batch, shape and dtype.
  3. A collective is done when all rehearsed ranks of its group have come to it, and a rank goes on after it alone.
  4. A rank goes on after a wait when the message is done.
If no rank can go on, they would wait for each other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEND, RECEIVE = "send", "recv"
MESSAGES = (SEND, RECEIVE)
Seen = Mapping[str, Any]
"""`moecompile.runtime.rehearsal.Seen`, as a dict."""


@dataclass
class _Rank:
    """A program and how far it has come. place: along pp. queues: group -> what has begun there and is not done.

    at: the next entry of `sent`; waits: those before it that are not over.
    """

    rank: int
    place: int
    sent: Sequence[Mapping[str, Any]]
    waits: deque[tuple[int, int]]
    at: int = 0
    queues: defaultdict[str, deque[int]] = field(default_factory=lambda: defaultdict(deque))
    done: set[int] = field(default_factory=set)

    @property
    def blocked(self) -> int | None:
        """What it waits for before it goes on; None: nothing."""
        if self.waits and self.waits[0][0] <= self.at:
            return self.waits[0][1]
        before = self.at - 1
        if before >= 0 and self.sent[before]["op"] not in MESSAGES and self.sent[before]["group"]:
            return before
        return None

    def goes_on(self) -> bool:
        """Runs until it has to wait; whether it got anywhere."""
        start = self.at, len(self.waits)
        while True:
            blocked = self.blocked
            if blocked is not None and blocked not in self.done:
                break
            if self.waits and self.waits[0][0] <= self.at:
                self.waits.popleft()
            elif self.at == len(self.sent):
                break
            else:
                if group := self.sent[self.at]["group"]:
                    self.queues[group].append(self.at)
                self.at += 1
        return start != (self.at, len(self.waits))

    def head(self, group: str) -> Mapping[str, Any] | None:
        """What it does in a group now."""
        return self.sent[self.queues[group][0]] if self.queues.get(group) else None

    def finish(self, group: str) -> None:
        self.done.add(self.queues[group].popleft())


def disagreements(seen: Mapping[int, Seen]) -> list[str]:
    """What would go wrong between the ranks of a pipeline, in words; empty if nothing does.

    Args:
        seen: global rank -> what was seen, in the order of the ranks along pp.
    """
    ranks = [
        _Rank(rank, place, of["sent"], deque(map(tuple, of["waits"]))) for place, (rank, of) in enumerate(seen.items())
    ]
    groups: dict[str, list[_Rank]] = {}
    for rank in ranks:
        for name in dict.fromkeys(each["group"] for each in rank.sent if each["group"]):
            groups.setdefault(name, []).append(rank)
    found: list[str] = []
    while not found:
        moved = [rank.goes_on() for rank in ranks]
        for group, members in groups.items():
            found += _meet(group, members, ranks)
        if not any(moved):
            break
    return found or [*_left(ranks)][:1]


def _meet(group: str, members: Sequence[_Rank], ranks: Sequence[_Rank]) -> Iterator[str]:
    """Finishes what the ranks of a group have all come to; yields what they do not agree on."""
    while True:
        heads = [(rank, head) for rank in members if (head := rank.head(group)) is not None]
        pair = next((pair for pair in _pairs(heads, ranks)), None)
        if pair is not None:
            (sender, sent), (receiver, received) = pair
            if _form(sent) != _form(received):
                yield (
                    f"rank {sender.rank} sends {_form(sent)}, and rank {receiver.rank} receives {_form(received)} as "
                    f"message {_number(sender, group, receiver)} between them"
                )
                return
            sender.finish(group)
            receiver.finish(group)
        elif heads and all(head["op"] not in MESSAGES and head["together"] == len(heads) for _, head in heads):
            forms = {(head["op"], head["bytes"]) for _, head in heads}
            if len(forms) > 1:
                texts = (f"{head['op']} of {head['bytes']} B on rank {rank.rank}" for rank, head in heads)
                yield f"a collective over {heads[0][1]['axis']} is {', '.join(texts)}"
                return
            for rank, _ in heads:
                rank.finish(group)
        else:
            return


def _pairs(
    heads: Sequence[tuple[_Rank, Mapping[str, Any]]], ranks: Sequence[_Rank]
) -> Iterator[tuple[tuple[_Rank, Mapping[str, Any]], tuple[_Rank, Mapping[str, Any]]]]:
    """(sender, receiver) of messages that both have come to."""
    of = {rank.rank: head for rank, head in heads}
    for rank, head in heads:
        if head["op"] == SEND:
            other = ranks[head["peer"]]
            theirs = of.get(other.rank)
            if theirs is not None and theirs["op"] == RECEIVE and theirs["peer"] == rank.place:
                yield (rank, head), (other, theirs)


def _form(message: Mapping[str, Any]) -> str:
    """`bfloat16 [1, 4096, 7168] (58720256 B) of micro-batch 3, stage 2 forward`"""
    form = f"{message['form']} ({message['bytes']} B)"
    if not message["message"]:
        return form
    is_forward, stage, number = message["message"]
    return f"{form} of micro-batch {number}, stage {stage} {'forward' if is_forward else 'backward'}"


def _number(sender: _Rank, group: str, receiver: _Rank) -> int:
    return sum(sender.sent[i]["group"] == group and sender.sent[i]["peer"] == receiver.place for i in sender.done)


def _left(ranks: Sequence[_Rank]) -> Iterator[str]:
    """Who waits for what, if some have not ended."""
    waiting = [rank for rank in ranks if rank.blocked is not None and rank.blocked not in rank.done]
    if waiting:
        texts = [f"rank {rank.rank} for {_text(rank.sent[rank.blocked or 0], ranks)}" for rank in waiting]
        yield f"ranks would wait for ever: {'; '.join(texts)}"
    for rank in ranks:
        for group in rank.queues:
            if (head := rank.head(group)) is not None:
                yield f"rank {rank.rank} has {_text(head, ranks)}, which nobody answers"


def _text(entry: Mapping[str, Any], ranks: Sequence[_Rank]) -> str:
    if entry["op"] not in MESSAGES:
        return f"{entry['op']} over {entry['axis']}"
    way = "to" if entry["op"] == SEND else "from"
    return f"{entry['op']} {way} rank {ranks[entry['peer']].rank} of {_form(entry)}"
