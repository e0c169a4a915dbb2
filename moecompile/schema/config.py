"""One dataclass per config group, with a description under each field, which the reference page prints.

YAML only sets values. Choices of behaviour are enums, not booleans. OmegaConf reads the annotations at run time and
accepts Optional[...] and Union[...], not `X | Y`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional, Union

from moecompile.ranges import Real, Whole, Words, number
from moecompile.routing import (
    BALANCE_NUMBERS,
    ROUTER_NUMBERS,
    BalanceRule,
    BiasUpdate,
    Choice,
    DropPolicy,
    GroupScore,
    Workload,
)
from moecompile.routing.scores import NO_SUCH_SCORE, SCORES
from moecompile.schema.enums import (
    AdapterExport,
    AdapterKind,
    Baseline,
    Bf16Weights,
    Calibrate,
    Checkpointing,
    Compiled,
    DataKind,
    DispatchBalance,
    DispatchKind,
    EmbeddingShard,
    ExpertInit,
    ExportFormat,
    Gather,
    ImportSource,
    LauncherKind,
    LoggerKind,
    MaskPadding,
    ModelAttention,
    ModelDevice,
    ModelInit,
    ModelLoad,
    MuonPrecision,
    MuonScale,
    Objective,
    OnNan,
    OptimizerKind,
    OverlapKind,
    Precision,
    Reduce,
    RehearsedLoad,
    RowLayout,
    RowRule,
    Schedule,
    SiteKind,
    StateKind,
    TaskName,
    TokenizerSource,
    VerifyDtype,
    WeightScaling,
    WidenTopK,
    WireDtype,
)
from moecompile.stages import AUTO, NONE, OVERLAPS, SCHEDULES

# -- layers: experts, routing, balance, per_layer -------------------------------------------------------------------


@dataclass(kw_only=True)
class WidenConfig:
    """`experts.widen`: how init=widen copies the experts of a model that is MoE already."""

    top_k: WidenTopK = WidenTopK.scaled
    """Experts per token: scaled as the experts are, or kept."""
    loads: Optional[str] = None
    """A run of the model before, whose loads say which experts get more copies; null: all get the same number."""
    noise: float = number(0.0, Real("[0, 1)", "Use 0.01, or 0 for none"))
    """Standard deviation of what is added to all copies but the first of an expert, relative to that of each weight;
    in [0, 1), positive with top_k=kept.
    """


@dataclass(kw_only=True)
class ExpertsConfig:
    """`experts`: which FFNs are replaced by experts, and how."""

    sites: SiteKind = SiteKind.auto
    """Kind of site that is rewritten; `auto`: experts that the model has already, else its dense FFNs."""
    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the matched sites in model order (`1:`: all but the first; `::2`: every other)."""
    num_routed: int = number(8, Whole(1))
    """Routed experts per layer; a multiple of `mesh.ep`."""
    granularity: int = number(1, Whole(1))
    """Slices that a dense FFN is split into; an expert has 1/granularity of its hidden units."""
    num_shared: int = number(0, Whole(0))
    """Slices in the shared expert, which every token uses; 0 for none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a learned sigmoid (Qwen2-MoE)."""
    shared_routed: bool = False
    """The router weighs the slices of the shared expert too, in one sum with a token's chosen experts (Inkling)."""
    num_identity: int = number(0, Whole(0))
    """Further experts, which return their input (zero-compute experts of LongCat-Flash); the router scores them too."""
    latent_size: Optional[int] = number(None, Whole(1))
    """Width in which routed experts work, between a projection down and one up (latent MoE); null: the model's."""
    latent_norm: bool = False
    """With `latent_size`, an RMSNorm before the projection up (Kimi K3)."""
    init: ExpertInit = ExpertInit.copy
    """How the experts are initialized, from the dense FFN or, with `widen`, from the experts that a model has."""
    widen: WidenConfig = field(default_factory=WidenConfig)
    """With init=widen, how they are copied. `num_routed` is the number afterwards."""
    drop_ratio: float = number(0.5, Real("(0, 1]", "Use 0.5, or another experts.init for none"))
    """With init=drop, the fraction of an expert's hidden units that is reinitialized."""
    weight_scaling: WeightScaling = WeightScaling.exact
    """How weights are scaled to compensate for routing weights, so that the MoE layer starts like the dense FFN."""
    backend: Optional[str] = None
    """`module:name` of a function that computes the SwiGLU experts of a rank instead; only from the command line or
    Python. null: the package's own.
    """


@dataclass(kw_only=True)
class RoutingConfig:
    """`routing`: the router."""

    choice: Choice = Choice.token
    """Token choice; expert choice of `top_k` tokens per expert on average (Zhou et al. 2022, arXiv 2202.09368); or a
    hash of the token id, with weights from the router's scores (DeepSeek-V4, in its first layers).
    """
    top_k: int = number(2, ROUTER_NUMBERS["top_k"])
    """Experts per token, 1 to `experts.num_routed`."""
    score: str = field(default="softmax", metadata={"range": Words(SCORES, NO_SUCH_SCORE)})
    """The function from router logits to scores."""
    normalize: bool = True
    """Whether the routing weights of a token are normalized to sum to `scale`, else they are its scores times it."""
    scale: float = number(1.0, ROUTER_NUMBERS["scale"])
    """Factor of the routing weights."""
    groups: Union[int, str] = "auto"
    """Groups of consecutive experts; `auto`: one per node of the EP group if `max_nodes` is set; with `even_groups`
    one per routed slice of the dense FFN; else 1.
    """
    top_groups: Optional[int] = number(None, ROUTER_NUMBERS["top_groups"])
    """Groups that a token may use, 1 to `groups`; null: as many as `max_nodes` allows, or all."""
    group_score: GroupScore = GroupScore.top2
    """How group-limited routing scores a group: by its best expert, its two best, or its top_k / top_groups best."""
    even_groups: bool = False
    """Each token uses the top_k / groups best experts of every group (MoGE, Pangu Pro MoE). With
    experts.init=virtual_group or drop a group is one slice of the dense FFN, so that a token always has all of them.
    """
    max_nodes: Optional[int] = number(None, Whole(1))
    """Nodes that a token may reach; null: no limit."""
    bias: bool = False
    """Whether the router's linear layer has a bias."""
    capacity_factor: Optional[float] = number(None, ROUTER_NUMBERS["capacity_factor"])
    """An expert takes at most ceil(capacity_factor * tokens * top_k / experts) tokens of a micro-batch;
    null: dropless.
    """
    drop: DropPolicy = DropPolicy.position
    """Which tokens an expert with too many keeps: the first ones, or those with the largest routing weights."""
    norm: bool = False
    """The router's input is divided by its root mean square and multiplied by a learned vector (Gemma 4)."""
    expert_scale: bool = False
    """The routing weights of an expert are multiplied by a learned number (Gemma 4)."""
    jitter: float = number(0.0, ROUTER_NUMBERS["jitter"])
    """In training, router inputs are multiplied by uniform(1 - jitter, 1 + jitter)."""
    workload: Workload = Workload.none
    """Routing that ignores the router's choice, for benchmarks."""
    skew: float = number(1.0, ROUTER_NUMBERS["skew"])
    """Exponent of the workloads zipf and drift: expert i is drawn with probability ~ 1 / (i + 1) ** skew."""
    hot_experts: int = number(1, ROUTER_NUMBERS["hot_experts"])
    """Experts of the block that the workloads from hot_block on make hot (or cold)."""
    allow_future: bool = False
    """Allows expert choice in a causal model, where it depends on future tokens."""
    replay: Optional[str] = None
    """`record` writes which experts every token chooses into `routes/` of the run; the path of such a folder makes
    tokens choose them again.
    """


@dataclass(kw_only=True)
class LossesConfig:
    """`balance.losses`: coefficients of the auxiliary losses, 0 for none; several may be used at once. null:
    with rule=auto that of the model's own config, or micro_batch=0.01 of a router that is made here, unless another
    loss over the load is given; else none.
    """

    micro_batch: Optional[float] = number(None, BALANCE_NUMBERS["losses.micro_batch"])
    """Load-balancing loss over one micro-batch (Switch and GShard)."""
    sequence: Optional[float] = number(None, BALANCE_NUMBERS["losses.sequence"])
    """Load-balancing loss over each sequence (DeepSeek)."""
    global_batch: Optional[float] = number(None, BALANCE_NUMBERS["losses.global_batch"])
    """Load-balancing loss over the global batch (Qwen)."""
    z: Optional[float] = number(None, BALANCE_NUMBERS["losses.z"])
    """Router z-loss (ST-MoE): the mean squared logsumexp of the logits."""


@dataclass(kw_only=True)
class BalanceConfig:
    """`balance`: load balancing."""

    rule: BalanceRule = BalanceRule.auto
    """Whether a correction bias balances the load: one that is nudged (`bias`, DeepSeek-V3), or solved from the scores
    of the global batch (`quantile`, Kimi K3). `auto`: no bias, and losses that are not given are filled in.
    """
    update: BiasUpdate = BiasUpdate.sign
    """How the correction bias changes per optimizer step: by the sign of mean load - load, or in proportion to it."""
    rate: float = number(1e-3, BALANCE_NUMBERS["rate"])
    """Step of the correction bias per optimizer step, positive with rule=bias."""
    recenter: bool = False
    """With rule=bias, the mean of the bias is subtracted after every update (torchtitan)."""
    losses: LossesConfig = field(default_factory=LossesConfig)


@dataclass(kw_only=True)
class PerLayerConfig:
    """`per_layer.NAME`: different settings for some of the rewritten layers."""

    match: str = "*"
    """Shell pattern on the module path."""
    layers: str = ":"
    """Python slice over the rewritten layers."""
    experts: dict[str, Any] = field(default_factory=dict)
    """Keys of `experts` with their values for these layers."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Keys of `routing` with their values for these layers."""
    balance: dict[str, Any] = field(default_factory=dict)
    """Keys of `balance` with their values for these layers."""


# -- adapters -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class AdaptersConfig:
    """`adapters`: low-rank adapters that are trained in place of the model's weights, which are then frozen."""

    kind: AdapterKind = AdapterKind.none
    """Which adapters."""
    rank: int = number(16, Whole(1))
    """Rank r of every adapter."""
    alpha: float = number(32.0, Real("(0, inf)", "Use twice adapters.rank"))
    """An adapter adds alpha / r times the product of its two matrices to a weight."""
    dropout: float = number(0.0, Real("[0, 1)", "Use 0"))
    """Dropout of the input of the adapters of linears in training; 0 with adapters of experts."""
    dense: Optional[str] = "*"
    """Pattern for the linears that get adapters, by module path (`*.self_attn.q_proj`); output heads and routers never
    get any. null: none."""
    experts: Optional[str] = "*"
    """Pattern for the stacked weights of experts that get adapters, by path (`*.experts.down_proj`). null: none."""
    train_router: bool = False
    """Whether the model's own routers are trained in full."""


# -- the machine: mesh, hardware, dispatch, stack, workload ---------------------------------------------------------


@dataclass(kw_only=True)
class MeshConfig:
    """`mesh`: ranks and their axes; num_nodes * ranks_per_node = pp * dp_replicate * dp_shard * cp * tp."""

    num_nodes: int = number(1, Whole(1, 65_536))
    """Nodes."""
    ranks_per_node: int = number(1, Whole(1, 1_024))
    """Ranks on each node."""
    ep: Union[int, str] = "auto"
    """Expert parallel size: ranks of an EP group, over which the experts are spread; `auto`: all ranks; `search`: what
    is predicted to be fastest and fits, with `dp_replicate` and what is `auto` in `dispatch`."""
    dp_replicate: int = number(1, Whole(1))
    """Replicas of the sharded weights."""
    dp_shard: Union[int, str] = "auto"
    """Ranks over which dense weights are sharded; `auto`: all ranks of a replica, divided by `cp` and `tp`."""
    tp: int = 1
    """Tensor parallel size: ranks that share a micro-batch and split dense weights, by the model's own `tp_plan`."""
    pp: int = 1
    """Pipeline parallel size: ranks that share micro-batches and have different layers (stages, see `pipeline`)."""
    cp: int = 1
    """Context parallel size: ranks that share sequences, and split their positions; attention splits its heads."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`."""
    placement: Optional[str] = None
    """A `placement.yaml` of task=place, or its folder: which EP rank has which experts; null: in the order of ids."""


@dataclass(kw_only=True)
class PipelineConfig:
    """`pipeline`: the stages into which `mesh.pp` cuts the model."""

    schedule: str = field(default=AUTO, metadata={"range": Words((AUTO, *SCHEDULES), "Use one of these")})
    """Which stages a rank has, and in which order it computes: `1f1b` one; `interleaved` 2 or more; `dualpipev` 2, one
    from each end of the model, so that all ranks keep equally many micro-batches; `auto` 1f1b or interleaved."""
    stages_per_rank: int = number(1, Whole(1))
    """Stages of a rank; with 2 or more, their forwards and backwards are interleaved, so ranks wait less and send more
    often. With `schedule=dualpipev` 2, also if it is left at 1."""
    overlap: str = field(default=NONE, metadata={"range": Words(OVERLAPS, "Use one of these")})
    """`exchanges`: with `schedule=dualpipev`, the forward of one micro-batch computes while exchanges of another's
    backward are on the wire, and the other way round; `none`: one after the other."""
    layout: Optional[str] = None
    """Where the model is cut, in the words of Megatron-LM: `Et*3|(tt|)*2t*3L` (E embedding, t a layer, L the head, |
    between stages, *n times); null: so that the dearest stage is as cheap as possible."""


@dataclass(kw_only=True)
class FigureConfig:
    """A number and where it comes from."""

    value: Optional[float] = number(None, Real("(0, inf)", "Give a positive number with its source"))
    """The number; null: not known."""
    source: str = ""
    """Where it is written, or how it was measured."""


@dataclass(kw_only=True)
class FiguresConfig:
    """`hardware.figures`: what predicting the time of a step needs, per rank; each has a `value` and a `source`."""

    bf16_tflops: FigureConfig = field(default_factory=FigureConfig)
    """Peak of dense matrix products in bf16, 1e12 operations/s, from the data sheet."""
    fp8_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same in 8 bits; where there is no such unit, the bf16 peak."""
    fp4_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same in 4 bits; where there is no such unit, the peak in 8 bits."""
    fp32_tflops: FigureConfig = field(default_factory=FigureConfig)
    """The same for fp32, without TF32, which PyTorch leaves off unless `torch.set_float32_matmul_precision` says so."""
    watts: FigureConfig = field(default_factory=FigureConfig)
    """Power limit."""
    memory_tb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth of the memory, 1e12 bytes/s, from the data sheet."""
    memory_effective_tb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth that kernels reach, 1e12 bytes/s."""
    latency_us: FigureConfig = field(default_factory=FigureConfig)
    """Time of an exchange without rows, microseconds."""
    link_domain: FigureConfig = field(default_factory=FigureConfig)
    """Ranks that the fast links connect (72: a rack of GB200)."""
    compute_units: FigureConfig = field(default_factory=FigureConfig)
    """Units, of which exchanges may take some (streaming multiprocessors)."""


@dataclass(kw_only=True)
class RateConfig:
    """A rate of `hardware.host`; rows rise from one to the next."""

    rows: float = 0.0
    """Rows, positive."""
    gflops: float = 0.0
    """1e9 operations/s with as many, positive."""


@dataclass(kw_only=True)
class ContentionConfig:
    """One of `hardware.host.contention`; ranks rise from one to the next."""

    ranks: float = 0.0
    """Ranks of a node that compute at once, positive."""
    factor: float = 0.0
    """How many times as long each of them takes as one alone, positive."""


@dataclass(kw_only=True)
class MessageConfig:
    """One of `hardware.host.messages`; ranks rise from one to the next."""

    ranks: float = 0.0
    """Ranks of an exchange, positive."""
    fixed_us: float = 0.0
    """CPU time of an exchange without rows, microseconds, positive."""
    byte_ns: float = 0.0
    """CPU time for each byte that a rank sends, nanoseconds, positive."""


@dataclass(kw_only=True)
class HostConfig:
    """`hardware.host`: ranks that compute on the CPU, as task=bench measures them; steps then take CPU time."""

    cores: Optional[int] = number(None, Whole(1))
    """Cores of a node, which its ranks share; null: no such ranks."""
    one_machine: bool = False
    """Whether all nodes of a mesh are played by one machine, so that their ranks share its cores."""
    products: list[RateConfig] = field(default_factory=list)
    """Dense products, by the rows that they have."""
    grouped: list[RateConfig] = field(default_factory=list)
    """Products of experts, by the rows of each of them."""
    contention: list[ContentionConfig] = field(default_factory=list)
    """What ranks of a node that compute at once cost each other."""
    messages: list[MessageConfig] = field(default_factory=list)
    """Exchanges, by the ranks among which they are; none: measured on one rank."""
    attention_gflops: FigureConfig = field(default_factory=FigureConfig)
    """Speed of attention without projections, 1e9 operations/s."""
    pass_gb_s: FigureConfig = field(default_factory=FigureConfig)
    """Bandwidth that operations on single numbers reach, 1e9 bytes/s."""
    node_us: FigureConfig = field(default_factory=FigureConfig)
    """What Python and autograd take for one operation, microseconds."""
    optimizer_ns: FigureConfig = field(default_factory=FigureConfig)
    """What the optimizer takes for a parameter, nanoseconds."""


@dataclass(kw_only=True)
class HardwareConfig:
    """`hardware`: memory and bandwidth of one rank."""

    name: str = "laptop"
    """Its name, for display."""
    memory_gib: float = number(4.0, Real("(0, inf)", "Give the memory of one rank in GiB"))
    """Memory of one rank, GiB."""
    intra_node_gb_s: float = number(2.0, Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"))
    """Bandwidth in one direction that exchanges of one rank reach within its link domain, 1e9 bytes/s."""
    inter_node_gb_s: float = number(2.0, Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"))
    """The same beyond it."""
    tflops: float = number(0.1, Real("(0, inf)", "Give the speed of one rank's matrix products in 1e12 operations/s"))
    """Speed that products of experts reach on one rank, 1e12 operations/s. A plan decides by it about overlap
    and lending; a forecast takes calibrated shares of the peaks in `figures`."""
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    host: HostConfig = field(default_factory=HostConfig)


@dataclass(kw_only=True)
class StackConfig:
    """`stack`: what the software of a run does, for predicting the time of a step (task=plan)."""

    name: str = "runtime"
    """Its name, for display."""
    bits: Optional[int] = number(None, Whole(4, 32))
    """Bits of the numbers in products with weights: 32, 16, 8 or 4; null: those of `trainer.precision`."""
    dispatcher: Optional[str] = None
    """`alltoall`, `deepep`, `hybridep` or a kind of `dispatch`; null: the plan's."""
    overlap: bool = False
    """Whether exchanges run beside the compute of another micro-batch."""
    schedule: Schedule = Schedule.onef1b
    """The pipeline's schedule."""
    graph: list[str] = field(default_factory=list)
    """Parts of a layer that CUDA graphs replay: attn, mamba, router, preprocess, dispatch, experts, dense; or all."""
    fused: bool = False
    """Whether activation and quantization are fused into the products of experts."""
    recompute: Optional[list[str]] = None
    """What backward computes again: full, all_but_exchanges, moe, experts (moe, but its exchanges), mlp, attention,
    mla_up_proj, layernorm, moe_act;
    null: that of `trainer.checkpointing`."""
    recompute_share: float = number(1.0, Real("(0, 1]", "Use 1.0, or stack.recompute=[] for none"))
    """Share of the layers of a stage to which `recompute` applies; others keep all."""
    row_bits: int = number(16, Whole(8, 16))
    """Bits of a number of a row in dispatch: 16 or 8."""
    grad_bits: int = number(32, Whole(16, 32))
    """Bits of a gradient in a described layout, kept and reduced: 32 or 16."""
    moment_bits: Optional[int] = number(None, Whole(8, 32))
    """Bits of each of the optimizer's two moments: 32, 16 or 8; null: those of `optimizer.state`."""
    wire_share: FigureConfig = field(
        default_factory=lambda: FigureConfig(value=1.0), metadata={"range": Real("(0, 1]", "Use 1.0")}
    )
    """Share of the machine's effective bandwidth that its exchanges reach."""
    comm_units: FigureConfig = field(
        default_factory=lambda: FigureConfig(value=20), metadata={"range": Real("[0, inf)", "Use 20, or 0 for none")}
    )
    """Compute units that overlapped exchanges take."""


@dataclass(kw_only=True)
class WorkloadConfig:
    """`workload`: the training step that task=plan plans, where it is not the one of `data`."""

    name: str = "data"
    """Its name, for display."""
    seq_len: Optional[int] = number(None, Whole(1))
    """Tokens per sequence; null: `data.seq_len`."""
    global_batch_size: Optional[int] = number(None, Whole(1))
    """Sequences per optimizer step; null: `data.global_batch_size`."""
    micro_batch_size: Optional[int] = number(None, Whole(1))
    """Sequences per rank and forward; null: `data.micro_batch_size`."""
    precision: Optional[Precision] = None
    """Precision of weights and computation; null: `trainer.precision`."""
    tp: int = number(1, Whole(1))
    """Tensor parallel size of a layout that is described, not run."""
    pp: int = number(1, Whole(1))
    """Pipeline parallel size of a layout that is described, not run."""
    vpp: int = number(1, Whole(1))
    """Virtual stages per rank of such a pipeline."""
    cp: int = number(1, Whole(1))
    """Context parallel size of a layout that is described, not run."""
    etp: int = number(1, Whole(1))
    """Tensor parallel size of experts in a layout that is described, not run."""
    zero: int = number(3, Whole(0, 3))
    """What is sharded over replicas: nothing (0), optimizer states (1), weights too (3, FSDP)."""
    mtp: int = number(0, Whole(0, 16))
    """Layers that predict further tokens (multi-token prediction), each with a head, which are described, not run."""
    load: Optional[str] = None
    """`metrics.csv` of a run, or a file of loads, whose imbalance is priced beside synthetic ones."""
    source: str = ""
    """Where the batch is published."""


@dataclass(kw_only=True)
class DispatchConfig:
    """`dispatch`: how tokens are sent to their experts."""

    kind: DispatchKind = DispatchKind.auto
    """Kind of dispatch; `auto`: flat, dedup or hierarchical, whose exchanges are predicted to take the least time, from
    `hardware`."""
    wire_dtype: WireDtype = WireDtype.auto
    """Precision of rows, partial sums and their gradients on the wire; routing weights stay fp32. `fp8`, `fp8_128`: two
    of the four ways of a step in eight bits, the others in bf16; `fp8_if_faster`: `fp8` where an EP group spans nodes
    and it is predicted to take less time, else `auto`."""
    overlap: OverlapKind = OverlapKind.none
    """What runs while rows are on the wire: nothing (`none`), the shared experts (`shared`), these and the experts on
    other parts of the tokens (`chunks`), or what is predicted to be fastest (`auto`)."""
    chunks: Union[int, str] = "auto"
    """Parts of a micro-batch's tokens with `overlap=chunks`, 2 or more; `auto`: 2 or 4, predicted to be faster."""
    balance: DispatchBalance = DispatchBalance.none
    """Whether experts with many tokens are lent to ranks with few, decided in each micro-batch: never (`none`), where
    it saves time (`lend`), or `lend` if a loan can pay on this mesh (`auto`)."""
    slots: Union[int, str] = "auto"
    """Experts that a rank can borrow at once, 1 or more; `auto`: 2, or as many as other ranks have."""
    backend: Optional[str] = None
    """`module:name` of a back end that dispatches and combines instead (DeepEP, ...); only from the command line or
    Python. null: the exchanges of `kind`."""


@dataclass(kw_only=True)
class EmbeddingsConfig:
    """`embeddings`: tables whose rows are spread over all ranks with different tokens, as experts are over those of
    `mesh.ep`: ids are sent to the rows, not tables to the ids."""

    shard: EmbeddingShard = EmbeddingShard.auto
    """Which tables: those whose ids are computed, such as hashes of n-grams (`auto`); all embeddings (`ep`); `none`."""
    min_numbers: int = number(2**24, Whole(1))
    """Numbers (rows times width) that a table has at least; smaller ones are gathered whole, as other weights are."""
    optimizer: RowRule = RowRule.same
    """How such tables are stepped: as other weights are (`same`), or only the rows that have a gradient: by AdamW
    (`lazy_adamw`), or by Adagrad without momentum and with one number of state per row (`rowwise_adagrad`). With these
    two gradients are kept by rows, too."""


# -- optimizer ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MuonConfig:
    """`optimizer.muon`: the step of hidden matrices, with `optimizer=muon` (docs/use/optimizers.md)."""

    lr: Optional[float] = number(None, Real("[0, inf)", "Use 0.02, or null for optimizer.lr"))
    """Peak learning rate of matrices; null: `optimizer.lr`, which is right for `scale=match_rms_adamw`."""
    momentum: float = number(0.95, Real("[0, 1)", "Use 0.95"))
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the gradient of the step is counted once more (Nesterov)."""
    scale: MuonScale = MuonScale.match_rms_adamw
    """Factor of the step of a matrix."""
    steps: int = number(5, Whole(1, 99))
    """Newton-Schulz steps."""
    coefficients: list[float] = field(default_factory=lambda: [3.4445, -4.775, 2.0315])
    """a, b and c of a step X -> a X + (b X X^T + c (X X^T)^2) X."""
    precision: MuonPrecision = MuonPrecision.fp32
    """Precision of these products, and of matrices that are gathered for them."""


@dataclass(kw_only=True)
class WeightGroupConfig:
    """`optimizer.groups[N]`: other settings for some weights."""

    match: str = "*"
    """Pattern for the weights by name (`*.norm.weight`); a weight belongs to the first group that matches."""
    lr_scale: float = 1.0
    """Factor of their learning rate, 0 or more."""
    weight_decay: Optional[float] = None
    """Their weight decay, 0 or more; null: what they have otherwise."""
    kind: Optional[OptimizerKind] = None
    """Their optimizer, with `optimizer=muon`; null: what they have otherwise."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """`optimizer`: AdamW or Muon, with linear warm-up, then cosine decay."""

    kind: OptimizerKind = OptimizerKind.adamw
    """Which optimizer."""
    lr: float = number(1e-3, Real("[0, inf)", "Use 0.001"))
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the two moments of AdamW, each in [0, 1)."""
    eps: float = number(1e-8, Real("(0, inf)", "Use 1e-8"))
    """Added to the denominator of AdamW."""
    weight_decay: float = number(0.1, Real("[0, inf)", "Use 0.1, or 0 for none"))
    """Decoupled weight decay of matrices; 0 for none."""
    warmup_steps: int = number(20, Whole(0))
    """Optimizer steps of warm-up, at most `trainer.max_steps`."""
    min_lr_ratio: float = number(0.1, Real("[0, 1]", "Use 0.1, or 1.0 for a constant rate"))
    """Final over peak learning rate; 1.0: constant."""
    clip_norm: Optional[float] = number(1.0, Real("(0, inf)", "Use 1.0, or null for no clipping"))
    """Maximum global gradient norm; null: no clipping."""
    state: StateKind = StateKind.auto
    """In what moments are kept: `fp32`, `bf16` (2 bytes), or `int8` (codes of 8 bits, about 1 byte); auto: in the dtype
    of the numbers that are stepped.
    """
    bf16_weights: Bf16Weights = Bf16Weights.nearest
    """How a step reaches weights that are stored in bf16: rounded, through fp32 copies (`master`, 4 bytes more), or
    rounded at random (`stochastic`).
    """
    groups: list[WeightGroupConfig] = field(default_factory=list)
    """Other settings for some weights."""
    muon: MuonConfig = field(default_factory=MuonConfig)


# -- a training run: data, trainer ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class DataConfig:
    """`data`: the text and the batch."""

    kind: DataKind = DataKind.text
    """One text, a corpus of many files, or chats to fine-tune on."""
    objective: Objective = Objective.causal
    """What is predicted: the next token, or masked spans (T5)."""
    corpus: str = "moby_dick"
    """`moby_dick`, which is part of the package."""
    path: Optional[str] = None
    """A UTF-8 text file to use instead; of a corpus or chats, a file, a folder or a pattern (`d/*.jsonl`)."""
    text_field: str = "text"
    """With `kind=corpus`: the field of a JSON line or the column of a table that holds the text."""
    layout: RowLayout = RowLayout.pack
    """With `kind=sft`: several chats in one row of `seq_len` tokens, or one."""
    cache: Optional[str] = None
    """Folder for tokenized data, with `kind=corpus` and `kind=sft`; null: `~/.cache/moecompile/data`."""
    tokenizer: TokenizerSource = TokenizerSource.train
    """A new one, trained on the training split, or the model's own."""
    vocab_size: Optional[int] = number(2048, Whole(257))
    """Size of the byte-level BPE vocabulary trained on the training split; null with the model's own."""
    seq_len: int = number(128, Whole(2))
    """Tokens per sequence; longer chats are cut off."""
    global_batch_size: int = number(16, Whole(1))
    """Sequences per optimizer step, independent of the mesh; a multiple of micro_batch_size * ranks."""
    micro_batch_size: int = number(4, Whole(1))
    """Sequences per rank and forward; the number of accumulation steps is derived."""
    epochs: Optional[float] = number(None, Real("(0, inf)", "Use 3, or null for trainer.max_steps"))
    """How often the training data are passed, instead of `trainer.max_steps`; null: as often as those steps take."""
    val_fraction: float = number(0.05, Real("(0, 1)", "Use 0.05"))
    """Fraction that is held out for validation: the end of a text, pieces of a corpus, or chats."""
    val_batches: int = number(0, Whole(0))
    """Validation micro-batches per rank, so other ranks or micro-batches validate other text; 0: all."""
    mask_padding: MaskPadding = MaskPadding.auto
    """Whether padding is taken out of routing, losses, loads, capacity and exchanges; auto: with chats, and if the
    example that the model is compiled with has a padding mask."""


@dataclass(kw_only=True)
class TrainerConfig:
    """`trainer`: the training run."""

    max_steps: int = number(100, Whole(1))
    """Optimizer steps."""
    precision: Precision = Precision.fp32
    """Precision of weights and computation; routers and the reduction of gradients are always fp32."""
    checkpointing: Checkpointing = Checkpointing.auto
    """Activation checkpointing: what is recomputed in backward instead of kept; auto: `keep_exchanges` if the plan then
    fits, else `full`; budget: chosen for each layer, so that the plan fits with the shortest predicted step."""
    reduce: Reduce = Reduce.auto
    """When gradients of sharded weights are reduced: after `each` micro-batch, or after the `last` one of a step, until
    when a rank has those of whole layers in fp32. auto: of the ways that fit, the one that sends the fewest bytes."""
    gather: Gather = Gather.auto
    """When sharded weights are gathered: each `layer` twice in a micro-batch, or all once in a `step`, and then kept
    whole until the step's last backward. auto: as for `reduce`, with which it is chosen."""
    compile: Compiled = Compiled.none
    """What is compiled with torch.compile."""
    log_interval: int = number(10, Whole(1))
    """Optimizer steps between rows of metrics."""
    val_interval: int = number(100, Whole(1))
    """Optimizer steps between validations."""
    sample_interval: Optional[int] = number(None, Whole(0))
    """Optimizer steps between samples of text that the model writes; null: only after the last step; 0: none."""
    loggers: list[LoggerKind] = field(default_factory=lambda: [LoggerKind.tensorboard])
    """Where metrics go, beside metrics.csv."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Lightning's callbacks and their arguments: EarlyStopping, Timer."""
    timeout_s: int = number(120, Whole(1, 1_000_000))
    """Timeout of a collective, seconds, after which a rank that hangs is detected."""
    threads_per_rank: int = number(1, Whole(1, 1_024))
    """CPU threads per rank."""
    progress_bar: bool = True
    """Shows a progress bar on a terminal, else lines."""
    save_checkpoint: bool = True
    """Writes a checkpoint at the end."""
    save_interval: int = number(1000, Whole(0))
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_last: int = number(3, Whole(0))
    """Number of newest checkpoints to keep; 0: all."""
    async_save: bool = True
    """Writes checkpoints in the background."""
    resume: Optional[str] = None
    """Checkpoint to resume from: `auto` (the latest one of this run directory, if there is one), a run directory or a
    checkpoint; null: a new run.
    """
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint, by their names in the error message or by shell patterns."""
    max_restarts: int = number(0, Whole(0))
    """How often a run that lost a rank is restarted from its latest checkpoint automatically."""
    on_nan: OnNan = OnNan.stop
    """What happens if a loss or a gradient is not finite."""
    calibrate: Calibrate = Calibrate.auto
    """Whether CPU ranks with hardware=laptop measure their machine before the first run with a model of about its size,
    in a few seconds, so that the report's forecast is of it; kept in `~/.cache/moecompile/machine`.
    """
    baseline: Baseline = Baseline.none
    """`dense` also trains the dense model, with the same data, optimizer, mesh and steps, and shows both side by side;
    `dense_flops` for as many steps as cost the same model FLOPs, so that each ends its own schedule at equal FLOPs.
    """


# -- the model, and the groups of single tasks ----------------------------------------------------------------------


@dataclass(kw_only=True)
class TaskConfig:
    """`task`: what the command does."""

    name: TaskName = TaskName.train
    """Name of the task."""
    require_fit: bool = False
    """With task=plan and search: exits with code 1 if the layout, or every layout, does not fit into memory with the
    load that is to be expected."""


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
    """Device of the build; `meta` has shapes alone, enough to plan and compile; to train, ranks fill their parts."""
    published: Optional[str] = None
    """The size of this architecture as published in its paper or model card, for display."""
    load: ModelLoad = ModelLoad.auto
    """Whether each of several ranks makes its part of the weights (`sharded`), or all and drops the rest (`full`).
    `auto`: `full` if `architecture` has at most 64 million numbers.
    """
    init: ModelInit = ModelInit.auto
    """Initial weights of `architecture`: the numbers that transformers draws (`replay`), or those of keys, by which a
    rank draws its own alone (`keyed`); `auto`: `replay` up to 4 billion numbers.
    """
    attention: ModelAttention = ModelAttention.auto
    """transformers' implementation of attention. `auto`: the one that it takes, `sdpa` in most models; `eager`, which
    gpt-oss has, keeps a matrix of scores for each head.
    """


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
    """Only these: ep, pp, dp_replicate, tp, stages, dispatch, overlap, micro_batch, checkpointing, max_nodes,
    granularity, layout (tp, pp, vpp, cp, etp and zero of `workload`, which are described, not run). Empty: all."""
    model: bool = False
    """Also what changes the result of training: the node limit, the granularity, and the micro-batch where a capacity
    or a loss is over it."""
    described: bool = True
    """Also layouts that this package does not run."""
    show: int = number(8, Whole(1))
    """Rows of each table."""


@dataclass(kw_only=True)
class RehearseConfig:
    """`rehearse`: what task=rehearse compares with the plan: a step of single ranks of the mesh, run without values."""

    load: RehearsedLoad = RehearsedLoad.balanced
    """How full the rank is: `balanced`, or the fullest rank under `zipf` or `hot`."""
    micro_batches: int = number(2, Whole(1))
    """Of the step, if the batch has more: a further one changes neither the peak nor the kinds of collectives. With
    mesh.pp at least as many as fill the pipeline, and one more."""
    ranks: list[int] = field(default_factory=list)
    """Ranks whose collectives are compared; empty: the first and the last one. With mesh.pp all of the pipeline of the
    first one, too."""


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
    average: int = number(1, Whole(1))
    """The mean of the weights of so many checkpoints: that one, and those before it."""
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


@dataclass(kw_only=True)
class ChatConfig:
    """`chat`: settings of task=chat, which takes everything else from the run."""

    run: Optional[str] = None
    """A run that was trained, an export or its run directory, adapters, or any folder of transformers with a chat
    template."""
    message: Optional[str] = None
    """One message, whose answer alone is printed; null: what is piped in, or lines on the terminal."""
    system: Optional[str] = None
    """A system message before the first one; null: the template's own, if it has one."""
    temperature: float = number(0.0, Real("[0, inf)", "Use 0.7, or 0 for the likeliest tokens"))
    """Temperature at which tokens are drawn; 0: the likeliest token each time."""
    max_tokens: int = number(256, Whole(1))
    """Most tokens of an answer."""


@dataclass(kw_only=True)
class ImportConfig:
    """`imported`: input of task=import, which makes a recipe of the training config of another system and plans it.

    On the command line `from=`, `file=` and `set.NAME=` stand for its keys.
    """

    source: Optional[ImportSource] = None
    """The system; `from=` on the command line."""
    file: Optional[str] = None
    """Its file, which is read and never run; `file=` on the command line."""
    set: dict[str, Any] = field(default_factory=dict)
    """Values of names that the file leaves open, or of its flags (`num_layers`); `set.NAME=` on the command line."""


# -- all groups -----------------------------------------------------------------------------------------------------


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
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stack: StackConfig = field(default_factory=StackConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rehearse: RehearseConfig = field(default_factory=RehearseConfig)
    place: PlaceConfig = field(default_factory=PlaceConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    imported: ImportConfig = field(default_factory=ImportConfig)
    plan: Optional[str] = None
    """A `plan.yaml`, or a run directory with one, that decides in task=plan, compile and train; null: a new plan."""
    compare: Optional[str] = None
    """Another `plan.yaml` or run directory, with task=plan: what differs, and what that costs."""
    plugins: list[str] = field(default_factory=list)
    """Modules (`package.module`), or paths of `.py` files, that are imported on every rank for what they register; only
    from the command line or Python."""
    given: list[str] = field(default_factory=list)
    """Keys that the caller set, filled in by the program."""
