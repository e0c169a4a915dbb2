"""state.json: where a run stood, and which settings it must go on with to be the same run. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moecompile.checkpoint.atomic import write_file
from moecompile.checkpoint.fingerprint import TEXT, differences, settings
from moecompile.checkpoint.fit import refuse
from moecompile.checkpoint.folders import STATE
from moecompile.errors import ConfigError
from moecompile.schema import Config

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stood after `step` optimizer steps.

    sequences: training sequences seen, the position in the data. fixed: settings that decide which data comes next.
    metrics: what the reports carry over. fingerprint: of model and data, empty in what earlier versions wrote.
    world_size, plan_hash, versions: who wrote it, for people.
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
    write_file(folder / STATE, json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n")


def read_state(folder: Path) -> State:
    """Reads it back.

    Raises:
        ConfigError: it is not what this version wrote.
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
    """Whether `config` continues the run that `folder` is a checkpoint of, as far as it can be told without a model.

    Raises:
        ConfigError: another data order, or fewer steps than are done already.
    """
    if config.trainer.max_steps < state.step:
        raise ConfigError(
            "trainer.max_steps", config.trainer.max_steps, f"the checkpoint {folder} has {state.step} steps already",
            f"Use {state.step} or more",
        )  # fmt: skip
    # The ranks, which read the text, compare its content; where it lies does not matter then.
    text = {TEXT: state.fingerprint[TEXT]} if TEXT in state.fingerprint else {}
    refuse(differences({**state.fixed, **text}, {**settings(config), **text}), config.trainer.allow_changes, folder)
