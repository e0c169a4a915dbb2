"""One dataclass per config group, with a string under each field that says what it is.

YAML only fills values; enums, not booleans, where there is a choice of behaviour. OmegaConf reads the annotations at
run time: Optional[...] and Union[...] are the spellings that it accepts. The strings are printed in the reference page.
"""

from moecompile.schema.config.layers import BalanceConfig, ExpertsConfig, LossesConfig, PerLayerConfig, RoutingConfig
from moecompile.schema.config.machine import DispatchConfig, HardwareConfig, MeshConfig
from moecompile.schema.config.root import Config
from moecompile.schema.config.run import DataConfig, OptimizerConfig, TrainerConfig
from moecompile.schema.config.tasks import BenchConfig, ExportConfig, ModelConfig, TaskConfig, VerifyConfig

__all__ = [
    "BalanceConfig",
    "BenchConfig",
    "Config",
    "DataConfig",
    "DispatchConfig",
    "ExpertsConfig",
    "ExportConfig",
    "HardwareConfig",
    "LossesConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PerLayerConfig",
    "RoutingConfig",
    "TaskConfig",
    "TrainerConfig",
    "VerifyConfig",
]
