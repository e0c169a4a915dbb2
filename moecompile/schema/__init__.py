"""The typed config schema and its rules. Configs are mutable input; only `make_plan` and the tasks read them.

What is imported here is what other rooms use of it.
"""

from moecompile.routing import BalanceRule, BiasUpdate, Choice, DropPolicy, GroupScore, Score, Workload
from moecompile.schema.config import (
    AdaptersConfig,
    BalanceConfig,
    BenchConfig,
    Config,
    ContentionConfig,
    DataConfig,
    DispatchConfig,
    ExpertsConfig,
    ExportConfig,
    FigureConfig,
    HardwareConfig,
    HostConfig,
    LauncherConfig,
    LossesConfig,
    MeshConfig,
    MessageConfig,
    ModelConfig,
    MuonConfig,
    OptimizerConfig,
    PerLayerConfig,
    PlaceConfig,
    RateConfig,
    RoutingConfig,
    SearchConfig,
    StackConfig,
    TaskConfig,
    TrainerConfig,
    VerifyConfig,
    WeightGroupConfig,
    WidenConfig,
    WorkloadConfig,
)
from moecompile.schema.enums import (
    AdapterExport,
    AdapterKind,
    Baseline,
    Checkpointing,
    Compiled,
    DataKind,
    DispatchBalance,
    DispatchKind,
    ExpertInit,
    ExportFormat,
    LauncherKind,
    LoggerKind,
    MaskPadding,
    ModelDevice,
    ModelLoad,
    MuonPrecision,
    MuonScale,
    Objective,
    OnNan,
    OptimizerKind,
    OverlapKind,
    Precision,
    RowLayout,
    Schedule,
    SiteKind,
    TaskName,
    TokenizerSource,
    VerifyDtype,
    WeightScaling,
    WidenTopK,
    WireDtype,
)
from moecompile.schema.implied import SOURCES, with_implied
from moecompile.schema.per_layer import LayerSettings, check_selections, layer_settings
from moecompile.schema.ranges import NUMBERS, check_numbers
from moecompile.schema.slices import site_slice
from moecompile.schema.validation import check_name, validate, validate_settings, validate_transform
from moecompile.schema.validation.adapters import check_adapters
from moecompile.schema.validation.experts import (
    check_latent,
    check_placement,
    check_shared,
    check_slices,
    is_sliced,
    virtual_group,
)
from moecompile.schema.validation.launcher import of_the_job
from moecompile.schema.validation.mesh import SEARCHED, commonest, mesh_spec, meshes
from moecompile.schema.validation.optimizer import check_optimizer, group_of
from moecompile.schema.validation.routing import balance_spec, router_config
from moecompile.schema.validation.run import accumulation_steps
from moecompile.schema.workload import is_described, with_workload
