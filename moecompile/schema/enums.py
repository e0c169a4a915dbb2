"""Enums of the config, except those of the router (`moecompile.routing`)."""

from __future__ import annotations

from enum import Enum


class TaskName(str, Enum):
    """What the command does."""

    train = "train"
    compile = "compile"
    plan = "plan"
    verify = "verify"
    export = "export"
    bench = "bench"
    search = "search"
    rehearse = "rehearse"
    place = "place"
    data = "data"
    chat = "chat"
    submit = "submit"
    import_config = "import"  # `import` is a word of Python

    @property
    def is_launched(self) -> bool:
        """Whether it runs on every rank of the mesh."""
        return self in (TaskName.train, TaskName.verify, TaskName.bench)


class ImportSource(str, Enum):
    """The system whose training config is imported."""

    megatron = "megatron"  # Megatron-Core: a shell script, or YAML with its flags
    torchtitan = "torchtitan"  # TOML, or a function of a config_registry.py
    axolotl = "axolotl"  # YAML


class RehearsedLoad(str, Enum):
    """How full the rank is whose step is rehearsed."""

    balanced = "balanced"  # every expert gets as many rows
    zipf = "zipf"  # the fullest rank of experts whose popularity falls as 1 / n
    hot = "hot"  # the fullest rank, with an expert that every other token takes


class LauncherKind(str, Enum):
    """Who starts the job."""

    local = "local"  # this command
    slurm = "slurm"  # task=submit, by a batch job


class ModelDevice(str, Enum):
    """Device on which the model is built: `meta` has shapes but no values, to plan and compile models of any size."""

    cpu = "cpu"
    meta = "meta"


class ModelAttention(str, Enum):
    """transformers' implementation of attention."""

    auto = "auto"  # the one that transformers takes for the model
    sdpa = "sdpa"
    eager = "eager"  # a matrix of scores for each head
    flex_attention = "flex_attention"
    flash_attention_2 = "flash_attention_2"  # these need the package
    flash_attention_3 = "flash_attention_3"
    flash_attention_4 = "flash_attention_4"

    @property
    def is_on_a_gpu(self) -> bool:
        """Whether it neither trains on a CPU nor runs on the meta device."""
        return self not in (ModelAttention.auto, ModelAttention.sdpa, ModelAttention.eager)


class ModelLoad(str, Enum):
    """How the ranks of a mesh load or build a model."""

    auto = "auto"  # sharded, except for small models from a config
    sharded = "sharded"  # each rank reads or draws only its own part
    full = "full"  # each rank makes the whole model, then drops the rest


class ModelInit(str, Enum):
    """Where the initial weights of a model from a config come from (docs/understand/meshes.md)."""

    auto = "auto"  # replay up to 4 billion numbers, keyed beyond
    replay = "replay"  # the numbers that transformers draws, on every rank
    keyed = "keyed"  # each block of rows from a random key of its own, so that a rank draws its rows alone


class SiteKind(str, Enum):
    """Which sites are rewritten."""

    auto = "auto"  # the experts that the model has already, else its dense FFNs
    dense = "dense"
    existing = "existing"
    both = "both"


class ExpertInit(str, Enum):
    """How the experts are initialized: from the dense FFN (docs/understand/upcycling.md), or from a model's experts."""

    copy = "copy"
    virtual_group = "virtual_group"
    drop = "drop"  # copies or slices, with some hidden units of each expert reinitialized (Nakamura et al. 2025)
    random = "random"
    widen = "widen"  # copies of the experts of a model that is MoE already (docs/understand/widening.md)


class WidenTopK(str, Enum):
    """Experts per token of a model that is widened."""

    scaled = "scaled"  # grows by the same factor as the experts, so outputs can stay equal
    kept = "kept"  # as many as before


class WeightScaling(str, Enum):
    """How experts made from the dense FFN are scaled, so that their weighted sum starts like the dense FFN.

    The formulas are in docs/understand/upcycling.md.
    """

    none = "none"
    exact = "exact"  # down by routed slices / scale: equals the dense FFN if the weights of a token sum to `scale`
    expected = "expected"  # down by routed slices / expected sum of the weights, for routers that do not normalize
    nvidia = "nvidia"  # the same factor, distributed over all projections (He et al. 2024)


class Objective(str, Enum):
    """The training objective."""

    causal = "causal"  # the next token
    span_corruption = "span_corruption"  # T5: masked spans, for encoder-decoder models


class DataKind(str, Enum):
    """What the data are."""

    text = "text"  # one plain text file, held in memory
    corpus = "corpus"  # many files of text, tokenized once into memory-mapped shards
    sft = "sft"  # chats: the loss is on the assistant's tokens alone


class RowLayout(str, Enum):
    """How chats of different lengths become rows of a batch."""

    pack = "pack"  # several chats a row, which do not see each other
    pad = "pad"  # one chat a row, filled up to the longest of its micro-batch


class TokenizerSource(str, Enum):
    """Where the tokenizer comes from."""

    train = "train"  # a byte-level BPE, trained on the training split
    model = "model"  # the tokenizer of the pretrained model


class Baseline(str, Enum):
    """Baseline that is trained after the model, with the same data, optimizer and mesh."""

    none = "none"
    dense = "dense"  # the model before rewriting, for as many steps
    dense_flops = "dense_flops"  # for as many steps as cost the FLOPs of the compiled model's


class AdapterKind(str, Enum):
    """Which adapters are trained in place of the model's weights."""

    none = "none"
    lora = "lora"


class AdapterExport(str, Enum):
    """How task=export writes a model that was trained with adapters."""

    separate = "separate"  # the adapters alone, in the format of peft
    merged = "merged"  # the whole model, with the adapters added to its weights


class DispatchKind(str, Enum):
    """How tokens are sent to their experts."""

    auto = "auto"
    local = "local"
    flat = "flat"
    dedup = "dedup"
    hierarchical = "hierarchical"
    allgather = "allgather"


class OverlapKind(str, Enum):
    """What runs while rows are on the wire."""

    none = "none"
    shared = "shared"  # the shared experts
    chunks = "chunks"  # the shared experts, and the experts on other tokens
    auto = "auto"  # what is predicted to be fastest


class EmbeddingShard(str, Enum):
    """Whose rows are spread over ranks."""

    auto = "auto"
    ep = "ep"
    none = "none"


class RowRule(str, Enum):
    """How a table whose rows are spread is stepped (moecompile.runtime.row_steps)."""

    same = "same"  # as other weights are: all rows, in every step
    lazy_adamw = "lazy_adamw"  # AdamW of the rows that have a gradient
    rowwise_adagrad = "rowwise_adagrad"  # Adagrad with one number per row, of the rows that have a gradient


class DispatchBalance(str, Enum):
    """Whether ranks with little to do compute experts of other ranks."""

    none = "none"
    lend = "lend"  # hot experts are lent, decided in each micro-batch
    auto = "auto"  # lend, if a loan can pay on this mesh


class WireDtype(str, Enum):
    """In what rows are sent."""

    auto = "auto"  # the dtype of the activations (bf16 under autocast), without a cast
    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"  # bf16; to the experts, and gradients of what they return, e4m3 with a power of two for 32 numbers
    fp8_128 = "fp8_128"  # the same with a fp32 scale for 128 numbers
    fp8_if_faster = "fp8_if_faster"  # fp8 where nodes are crossed and it is predicted to take less time; else auto


class Precision(str, Enum):
    """Precision of weights and activations. Routers and the reduction of gradients are always fp32."""

    fp32 = "fp32"
    bf16_mixed = "bf16_mixed"  # fp32 weights, matmuls under autocast
    bf16_params = "bf16_params"  # bf16 weights and activations in every layer, cast from the optimizer's fp32 shards


class OptimizerKind(str, Enum):
    """Which optimizer."""

    adamw = "adamw"
    muon = "muon"  # Muon for the matrices of hidden layers, AdamW for all other weights


class StateKind(str, Enum):
    """In what the optimizer keeps its moments, see `moecompile.schema.moments`."""

    auto = "auto"  # in the dtype of the numbers that it steps: fp32, or bf16 for weights that are stored in bf16
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"  # codes of 8 bits with a scale for every block of a row


class Bf16Weights(str, Enum):
    """How a step reaches weights that are stored in bf16, in which small changes are lost."""

    nearest = "nearest"  # rounded to the nearest number, as torch does
    master = "master"  # kept in fp32 beside them, by the optimizer
    stochastic = "stochastic"  # rounded up or down, more often to the nearer one: right on average


class MuonScale(str, Enum):
    """Factor of Muon's step for a matrix with d_out rows and d_in columns, after `torch.optim.Muon`."""

    match_rms_adamw = "match_rms_adamw"  # 0.2 sqrt(max(d_out, d_in)): as large as AdamW's (Liu et al. 2025, Moonlight)
    original = "original"  # sqrt(max(1, d_out / d_in)) (Jordan 2024)


class MuonPrecision(str, Enum):
    """Precision of Newton-Schulz steps."""

    fp32 = "fp32"  # or wider, if the weights are
    bf16 = "bf16"  # as in `torch.optim.Muon`; also half of the bytes that are gathered


class Reduce(str, Enum):
    """When the gradients of weights that FSDP shards are reduced."""

    auto = "auto"
    each = "each"  # after the backward of each micro-batch: between them a rank has its shards alone
    last = "last"  # once, after the last one: until then a rank has the gradients of whole layers


class Gather(str, Enum):
    """When FSDP gathers weights."""

    auto = "auto"
    layer = "layer"  # a layer before its forward and again before its backward, in each micro-batch (ZeRO 3)
    step = "step"  # once in an optimizer step, and kept until its last backward (ZeRO 2)


class Checkpointing(str, Enum):
    """What is recomputed in backward instead of kept."""

    auto = "auto"  # keep_exchanges if that fits, else full
    none = "none"
    full = "full"  # every layer, including exchanges
    keep_exchanges = "keep_exchanges"  # every layer, but received rows and expert ids are kept: nothing is sent again
    budget = "budget"  # of each layer what its parts cost the least time for, until the plan fits


class MaskPadding(str, Enum):
    """Whether padding is taken out of routing."""

    auto = "auto"  # if the example has a padding mask
    always = "always"
    never = "never"


class Compiled(str, Enum):
    """What is compiled with torch.compile."""

    none = "none"
    regions = "regions"  # the graphs that replaced FFNs or experts


class OnNan(str, Enum):
    """What happens if a loss or a gradient is NaN or infinite."""

    stop = "stop"  # the run ends; the error names the layer and the rank where it began
    skip = "skip"  # the optimizer step is skipped on all ranks, and counted


class Calibrate(str, Enum):
    """Whether CPU ranks of one machine measure it before a run, so that its report's forecast is of this machine."""

    auto = "auto"  # with hardware=laptop, and a model of 1 to 200 million parameters
    always = "always"  # with a model of any size too
    never = "never"


class LoggerKind(str, Enum):
    """Where metrics of training go, beside metrics.csv."""

    tensorboard = "tensorboard"
    wandb = "wandb"  # Weights & Biases, offline unless WANDB_MODE says otherwise
    mlflow = "mlflow"  # files in the run directory, or MLFLOW_TRACKING_URI


class VerifyDtype(str, Enum):
    """Precision in which N ranks are compared with one process."""

    both = "both"
    float64 = "float64"
    float32 = "float32"


class ExportFormat(str, Enum):
    """Format in which a trained model is written."""

    huggingface = "huggingface"  # a transformers model that computes the same function
    native = "native"  # our own format, with config and plan; `moecompile.load_exported` reads it


class Schedule(str, Enum):
    """Schedule of a pipeline that is described."""

    onef1b = "onef1b"  # one forward, one backward, interleaved over virtual stages
    dualpipe = "dualpipe"  # from both ends, forwards beside backwards (DeepSeek-V3)
