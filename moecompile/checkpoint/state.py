"""state.json: where a run stood, and which settings it must go on with to be the same run. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moecompile.checkpoint.atomic import write_file
from moecompile.checkpoint.folders import STATE
from moecompile.errors import ConfigError
from moecompile.schema import Config

FORMAT = 1

_FIXED = ("data.objective", "data.corpus", "data.path", "data.vocab_size", "data.seq_len", "data.global_batch_size",
          "data.val_fraction", "seed")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stood after `step` optimizer steps.

    sequences: training sequences seen, the position in the data. fixed: settings that decide which data comes next.
    metrics: what the reports carry over. world_size, plan_hash, versions: who wrote it, for people.
    """

    step: int
    sequences: int
    fixed: dict[str, Any]
    world_size: int
    plan_hash: str
    versions: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings that a run must go on with, by dotted path."""
    found = {}
    for path in _FIXED:
        value: Any = config
        for key in path.split("."):
            value = getattr(value, key)
        found[path] = getattr(value, "value", value)
    return found


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
        if body.pop("format", None) != FORMAT or set(body) != {entry.name for entry in fields(State)}:
            raise ValueError(f"format {FORMAT} has the keys {[entry.name for entry in fields(State)]}")
        return State(**body)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "trainer.resume", folder, f"its {STATE} cannot be read ({error})", "Use another checkpoint"
        ) from error


def check_settings(state: State, config: Config, folder: Path) -> None:
    """Whether `config` continues the run that `folder` is a checkpoint of.

    Raises:
        ConfigError: another data order, or fewer steps than are done already.
    """
    for path, value in fixed_settings(config).items():
        if path in state.fixed and state.fixed[path] != value:
            raise ConfigError(
                path, value, f"the checkpoint {folder} was made with {state.fixed[path]}, and other data would follow",
                f"Use {path}={'null' if state.fixed[path] is None else state.fixed[path]}, or start a new run",
            )  # fmt: skip
    if config.trainer.max_steps < state.step:
        raise ConfigError(
            "trainer.max_steps", config.trainer.max_steps, f"the checkpoint {folder} has {state.step} steps already",
            f"Use {state.step} or more",
        )  # fmt: skip
