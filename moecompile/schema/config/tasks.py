"""What is done, with which model: `task`, `model`, and what single tasks read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from moecompile.schema.enums import ExportFormat, ModelDevice, ModelLoad, TaskName, VerifyDtype


@dataclass(kw_only=True)
class TaskConfig:
    """`task`: what to do."""

    name: TaskName = TaskName.train
    """What the command does."""


@dataclass(kw_only=True)
class ModelConfig:
    """`model`: what is built or loaded.

    Exactly one of `architecture`, `pretrained`, `package` and `factory` is given.
    """

    name: str = "custom"
    """Its name, for people."""
    architecture: Optional[str] = None
    """A transformers model type (`deepseek_v3`), built with random weights from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of the architecture's transformers config."""
    pretrained: Optional[str] = None
    """A local folder that `save_pretrained` wrote; its `config.json` says which class is loaded."""
    package: Optional[str] = None
    """An installed Python package, by its name for pip, with such a folder or a GGUF file; no code of it runs."""
    factory: Optional[str] = None
    """`package.module:function`, called without arguments; only from the command line or Python."""
    device: ModelDevice = ModelDevice.cpu
    """Where it is built; `meta` builds shapes without values, enough for task=plan and task=compile."""
    published: Optional[str] = None
    """What this architecture's paper or model card says of its size, for people."""
    load: ModelLoad = ModelLoad.sharded
    """How several ranks load `pretrained`: each reads what it keeps, or loads the whole model and drops the rest."""


@dataclass(kw_only=True)
class VerifyConfig:
    """`verify`: what task=verify runs."""

    steps: int = 3
    """Optimizer steps, 1 or more."""
    dtype: VerifyDtype = VerifyDtype.both
    """Precision of weights and arithmetic in which N ranks are compared with one process."""


@dataclass(kw_only=True)
class BenchConfig:
    """`bench`: how often task=bench measures."""

    rounds: int = 10
    """What is measured counts so often, 1 or more."""
    warmup: int = 3
    """Runs before that, 1 or more."""


@dataclass(kw_only=True)
class ExportConfig:
    """`export`: what task=export reads and writes; all else it takes from the run."""

    run: Optional[str] = None
    """A run directory, or a native export."""
    checkpoint: Optional[str] = None
    """One of the run's checkpoints; null: its latest."""
    format: ExportFormat = ExportFormat.huggingface
    """What is written: the family of transformers with the same mathematics, or our own names with config and plan."""
    family: Optional[str] = None
    """A model type of transformers; null: the first that fits."""
    path: Optional[str] = None
    """The new folder; null: `model` in the run directory of this task."""
    tolerance: float = 1e-5
    """Largest difference of logits to the trained model, when loaded again; positive."""
