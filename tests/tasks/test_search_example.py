"""docs/examples/optuna_search.py: the study goes on where it stopped, failed trials do no harm."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.forked import python
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


def search(folder: Path, trials: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    return python(
        str(EXAMPLE),
        "--study",
        str(folder),
        "--trials",
        str(trials),
        *TINY,
        *overrides,
        cwd=folder.parent,
        timeout_s=600,
    )


@pytest.mark.slow
def test_a_search_stops_goes_on_and_reports(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    folder = tmp_path / "study"
    first = search(folder, 2)
    assert first.returncode == 0, first.stdout + first.stderr
    study = optuna.load_study(study_name="moecompile", storage=f"sqlite:///{folder / 'study.db'}")
    study.ask()  # as if the search had been stopped within its third trial
    second = search(folder, 5)
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.findall(r"^trial (\d)", first.stdout, re.MULTILINE) == ["0", "1"]
    assert re.findall(r"^trial (\d)", second.stdout, re.MULTILINE) == ["3", "4"]

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
    assert f"{5 - len(failed)} of 5 trials succeeded" in second.stdout
    assert f"loss {best:.4f}" in second.stdout.partition("best loss")[2].splitlines()[1]
    assert second.stdout.partition("Pareto front")[2].count("  trial ") == len(study.best_trials)


@pytest.mark.slow
def test_a_search_without_a_trial_that_works_says_so(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    run = search(tmp_path / "study", 1, "no_such_key=1")
    assert run.returncode == 1
    assert run.stderr == "no trial succeeded: see output.log in the folders of the trials\n"
