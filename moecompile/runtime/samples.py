"""Text that the model writes during training: from the beginnings of validation texts, or answers to held-out prompts.

Algorithm of one sample, on all ranks at once, because a forward exchanges tokens between them:
  1. A validation micro-batch of this rank; of its rows a causal model is given the first quarter, an encoder-decoder
     model all of the encoder's input. Of chats, on every rank the same prompts as the template renders them
     (`ChatRows.prompts`); what follows the token that ends the answer is dropped.
  2. One forward for each token, as many on every rank, also if rows of chats are shorter on some. Rows keep their
     length, so that nothing is compiled again; causal models do not see what is not written yet. (Behind a capacity, it
     competes for experts all the same.)
  3. The next token is drawn at temperature 0.8 with a seed that depends on the step alone.
  4. Rank 0 writes prompts and continuations to `samples.jsonl`, and to loggers that take text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import Tokenizer
from torch import Tensor

from moecompile.atomic import write_text
from moecompile.rundir import read_samples
from moecompile.runtime.data import num_ids
from moecompile.runtime.metrics import Metrics
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy

TOKENS, ANSWER, ROWS, TEMPERATURE = 24, 48, 2, 0.8


class Samples(StepObserver):
    """Writes samples every `interval` optimizer steps and after the last one; None: only after the last one.

    Args:
        batches: micro-batches, of which the first is taken. tokenizer: of the text. path: of samples.jsonl.
        metrics: whose clock stops meanwhile.
    """

    def __init__(
        self, interval: int | None, batches: Iterable[dict[str, Tensor]], tokenizer: Tokenizer, path: Path,
        metrics: Metrics, *, seed: int,
    ) -> None:  # fmt: skip
        self.interval, self.batches, self.tokenizer, self.path = interval, batches, tokenizer, path
        self.metrics, self.seed = metrics, seed
        self._sampled = self._first = 0

    def started(self, module: LanguageModule) -> None:
        """Keeps the step from which the run goes on."""
        self._first = module.trainer.global_step

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """Writes a sample if it is time; after the first step, removes those of a run that went on another way."""
        if module.trainer.global_step == self._first + 1 and module.trainer.is_global_zero and self.path.is_file():
            kept = [row for row in read_samples(self.path) if row["step"] <= self._first]
            write_text(self.path, _as_lines(kept))
        if self.interval and module.trainer.global_step % self.interval == 0:
            self._sample(module, strategy)

    def ended(self, module: LanguageModule) -> None:
        """Writes the last one, also of a run that a callback has ended early."""
        strategy = module.trainer.strategy
        assert isinstance(strategy, ExpertParallelStrategy)
        if module.trainer.global_step not in (self._first, self._sampled):
            self._sample(module, strategy)

    def _sample(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        trainer = module.trainer
        assert isinstance(trainer, Trainer)
        self._sampled = step = trainer.global_step
        with self.metrics.paused():
            batch = strategy.batch_to_device(next(iter(self.batches)), strategy.root_device)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            vocabulary = num_ids(self.tokenizer)
            count = fewest(room(module, batch), strategy.groups.every, strategy.root_device)
            with strategy.precision_plugin.val_step_context():
                rows = written(module, batch, count, vocabulary=vocabulary, generator=generator)
            if trainer.is_global_zero:
                self._write(trainer, step, [self._texts(batch, i, *row) for i, row in enumerate(rows[:ROWS])])

    def _texts(self, batch: dict[str, Tensor], i: int, prompt: list[int], text: list[int]) -> tuple[str, str]:
        """Prompt and continuation of a row; a prompt of chats with the tokens of the template."""
        if "ends" not in batch:
            return self.tokenizer.decode(prompt), self.tokenizer.decode(text)
        end = int(batch["ends"][i])
        text = text[: text.index(end)] if end in text else text
        return self.tokenizer.decode(prompt, skip_special_tokens=False), self.tokenizer.decode(text)

    def _write(self, trainer: Trainer, step: int, texts: list[tuple[str, ...]]) -> None:
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in texts]
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk is told by the checkpoint
            file.write(_as_lines(rows))
        for logger in trainer.loggers:
            if hasattr(logger, "log_text"):  # wandb
                logger.log_text("sample", columns=["prompt", "text"], data=[list(row) for row in texts], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", "\n\n".join(f"**{p}**{t}" for p, t in texts), step)


def _as_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def room(module: LanguageModule, batch: dict[str, Tensor]) -> int:
    """How many tokens of a sample fit behind the prompts."""
    if module.decoder_start is not None:
        return min(TOKENS, batch["labels"].shape[1])
    length = batch["input_ids"].shape[1]
    if "starts" in batch:
        return length - int(batch["starts"].max())
    return min(TOKENS, length - _prompt(length))


def fewest(count: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The smallest `count` of all ranks."""
    number = torch.tensor(count, device=device)
    dist.all_reduce(number, dist.ReduceOp.MIN, group=group)
    return int(number)


def _prompt(length: int) -> int:
    return max(1, length // 4)


@torch.no_grad()
def written(
    module: LanguageModule, batch: dict[str, Tensor], count: int, *, vocabulary: int, generator: torch.Generator
) -> list[tuple[list[int], list[int]]]:
    """Prompt and continuation of every row, token ids. All ranks call it together, with the same `count`.

    Args:
        batch: as for the module, or of `ChatRows.prompts`. count: tokens to write.
        vocabulary: ids to draw from.
    """
    is_causal, training = module.decoder_start is None, module.training
    module.eval()
    try:
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"].clone()} if is_causal else dict(batch)
        inputs["labels"] = batch["labels"].clone()
        target = inputs["input_ids" if is_causal else "labels"]
        rows, first = torch.arange(len(target)), _prompt(target.shape[1]) if is_causal else 0
        starts = batch["starts"].cpu() if "starts" in batch else torch.full_like(rows, first)
        for row, start in enumerate(starts.tolist()):
            target[row, start:] = target[row, start - 1] if is_causal else 0
        for places in (starts + i for i in range(count)):
            logits = module.logits(inputs)[rows, places - int(is_causal), :vocabulary]
            finite = logits.float().nan_to_num(0.0, posinf=0.0)  # a run may go on with weights that are not
            chances = (finite / TEMPERATURE).softmax(-1).cpu()
            target[rows, places] = torch.multinomial(chances, 1, generator=generator)[:, 0].to(target.device)
        prompts = target if is_causal else batch["input_ids"]
        return [
            (prompt[:start] if is_causal else prompt, text[start : start + count])
            for prompt, text, start in zip(prompts.tolist(), target.tolist(), starts.tolist(), strict=True)
        ]
    finally:
        module.train(training)
