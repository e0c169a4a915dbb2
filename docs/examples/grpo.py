"""Reinforcement learning (GRPO, arXiv 2402.03300) of a mixture of experts on two CPU processes.

    torchrun --nproc_per_node 2 docs/examples/grpo.py                        # a small Qwen3-MoE, which is to count
    torchrun --nproc_per_node 2 docs/examples/grpo.py FOLDER questions.jsonl # your own

A line of `questions.jsonl` is {"prompt": "...", "answer": "..."}. What the model writes is worth 1 if the answer is in
it, else 0: change `contains`. Answers are sampled in groups, one for each prompt, and then trained on several times.
Meanwhile tokens keep the experts that they had at first (routing replay, arXiv 2507.18071): else a few routers that
have moved change the probabilities of many tokens at once, and the ratios that are clipped say nothing any more.
The loss is a mean over all tokens of all ranks (arXiv 2503.14476), without a penalty for leaving the first model.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen3MoeConfig

from moecompile import ExpertParallelStrategy, compile_model, record_routes, replay_routes

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
CLIP = 0.2  # how far the ratio of new and old probability counts
Question = tuple[list[int], str]  # tokens of the prompt; the answer
Reward = Callable[[list[int], str], float]  # of the tokens that were written, and the answer


class GRPO(LightningModule):
    """A step samples `group` answers to each question, and takes `updates` optimizer steps on them."""

    def __init__(
        self, model: PreTrainedModel, reward: Reward, *, group: int, length: int, updates: int, lr: float
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        example = {"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 4)}
        self.model = compile_model(model, [f"mesh.ranks_per_node={RANKS}"], example=example)
        self.reward, self.group, self.updates, self.lr = reward, group, updates, lr
        ends = model.generation_config.eos_token_id
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        model.generation_config = GenerationConfig(  # nothing else of the folder's: it is not the model's distribution
            do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0, eos_token_id=ends
        )

    @torch.no_grad()
    def sampled(self, prompts: Sequence[list[int]], seed: int) -> list[list[int]]:
        """An answer to each prompt, up to its end, as the model writes without temperature or top-k."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        with torch.random.fork_rng():  # Lightning's ranks draw the same numbers in a step
            torch.manual_seed(seed)
            rows = self.model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
        return [row[: next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))] for row in rows]

    def of_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of all tokens but the first, (answers, tokens - 1)."""
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)

    def training_step(self, questions: list[Question], batch_idx: int) -> None:
        optimizer, strategy = self.optimizers(), self.trainer.strategy
        self.model.eval()
        asked = [question for question in questions for _ in range(self.group)]
        answers = self.sampled([prompt for prompt, _ in asked], self.global_step * RANKS + self.global_rank)
        rewards = [self.reward(got, wanted) for got, (_, wanted) in zip(answers, asked, strict=True)]
        worth = torch.tensor(rewards, device=self.device)
        groups = worth.view(-1, self.group)
        gain = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)

        rows = [torch.tensor(prompt + answer) for (prompt, _), answer in zip(asked, answers, strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device)
        begins = torch.tensor([len(prompt) for prompt, _ in asked], device=self.device)
        counts = mask[:, 1:] * (torch.arange(1, ids.shape[1], device=self.device) >= begins[:, None])
        with torch.no_grad(), record_routes(self.model) as routes:
            old = self.of_tokens(ids, mask)

        self.model.train()
        for _ in range(self.updates):
            with replay_routes(self.model, routes.stacked()):
                ratio = (self.of_tokens(ids, mask) - old).exp()
                gained = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
                optimizer.zero_grad()
                strategy.count_tokens(int(counts.sum()))
                self.manual_backward(-(gained * counts).sum())
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
        self.log("reward", worth.mean(), on_step=False, on_epoch=True, sync_dist=True, batch_size=len(worth))

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch}: reward {float(self.trainer.callback_metrics['reward']):.2f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def read(folder: Path, path: Path) -> tuple[PreTrainedModel, list[Question], Reward]:
    """The model of a folder, questions in the tokens of its tokenizer, and what answers are worth."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def contains(got: list[int], wanted: str) -> float:
        return float(wanted in tokenizer.decode(got, skip_special_tokens=True))

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = [(tokenizer(line["prompt"])["input_ids"], str(line["answer"])) for line in lines]
    return AutoModelForCausalLM.from_pretrained(folder), questions, contains


def made_up() -> tuple[PreTrainedModel, list[Question], Reward]:
    """A small model with random weights, and questions to which the answer is the next number."""
    config = Qwen3MoeConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    questions = [([15, i], str(i + 1)) for i in range(8)]
    return AutoModelForCausalLM.from_config(config), questions * 8, lambda got, wanted: float(int(wanted) in got)


def main() -> None:
    """Writes the trained model as a folder of transformers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="what save_pretrained wrote")
    parser.add_argument("questions", nargs="?", type=Path, help="JSON lines")
    parser.add_argument("--batch-size", type=int, default=8, help="questions of a rank")
    parser.add_argument("--group", type=int, default=8, help="answers to a question")
    parser.add_argument("--length", type=int, default=4, help="tokens of an answer, at most")
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps on the same answers")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, help="by default 1e-6, of the small model 3e-3")
    parser.add_argument("--out", type=Path, default=Path("reinforced"), help="a folder for the result")
    given = parser.parse_args()
    if (given.folder is None) is not (given.questions is None):
        parser.error("a folder and questions go together")
    if given.group < 2:
        parser.error("--group: an answer is compared with the others of its group")

    seed_everything(0, verbose=False)  # every rank begins with the same weights
    model, questions, reward = made_up() if given.folder is None else read(given.folder, given.questions)
    ours, lr = model.generation_config, given.lr or (3e-3 if given.folder is None else 1e-6)
    module = GRPO(model, reward, group=given.group, length=given.length, updates=given.updates, lr=lr)
    trainer = Trainer(
        strategy=ExpertParallelStrategy(loss="sum"), accelerator="auto", devices=RANKS, max_epochs=given.epochs,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(questions, given.batch_size, shuffle=True, collate_fn=list))
    weights = get_model_state_dict(
        module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )  # all ranks gather, the first one has them
    if trainer.is_global_zero:
        model.generation_config = ours
        model.save_pretrained(given.out, state_dict=weights)
        print(f"written to {given.out}")


if __name__ == "__main__":
    main()
