"""Trains the dense model in the same way as the compiled one, as a baseline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from moecompile.capture import Example
from moecompile.mesh import MeshSpec
from moecompile.pipeline import compile_model
from moecompile.plan import Plan, reductions
from moecompile.runtime.data import TextData
from moecompile.runtime.training import Outcome, train
from moecompile.schema import Config

FOLDER = "baseline"
"""Folder of its metrics in the run directory."""


def train_dense(
    model: nn.Module, mesh: MeshSpec, config: Config, data: TextData, run_dir: Path, *, example: Example
) -> Outcome:
    """Trains `model` with a plan without layers: same ranks, data order, optimizer and steps; saves no checkpoint.

    All ranks call it with the same newly built model.
    """
    plan = Plan(mesh=mesh, layers=(), reductions=reductions(mesh))
    dense = compile_model(model, config, example=example, plan=plan)
    unsaved = dataclasses.replace(config.trainer, save_checkpoint=False, save_interval=0, resume=None)
    return train(dense, plan, dataclasses.replace(config, trainer=unsaved), data, run_dir / FOLDER)
