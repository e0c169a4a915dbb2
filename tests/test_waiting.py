"""What is shown before there is anything to show, and how time is told."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moecompile import clock, waiting

HIDE_CURSOR, SHOW_CURSOR = "\033[?25l", "\033[?25h"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    waiting.show("loading torch")
    waiting.show("building the model", line=False)
    waiting.done()
    assert capsys.readouterr().out == "loading torch ...\n"


def test_on_a_terminal_it_turns_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    waiting.show("loading torch")
    waiting.show("building the model", line=False)
    waiting.done()
    waiting.done()
    shown = terminal.getvalue()
    assert "loading torch" in shown and "building the model" in shown
    assert shown.rindex(SHOW_CURSOR) > shown.rindex("building the model")
    assert shown.count(HIDE_CURSOR) == shown.count(SHOW_CURSOR) == 2


SLEEPER = """
import os, time
time.sleep(0.4)
from moecompile import clock
clock.begin()
first = clock.seconds()
clock.begin()
print(first, clock.seconds())
"""


def test_time_counts_from_the_start_of_the_process_and_later_runs_from_their_own() -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", SLEEPER], env=environ, capture_output=True, text=True, check=True)
    wall = time.monotonic() - began
    first, second = map(float, run.stdout.split())
    assert 0.4 <= first <= wall + 0.02  # the kernel counts in hundredths
    assert second < first


def test_ranks_count_from_the_start_of_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME) - 100
    monkeypatch.setenv("MOECOMPILE_STARTED", str(before))
    assert 100 <= clock.seconds() < 160


def test_the_bar_begins_where_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 6 to 8 of 8, of two micro-batches each."""
    from moecompile.runtime.progress import ProgressBar

    bar: Any = ProgressBar(refresh_rate=1)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    trainer: Any = SimpleNamespace(max_steps=8, global_step=5, progress_bar_metrics={})
    bar.train_progress_bar = bar.init_train_tqdm()
    bar.on_train_epoch_start(trainer)
    shown = [str(bar.train_progress_bar)]
    for micro_batch in range(6):
        trainer.global_step = 5 + (micro_batch + 1) // 2
        bar.on_train_batch_end(trainer, None, None, None, micro_batch)
    shown.append(str(bar.train_progress_bar))
    assert "5/8" in shown[0] and "8/8" in shown[1] and "100%" in shown[1], shown
