"""Loggers and callbacks of the config, on two ranks; what is refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.runtime import loggers
from moecompile.tasks.inputs import check_inputs
from tests.tasks.test_train import TINY, moecompile

STOP = "+trainer.callbacks.EarlyStopping={monitor: val_loss, patience: 1, min_delta: 5.0}"  # nothing improves by that


@pytest.mark.slow
def test_every_logger_has_every_row_and_a_callback_ends_the_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    settings = ["mesh=cpu_1x2", "trainer.max_steps=9", "trainer.val_interval=2", "hydra.run.dir=out"]
    run = moecompile([*TINY, *settings, "trainer.loggers=[tensorboard,wandb,mlflow]", STOP], tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    assert "ended after step 4 of 9" in run.stdout
    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    losses = {int(row["step"]): float(row["loss"]) for row in rows}
    assert list(losses) == [1, 2, 3, 4]
    where = f"file:{tmp_path / 'out' / 'mlruns'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client: Any = mlflow.MlflowClient(tracking_uri=where)
        experiment = client.get_experiment_by_name("moecompile")
        (found,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(found.info.run_id, "loss")
    assert {each.step: each.value for each in history} == losses
    assert found.data.params["trainer/max_steps"] == "9" and found.info.status == "FINISHED"
    assert any(name.startswith("max_violation.model") for name in found.data.metrics)
    (offline,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")  # one rank writes
    assert b"val_loss" in offline.read_bytes()
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.callbacks={ModelPruning: {}}", "trainer.callbacks=ModelPruning: must be one of EarlyStopping, Timer. Use one of these."),
        ("+trainer.callbacks={EarlyStopping: 3}", "trainer.callbacks.EarlyStopping=3: must be a mapping of arguments. Use {EarlyStopping: {}} for none."),
        ("+trainer.callbacks={Timer: {seconds: 3}}", "trainer.callbacks.Timer.seconds=3: Timer takes duration, interval, verbose. Use these."),
        ("+trainer.callbacks={EarlyStopping: {}}", "trainer.callbacks.EarlyStopping={}: Lightning says: EarlyStopping.__init__() missing 1 required positional argument: 'monitor'. Correct the arguments."),
    ],
)  # fmt: skip
def test_what_is_not_a_callback_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loggers.make_callbacks(compose_config([override]).trainer)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_before_files_are_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = compose_config(["task=train", f"trainer.loggers=[tensorboard,{name}]", "data.path=/not/there.txt"])
    with pytest.raises(
        ConfigError, match=rf"trainer.loggers={name}: needs the package {name}. pip install 'moecompile"
    ):
        check_inputs(config)
