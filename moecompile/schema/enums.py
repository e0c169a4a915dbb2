"""The choices that configs offer: enums, not booleans, where there is a choice of behaviour."""

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


class ModelDevice(str, Enum):
    """Where the model is built: `meta` has shapes and no values, for planning and compiling models of any size."""

    cpu = "cpu"
    meta = "meta"


class ModelLoad(str, Enum):
    """How the ranks of a mesh load a pretrained model."""

    sharded = "sharded"  # each rank reads what it keeps
    full = "full"  # each rank loads the whole model and then drops what it does not keep


class SiteKind(str, Enum):
    """Which sites are rewritten."""

    auto = "auto"  # the experts that the model has already, else its dense FFNs
    dense = "dense"
    existing = "existing"
    both = "both"


class ExpertInit(str, Enum):
    """How the experts get their first weights from the dense FFN (docs/understand/upcycling.md)."""

    copy = "copy"
    virtual_group = "virtual_group"
    drop = "drop"  # copies or slices, of which each expert draws some hidden units anew (Nakamura et al. 2025)
    random = "random"


class WeightScaling(str, Enum):
    """How experts made from the dense FFN are scaled, so that their weighted sum starts like it.

    docs/understand/upcycling.md has the rules.
    """

    none = "none"
    exact = "exact"  # down by routed slices / scale: the dense FFN, where the weights of a token sum to `scale`
    expected = "expected"  # down by routed slices / expected sum of the weights, for routers that do not normalise
    nvidia = "nvidia"  # the same factor spread over all projections (He et al. 2024)


class Objective(str, Enum):
    """What the model learns to predict."""

    causal = "causal"  # the next token
    span_corruption = "span_corruption"  # T5: masked spans, for encoder-decoder models


class TokenizerSource(str, Enum):
    """Whose tokens the text is cut into."""

    train = "train"  # a byte-level BPE, trained on the training split
    model = "model"  # those that the pretrained model was trained on


class Baseline(str, Enum):
    """What is trained after the model, with the same data, optimizer and mesh, to compare with."""

    none = "none"
    dense = "dense"  # the model before it was rewritten


class DispatchKind(str, Enum):
    """How tokens travel to their experts."""

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
    chunks = "chunks"  # these, and the experts on other tokens
    auto = "auto"  # what is predicted to be fastest


class WireDtype(str, Enum):
    """What rows are cast to for an exchange."""

    auto = "auto"  # nothing: they travel as the activations are (bf16 under autocast)
    fp32 = "fp32"
    bf16 = "bf16"


class Precision(str, Enum):
    """What weights and activations are computed in. Routers, and sums of gradients over ranks, are fp32 under all."""

    fp32 = "fp32"
    bf16_mixed = "bf16_mixed"  # fp32 weights, matrix products under autocast
    bf16_params = (
        "bf16_params"  # bf16 weights and activations in every layer, made of fp32 shards that the optimizer has
    )


class Checkpointing(str, Enum):
    """What is computed again in backward instead of being kept."""

    none = "none"
    full = "full"  # every layer, exchanges too
    keep_exchanges = "keep_exchanges"  # every layer, but what was received and chosen is kept: nothing is sent again


class Compiled(str, Enum):
    """What goes through torch.compile."""

    none = "none"
    regions = "regions"  # the graphs that replaced FFNs or experts


class OnNan(str, Enum):
    """What happens when a loss or a gradient is NaN or infinite."""

    stop = "stop"  # the run ends and names the layer and the rank where it began
    skip = "skip"  # the optimizer step is dropped on all ranks and counted


class VerifyDtype(str, Enum):
    """In which precision N ranks are compared with one process."""

    both = "both"
    float64 = "float64"
    float32 = "float32"


class ExportFormat(str, Enum):
    """What a trained model is written as."""

    huggingface = "huggingface"  # the family of transformers with the same mathematics
    native = "native"  # our own names, with config and plan; `moecompile.load_exported` reads it
