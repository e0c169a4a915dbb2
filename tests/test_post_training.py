"""docs/examples/dpo.py and grpo.py on two ranks train as plain transformers does, row by row and without padding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.chat_models import save_mixtral

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
LR = 1e-3

# -- DPO ------------------------------------------------------------------------------------------------------------

PAIRS = [
    ("Call me", " Ishmael.", " a whale\u2028of a ship, or what you like."),  # no end of a line of JSON
    ("It was", " a damp, drizzly November in my soul", " late"),
    ("The whale", " sounded", " had a cup of tea in the captain's cabin"),
    ("Some years ago", " never mind how long precisely", " and so on"),
]
STEPS = 3


@pytest.mark.slow
def test_preferences_are_trained_as_by_plain_transformers(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", None, router_aux_loss_coef=0.0)
    lines = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    printed = trained("dpo.py", folder, lines, "--batch-size=2", f"--epochs={STEPS}")
    (said,) = re.findall(r"^loss ([\d.]+) ", printed, re.MULTILINE)

    wanted, losses = prefer(load(folder), AutoTokenizer.from_pretrained(folder))
    assert float(said) == pytest.approx(losses[-1], abs=6e-4)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.68
    assert_moved_alike(folder, load(tmp_path / "trained"), wanted)


def prefer(model: nn.Module, tokenizer: Any) -> tuple[nn.Module, list[float]]:
    """All pairs in each step, as two ranks with two pairs each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with torch.no_grad():
        reference = [[of_answer(model, tokenizer, prompt, text) for text in texts] for prompt, *texts in PAIRS]
    losses: list[float] = []
    for _ in range(STEPS):
        margins = []
        for (prompt, *texts), of_reference in zip(PAIRS, reference, strict=True):
            chosen, rejected = (of_answer(model, tokenizer, prompt, text) for text in texts)
            margins.append(0.1 * ((chosen - rejected) - (of_reference[0] - of_reference[1])))
        loss = -F.logsigmoid(torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def of_answer(model: nn.Module, tokenizer: Any, prompt: str, text: str) -> Tensor:
    """The log-probability of one answer."""
    begin = tokenizer(prompt)["input_ids"]
    answer = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([begin + answer + [tokenizer.eos_token_id]])
    of_tokens = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return of_tokens[len(begin) - 1 :].sum()


# -- GRPO -----------------------------------------------------------------------------------------------------------

QUESTIONS = ["Call\u2028me", "It was", "The whale", "Some years ago"]
WANTED, GROUP, LENGTH, UPDATES, EPOCHS = "e", 4, 6, 3, 2


@pytest.mark.slow
def test_reinforcement_is_as_by_plain_transformers(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", None, router_aux_loss_coef=0.0)
    lines = [{"prompt": question, "answer": WANTED} for question in QUESTIONS]
    sizes = [f"--group={GROUP}", f"--length={LENGTH}", f"--updates={UPDATES}", f"--epochs={EPOCHS}", "--batch-size=2"]
    printed = trained("grpo.py", folder, lines, *sizes)
    said = [float(reward) for reward in re.findall(r"^epoch \d+: reward ([\d.]+)$", printed, re.MULTILINE)]

    wanted, rewards, moved = reinforce(load(folder), AutoTokenizer.from_pretrained(folder))
    assert said == pytest.approx(rewards, abs=6e-3) and all(0 < reward < 1 for reward in rewards)
    assert moved > 0  # so it matters that choices are replayed
    assert_moved_alike(folder, load(tmp_path / "trained"), wanted)


def reinforce(model: nn.Module, tokenizer: Any) -> tuple[nn.Module, list[float], int]:
    """The answers of two ranks, each by itself. Also: mean rewards, and choices of experts that would have changed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    routers = [layer.mlp.gate for layer in model.model.layers]
    rewards, moved, steps = [], 0, 0
    for epoch in range(EPOCHS):
        answers: list[tuple[int, list[int], float]] = []  # where it begins, all tokens, what a token is worth
        worth: list[float] = []
        for rank in range(2):
            sampler = DistributedSampler(QUESTIONS, 2, rank, seed=0)
            sampler.set_epoch(epoch)
            prompts = [tokenizer(QUESTIONS[i])["input_ids"] for i in sampler for _ in range(GROUP)]
            written = sample(model, prompts, tokenizer.eos_token_id, seed=2 * steps + rank)
            found = [float(WANTED in tokenizer.decode(row, skip_special_tokens=True)) for row in written]
            worth += found
            for i, (prompt, row) in enumerate(zip(prompts, written, strict=True)):
                group = torch.tensor(found[i // GROUP * GROUP : (i // GROUP + 1) * GROUP])
                gain = (found[i] - float(group.mean())) / (float(group.std()) + 1e-4)
                answers.append((len(prompt), prompt + row, gain))
        rewards.append(sum(worth) / len(worth))

        num_tokens = sum(len(ids) - begin for begin, ids, _ in answers)
        old: list[Tensor] = []
        routes: list[list[Tensor]] = []
        for begin, ids, _ in answers:
            with torch.no_grad(), routed(routers, kept := []):
                old.append(log_probs(model, ids)[begin - 1 :])
            routes.append(kept)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            for (begin, ids, gain), before, chosen in zip(answers, old, routes, strict=True):
                with routed(routers, now := []), torch.no_grad():
                    log_probs(model, ids)
                moved += sum(int((a != b).any()) for a, b in zip(now, chosen, strict=True))
                with routed(routers, [], chosen):
                    ratio = (log_probs(model, ids)[begin - 1 :] - before).exp()
                gained = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
                (-gained.sum() / num_tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
    return model, rewards, moved


@torch.no_grad()
def sample(model: Any, prompts: list[list[int]], end: int, seed: int) -> list[list[int]]:
    """As transformers does it for a batch that is padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    torch.manual_seed(seed)
    how = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "max_new_tokens": LENGTH}
    rows = model.eval().generate(ids, attention_mask=mask, **how)[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def log_probs(model: nn.Module, ids: list[int]) -> Tensor:
    """Of all tokens but the first."""
    rows = torch.tensor([ids])
    return model(rows).logits[0, :-1].log_softmax(-1).gather(1, rows[0, 1:, None])[:, 0]


@contextmanager
def routed(routers: Sequence[nn.Module], kept: list[Tensor], given: Sequence[Tensor] = ()) -> Iterator[None]:
    """Keeps what Mixtral's routers choose; given: what they choose instead, layer by layer."""
    left = list(given)

    def after(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, _, chosen = output
        kept.append(chosen)
        if not given:
            return None
        chosen = left.pop(0)
        weights = logits.softmax(-1).gather(1, chosen)
        return logits, weights / weights.sum(1, keepdim=True), chosen

    handles = [router.register_forward_hook(after) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- both -----------------------------------------------------------------------------------------------------------


def trained(example: str, folder: Path, lines: Sequence[dict[str, str]], *options: str) -> str:
    """What the example prints on two ranks; it writes `trained` beside the folder of the model."""
    place = folder.parent
    (place / "lines.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(EXAMPLES / example)]
    given = [str(folder), "lines.jsonl", "--out=trained", f"--lr={LR}", *options]
    done = forked.python(*program, *given, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # type: ignore[no-any-return]


def assert_moved_alike(folder: Path, got: nn.Module, wanted: nn.Module) -> None:
    """Every weight has moved from the folder's as in `wanted`, within a hundredth."""
    start, ours = load(folder).state_dict(), got.state_dict()
    for name, weight in wanted.state_dict().items():
        moved = (weight - start[name]).norm()
        assert (ours[name] - weight).norm() <= 1e-2 * moved, name
