"""state.json: the position of a run, and the settings that a resumed run must keep. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moecompile.atomic import write_text
from moecompile.checkpoint.fingerprint import TEXT, differences, settings
from moecompile.checkpoint.fit import refuse
from moecompile.checkpoint.folders import STATE
from moecompile.errors import ConfigError
from moecompile.schema import Config

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """The position of a run after `step` optimizer steps.

    sequences: training sequences seen, the position in the data. fixed: settings that determine the next data.
    metrics: values that reports carry over. fingerprint: of model and data; empty in files of earlier versions.
    world_size, plan_hash, versions: of the run that wrote it, for information.
    """

    step: int
    sequences: int
    fixed: dict[str, Any]
    world_size: int
    plan_hash: str
    versions: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)


def write_state(folder: Path, state: State) -> None:
    """Writes `folder`/state.json."""
    write_text(folder / STATE, json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n", durable=True)


def read_state(folder: Path) -> State:
    """Reads `folder`/state.json.

    Raises:
        ConfigError: it is missing or has another format.
    """
    try:
        body = dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
        body.setdefault("fingerprint", {})  # earlier versions wrote none
        if body.pop("format", None) != FORMAT or set(body) != {entry.name for entry in fields(State)}:
            raise ValueError(f"format {FORMAT} has the keys {[entry.name for entry in fields(State)]}")
        return State(**body)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "trainer.resume", folder, f"its {STATE} cannot be read ({error})", "Use another checkpoint"
        ) from error


def check_settings(state: State, config: Config, folder: Path) -> None:
    """Checks that `config` continues the run of the checkpoint `folder`, as far as possible without a model.

    Raises:
        ConfigError: the order of the data changes, or `max_steps` is below the steps already done.
    """
    if config.trainer.max_steps < state.step:
        raise ConfigError(
            "trainer.max_steps", config.trainer.max_steps, f"the checkpoint {folder} has {state.step} steps already",
            f"Use {state.step} or more",
        )  # fmt: skip
    # The ranks read the text and compare its content, so its location does not matter.
    text = {TEXT: state.fingerprint[TEXT]} if TEXT in state.fingerprint else {}
    now = {path: value for path, value in settings(config).items() if path in state.fixed}
    refuse(differences({**state.fixed, **text}, {**now, **text}), config.trainer.allow_changes, folder)


def not_compared(state: State, config: Config) -> list[str]:
    """What a checkpoint of an earlier version does not say, so that nothing is known about it."""
    unknown = [path for path in settings(config) if path not in state.fixed]
    return unknown if state.fingerprint else ["the model's config", "the text's content", *unknown]
