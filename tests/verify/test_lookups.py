"""task=verify of tables whose rows are spread: every rule of stepping is right, and silent bugs are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.compose import compose_config
from moecompile.ops import lookups
from moecompile.runtime import gradients, row_steps
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import SHORT

SMALL = [
    "model.factory=tests.table_models:build", "experts.num_routed=4", "routing.top_k=2", "data.vocab_size=300",
    "data.seq_len=16", "data.micro_batch_size=2", "data.global_batch_size=8", "verify.dtype=float64", SHORT,
    "embeddings.shard=ep", "embeddings.min_numbers=300", "optimizer.lr=0.01",
]  # fmt: skip
TWO = ["mesh=cpu_1x2"]
FOUR = ["mesh=cpu_2x2", "mesh.ep=2", "mesh.dp_replicate=2", "trainer.checkpointing=full", "trainer.reduce=each"]
TP = ["mesh=cpu_1x4", "mesh.ep=2", "mesh.tp=2", "embeddings.shard=auto", "embeddings.optimizer=lazy_adamw"]
ONE = "data.global_batch_size=4"  # of two ranks
LAYERED = ["model.factory=tests.table_models:Layered", "mesh=cpu_1x4", "mesh.pp=2", "data.global_batch_size=16"]
STAGES = {
    "interleaved": [*LAYERED, "pipeline.stages_per_rank=2", "trainer.checkpointing=full",
                    "embeddings.optimizer=rowwise_adagrad"],
    "dualpipev": [*LAYERED, "mesh.ep=2", "pipeline.schedule=dualpipev", "pipeline.overlap=exchanges",
                  "trainer.reduce=each", "embeddings.optimizer=lazy_adamw"],
    "one micro-batch": ["mesh=cpu_1x4", "mesh.pp=2", ONE, "embeddings.optimizer=lazy_adamw"],
}  # fmt: skip
RULES = ("same", "lazy_adamw", "rowwise_adagrad")
Patch = Callable[[pytest.MonkeyPatch], None]


def rows_of_a_rank_rounded_down(patch: pytest.MonkeyPatch) -> None:
    """The owner of a row is another one than has it, if ranks do not divide the rows."""
    patch.setattr(lookups, "rows_of_a_rank", lambda rows, ranks: max(1, rows // ranks))


def repeated_ids_counted_once(patch: pytest.MonkeyPatch) -> None:
    """Of the tokens that read a row, the gradient of the last one alone."""

    def wrong(rows: Tensor, index: Tensor, num_out: int) -> Tensor:
        return rows.new_zeros(num_out, rows.shape[1]).index_copy(0, index, rows)

    patch.setattr(lookups, "sum_by", wrong)


def padding_row_trained(patch: pytest.MonkeyPatch) -> None:
    right = lookups.summed_by_row
    patch.setattr(lookups, "summed_by_row", lambda grad, ids, padding: right(grad, ids, -1))


def norm_of_one_shard(patch: pytest.MonkeyPatch) -> None:
    """Squares of shards are divided by the ranks, as those of weights that every rank has."""
    patch.setattr(gradients, "_num_shards", lambda parameter: 1)


def only_the_last_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Gradients by rows of earlier micro-batches are forgotten."""
    patch.setattr(lookups.RowGradients, "add", lambda self, *part: setattr(self, "_parts", [part]))


def rows_stepped_without_decay(patch: pytest.MonkeyPatch) -> None:
    right = row_steps.step_rows

    def wrong(weight: Tensor, grads: Any, state: dict[str, Any], group: Any) -> None:
        right(weight, grads, state, {**group, "weight_decay": 0.0})

    patch.setattr("moecompile.runtime.moments.step_rows", wrong)


def steps_of_a_row_counted(patch: pytest.MonkeyPatch) -> None:
    """The first moment is corrected as if every step were the first."""
    right = row_steps._lazy_adamw
    rule = row_steps.RowRule.lazy_adamw
    patch.setitem(row_steps._RULES, rule, lambda grad, parts, step, group: right(grad, parts, torch.ones(()), group))


def rows_of_a_pipeline_zeroed(patch: pytest.MonkeyPatch) -> None:
    """A pipeline has its gradients before Lightning zeroes the old ones."""
    patch.setattr(lookups.RowGradients, "exchange", lambda self, parts: parts)


MUTATIONS: dict[Patch, tuple[str, str]] = {
    rows_of_a_rank_rounded_down: ("same", "outputs"),
    repeated_ids_counted_once: ("same", "gradients of dense"),
    padding_row_trained: ("same", "gradients of dense"),
    norm_of_one_shard: ("same", "gradient norm"),
    only_the_last_micro_batch: ("lazy_adamw", "gradients of dense"),
    rows_stepped_without_decay: ("rowwise_adagrad", "weights"),
    steps_of_a_row_counted: ("lazy_adamw", "weights"),
}
"""Mutation -> the rule under which it shows, and part of the name of a check that has to fail."""


def _certified(folder: Path, overrides: Sequence[str]) -> list[Check]:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    config = shrink(compose_config([*SMALL, *overrides]), steps=2)[0]
    if ONE in overrides:  # Lightning zeroes gradients in the step that has them
        config = replace(config, data=replace(config.data, global_batch_size=4))
    return certify_config(config, folder)[0]


def _on_two(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {rule: _certified(folder / rule, [*TWO, f"embeddings.optimizer={rule}"]) for rule in RULES}
    for mutation, (rule, _) in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            name = mutation.__name__
            try:
                found[name] = _certified(folder / name, [*TWO, f"embeddings.optimizer={rule}"])
            except IndexError:  # a rank is asked for a row that it does not have: on all ranks, or none could go on
                found[name] = [Check(name="outputs", error=1, tolerance=0, passed=False)]
    return found


def _on_four(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {rule: _certified(folder / rule, [*FOUR, f"embeddings.optimizer={rule}"]) for rule in RULES}
    found |= {name: _certified(folder / name, overrides) for name, overrides in STAGES.items()}
    with pytest.MonkeyPatch.context() as patch:
        rows_of_a_pipeline_zeroed(patch)
        found["zeroed"] = _certified(folder / "zeroed", STAGES["one micro-batch"])
    return found | {"tp": _certified(folder / "tp", TP)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    return run_distributed_test(_on_two, 2, tmp_path_factory.mktemp("two"), timeout_s=400)[0]


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_compute_what_one_does(rule: str, two: dict[str, list[Check]]) -> None:
    assert [check for check in two[rule] if not check.passed] == []
    assert len(two[rule]) > 12


@pytest.mark.slow
def test_four_ranks_with_replicas_and_recomputation_with_tp_and_in_stages(tmp_path: Path) -> None:
    found = run_distributed_test(_on_four, 4, tmp_path, timeout_s=400)[0]
    failed = {name: [check for check in checks if not check.passed] for name, checks in found.items()}
    assert "float64: gradient norm" in {check.name for check in failed.pop("zeroed")}
    assert failed == {name: [] for name in (*RULES, *STAGES, "tp")}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation: Patch, two: dict[str, list[Check]]) -> None:
    failed = [check.name for check in two[mutation.__name__] if not check.passed]
    assert any(MUTATIONS[mutation][1] in name for name in failed), failed
