"""When a page is written during a run: after the first row, then within one percent of the time."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch import Trainer

from moecompile.runtime.progress import LiveReport


def test_the_first_row_is_written_and_then_as_time_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    metrics, module, strategy = MagicMock(rows=0, paused=nullcontext), MagicMock(), MagicMock(is_global_zero=True)
    module.trainer = MagicMock(spec=Trainer, loggers=[])

    def write() -> None:
        written.append(now[0])
        now[0] += 2

    live: Any = LiveReport(metrics, write)

    def step(seconds: float, rows: int) -> None:
        now[0], metrics.rows = seconds, rows
        live.step_ended(module, strategy)

    step(5, 0)  # no row yet
    step(10, 1)
    step(13, 1)  # no new row
    step(150, 2)  # 2 s are more than 1% of 150 s
    step(250, 3)
    assert written == [10, 250]
    assert metrics.save_history.call_count == 2
    strategy.is_global_zero = False
    step(9000, 4)
    assert written == [10, 250]
