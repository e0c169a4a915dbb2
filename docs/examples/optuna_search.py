"""Searches a recipe's settings with Optuna for little validation loss and few bytes between nodes.

    pip install "moecompile[search]"
    python docs/examples/optuna_search.py --trials 12 recipe=mixtral_ep trainer.max_steps=40

Every trial is one run of the command line, in a folder of its own below the study's (`--study`, runs/search). The study
is a SQLite file: the same command goes on where an earlier one stopped, until there are as many trials as asked for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState


def suggest(trial: Trial) -> list[str]:
    """The space: overrides of one trial. Change it to search another one."""
    values = {
        "experts.num_routed": trial.suggest_categorical("experts.num_routed", [8, 16]),
        "routing.top_k": trial.suggest_categorical("routing.top_k", [1, 2, 4]),
        "routing.max_nodes": trial.suggest_categorical("routing.max_nodes", [1, 2]),
        "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-3, 1e-2, log=True),
    }
    return [f"{key}={value}" for key, value in values.items()]


def run(overrides: list[str], folder: Path) -> dict[str, Any] | None:
    """Runs one job in `folder` and returns its result, or None if it failed; `output.log` beside it says why."""
    folder.mkdir(parents=True, exist_ok=True)
    fixed = ["trainer.save_checkpoint=false", "trainer.progress_bar=false", f"hydra.run.dir={folder / 'run'}"]
    with (folder / "output.log").open("w") as log:
        command = [sys.executable, "-m", "moecompile", *overrides, *fixed]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    result = folder / "run" / "result.json"
    if code or not result.exists():
        return None
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found if found["status"] == "ok" and found["val_loss"] is not None else None


def open_study(folder: Path, seed: int) -> optuna.Study:
    """A new study, or the one in `folder`; trials that a stopped search has left running are given up."""
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="moecompile",
        storage=f"sqlite:///{folder / 'study.db'}",
        load_if_exists=True,
        directions=["minimize", "minimize"],  # validation loss, inter-node bytes
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    # A sampler that starts again with the same seed would ask for its first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), multivariate=True)
    return study


def search(study: optuna.Study, folder: Path, num_trials: int, overrides: list[str]) -> None:
    """Asks for settings, runs them and tells what came out, until the study has `num_trials` trials."""
    while len(study.trials) < num_trials:
        trial = study.ask()
        chosen = suggest(trial)
        result = run([*overrides, *chosen], folder / f"trial-{trial.number:03d}")
        if result is None:
            study.tell(trial, state=TrialState.FAIL)  # the sampler learns nothing from it and goes on
            print(f"trial {trial.number}: failed    {' '.join(chosen)}", flush=True)
            continue
        values = [result["val_loss"], result["bytes_per_token_per_layer"]["inter_node"]]
        study.tell(trial, values)
        print(f"trial {trial.number}: {line(values)}    {' '.join(chosen)}", flush=True)


def line(values: list[float]) -> str:
    """Both objectives."""
    return f"loss {values[0]:.4f}, {values[1]:,.0f} B inter-node"


def report(study: optuna.Study) -> None:
    """Prints the trial with the least loss, and the trials that no other one beats in both objectives."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    if not done:
        sys.exit("no trial succeeded: see output.log in the folders of the trials")
    print(f"\n{len(done)} of {len(study.trials)} trials succeeded\n\nbest loss")
    print(described(min(done, key=lambda trial: trial.values[0])))
    print("\nPareto front: less loss costs bytes, fewer bytes cost loss")
    for trial in sorted(study.best_trials, key=lambda trial: trial.values[0]):
        print(described(trial))


def described(trial: FrozenTrial) -> str:
    """Number, objectives and settings."""
    settings = " ".join(f"{key}={value:.3g}" for key, value in trial.params.items())
    return f"  trial {trial.number}: {line(trial.values)}    {settings}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", type=Path, default=Path("runs/search"), help="folder of the study")
    parser.add_argument("--trials", type=int, default=20, help="trials in all, those of earlier calls included")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("overrides", nargs="*", help="hold for every trial, for example recipe=mixtral_ep")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = arguments.study.absolute()
    study = open_study(folder, arguments.seed)
    search(study, folder, arguments.trials, arguments.overrides)
    report(study)


if __name__ == "__main__":
    main()
