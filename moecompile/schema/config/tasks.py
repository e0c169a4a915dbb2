"""Config of the task and the model: `task`, `model`, and the groups of single tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from moecompile.ranges import Real, Whole, number
from moecompile.schema.enums import (
    AdapterExport,
    ExportFormat,
    LauncherKind,
    ModelDevice,
    ModelLoad,
    TaskName,
    VerifyDtype,
)


@dataclass(kw_only=True)
class TaskConfig:
    """`task`: what the command does."""

    name: TaskName = TaskName.train
    """Name of the task."""


@dataclass(kw_only=True)
class LauncherConfig:
    """`launcher`: the batch job that task=submit writes and submits. Nodes, ranks and GPUs are those of `mesh`."""

    kind: LauncherKind = LauncherKind.local
    """`local`: none; `slurm`: a job for sbatch."""
    task: TaskName = TaskName.train
    """What the job does: train or bench."""
    dry_run: bool = False
    """Writes and prints the job, and submits nothing."""
    wait: bool = False
    """Waits until the job has ended, in a sweep all jobs, and fails if one has failed."""
    partition: Optional[str] = None
    """Partition; null: the cluster's default."""
    account: Optional[str] = None
    """Account; null: the user's default."""
    qos: Optional[str] = None
    """Quality of service; null: the default."""
    time: Optional[str] = None
    """Time limit as sbatch takes it (`90`, `12:00:00`, `2-00:00:00`); null: the partition's."""
    signal_s: int = number(120, Whole(1, 65_535))
    """Seconds before the time limit at which the ranks are asked to save (SIGUSR1); longer than a step and a
    checkpoint take."""
    requeue: bool = True
    """Whether a job that was asked to end puts itself back into the queue, and goes on from what it saved."""
    cpus_per_rank: Optional[int] = number(None, Whole(1, 65_536))
    """CPUs of a rank; null: `trainer.threads_per_rank`."""
    interface: Optional[str] = None
    """Network interface between nodes (`ib0`), for gloo and NCCL; null: their own choice."""
    directives: list[str] = field(default_factory=list)
    """Further options of sbatch, such as `--mem=0`; only from the command line or Python."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before the ranks start, such as `module load cuda`; only from the command line or Python."""
    python: Optional[str] = None
    """Python of the job, only from the command line or Python; null: the one that submits it."""


@dataclass(kw_only=True)
class ModelConfig:
    """`model`: the model that is built or loaded.

    Exactly one of `architecture`, `pretrained`, `package` and `factory` must be set.
    """

    name: str = "custom"
    """Its name, for display."""
    architecture: Optional[str] = None
    """A transformers model type (`deepseek_v3`), built with random weights from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Keys of the architecture's transformers config."""
    pretrained: Optional[str] = None
    """A local folder written by `save_pretrained`; its `config.json` determines the class."""
    package: Optional[str] = None
    """The pip name of an installed Python package with such a folder or a GGUF file; no code of the package is run."""
    factory: Optional[str] = None
    """`package.module:function`, called without arguments; only from the command line or Python."""
    device: ModelDevice = ModelDevice.cpu
    """Device on which it is built; `meta` has shapes but no values, enough for task=plan and task=compile."""
    published: Optional[str] = None
    """The size of this architecture as published in its paper or model card, for display."""
    load: ModelLoad = ModelLoad.sharded
    """How several ranks load `pretrained`: each reads only its part, or loads the whole model and drops the rest."""


@dataclass(kw_only=True)
class VerifyConfig:
    """`verify`: settings of task=verify."""

    steps: int = number(3, Whole(1))
    """Optimizer steps."""
    dtype: VerifyDtype = VerifyDtype.both
    """Precision of weights and computation in which N ranks are compared with one process."""


@dataclass(kw_only=True)
class BenchConfig:
    """`bench`: measurements of task=bench."""

    rounds: int = number(10, Whole(1))
    """Measured runs."""
    warmup: int = number(3, Whole(1))
    """Warm-up runs before that."""
    machine: bool = True
    """Also what the time of a step depends on, if ranks compute on the CPU, for a `hardware` file."""


@dataclass(kw_only=True)
class SearchConfig:
    """`search`: what task=search varies. Keys that the caller sets are kept, and so is the batch."""

    axes: list[str] = field(default_factory=list)
    """Only these: ep, dp_replicate, tp, dispatch, overlap, micro_batch, checkpointing, max_nodes, granularity, layout
    (tp, pp, vpp, cp, etp and zero of `workload`, which are described, not run). Empty: all."""
    model: bool = False
    """Also what changes the result of training: the node limit, the granularity, and the micro-batch where a capacity
    or a loss is over it."""
    described: bool = True
    """Also layouts that this package does not run."""
    show: int = number(8, Whole(1))
    """Rows of each table."""


@dataclass(kw_only=True)
class PlaceConfig:
    """`place`: input of task=place, which writes a `placement.yaml` for `mesh.placement`."""

    run: Optional[str] = None
    """A run directory, or its `load.npz` or `metrics.csv`; its plan says what is placed, and where, unless a mesh is
    given."""
    steps: Optional[int] = number(None, Whole(1))
    """Only this many of the last logged steps count; null: all."""


@dataclass(kw_only=True)
class ExportConfig:
    """`export`: input and output of task=export; everything else comes from the run."""

    run: Optional[str] = None
    """A run directory, or a native export."""
    checkpoint: Optional[str] = None
    """One of the run's checkpoints; null: the latest."""
    format: ExportFormat = ExportFormat.huggingface
    """Output: a transformers model that computes the same function, or our own format with config and plan."""
    adapters: AdapterExport = AdapterExport.separate
    """For a run with adapters: the adapters alone, in peft's format, or merged into the model."""
    family: Optional[str] = None
    """A model type of transformers; null: the first that fits."""
    path: Optional[str] = None
    """The folder to create; null: `model` in the run directory of this task."""
    tolerance: float = number(1e-5, Real("(0, inf)", "Use 1e-5"))
    """Largest difference between the logits of the exported and the trained model."""
