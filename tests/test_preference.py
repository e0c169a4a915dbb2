"""docs/examples/dpo.py on two ranks trains as plain transformers does, pair by pair and without padding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.chat_models import save_mixtral

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "dpo.py"
PAIRS = [
    ("Call me", " Ishmael.", " a whale of a ship, or what you like."),
    ("It was", " a damp, drizzly November in my soul", " late"),
    ("The whale", " sounded", " had a cup of tea in the captain's cabin"),
    ("Some years ago", " never mind how long precisely", " and so on"),
]
LR, STEPS = 1e-3, 3


@pytest.mark.slow
def test_the_example_trains_as_plain_transformers_does(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", None, router_aux_loss_coef=0.0)
    lines = (json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))) for pair in PAIRS)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(EXAMPLE), str(folder)]
    options = ["pairs.jsonl", "--batch-size=2", f"--epochs={STEPS}", f"--lr={LR}"]
    done = forked.python(*program, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (said,) = re.findall(r"^loss ([\d.]+) ", done.stdout, re.MULTILINE)

    before, got = (load(folder) for folder in (folder, tmp_path / "preferred"))
    wanted, losses = train(load(folder), AutoTokenizer.from_pretrained(folder))
    assert float(said) == pytest.approx(losses[-1], abs=6e-4)
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.68
    start, ours = before.state_dict(), got.state_dict()
    for name, weight in wanted.state_dict().items():
        moved = (weight - start[name]).norm()
        assert (ours[name] - weight).norm() <= 1e-2 * moved, name


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # type: ignore[no-any-return]


def train(model: nn.Module, tokenizer: Any) -> tuple[nn.Module, list[float]]:
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
