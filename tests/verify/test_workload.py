"""task=verify with experts that are drawn: both sides draw the same ones, in evaluation too."""

from __future__ import annotations

from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.distributed.harness import run_distributed_test
from tests.tiny import NARROW, SHORT

KINDS = ("zipf", "hot")
SMALL = [
    "recipe=mixtral_ep", "mesh=cpu_1x2", "verify.dtype=float64", "data.micro_batch_size=2", "data.vocab_size=300", *NARROW,
    SHORT,
]  # fmt: skip


def _all(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {}
    for kind in KINDS:
        (folder / kind).mkdir(exist_ok=True)
        config, _ = shrink(compose_config([*SMALL, f"routing.workload={kind}"]), steps=2)
        found[kind] = certify_config(config, folder / kind)[0]
    return found


@pytest.mark.slow
def test_drawn_experts_are_the_same_on_both_sides(tmp_path: Path) -> None:
    found = run_distributed_test(_all, 2, tmp_path, timeout_s=240)[0]
    for kind in KINDS:
        assert any(check.name == "float64: outputs" for check in found[kind])
        assert [check for check in found[kind] if not check.passed] == []
