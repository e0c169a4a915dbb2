"""task=verify of chats: it passes as they are, and fails if ranks route and count padding."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moecompile.compose import compose_config
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from tests.chat_models import CHATML, chats, save_mixtral, unmarked, write_lines
from tests.distributed.harness import run_distributed_test

SMALL = [
    "data=sft", "data.layout=pad", "data.seq_len=64", "data.global_batch_size=8", "data.micro_batch_size=2",
    "mesh=cpu_1x2", "verify.dtype=float64",
]  # fmt: skip

MUTATIONS = {"counted": "expert loads that differ"}


def _both(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    from moecompile.nn.padding import TokenMask

    module = importlib.import_module("moecompile.verify.whole_run")

    def counted(*args: Any) -> Any:
        """The ranks, not the process that they are compared with, take every row for a token."""
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(TokenMask, "forward", _nothing)
            return right(*args)

    right, found = module.run_ranks, {}
    paths = [f"model.pretrained={folder}/mixtral", f"data.path={folder}/chats.jsonl", f"data.cache={folder}/cache"]
    for name, function in (("right", right), ("counted", counted)):
        (folder / name).mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_ranks", function)
            found[name] = certify_config(shrink(compose_config([*SMALL, *paths]), steps=2)[0], folder / name)[0]
    return found


def _nothing(self: Any, x: Tensor) -> None:
    return None


@pytest.mark.slow
def test_padding_that_is_counted_is_caught(tmp_path: Path) -> None:
    save_mixtral(tmp_path / "mixtral", unmarked(CHATML))
    write_lines(tmp_path / "chats.jsonl", chats(40))
    found = run_distributed_test(_both, 2, tmp_path, timeout_s=240)[0]
    assert [check for check in found["right"] if not check.passed] == []
    failed = [check.name for check in found["counted"] if not check.passed]
    assert any(MUTATIONS["counted"] in name for name in failed), failed
