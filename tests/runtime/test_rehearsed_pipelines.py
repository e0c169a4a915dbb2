"""Rehearsed ranks of a pipeline do what ranks that train do, and what is wrong in the executor is found without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moecompile.mesh import Part
from moecompile.planner.pipeline import ranks_of
from moecompile.runtime.messages import disagreements
from moecompile.runtime.pipeline import Stages, Wires
from moecompile.runtime.rehearsal import Fake
from moecompile.tasks import rehearse as task
from moecompile.tasks.ranks.rehearse import FOLDER, rehearse_all, result_of
from tests import forked
from tests.distributed.harness import run_distributed_test
from tests.runtime.test_rehearsal import TINY, described, trained_by

pytestmark = pytest.mark.slow

TWO = ["mesh.pp=2", "mesh.ep=2", "data.global_batch_size=16"]
CASES = {
    "1f1b": [*TINY, *TWO],
    "interleaved": [
        *TINY, *TWO, "model.config.num_hidden_layers=4", "pipeline.stages_per_rank=2", "trainer.reduce=each",
        "trainer.gather=step", "trainer.checkpointing=full",
    ],
    "tied": ["model=llama_nano", "balance.losses.z=0.001", *TINY[2:], "mesh=cpu_1x4", *TWO, "trainer.gather=layer"],
    "there and back": [
        *TINY, *TWO, "model.config.num_hidden_layers=4", "pipeline.schedule=dualpipev", "trainer.reduce=each",
        "trainer.gather=layer", "data.global_batch_size=32", "pipeline.overlap=exchanges",
    ],
    "there and back, tied": [
        "model=llama_nano", "model.config.num_hidden_layers=4", "balance.losses.z=0.001", *TINY[2:], "mesh=cpu_1x4",
        *TWO, "pipeline.schedule=dualpipev", "trainer.gather=step", "trainer.checkpointing=full",
        "pipeline.overlap=exchanges",
    ],
    "there and back, four ranks": [
        *TINY, "model.config.num_hidden_layers=8", "mesh.pp=4", "data.global_batch_size=40",
        "pipeline.schedule=dualpipev",
    ],
    "positions split": [*TINY, *TWO, "mesh.cp=2", "model.config.num_hidden_layers=4", "pipeline.stages_per_rank=2"],
    "weights split, tied": [
        "model=llama_nano", "balance.losses.z=0.001", *TINY[2:], "mesh=cpu_1x4", *TWO, "mesh.tp=2", "trainer.gather=layer",
    ],
    "four stages": [*TINY, "model.config.num_hidden_layers=4", "mesh.pp=4", "data.global_batch_size=12"],
}  # fmt: skip
Results = dict[str, dict[int, dict[str, Any]]]


def drops_a_receive() -> Any:
    whole = Wires.receive_live

    def receive(self: Wires, stage: int, key: Any, message: Any) -> list[Tensor]:
        if message[2] != 1:
            return whole(self, stage, key, message)
        return [torch.empty(shape, dtype=dtype).requires_grad_() for shape, dtype, _ in self._shapes[stage, key]]

    return mock.patch.object(Wires, "receive_live", receive)


def swaps_two_sends() -> Any:
    whole, held = Wires.send_live, list[Any]()

    def send(self: Wires, tensors: Any, stage: int, key: Any, message: Any) -> None:
        if message[2] == 0:
            held.append((tensors, stage, key, message))
            return
        whole(self, tensors, stage, key, message)
        if held:
            whole(self, *held.pop())

    return mock.patch.object(Wires, "send_live", send)


def sends_another_shape() -> Any:
    """Of as many bytes."""
    whole = Wires.send

    def send(self: Wires, tensors: Any, stage: int, message: Any, *, is_forward: bool) -> None:
        if message[2] == 1 and not is_forward:
            tensors = [tensor.transpose(0, 1) if tensor.ndim > 1 else tensor for tensor in tensors]
        whole(self, tensors, stage, message, is_forward=is_forward)

    return mock.patch.object(Wires, "send", send)


def has_one_micro_batch_fewer() -> Any:
    whole = Stages.step

    def step(self: Stages, keys: Any, *others: Any) -> Any:
        return whole(self, keys[: len(keys) - self.index], *others)

    return mock.patch.object(Stages, "step", step)


def never_tells_shapes() -> Any:
    return mock.patch.object(Fake, "tells", lambda self, stage, shapes: None)


BROKEN: dict[Callable[[], Any], str] = {
    drops_a_receive: "rank 0 sends float32 [2, 64, 128] (65536 B) of micro-batch 1, stage 0 forward, and rank 2 receives "
    "float32 [2, 64, 128] (65536 B) of micro-batch 2, stage 0 forward as message 2 between them",
    swaps_two_sends: "rank 0 sends int64 [1, 11] (88 B) of micro-batch 1, stage 0 forward, and rank 2 receives int64 "
    "[1, 11] (88 B) of micro-batch 0, stage 0 forward as message 0 between them",
    sends_another_shape: "rank 2 sends float32 [64, 2, 128] (65536 B) of micro-batch 1, stage 1 backward, and rank 0 "
    "receives float32 [2, 64, 128] (65536 B) of micro-batch 1, stage 1 backward as message 3 between them",
    has_one_micro_batch_fewer: "ranks would wait for ever: rank 0 for recv from rank 2 of float64 [] (8 B) of micro-batch 2, "
    "stage 1 backward; rank 2 for objects over pp",
}


def _rehearse(folder: Path, overrides: list[str], ranks: list[int]) -> dict[int, dict[str, Any]]:
    config, plan, _, _ = described(overrides, base=[])
    (folder / FOLDER).mkdir(parents=True)
    rehearse_all(config, plan, ranks, 1.0, folder)
    files = {rank: result_of(folder, rank) for rank in ranks}
    return {rank: json.loads(file.read_text()) for rank, file in files.items() if file.exists()}


def _places(overrides: list[str]) -> list[int]:
    """All four ranks, those of a pipeline first."""
    _, plan, _, _ = described(overrides, base=[])
    return list(dict.fromkeys((*plan.mesh.group(Part.LAYERS), *range(4))))


def _rehearsals(sender: Any, folder: Path) -> None:
    found: Results = {name: _rehearse(folder / name, each, _places(each)) for name, each in CASES.items()}
    for broken in (*BROKEN, never_tells_shapes):
        with broken():
            found[broken.__name__] = _rehearse(folder / broken.__name__, CASES["1f1b"], [0, 2])
    sender.send(found)


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Results:
    receiver, sender = forked.context.Pipe(duplex=False)
    process = forked.context.Process(target=_rehearsals, args=(sender, tmp_path_factory.mktemp("rehearsed")))
    forked.start(process)
    sender.close()
    found: Results = receiver.recv()
    process.join()
    return found


@pytest.mark.parametrize("name", CASES)
def test_ranks_send_and_hold_what_the_plan_says(rehearsals: Results, name: str) -> None:
    _, plan, facts, run = described([*CASES[name], "rehearse.micro_batches=3"], base=[])
    assert plan.pipeline is not None
    seen = rehearsals[name]
    ranks = [seen[rank] for rank in plan.mesh.group(Part.LAYERS)]
    compared = [task._compared(each, of, plan, run) for each, of in zip(ranks, ranks_of(plan, facts), strict=True)]
    assert [text for each in compared for text in each.differs] == []
    rows = [row for each in compared for row in each.sent if row.axis == "pp" and row.planned is not None]
    assert rows and all(row.seen == row.planned for row in rows)
    assert [*task.first_differences([*seen.values()], plan)] == []
    together = {each["rank"]: each["seen"] for each in ranks}
    assert disagreements(together) == []
    messages = [each for of in together.values() for each in of["sent"] if each["op"] == "send"]
    assert messages and all(each["group"] and each["form"] and each["message"] for each in messages)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_what_is_broken_is_told(rehearsals: Results, broken: Callable[[], Any]) -> None:
    found = rehearsals[broken.__name__]
    assert disagreements({rank: each["seen"] for rank, each in found.items()}) == [BROKEN[broken]]


def test_a_rank_that_is_told_nothing_says_so(rehearsals: Results) -> None:
    error = rehearsals["never_tells_shapes"][2]["error"]
    assert error == "waits for what crosses the cut before stage 1, and rank 0 has ended its step"


# -- beside ranks that train ------------------------------------------------------------------------------------------


def trained(rank: int, world_size: int, folder: str) -> Results:
    return {name: trained_by(each, Path(folder)) for name, each in CASES.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_distributed_test(trained, 4, str(tmp_path_factory.mktemp("ranks")), timeout_s=400)


@pytest.mark.parametrize("name", CASES)
def test_they_do_what_four_ranks_do(ranks: list[Any], rehearsals: Results, name: str) -> None:
    """The same collectives, messages and waits in the same order; the same bytes where routing does not decide."""

    def form(seen: dict[str, Any]) -> list[Any]:
        sent = [{**each, "group": "", "together": 0} for each in seen["sent"]]
        for each in sent:
            if task.KINDS.get(each["op"]) == task.ROWS or each["op"] == "broadcast":
                each["bytes"] = 0
        return [*sent, seen["waits"]]

    for rank, each in enumerate(ranks):
        ours, theirs = rehearsals[name][rank], each[name]
        assert form(ours["seen"]) == form(theirs["seen"])
        assert ours["optimizer"] == theirs["optimizer"]
        made = [max(moment["peak"] for moment in of["seen"]["moments"]) - of["seen"]["start"] for of in (ours, theirs)]
        assert made[0] == pytest.approx(made[1], rel=0.06)  # rows are not balanced there
