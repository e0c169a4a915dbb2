"""The state of a run in its checkpoint, and what a resumed run takes from it. Needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from moecompile.atomic import write_text
from moecompile.checkpoint.fingerprint import TEXT, differences, of_training, settings
from moecompile.checkpoint.fit import refuse
from moecompile.checkpoint.folders import AUTO, PLAN, STATE, check, checkpoints_of, find, steps
from moecompile.errors import ConfigError
from moecompile.libyaml import load_yaml
from moecompile.plan import Plan, read
from moecompile.rundir import RESOLVED, output_dir, task_of
from moecompile.schema import AdapterKind, Baseline, Config, TaskName

# -- state.json: the position of a run, and the settings that a resumed run must keep -------------------------------

FORMAT = 1
TRAINED_WITH = "trained_with"
"""Key of `State.metrics`: what `of_training` said of each part of the run."""


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
    if config.trainer.max_steps < state.step and config.data.epochs is not None:
        rule = f"are {config.trainer.max_steps} steps, and the checkpoint {folder} has {state.step} already"
        raise ConfigError("data.epochs", config.data.epochs, rule, "Use more: they count from the beginning of the run")
    if config.trainer.max_steps < state.step:
        raise ConfigError(
            "trainer.max_steps", config.trainer.max_steps, f"the checkpoint {folder} has {state.step} steps already",
            f"Use {state.step} or more",
        )  # fmt: skip
    # The ranks read the text and compare its content, so its location does not matter.
    text = {TEXT: state.fingerprint[TEXT]} if TEXT in state.fingerprint else {}
    now = {path: value for path, value in settings(config).items() if path in state.fixed}
    refuse(differences({**state.fixed, **text}, {**now, **text}), config.trainer.allow_changes, folder)


def check_baseline(state: State, config: Config, folder: Path) -> None:
    """Checks that the steps before were trained as those to come, so that a dense model can be trained in the same way.

    Raises:
        ConfigError: they were not; checkpoints of earlier versions do not say.
    """
    now = of_training(config)
    for before in state.metrics.get(TRAINED_WITH, ()) if config.trainer.baseline is not Baseline.none else ():
        other = [f"{path}={old} ({new} here)" for path, old, new in differences(before, now)]
        if other:
            raise ConfigError(
                "trainer.baseline", config.trainer.baseline.value,
                f"steps before {folder} were trained with {', '.join(other)}; "
                "the dense model would have one setting throughout, which is no comparison",
                "Use trainer.baseline=none, or the settings of before",
            )  # fmt: skip


def not_compared(state: State, config: Config) -> list[str]:
    """What a checkpoint of an earlier version does not say, so that nothing is known about it."""
    unknown = [path for path in settings(config) if path not in state.fixed]
    return unknown if state.fingerprint else ["the model's config", "the text's content", *unknown]


# -- what a resumed run takes from it, before any rank is started ---------------------------------------------------


def check_free(config: Config, run_dir: Path) -> None:
    """Checks that a run may write to `run_dir`: it is new, or the run resumes or replaces one of the same task.

    Raises:
        ConfigError: the directory has a run that this one would damage.
    """
    task, previous = config.task.name.value, task_of(run_dir)
    has_checkpoints = bool(steps(checkpoints_of(run_dir)))
    resumes = config.task.name is TaskName.train and (config.trainer.resume is not None or is_restarted())
    if has_checkpoints and not resumes:
        raise ConfigError(
            "hydra.run.dir", run_dir, "holds the checkpoints of another run",
            "Go on with that run by trainer.resume=auto, or use another directory",
        )  # fmt: skip
    if previous is not None and previous != task:
        raise ConfigError("hydra.run.dir", run_dir, f"holds what task={previous} has written", "Use another directory")


def is_restarted() -> bool:
    """Whether torchrun has restarted all ranks, after one was lost, or SLURM has requeued the job."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def has_trained(run_dir: Path) -> bool:
    """Whether an earlier attempt of a restarted run has trained in `run_dir`, so that it goes on from the latest
    checkpoint there; else that is one of another run, or a later one than the run resumes from.

    The config tells: that of an attempt is moved to `run_dir` when it has computed a step. What it was resumed from may
    have moved on meanwhile, unless that is a checkpoint in `run_dir` itself.
    """
    now, before = _config(output_dir(run_dir)), _config(run_dir)
    if now is None or before is None:
        return False
    for group in ("mesh", "hardware", "dispatch"):  # torchrun may start fewer ranks again
        now.pop(group, None), before.pop(group, None)
    resume, resumed_before = (body.get("trainer", {}).pop("resume", None) for body in (now, before))
    is_here = isinstance(resume, str) and checkpoints_of(run_dir).resolve() == Path(resume).resolve().parent
    return now == before and (resume == resumed_before or not is_here)


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        body = load_yaml((folder / RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return body if isinstance(body, dict) else None


def _check_adapters(saved: Plan, config: Config, folder: Path) -> None:
    """Checks that adapters are trained if they were; else every tensor of them would be listed as a difference."""
    kind, adapters = config.adapters.kind, saved.adapters
    if (kind is AdapterKind.none) == (adapters is None):
        return
    if adapters is None:
        rule, fix = "without adapters", "Leave adapters out, or train them on the folder that task=export writes of it"
    else:
        rule = "with adapters"
        fix = f"Give adapters=lora adapters.rank={adapters.rank} adapters.alpha={adapters.alpha:g}"
    raise ConfigError("adapters.kind", kind.value, f"the checkpoint {folder} was trained {rule}", fix)


def resumed(config: Config, run_dir: Path) -> Config:
    """`config` with the routing groups of the checkpoint; unchanged for a new run.

    `routing.groups=auto` follows the mesh only once: groups are part of the model, which another mesh must not change.

    Raises:
        ConfigError: there is no such checkpoint, it does not fit the config, or it has more steps.
    """
    check_free(config, run_dir)
    resume = config.trainer.resume
    if resume is None or config.task.name is not TaskName.train:
        return config
    folder = find(resume, run_dir)
    if folder is None:
        return config
    check(folder, [STATE, PLAN])
    state = read_state(folder)
    check_settings(state, config, folder)
    check_baseline(state, config, folder)
    saved_plan = read(folder / PLAN)
    _check_adapters(saved_plan, config, folder)
    config = replace(config, trainer=replace(config.trainer, resume=AUTO if resume == AUTO else str(folder)))
    layers = [layer for layer in saved_plan.layers if layer.experts.init != "existing"]
    saved = {(layer.routing.groups, layer.routing.top_groups, layer.routing.even_groups) for layer in layers}
    if config.routing.groups != "auto" or len(saved) != 1:
        return config
    groups, top_groups, even_groups = saved.pop()
    if even_groups != config.routing.even_groups:  # another model, of which the plan will tell
        return config
    limit = config.routing.top_groups or (top_groups if top_groups < groups else None)
    return replace(config, routing=replace(config.routing, groups=groups, top_groups=limit))
