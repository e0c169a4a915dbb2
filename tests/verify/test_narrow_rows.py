"""Rows in eight bits: N ranks equal one process that rounds by code of its own; what is not rounded, or twice, is caught."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.ops import exchange, in_flight
from moecompile.ops.narrow_rows import unpack_rows
from moecompile.tasks.verify import shrink
from moecompile.torch_private import in_backward
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import NARROW, SHORT

TINY = [
    "data.vocab_size=300", "data.seq_len=16", "data.micro_batch_size=1", "data.global_batch_size=8",
    "verify.dtype=float64", "model.config.num_hidden_layers=2", *NARROW, SHORT,
]  # fmt: skip
CHUNKS = ["dispatch.overlap=chunks", "dispatch.chunks=2", "trainer.checkpointing=keep_exchanges"]
CASES = {
    "one for each expert": ["recipe=deepseek_ep", "dispatch.kind=flat", "dispatch.wire_dtype=fp8"],
    "one for each rank, in chunks": [
        "recipe=deepseek_ep",
        "dispatch.kind=dedup",
        "dispatch.wire_dtype=fp8_128",
        *CHUNKS,
    ],
    "recomputed": ["recipe=deepseek_ep", "dispatch.wire_dtype=fp8", "trainer.checkpointing=full"],
    "lent": ["recipe=deepseek_ep", "dispatch.kind=flat", "dispatch.wire_dtype=fp8", "dispatch.balance=lend"],
    "split": ["recipe=deepseek_ep", "dispatch.wire_dtype=fp8", "mesh.tp=2"],
    "positions": ["recipe=deepseek_ep", "dispatch.wire_dtype=fp8", "mesh.cp=2"],
    "a model's own experts": ["recipe=qwen3_moe", "dispatch.kind=flat", "dispatch.wire_dtype=fp8"],
    "a model's own router, and latent rows": ["recipe=deepseek_v4", "dispatch.wire_dtype=fp8_128"],
}


def _certified(options: list[str], folder: Path) -> list[Check]:
    folder.mkdir(exist_ok=True)
    return certify_config(shrink(compose_config([*options, "mesh=cpu_1x2", *TINY]), steps=1)[0], folder)[0]


def nothing_is_rounded(patch: pytest.MonkeyPatch) -> None:
    _as_they_are(patch, lambda: True)


def gradients_are_not_rounded(patch: pytest.MonkeyPatch) -> None:
    _as_they_are(patch, in_backward)


def rows_are_not_rounded(patch: pytest.MonkeyPatch) -> None:
    _as_they_are(patch, lambda: not in_backward())


def rounded_to_the_other_format_before(patch: pytest.MonkeyPatch) -> None:
    pack = exchange.pack
    patch.setattr(
        exchange, "pack", lambda rows, narrow: pack(unpack_rows(pack(rows, "fp8_128"), "fp8_128", rows), narrow)
    )


def _as_they_are(patch: pytest.MonkeyPatch, now: Callable[[], bool]) -> None:
    for module in (exchange, in_flight):
        packed, unpack = module.packed, module.unpack_rows
        patch.setattr(module, "packed", lambda rows, narrow, f=packed: rows if now() else f(rows, narrow))
        patch.setattr(
            module, "unpack_rows", lambda rows, narrow, like, f=unpack: rows if now() else f(rows, narrow, like)
        )


MUTATIONS = (
    nothing_is_rounded, gradients_are_not_rounded, rows_are_not_rounded, rounded_to_the_other_format_before,
)  # fmt: skip


def _all(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {name: _certified(options, folder / name) for name, options in CASES.items()}
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            name = mutation.__name__
            found[name] = _certified(CASES["one for each expert"], folder / name)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    return run_distributed_test(_all, 2, tmp_path_factory.mktemp("verify"), timeout_s=400)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_that_rounds(name: str, found: dict[str, list[Check]]) -> None:
    checks = found[name]
    assert [check for check in checks if not check.passed] == [] and len(checks) > 10
    gradients = [check for check in checks if "float64: gradients of" in check.name and "rounding" not in check.name]
    assert len(gradients) == 3 and max(check.error for check in gradients) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation: Callable[..., None], found: dict[str, list[Check]]) -> None:
    failed = [check.name for check in found[mutation.__name__] if not check.passed]
    assert "float64: gradients of experts" in failed
