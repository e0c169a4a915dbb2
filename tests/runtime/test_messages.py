"""What ranks of a pipeline send and wait for, run against each other: valid orders end, and each way to break one is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moecompile.runtime.messages import disagreements
from moecompile.stages import AUTO, Pipeline, Stage, schedule_of

Programs = dict[int, dict[str, list[Any]]]


def pipeline(ranks: int, per_rank: int, schedule: str = AUTO) -> Pipeline:
    schedule, _ = schedule_of(schedule, per_rank)
    return Pipeline(schedule=schedule, ranks=ranks, stages=(Stage(units=()),) * (ranks * per_rank))


def programs(ranks: int, per_rank: int, micro_batches: int, schedule: str = AUTO) -> Programs:
    """As runtime/pipeline.py has them; global rank 8 is at place 1."""
    of = pipeline(ranks, per_rank, schedule)
    found: Programs = {}
    for place in range(ranks):
        sent: list[Any] = [collective("allreduce", "all", ranks)]
        waits: list[list[int]] = []

        def message(op: str, stage: int, other: int, is_forward: bool, number: int) -> None:
            cut = max(stage, other)
            if of.is_local(cut):
                return
            again = of.goes_back(cut)
            group = f"{'forward' if is_forward else 'backward'}{' again' * again}"
            peer = of.rank_of(other)
            source = stage if op == "send" else other
            form = "bfloat16 [1, 8]"
            sent.append(  # noqa: B023
                {"op": op, "axis": group, "ranks": ranks, "bytes": 16, "group": group, "peer": peer, "form": form,
                 "message": [is_forward, source, number]}
            )  # fmt: skip
            if op == "recv":
                waits.append([len(sent), len(sent) - 1])  # noqa: B023

        for action in of.order(place, micro_batches):
            stage, last = action.stage, len(of.stages) - 1
            before, after = (stage - 1, stage + 1) if action.is_forward else (stage + 1, stage - 1)
            if 0 <= before <= last:
                message("recv", stage, before, action.is_forward, action.micro_batch)
            if 0 <= after <= last:
                message("send", stage, after, action.is_forward, action.micro_batch)
        waits += [[len(sent), i] for i, each in enumerate(sent) if each["op"] == "send"]
        sent.append(collective("allreduce", "all", ranks))
        found[8 * place] = {"sent": sent, "waits": waits}
    return found


def collective(op: str, axis: str, together: int) -> dict[str, Any]:
    return {
        "together": together,
        "op": op,
        "axis": axis,
        "ranks": 2,
        "bytes": 8,
        "group": axis,
        "peer": -1,
        "form": "",
        "message": [],
    }


@pytest.mark.parametrize(
    ("ranks", "per_rank", "micro_batches"),
    [(2, 1, 1), (2, 1, 4), (4, 1, 2), (4, 1, 9), (16, 1, 17), (2, 2, 4), (4, 2, 3), (4, 3, 8), (4, 2, 10)],
)
def test_valid_orders_end(ranks: int, per_rank: int, micro_batches: int) -> None:
    assert disagreements(programs(ranks, per_rank, micro_batches)) == []


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_orders_there_and_back_end(ranks: int) -> None:
    for micro_batches in (*range(1, 2 * ranks + 3), 5 * ranks):
        assert disagreements(programs(ranks, 2, micro_batches, "dualpipev")) == [], micro_batches


def without(program: dict[str, list[Any]], index: int) -> None:
    """Leaves out an entry, and what waits for it."""
    del program["sent"][index]
    program["waits"] = [
        [at - (at > index), of - (of > index)] for at, of in program["waits"] if of != index
    ]  # fmt: skip


def first(program: dict[str, list[Any]], op: str, number: int) -> int:
    return next(i for i, each in enumerate(program["sent"]) if each["op"] == op and each["message"][2] == number)


def drops_a_receive(found: Programs) -> None:
    without(found[8], first(found[8], "recv", 1))


def drops_the_last_receive(found: Programs) -> None:
    without(found[0], max(i for i, each in enumerate(found[0]["sent"]) if each["op"] == "recv"))


def swaps_sends(found: Programs) -> None:
    sent = found[0]["sent"]
    one, other = first(found[0], "send", 0), first(found[0], "send", 1)
    sent[one], sent[other] = sent[other], sent[one]


def sends_another_shape(found: Programs) -> None:
    found[0]["sent"][first(found[0], "send", 2)]["form"] = "bfloat16 [8, 1]"


def sends_another_type(found: Programs) -> None:
    message = found[0]["sent"][first(found[0], "send", 2)]
    message["form"], message["bytes"] = "float32 [1, 8]", 32


def has_one_micro_batch_fewer(found: Programs) -> None:
    found[8] = programs(2, 1, 3)[8]


def waits_before_it_is_known(found: Programs) -> None:
    """Each rank waits until what it has sent is received, before it receives: both at once never end."""
    for rank, group in ((0, "forward"), (8, "backward")):
        sent = [each for each in found[rank]["sent"] if each["group"] != "all"]
        sends = [each for each in sent if each["op"] == "send" and each["group"] == group][:1]
        receives = [each for each in sent if each["op"] == "recv"][:1]
        found[rank] = {"sent": sends + receives, "waits": [[1, 0], [2, 1]]}


def leaves_out_a_collective(found: Programs) -> None:
    del found[8]["sent"][-1]


def leaves_out_all_collectives(found: Programs) -> None:
    program = found[8]
    while any(each["group"] == "all" for each in program["sent"]):
        without(program, next(i for i, each in enumerate(program["sent"]) if each["group"] == "all"))


def sums_other_numbers(found: Programs) -> None:
    found[8]["sent"][-1]["bytes"] = 16


BROKEN: dict[Callable[[Programs], None], str] = {
    drops_a_receive: "rank 0 sends bfloat16 [1, 8] (16 B) of micro-batch 1, stage 0 forward, and rank 8 receives bfloat16 "
    "[1, 8] (16 B) of micro-batch 2, stage 0 forward as message 1 between them",
    drops_the_last_receive: "ranks would wait for ever: rank 0 for allreduce over all; rank 8 for send to rank 0 of "
    "bfloat16 [1, 8] (16 B) of micro-batch 3, stage 1 backward",
    swaps_sends: "rank 0 sends bfloat16 [1, 8] (16 B) of micro-batch 1, stage 0 forward, and rank 8 receives bfloat16 "
    "[1, 8] (16 B) of micro-batch 0, stage 0 forward as message 0 between them",
    sends_another_shape: "rank 0 sends bfloat16 [8, 1] (16 B) of micro-batch 2, stage 0 forward, and rank 8 receives "
    "bfloat16 [1, 8] (16 B) of micro-batch 2, stage 0 forward as message 2 between them",
    sends_another_type: "rank 0 sends float32 [1, 8] (32 B) of micro-batch 2, stage 0 forward, and rank 8 receives bfloat16 "
    "[1, 8] (16 B) of micro-batch 2, stage 0 forward as message 2 between them",
    has_one_micro_batch_fewer: "ranks would wait for ever: rank 0 for recv from rank 8 of bfloat16 [1, 8] (16 B) of "
    "micro-batch 3, stage 1 backward; rank 8 for allreduce over all",
    waits_before_it_is_known: "ranks would wait for ever: rank 0 for send to rank 8 of bfloat16 [1, 8] (16 B) of "
    "micro-batch 0, stage 0 forward; rank 8 for send to rank 0 of bfloat16 [1, 8] (16 B) of micro-batch 0, stage 1 backward",
    leaves_out_a_collective: "ranks would wait for ever: rank 0 for allreduce over all",
    leaves_out_all_collectives: "ranks would wait for ever: rank 0 for allreduce over all; rank 8 for recv from rank 0 of "
    "bfloat16 [1, 8] (16 B) of micro-batch 0, stage 0 forward",
    sums_other_numbers: "a collective over all is allreduce of 8 B on rank 0, allreduce of 16 B on rank 8",
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_what_is_broken_is_told(broken: Callable[[Programs], None]) -> None:
    found = programs(2, 1, 4)
    broken(found)
    assert disagreements(found) == [BROKEN[broken]]


def test_what_nobody_waits_for_is_told() -> None:
    """A message that is sent and not waited for, to a rank that has ended."""
    found = programs(2, 1, 1)
    found[0]["sent"].append({**found[0]["sent"][1], "message": [True, 0, 1]})
    (text,) = disagreements(found)
    assert text.endswith(
        "send to rank 8 of bfloat16 [1, 8] (16 B) of micro-batch 1, stage 0 forward, which nobody answers"
    )
