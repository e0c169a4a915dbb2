"""Stages of a pipeline: ranks equal one process for each schedule and what goes with it; what is forgotten is caught."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.compose import compose_config
from moecompile.passes import cut
from moecompile.runtime import pipeline, stages, strategy
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import NARROW, SHORT

pytestmark = pytest.mark.slow

TINY = ["mesh=cpu_1x4", "mesh.pp=2", "data.vocab_size=300", "data.seq_len=16", "verify.dtype=float64", SHORT, *NARROW]
FOUR = "model.config.num_hidden_layers=4"
DEEPSEEK, LLAMA = ["recipe=deepseek_ep", FOUR], ["model=llama_nano", FOUR]  # its embedding and its head are one weight
LOSSES = ["balance.losses.micro_batch=0.01", "balance.losses.sequence=0.01", "balance.losses.z=0.001"]
FULL, KEPT = "trainer.checkpointing=full", "trainer.checkpointing=keep_exchanges"
DRAWN = ["routing.workload=zipf", *LOSSES]  # choices are drawn, by layer and micro-batch
V, PAIRS = "pipeline.schedule=dualpipev", "pipeline.overlap=exchanges"
AUX = ["balance.losses.sequence=0.01", "balance.losses.z=0.001"]  # beside the bias
EIGHT = "model.config.num_hidden_layers=8"
CASES: dict[str, list[str]] = {
    "1f1b": DEEPSEEK,
    "interleaved, computed again": [*DEEPSEEK, "pipeline.stages_per_rank=2", FULL],
    "reduced each time, a budget": [
        *DEEPSEEK, "trainer.reduce=each", "trainer.gather=layer", "trainer.checkpointing=budget",
        "hardware.memory_gib=0.00505",  # enough for some parts
    ],
    "four stages, one without experts": [*DEEPSEEK, "mesh.pp=4", "trainer.gather=step"],
    "tied": [*LLAMA, *LOSSES],
    "tied, interleaved, drawn, computed again": [*LLAMA, *DRAWN, "pipeline.stages_per_rank=2", FULL],
    "tied, muon": [*LLAMA, "optimizer=muon"],
    "replicas, interleaved, reduced each time": [
        "recipe=qwen3_moe",
        FOUR,
        "mesh.ep=1",
        "mesh.dp_replicate=2",
        "pipeline.stages_per_rank=2",
        "trainer.reduce=each",
    ],
    "streams, hash": ["recipe=deepseek_v4", FOUR],
    "chunks in flight": [*DEEPSEEK, "dispatch.overlap=chunks", "dispatch.chunks=2", KEPT],
    "lent": [*DEEPSEEK, "dispatch.balance=lend"],
    "bf16": [*DEEPSEEK, "trainer.precision=bf16_params", "trainer.reduce=each"],
    "there and back": [*DEEPSEEK, *AUX, V, "data.global_batch_size=32", KEPT],  # 8 micro-batches
    "there and back, tied, drawn, computed again": [*LLAMA, *DRAWN, V, FULL],  # fewer than fill the order
    "pairs, tied, drawn, computed again": [*LLAMA, *DRAWN, V, PAIRS, FULL, "data.global_batch_size=20"],
    "pairs, reduced each time": [
        *DEEPSEEK, V, PAIRS, "trainer.reduce=each", "trainer.gather=step", "dispatch.overlap=chunks", "dispatch.chunks=2",
    ],
    "pairs, adapters": [
        "model=mixtral_8x7b", FOUR, V, PAIRS, FULL, "adapters=lora", "adapters.rank=2", "adapters.train_router=true",
    ],
    "pairs of one rank": [*DEEPSEEK, *AUX, V, PAIRS, "mesh.pp=1", "trainer.gather=layer"],
    "there and back, tied, replicas, reduced each time": [
        *LLAMA, *LOSSES, V, "mesh.ep=1", "mesh.dp_replicate=2", "trainer.reduce=each", "data.global_batch_size=20",
    ],
    "there and back, replicas, reduced each time": [
        "recipe=qwen3_moe", FOUR, V, "mesh.ep=1", "mesh.dp_replicate=2", "trainer.reduce=each", "trainer.gather=layer",
    ],
    "positions split, tied, muon": [*LLAMA, *LOSSES, "mesh.cp=2", "optimizer=muon", KEPT],
    "positions split, pairs": [*DEEPSEEK, *AUX, "mesh.cp=2", V, PAIRS, "data.global_batch_size=32"],
    "weights split, tied, interleaved, drawn, computed again": [
        *LLAMA, *DRAWN, "mesh.tp=2", "pipeline.stages_per_rank=2", FULL,
    ],
    "weights split, tied, pairs, kept": [*LLAMA, *LOSSES, "mesh.tp=2", V, PAIRS, KEPT, "data.global_batch_size=20"],
    "there and back, four ranks, muon": [
        "recipe=deepseek_ep", EIGHT, V, "mesh.pp=4", "optimizer=muon", "data.global_batch_size=20",
    ],
}  # fmt: skip
TWICE = (
    "1f1b", "interleaved, computed again", "tied, muon", "positions split, tied, muon", "streams, hash", "bf16", "there and back",
    "pairs, reduced each time", "there and back, four ranks, muon",
)  # fmt: skip
"""Cases with two steps: each schedule, optimizer and precision, and a router that is balanced."""
PATCHED = Callable[[pytest.MonkeyPatch], None]


def _aux_of_earlier_stages_forgotten(patch: pytest.MonkeyPatch) -> None:
    take = stages.PipelineSteps._take_aux

    def taken(self: Any, stage: int, number: int) -> Any:
        aux = take(self, stage, number)
        return aux if stage == len(self.stages.pipeline.stages) - 1 else None

    patch.setattr(stages.PipelineSteps, "_take_aux", taken)


def _routers_numbered_by_stage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cut, "number_routers", lambda model: None)


def _key_of_the_next_micro_batch(patch: pytest.MonkeyPatch) -> None:
    before = stages.PipelineSteps._before

    def entered(self: Any, action: Any) -> AbstractContextManager[None]:
        return before(self, action) if action.is_forward else nullcontext()

    patch.setattr(stages.PipelineSteps, "_before", entered)


def _norm_over_all_ranks(patch: pytest.MonkeyPatch) -> None:
    clip = strategy.clip_by_global_norm

    def clipped(parameters: Any, most: float, every: Any, **settings: Any) -> Any:
        return clip(parameters, most, every, **{**settings, "stages": 1})

    patch.setattr(strategy, "clip_by_global_norm", clipped)


def _tied_counted_twice(patch: pytest.MonkeyPatch) -> None:
    clip = strategy.clip_by_global_norm

    def clipped(parameters: Any, most: float, every: Any, **settings: Any) -> Any:
        return clip(parameters, most, every, **{**settings, "uncounted": ()})

    patch.setattr(strategy, "clip_by_global_norm", clipped)


def _tied_not_summed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stages._TiedWeights, "sum_gradients", lambda self: None)


def _one_more_forward(patch: pytest.MonkeyPatch) -> None:
    """As a schedule that runs each stage once to learn the shapes."""
    step = pipeline.Stages.step

    def with_one_more(self: Any, keys: Any, steps: Any, after: Any) -> Any:
        steps = pipeline.Steps(**vars(steps))
        forward, seen = steps.forward, set[int]()

        def run(number: int) -> Any:
            if self.passage.stage == 0 and number == 0 and not seen:
                seen.add(0)
                with pytest.raises(pipeline.StageEnded):
                    forward(number)
                self.passage.calls = 0  # else it is an error
            return forward(number)

        steps.forward = run
        return step(self, keys, steps, after)

    patch.setattr(pipeline.Stages, "step", with_one_more)


def _received_is_zero(patch: pytest.MonkeyPatch) -> None:
    receive = pipeline.Wires.receive_live

    def nothing(self: Any, stage: int, key: Any, message: Any = None) -> Any:
        return [torch.zeros_like(t).requires_grad_(t.requires_grad) for t in receive(self, stage, key, message)]

    patch.setattr(pipeline.Wires, "receive_live", nothing)


def _weight_of_one(patch: pytest.MonkeyPatch) -> None:
    """Auxiliary losses of earlier stages count as of one token."""
    backward = pipeline.Stages._backward

    def weighed(self: Any, action: Any, given: Any, *others: Any) -> None:
        if given.kept.aux is not None and given.kept.computed is None:
            given.kept.aux = given.kept.aux / 7
        backward(self, action, given, *others)

    patch.setattr(pipeline.Stages, "_backward", weighed)


def _root_reduced_when_the_last_stage_ends(patch: pytest.MonkeyPatch) -> None:
    made = pipeline.Stages.__init__

    def init(self: Any, *args: Any, **settings: Any) -> None:
        made(self, *args, **settings)
        self.of_root = self.of_root[-1:]

    patch.setattr(pipeline.Stages, "__init__", init)


MUTATIONS: dict[str, tuple[list[str], PATCHED, str]] = {
    "auxiliary losses of earlier stages are forgotten": (CASES["tied"], _aux_of_earlier_stages_forgotten, "gradients"),
    "they are weighed by another number of tokens": (CASES["tied"], _weight_of_one, "gradients"),
    "routers are numbered from 0 in each stage": ([*LLAMA, *DRAWN], _routers_numbered_by_stage, "routes"),
    "a layer that is computed again draws for the next micro-batch": (
        [*LLAMA, *DRAWN, FULL, "mesh.ep=1"], _key_of_the_next_micro_batch, "gradients",  # else shapes differ, which is loud
    ),
    "the norm counts stages as replicas": (CASES["1f1b"], _norm_over_all_ranks, "gradient norm"),
    "a tied weight counts twice in the norm": (CASES["tied"], _tied_counted_twice, "gradient norm"),
    "a tied weight has one stage's part of its gradient": (CASES["tied"], _tied_not_summed, "gradients"),
    "a stage runs once more to learn shapes": (CASES["1f1b"], _one_more_forward, "loads"),
    "embedding and head of one rank are reduced when the head's stage ends": (
        CASES["there and back, tied, drawn, computed again"], _root_reduced_when_the_last_stage_ends, "gradients",
    ),
    "a stage does not get what was sent": (CASES["1f1b"], _received_is_zero, "outputs"),
}  # fmt: skip


def _turns(name: str) -> str:
    return f"{name}: turns"


def _counted_turns(patch: pytest.MonkeyPatch) -> list[int]:
    """Of each pair that runs at once, how often one hands over to the other; filled while the patch is there."""
    counts: list[int] = []
    together = pipeline.together

    def counted(*arguments: Any) -> Any:
        baton = together(*arguments)
        counts.append(baton.handed_over)
        return baton

    patch.setattr(pipeline, "together", counted)
    return counts


def _certified(overrides: list[str], folder: Path, steps: int = 1) -> list[Check]:
    folder.mkdir(exist_ok=True)
    config = compose_config([*TINY, *overrides])
    return certify_config(shrink(config, steps)[0], folder)[0]


def _all(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, (name, overrides) in enumerate(CASES.items()):
        with pytest.MonkeyPatch.context() as patch:
            found[_turns(name)] = _counted_turns(patch)
            found[name] = _certified(overrides, folder / f"case-{i}", 1 + (name in TWICE))
    for i, (name, (overrides, change, _)) in enumerate(MUTATIONS.items()):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            try:
                found[name] = _certified(overrides, folder / f"mutation-{i}")
            except Exception as error:
                found[name] = error
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_distributed_test(_all, 4, tmp_path_factory.mktemp("pipeline"), timeout_s=900)[0]


@pytest.mark.parametrize("name", CASES)
def test_stages_equal_one_process(found: Any, name: str) -> None:
    failed = [check for check in found[name] if not check.passed]
    assert not failed, failed
    assert any("gradients of" in check.name for check in found[name])


@pytest.mark.parametrize("name", CASES)
def test_both_of_a_pair_compute_in_turns(found: Any, name: str) -> None:
    turns = found[_turns(name)]
    if PAIRS not in CASES[name]:
        assert not turns
    else:
        assert turns and max(turns) > 2 and min(turns) >= 2  # one after the other would be 2 of each


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_forgotten_is_caught(found: Any, name: str) -> None:
    result = found[name]
    assert not isinstance(result, Exception), result
    assert any(MUTATIONS[name][2] in check.name for check in result if not check.passed), result
