"""The LightningModule that trains a language model: losses are sums, so unequal token counts are exact."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.errors import ConfigError
from moecompile.nn.context import own_positions
from moecompile.nn.padding import ENCODER, padding_of
from moecompile.runtime.data import IGNORED
from moecompile.runtime.objective import is_encoder_decoder
from moecompile.runtime.strategy import groups_of
from moecompile.runtime.weight_groups import make_optimizer
from moecompile.schema import OptimizerConfig


class LanguageModule(LightningModule):
    """A language model with AdamW or Muon, for `ExpertParallelStrategy(loss="sum")`.

    A batch has `input_ids` and `labels`, of chats also `attention_mask` (1 for a token, 0 for padding) and, if several
    chats share a row, `position_ids`. The labels of a causal model are its inputs, already shifted; those of an
    encoder-decoder model are the decoder's targets, from which the decoder's inputs are derived.

    Args:
        model: takes `input_ids` (B, S) and returns an object with `logits` (B, S, V); with an encoder and a decoder, it
            also takes `decoder_input_ids` (B, L) and the logits are (B, L, V).
        optimizer: AdamW or Muon, warm-up and decay.
        max_steps: optimizer steps of the run, for the decay.

    Raises:
        ConfigError: an encoder-decoder model without a start token for its decoder.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, max_steps: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.max_steps = model, optimizer, max_steps
        self.decoder_start = _decoder_start(model)
        self.val_loss = math.nan
        self._val_sums: Tensor | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Returns the sum of the token losses in nats, and the number of tokens with a target."""
        loss, num_tokens = self.summed_loss(batch)
        return {"loss": loss, "num_tokens": num_tokens}

    def summed_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross entropy in nats, summed over the tokens of this rank that have a target, and their number."""
        labels, logits = own_positions(self.model, batch["labels"]), self.logits(batch)
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, (labels != IGNORED).sum()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, S, V), or (B, L, V) of a decoder with the shifted labels as inputs (teacher forcing).

        With context parallelism, S are the positions of this rank.
        """
        inputs = {"input_ids": batch["input_ids"]}
        if self.decoder_start is not None:
            inputs["decoder_input_ids"] = shifted(batch["labels"], self.decoder_start)
        # transformers finds packed samples where positions start again, but only if there is no attention mask. Padding
        # is then a sample of its own.
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"]
        elif "attention_mask" in batch:
            inputs["attention_mask"] = batch["attention_mask"]
        with self._padding_of(batch):
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    @contextmanager
    def _padding_of(self, batch: dict[str, Tensor]) -> Iterator[None]:
        """Gives MoE layers the padding of packed rows, of which the model's own call has no mask."""
        padding = padding_of(self.model) if "position_ids" in batch else None
        if padding is None:
            yield
            return
        padding.start({ENCODER: batch["attention_mask"] != 0})
        try:
            yield
        finally:
            padding.end()

    def on_validation_epoch_start(self) -> None:
        """Starts the sums."""
        self._val_sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds to the sums; nothing is averaged before the end."""
        assert self._val_sums is not None
        loss, num_tokens = self.summed_loss(batch)
        self._val_sums += torch.stack((loss.double(), num_tokens.double()))

    def on_validation_epoch_end(self) -> None:
        """Validation loss over all ranks, nats per token."""
        assert self._val_sums is not None
        dist.all_reduce(self._val_sums, group=groups_of(self.trainer).losses)
        loss, num_tokens = self._val_sums.tolist()
        self.val_loss = loss / num_tokens
        self.log("val_loss", self.val_loss, prog_bar=True, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics({"val_loss": self.val_loss}, step=self.trainer.global_step)
            logger.save()  # the checkpoint of this step is on disk already, and a run that goes on has its row

    def configure_optimizers(self) -> Any:
        """AdamW or Muon, with the schedule (moecompile.runtime.weight_groups)."""
        optimizer = make_optimizer(self.model, self.optimizer)
        return {
            "optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}
        }  # fmt: skip

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's. It would free gradients after the next forward, which needs their memory, as validation does."""
        super().optimizer_step(*args, **kwargs)
        self.optimizers(use_pl_optimizer=False).zero_grad()  # type: ignore[union-attr]

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rates of an optimizer of this module."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)

    def set_step(self, scheduler: Any, step: int) -> None:
        """Sets the schedule, and the learning rates of its optimizer, to `step` optimizer steps."""
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1})
        for group in scheduler.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        """Linear warm-up, then cosine decay to `min_lr_ratio` at `max_steps`."""
        warmup, floor = self.optimizer.warmup_steps, self.optimizer.min_lr_ratio
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.max_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def shifted(labels: Tensor, start: int) -> Tensor:
    """Decoder inputs, (B, L): `start`, then all labels but the last; `start` also replaces ignored targets."""
    inputs = labels.roll(1, dims=-1)
    inputs[:, 0] = start
    return inputs.masked_fill(inputs == IGNORED, start)


def _decoder_start(model: nn.Module) -> int | None:
    """The first input of the decoder; T5 uses the padding token. None: no decoder."""
    if not is_encoder_decoder(model):
        return None
    names = ("decoder_start_token_id", "pad_token_id")
    start = next((value for name in names if (value := getattr(model.config, name, None)) is not None), None)
    if start is None:
        raise ConfigError(
            "model.config.pad_token_id", None, "the decoder's input has to start with some token",
            "Give pad_token_id or decoder_start_token_id",
        )  # fmt: skip
    return int(start)
