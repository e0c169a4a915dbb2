"""Preference training (DPO, arXiv 2305.18290) of a mixture of experts on two CPU processes.

    torchrun --nproc_per_node 2 docs/examples/dpo.py                     # a small Qwen3-MoE, and pairs that are made up
    torchrun --nproc_per_node 2 docs/examples/dpo.py FOLDER pairs.jsonl  # your own

A line of `pairs.jsonl` is {"prompt": "...", "chosen": "...", "rejected": "..."}. The reference is the model itself
before its first step: `Trainer.predict` computes its log-probabilities once, so no second model is held. Of a step,
chosen and rejected answers are one batch, so the experts are called once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig

from moecompile import compile_model

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
BETA = 0.1  # how far the model may leave the reference
Answer = tuple[list[int], int]  # tokens of prompt and answer; where the answer begins
Pair = tuple[int, Answer, Answer]  # its number, chosen, rejected


class DPO(LightningModule):
    """A step of one batch of pairs; see `collate` for what it has."""

    def __init__(self, model: PreTrainedModel, num_pairs: int, lr: float) -> None:
        super().__init__()
        example = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 4)}
        self.model = compile_model(model, [f"mesh.ranks_per_node={RANKS}"], example=example)
        self.reference = torch.zeros(num_pairs, 2)
        self.lr = lr

    def of_answers(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of the answers, (pairs, 2): chosen, rejected."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        of_tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (of_tokens * batch["is_answer"][:, 1:]).sum(1).view(2, -1).T

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[int, list[float]]:
        """The reference: pair -> its two log-probabilities."""
        return dict(zip(batch["pair"].tolist(), self.of_answers(batch).tolist(), strict=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        gained = BETA * (self.of_answers(batch) - self.reference.to(self.device)[batch["pair"]])
        margin = gained[:, 0] - gained[:, 1]
        loss = -F.logsigmoid(margin).mean()
        self.log("loss", loss, sync_dist=True)
        self.log("right", (margin > 0).float().mean(), sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """All chosen answers, then all rejected ones: ids, what is no padding, and what the answers are."""
    answers = [answer for kind in (1, 2) for answer in (pair[kind] for pair in pairs)]
    places = [torch.arange(len(ids)) for ids, _ in answers]
    begins = [place >= start for place, (_, start) in zip(places, answers, strict=True)]
    return {
        "pair": torch.tensor([pair[0] for pair in pairs]),
        "input_ids": pad_sequence([torch.tensor(ids) for ids, _ in answers], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(place) for place in places], batch_first=True),
        "is_answer": pad_sequence([begin.float() for begin in begins], batch_first=True),
    }


def read(folder: Path, path: Path) -> tuple[PreTrainedModel, list[Pair]]:
    """The model of a folder, and pairs in the tokens of its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(prompt: str, text: str) -> Answer:
        begin, end = tokenizer(prompt)["input_ids"], tokenizer.eos_token or ""
        return begin + tokenizer(text + end, add_special_tokens=False)["input_ids"], len(begin)

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    pairs = [(answer(line["prompt"], line["chosen"]), answer(line["prompt"], line["rejected"])) for line in lines]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model, [(i, *pair) for i, pair in enumerate(pairs)]


def made_up() -> tuple[PreTrainedModel, list[Pair]]:
    """A small model, which is to prefer answers that count upwards."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    found: list[Pair] = []
    for i in range(64):
        start, length = i % 40, 3 + i % 5
        upwards, downwards = list(range(start, start + length)), list(range(start + length, start, -1))
        found.append((i, ([60, start, *upwards], 2), ([60, start, *downwards], 2)))
    return AutoModelForCausalLM.from_config(config), found


def main() -> None:
    """Writes the trained model as a folder of transformers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="what save_pretrained wrote")
    parser.add_argument("pairs", nargs="?", type=Path, help="JSON lines")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a rank")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="by default 1e-6, of the small model 1e-3")
    parser.add_argument("--out", type=Path, default=Path("preferred"), help="a folder for the result")
    given = parser.parse_args()
    if (given.folder is None) is not (given.pairs is None):
        parser.error("a folder and pairs go together")

    seed_everything(0, verbose=False)  # every rank begins with the same weights
    model, pairs = made_up() if given.folder is None else read(given.folder, given.pairs)
    module = DPO(model, len(pairs), given.lr or (1e-3 if given.folder is None else 1e-6))
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        strategy="expert_parallel", accelerator="auto", devices=RANKS, max_epochs=given.epochs, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, **quiet,
    )  # fmt: skip

    loader = DataLoader(pairs, given.batch_size, shuffle=True, collate_fn=collate)
    ordered = DataLoader(pairs, given.batch_size, collate_fn=collate)
    every: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(every, trainer.predict(module, ordered))  # each rank has computed some
    for pair, log_probs in (item for rank in every for batch in rank for item in batch.items()):
        module.reference[pair] = torch.tensor(log_probs)

    trainer.fit(module, loader)
    weights = get_model_state_dict(
        module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )  # all ranks gather, the first one has them
    if trainer.is_global_zero:
        model.save_pretrained(given.out, state_dict=weights)
        loss, right = (float(trainer.callback_metrics[name]) for name in ("loss", "right"))
        print(f"loss {loss:.3f} (0.693 at first), {right:.0%} of the last pairs right; {given.out}")


if __name__ == "__main__":
    main()
