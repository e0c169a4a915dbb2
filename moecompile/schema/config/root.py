"""The root of the config, with all groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from moecompile.ranges import Whole, number
from moecompile.schema.config.adapters import AdaptersConfig
from moecompile.schema.config.layers import BalanceConfig, ExpertsConfig, PerLayerConfig, RoutingConfig
from moecompile.schema.config.machine import DispatchConfig, HardwareConfig, MeshConfig, StackConfig, WorkloadConfig
from moecompile.schema.config.optimizer import OptimizerConfig
from moecompile.schema.config.run import DataConfig, TrainerConfig
from moecompile.schema.config.tasks import (
    BenchConfig,
    ExportConfig,
    LauncherConfig,
    ModelConfig,
    PlaceConfig,
    SearchConfig,
    TaskConfig,
    VerifyConfig,
)


@dataclass(kw_only=True)
class Config:
    """The whole config."""

    name: str = "default"
    """Name of the recipe, used in results and in the run directory."""
    seed: int = number(0, Whole(0, 2**63 - 1))
    """Random seed of weights, data order and everything else."""
    debug: bool = False
    """Shows tracebacks for user errors too."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    per_layer: dict[str, PerLayerConfig] = field(default_factory=dict)
    """Name -> different settings for some layers, applied in order."""
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stack: StackConfig = field(default_factory=StackConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    place: PlaceConfig = field(default_factory=PlaceConfig)
    plan: Optional[str] = None
    """A `plan.yaml`, or a run directory with one, that decides in task=plan, compile and train; null: a new plan."""
    compare: Optional[str] = None
    """Another `plan.yaml` or run directory, with task=plan: what differs, and what that costs."""
    given: list[str] = field(default_factory=list)
    """Keys that the caller set, filled in by the program."""
