"""A training run: `data`, `optimizer` and `trainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from moecompile.schema.enums import Baseline, Checkpointing, Compiled, Objective, OnNan, Precision, TokenizerSource


@dataclass(kw_only=True)
class DataConfig:
    """`data`: the text and the batch."""

    objective: Objective = Objective.causal
    """What is predicted: the next token, or masked spans (T5)."""
    corpus: str = "moby_dick"
    """`moby_dick` (embedded)."""
    path: Optional[str] = None
    """A UTF-8 text file that is used instead."""
    tokenizer: TokenizerSource = TokenizerSource.train
    """A new one, trained on the training split, or the model's own."""
    vocab_size: Optional[int] = 2048
    """Entries of the byte-level BPE that is trained on the training split, 257 or more; null with the model's own."""
    seq_len: int = 128
    """Tokens per sequence, 2 or more."""
    global_batch_size: int = 16
    """Sequences per optimizer step, independent of the mesh; a multiple of micro_batch_size * ranks."""
    micro_batch_size: int = 4
    """Sequences per rank and forward, 1 or more; accumulation is derived."""
    val_fraction: float = 0.05
    """Tail of the text that is held out for validation, in (0, 1)."""
    val_batches: int = 0
    """Validation micro-batches per rank; 0: all."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """`optimizer`: AdamW with linear warm-up, then cosine decay."""

    lr: float = 1e-3
    """Highest learning rate, 0 or more."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the two moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator, positive."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; 0 for none."""
    warmup_steps: int = 20
    """Optimizer steps of warm-up, at most `trainer.max_steps`."""
    min_lr_ratio: float = 0.1
    """Last over highest learning rate, in [0, 1]; 1.0: constant."""
    clip_norm: Optional[float] = 1.0
    """Largest global gradient norm, positive; null: no clipping."""


@dataclass(kw_only=True)
class TrainerConfig:
    """`trainer`: the run."""

    max_steps: int = 100
    """Optimizer steps, 1 or more."""
    precision: Precision = Precision.fp32
    """Of weights and arithmetic; routers, and sums of gradients over ranks, are fp32 under all."""
    checkpointing: Checkpointing = Checkpointing.keep_exchanges
    """Activations that are computed again in backward instead of being kept."""
    compile: Compiled = Compiled.none
    """What goes through torch.compile."""
    log_interval: int = 10
    """Optimizer steps between rows."""
    val_interval: int = 100
    """Optimizer steps between validations."""
    timeout_s: int = 120
    """Timeout of a collective, seconds; a rank that hangs is found after it."""
    threads_per_rank: int = 1
    """CPU threads of a rank."""
    progress_bar: bool = True
    """A bar on a terminal, else lines."""
    save_checkpoint: bool = True
    """Writes a checkpoint at the end."""
    save_interval: int = 1000
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints that are kept; 0: all."""
    async_save: bool = True
    """Checkpoints are written in the background."""
    resume: Optional[str] = None
    """`auto` (the latest checkpoint of this run directory, if there is one), or a run directory or checkpoint to go on
    from; null: a new run.
    """
    allow_changes: list[str] = field(default_factory=list)
    """Names (shell patterns too) of what may differ from the checkpoint all the same, as the refusal lists them."""
    max_restarts: int = 0
    """How often a run that lost a rank goes on from its latest checkpoint by itself."""
    on_nan: OnNan = OnNan.stop
    """What happens when a loss or a gradient is not finite."""
    baseline: Baseline = Baseline.none
    """`dense` trains the dense model too, with the same data, optimizer and mesh, and shows both side by side."""
