"""One dataclass per config group, with a description under each field, which the reference page prints.

YAML only sets values. Choices of behaviour are enums, not booleans. OmegaConf reads the annotations at run time and
accepts Optional[...] and Union[...], not `X | Y`.
"""

from moecompile.schema.config.adapters import AdaptersConfig
from moecompile.schema.config.layers import (
    BalanceConfig,
    ExpertsConfig,
    LossesConfig,
    PerLayerConfig,
    RoutingConfig,
    WidenConfig,
)
from moecompile.schema.config.machine import (
    ContentionConfig,
    DispatchConfig,
    FigureConfig,
    FiguresConfig,
    HardwareConfig,
    HostConfig,
    MeshConfig,
    MessageConfig,
    RateConfig,
    StackConfig,
    WorkloadConfig,
)
from moecompile.schema.config.optimizer import MuonConfig, OptimizerConfig, WeightGroupConfig
from moecompile.schema.config.root import Config
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

__all__ = [
    "AdaptersConfig",
    "BalanceConfig",
    "BenchConfig",
    "Config",
    "ContentionConfig",
    "DataConfig",
    "DispatchConfig",
    "ExpertsConfig",
    "ExportConfig",
    "FigureConfig",
    "FiguresConfig",
    "HardwareConfig",
    "HostConfig",
    "LauncherConfig",
    "LossesConfig",
    "MeshConfig",
    "MessageConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PerLayerConfig",
    "PlaceConfig",
    "RateConfig",
    "RoutingConfig",
    "SearchConfig",
    "StackConfig",
    "TaskConfig",
    "TrainerConfig",
    "VerifyConfig",
    "WeightGroupConfig",
    "WidenConfig",
    "WorkloadConfig",
]
