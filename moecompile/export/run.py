"""The trained model of a run: its config, plan and the weights of a checkpoint, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import nn

from moecompile import plan as plans
from moecompile.checkpoint.tensors import latest_checkpoint, load_weights
from moecompile.compose import RESOLVED, load_resolved
from moecompile.errors import ConfigError
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.models.source import source_structure
from moecompile.named_code import FACTORY, Named
from moecompile.pipeline import compile_with_report
from moecompile.plan import Plan
from moecompile.schema import Config

PLAN, TOKENIZER = "plan.yaml", "tokenizer.json"


@dataclass(frozen=True)
class Run:
    """folder: the run directory. checkpoint: the folder with the weights."""

    folder: Path
    checkpoint: Path
    config: Config
    plan: Plan

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the run trained, or that of the pretrained model."""
        beside = pretrained_folder(self.config.model)
        folders = [self.folder] if beside is None else [self.folder, beside]
        return next((path for folder in folders if (path := folder / TOKENIZER).is_file()), None)


def find_run(run: str | None, checkpoint: str | None, *, named: Named = MappingProxyType({})) -> Run:
    """The run with a checkpoint, by default its latest. If only a checkpoint is given, its run is two levels above it.

    Args:
        named: the code that the caller names. Back ends are not among it: the run is loaded without them.

    Raises:
        ConfigError: a folder without config, plan or checkpoint, or a `model.factory` that only its config names.
    """
    folder = Path(run) if run is not None else Path(str(checkpoint)).resolve().parents[1]
    path, value = ("export.run", run) if run is not None else ("export.checkpoint", checkpoint)
    for name in (RESOLVED, PLAN):
        if not (folder / name).is_file():
            raise ConfigError(path, value, f"{folder} has no {name}", "Name the run directory of task=train")
    weights = Path(checkpoint) if checkpoint is not None else latest_checkpoint(folder)
    if not weights.is_dir():
        raise ConfigError("export.checkpoint", weights, "is not a folder", "Name one of the run's checkpoints")
    config = load_resolved(folder / RESOLVED, named=named, runs=(FACTORY,), given_as=(path, value))
    return Run(folder, weights, config, plans.read(folder / PLAN))


def load_run(run: Run) -> nn.Module:
    """The model on one device, in evaluation mode, rewritten by the run's plan and filled from its checkpoint.

    Raises:
        ConfigError, PlanError: config, plan and checkpoint do not belong together.
    """
    model = source_structure(run.config)
    example = example_inputs(model, run.config.data.seq_len)
    model = compile_with_report(model, run.config, example=example, plan=run.plan, until="rewrite").model
    load_weights(run.checkpoint, model.state_dict())
    return model.eval()
