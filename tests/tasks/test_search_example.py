"""docs/examples/optuna_search.py: the study goes on where it stopped, failed trials do no harm."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import forked
from tests.tiny import SHORT

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "docs" / "examples" / "optuna_search.py"
# One process, so that routing.max_nodes=2, which the search tries as well, is refused.
TINY = [
    "mesh=cpu_1", "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=64",
    "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2", "data.vocab_size=300",
    "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=2", "data.val_batches=1",
    "trainer.max_steps=2", SHORT,
]  # fmt: skip


Search = Callable[..., str]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Search:
    """Runs the example in this process, and its trials in forked ones; returns what it prints."""
    pytest.importorskip("optuna")
    spec = importlib.util.spec_from_file_location("optuna_search", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=forked.run, STDOUT=subprocess.STDOUT))

    def searched(folder: Path, trials: int, *overrides: str) -> str:
        monkeypatch.chdir(folder.parent)
        words = ["--study", str(folder), "--trials", str(trials), *TINY, *overrides]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
        example.main()
        return capsys.readouterr().out

    return searched


@pytest.mark.slow
def test_a_search_stops_goes_on_and_reports(tmp_path: Path, search: Search) -> None:
    optuna = pytest.importorskip("optuna")
    folder = tmp_path / "study"
    first = search(folder, 2)
    study = optuna.load_study(study_name="moecompile", storage=f"sqlite:///{folder / 'study.db'}")
    study.ask()  # as if the search had been stopped within its third trial
    second = search(folder, 5)
    assert re.findall(r"^trial (\d)", first, re.MULTILINE) == ["0", "1"]
    assert re.findall(r"^trial (\d)", second, re.MULTILINE) == ["3", "4"]

    trials = study.get_trials()
    failed = [trial.number for trial in trials if trial.state.name == "FAIL"]
    refused = [trial.number for trial in trials if trial.params.get("routing.max_nodes") == 2]
    assert failed == sorted([2, *refused]) and refused
    for trial in trials:
        run = folder / f"trial-{trial.number:03d}"
        if trial.number in refused:
            assert "error: routing.max_nodes=2" in (run / "output.log").read_text()
        elif trial.number != 2:
            assert trial.values[0] == json.loads((run / "run" / "result.json").read_text())["val_loss"]
    best = min(trial.values[0] for trial in trials if trial.values)
    assert f"{5 - len(failed)} of 5 trials succeeded" in second
    assert f"loss {best:.4f}" in second.partition("best loss")[2].splitlines()[1]
    assert second.partition("Pareto front")[2].count("  trial ") == len(study.best_trials)


@pytest.mark.slow
def test_a_search_without_a_trial_that_works_says_so(tmp_path: Path, search: Search) -> None:
    with pytest.raises(SystemExit) as ended:
        search(tmp_path / "study", 1, "no_such_key=1")
    assert ended.value.code == "no trial succeeded: see output.log in the folders of the trials"
