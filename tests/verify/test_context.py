"""task=verify of context parallelism: it passes as it is, with every auxiliary loss, and catches its silent bugs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moecompile.compose import compose_config
from moecompile.runtime import module as runtime_module
from moecompile.runtime import strategy
from moecompile.runtime.groups import Groups
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import SHORT

SMALL = [
    "recipe=deepseek_ep", "mesh=cpu_1x2", "mesh.cp=2", "model.config.num_hidden_layers=2", "model.config.hidden_size=32",
    "routing.max_nodes=null", "model.config.intermediate_size=80", "data.vocab_size=300", "data.seq_len=16",
    "data.micro_batch_size=2", "data.global_batch_size=4", "verify.dtype=float64", SHORT,
    "balance.losses={micro_batch: 0.02, sequence: 0.03, global_batch: 0.04, z: 0.01}",
]  # fmt: skip
CP = 2
Patch = Callable[[pytest.MonkeyPatch], None]


def cp_gradients_divided_twice(patch: pytest.MonkeyPatch) -> None:
    """Once by the tokens of all ranks, and once more by the ranks of a CP group, as if these were replicas."""
    right = strategy.divide

    def wrong(parameters: list[nn.Parameter], divisor: Any) -> None:
        right(parameters, divisor * CP)

    patch.setattr(strategy, "divide", wrong)


def auxiliary_losses_by_own_tokens(patch: pytest.MonkeyPatch) -> None:
    """The loss of a whole micro-batch counts for this rank's targets alone."""
    patch.setattr(Groups, "of_micro_batch", lambda groups, num_tokens: num_tokens)


def targets_shifted_within_a_rank(patch: pytest.MonkeyPatch) -> None:
    """A rank's last position has no target: its next token is on the next rank."""
    right = runtime_module.own_positions

    def wrong(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
        own = right(model, labels)
        return own if own is labels else torch.cat((own[:, :-1], torch.full_like(own[:, -1:], -100)), 1)

    patch.setattr(runtime_module, "own_positions", wrong)


# mutation -> part of the name of a check that has to fail
MUTATIONS: dict[Patch, str] = {
    cp_gradients_divided_twice: "gradients of dense",
    auxiliary_losses_by_own_tokens: "gradients of router",
    targets_shifted_within_a_rank: "loss",
}


def _all(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    def certified(name: str) -> list[Check]:
        (folder / name).mkdir(exist_ok=True)
        return certify_config(shrink(compose_config(SMALL), steps=2)[0], folder / name)[0]

    found = {"right": certified("right")}
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            found[mutation.__name__] = certified(mutation.__name__)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    return run_distributed_test(_all, 2, tmp_path_factory.mktemp("verify"), timeout_s=400)[0]


@pytest.mark.slow
def test_right_passes(found: dict[str, list[Check]]) -> None:
    assert [check for check in found["right"] if not check.passed] == []
    assert len(found["right"]) > 12


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation: Patch, found: dict[str, list[Check]]) -> None:
    failed = [check.name for check in found[mutation.__name__] if not check.passed]
    assert any(MUTATIONS[mutation] in name for name in failed), failed
