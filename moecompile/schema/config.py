"""One dataclass per config group. YAML only fills values; enums, not booleans, where there is a choice of behaviour."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from moecompile.schema.enums import (
    BalanceRule,
    Baseline,
    BiasUpdate,
    Checkpointing,
    Choice,
    Compiled,
    DispatchKind,
    DropPolicy,
    ExpertInit,
    ExportFormat,
    GroupScore,
    ModelDevice,
    ModelLoad,
    Objective,
    OnNan,
    Precision,
    Score,
    SiteKind,
    TaskName,
    TokenizerSource,
    VerifyDtype,
    WeightScaling,
    WireDtype,
    Workload,
)

# OmegaConf reads these annotations at run time: Optional[...] and Union[...] are the spellings that it accepts.


@dataclass(kw_only=True)
class TaskConfig:
    """`task`: what to do."""

    name: TaskName = TaskName.train


@dataclass(kw_only=True)
class ModelConfig:
    """`model`: what is built or loaded. Exactly one of `architecture`, `pretrained`, `package` and `factory` is given.

    architecture: a transformers model type (`deepseek_v3`), built with random weights from `config`.
    pretrained: a local folder that `save_pretrained` wrote; its `config.json` says which class is loaded.
    package: an installed Python package, by its name for pip, with such a folder or a GGUF file; no code of it runs.
    factory: `package.module:function`, called without arguments; only from the command line or Python.
    device: `meta` builds shapes without values, enough for task=plan and task=compile. published: what this
    architecture's paper or model card says of its size, for people. load: how several ranks load `pretrained`.
    """

    name: str = "custom"
    architecture: Optional[str] = None
    config: dict[str, Any] = field(default_factory=dict)
    pretrained: Optional[str] = None
    package: Optional[str] = None
    factory: Optional[str] = None
    device: ModelDevice = ModelDevice.cpu
    published: Optional[str] = None
    load: ModelLoad = ModelLoad.sharded


@dataclass(kw_only=True)
class ExpertsConfig:
    """`experts`: which FFNs become experts and how.

    sites: which kind of site. match: shell pattern on the module path. layers: Python slice over the matched sites in
    model order (`1:` all but the first, `::2` every other). num_routed: routed experts. granularity: slices that one
    dense FFN is cut into. num_shared: slices that go to the shared expert, which every token visits. shared_gate: the
    shared expert's output is multiplied by a learned sigmoid (Qwen2-MoE). init: where the first weights come from.
    drop_ratio: with init=drop, the part of an expert's hidden units that is drawn anew. weight_scaling: what makes up
    for the routing weights.
    """

    sites: SiteKind = SiteKind.auto
    match: str = "*"
    layers: str = ":"
    num_routed: int = 8
    granularity: int = 1
    num_shared: int = 0
    shared_gate: bool = False
    init: ExpertInit = ExpertInit.copy
    drop_ratio: float = 0.5
    weight_scaling: WeightScaling = WeightScaling.exact


@dataclass(kw_only=True)
class RoutingConfig:
    """`routing`: where a token goes.

    top_k: experts per token. score: what turns logits into scores. scale: what the weights of a token sum to.
    groups: contiguous groups of experts (`auto`: one per node that the EP group spans if `max_nodes` is given, else 1).
    top_groups: groups that a token may use (null: all, or what `max_nodes` asks for). max_nodes: nodes that a token may
    reach. normalize: routing weights sum to `scale`. choice: token choice, or expert choice of top_k tokens per expert
    on average. bias: the router is a linear with a bias. capacity_factor: an expert takes at most
    ceil(capacity_factor * tokens * top_k / experts) tokens of a micro-batch (null: dropless). drop: which it keeps.
    jitter: router inputs are multiplied by uniform(1 - jitter, 1 + jitter) in training. workload: routing for
    benchmarks. skew: exponent of zipf. allow_future: expert choice in a causal model, where it sees the future.
    """

    choice: Choice = Choice.token
    top_k: int = 2
    score: Score = Score.softmax
    normalize: bool = True
    scale: float = 1.0
    groups: Union[int, str] = "auto"
    top_groups: Optional[int] = None
    group_score: GroupScore = GroupScore.top2
    max_nodes: Optional[int] = None
    bias: bool = False
    capacity_factor: Optional[float] = None
    drop: DropPolicy = DropPolicy.position
    jitter: float = 0.0
    workload: Workload = Workload.none
    skew: float = 1.0
    allow_future: bool = False


@dataclass(kw_only=True)
class LossesConfig:
    """`balance.losses`: coefficients of the auxiliary losses, 0 for none; several may be used at once.

    micro_batch: Switch and GShard, over one micro-batch. sequence: DeepSeek's, over each sequence. global_batch: over
    the global batch (Qwen). z: router z-loss (ST-MoE).
    """

    micro_batch: float = 0.0
    sequence: float = 0.0
    global_batch: float = 0.0
    z: float = 0.0


@dataclass(kw_only=True)
class BalanceConfig:
    """`balance`: how load is evened out.

    rule: whether a correction bias follows the load. update: how it moves. rate: its step per optimizer step. losses:
    coefficients of auxiliary losses.
    """

    rule: BalanceRule = BalanceRule.none
    update: BiasUpdate = BiasUpdate.sign
    rate: float = 1e-3
    losses: LossesConfig = field(default_factory=LossesConfig)


@dataclass(kw_only=True)
class PerLayerConfig:
    """`per_layer.NAME`: other settings for some of the rewritten layers.

    match: shell pattern on the module path. layers: Python slice over the rewritten layers. experts, routing, balance:
    keys of these groups with their values there.
    """

    match: str = "*"
    layers: str = ":"
    experts: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class MeshConfig:
    """`mesh`: ranks and their axes; num_nodes * ranks_per_node = dp_replicate * dp_shard.

    num_nodes: nodes. ranks_per_node: ranks on each. ep: ranks that share one set of experts (`auto`: all).
    dp_replicate: copies of the sharded weights. dp_shard: ranks over which dense weights are sharded (`auto`: all of a
    copy). tp, pp, cp: do not exist yet, 1. device: cpu, cuda or auto.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    ep: Union[int, str] = "auto"
    dp_replicate: int = 1
    dp_shard: Union[int, str] = "auto"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    device: str = "auto"


@dataclass(kw_only=True)
class HardwareConfig:
    """`hardware`: what one rank has. memory_gib: memory of one rank; *_gb_s: bandwidth of one rank, 1e9 bytes/s."""

    name: str = "laptop"
    memory_gib: float = 4.0
    intra_node_gb_s: float = 2.0
    inter_node_gb_s: float = 2.0


@dataclass(kw_only=True)
class DispatchConfig:
    """`dispatch`: how tokens travel to their experts.

    kind: which exchange. wire_dtype: precision of rows, partial sums and their gradients on the wire; routing weights
    stay fp32.
    """

    kind: DispatchKind = DispatchKind.auto
    wire_dtype: WireDtype = WireDtype.auto


@dataclass(kw_only=True)
class DataConfig:
    """`data`: the text and the batch.

    objective: what is predicted.
    corpus: `moby_dick` (embedded). path: a UTF-8 text file that is used instead. tokenizer: a new one, or the model's.
    vocab_size: entries of the byte-level BPE that is trained on the training split (null with the model's own
    tokenizer). seq_len: tokens per sequence. global_batch_size: sequences per optimizer step, independent of the mesh.
    micro_batch_size: sequences per rank and forward; accumulation is derived.
    val_fraction: tail of the text that is held out. val_batches: validation micro-batches per rank (0: all).
    """

    objective: Objective = Objective.causal
    corpus: str = "moby_dick"
    path: Optional[str] = None
    tokenizer: TokenizerSource = TokenizerSource.train
    vocab_size: Optional[int] = 2048
    seq_len: int = 128
    global_batch_size: int = 16
    micro_batch_size: int = 4
    val_fraction: float = 0.05
    val_batches: int = 0


@dataclass(kw_only=True)
class OptimizerConfig:
    """`optimizer`: AdamW with linear warm-up, then cosine decay.

    lr: highest learning rate. betas: decay of the moments. eps: added to the denominator. weight_decay: of matrices.
    warmup_steps: optimizer steps. min_lr_ratio: last over highest learning rate (1.0: constant). clip_norm: largest
    global gradient norm (null: no clipping).
    """

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    clip_norm: Optional[float] = 1.0


@dataclass(kw_only=True)
class TrainerConfig:
    """`trainer`: the run.

    max_steps: optimizer steps. precision: of weights and arithmetic. checkpointing: activations that are computed again
    in backward. compile: what goes through torch.compile. log_interval, val_interval: optimizer steps between rows and
    between validations. timeout_s: of a collective; a rank that hangs is found after it. threads_per_rank: CPU threads
    of a rank. progress_bar: a bar on a terminal, else lines. save_checkpoint: at the end. save_interval: optimizer
    steps between checkpoints (0: only at the end). keep_last: newest checkpoints that are kept (0: all). async_save:
    write them in the background. resume: `auto` (the latest checkpoint of this run directory, if there is one), or a
    run directory or checkpoint to go on from (null: a new run). allow_changes: names (shell patterns too) of what may
    differ from the checkpoint all the same, as the refusal lists them. max_restarts: how often a run that lost a rank
    goes on from its latest checkpoint by itself. on_nan: what happens when a loss or a gradient is not finite.
    baseline: `dense` trains the dense model too, and shows both side by side.
    """

    max_steps: int = 100
    precision: Precision = Precision.fp32
    checkpointing: Checkpointing = Checkpointing.keep_exchanges
    compile: Compiled = Compiled.none
    log_interval: int = 10
    val_interval: int = 100
    timeout_s: int = 120
    threads_per_rank: int = 1
    progress_bar: bool = True
    save_checkpoint: bool = True
    save_interval: int = 1000
    keep_last: int = 3
    async_save: bool = True
    resume: Optional[str] = None
    allow_changes: list[str] = field(default_factory=list)
    max_restarts: int = 0
    on_nan: OnNan = OnNan.stop
    baseline: Baseline = Baseline.none


@dataclass(kw_only=True)
class VerifyConfig:
    """`verify`: what task=verify runs. steps: optimizer steps. dtype: precision of weights and arithmetic."""

    steps: int = 3
    dtype: VerifyDtype = VerifyDtype.both


@dataclass(kw_only=True)
class BenchConfig:
    """`bench`: how often task=bench measures. rounds: what is measured counts so often. warmup: runs before that."""

    rounds: int = 10
    warmup: int = 3


@dataclass(kw_only=True)
class ExportConfig:
    """`export`: what task=export reads and writes; all else it takes from the run.

    run: a run directory, or a native export. checkpoint: one of the run's checkpoints (null: its latest). format: what
    is written. family: a model type of transformers (null: the first that fits). path: the new folder (null: `model` in
    the run directory of this task). tolerance: largest difference of logits to the trained model, when loaded again.
    """

    run: Optional[str] = None
    checkpoint: Optional[str] = None
    format: ExportFormat = ExportFormat.huggingface
    family: Optional[str] = None
    path: Optional[str] = None
    tolerance: float = 1e-5


@dataclass(kw_only=True)
class Config:
    """The whole config.

    name: the recipe's name, used in results and for the run directory. seed: decides weights, data order and all else
    that is random. debug: tracebacks for mistakes too. per_layer: name -> other settings for some layers, applied in
    order. given: keys that the caller set by value, filled in by the program.
    """

    name: str = "default"
    seed: int = 0
    debug: bool = False
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    per_layer: dict[str, PerLayerConfig] = field(default_factory=dict)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    given: list[str] = field(default_factory=list)
