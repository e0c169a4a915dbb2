"""Config of a training run: `data` and `trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from moecompile.ranges import Real, Whole, number
from moecompile.schema.enums import (
    Baseline,
    Checkpointing,
    Compiled,
    DataKind,
    LoggerKind,
    MaskPadding,
    Objective,
    OnNan,
    Precision,
    RowLayout,
    TokenizerSource,
)


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
    val_fraction: float = number(0.05, Real("(0, 1)", "Use 0.05"))
    """Fraction that is held out for validation: the end of a text, pieces of a corpus, or chats."""
    val_batches: int = number(0, Whole(0))
    """Validation micro-batches per rank; 0: all."""
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
    checkpointing: Checkpointing = Checkpointing.keep_exchanges
    """Activation checkpointing: what is recomputed in backward instead of kept."""
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
    baseline: Baseline = Baseline.none
    """`dense` also trains the dense model, with the same data, optimizer and mesh, and shows both side by side."""
