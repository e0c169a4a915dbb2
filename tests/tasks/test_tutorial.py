"""docs/use/fine-tune.md: its commands, as they stand there, from a folder and a file of chats to logits in peft."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_models import CHATML, chats, save_mixtral, unmarked, write_lines
from tests.tasks.test_train import losses_of, moecompile, result_of

PAGE = (Path(__file__).parents[2] / "docs" / "use" / "fine-tune.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m moecompile (.*)$", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_the_tutorial_ends_with_adapters_that_peft_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mixtral(tmp_path / "mixtral", unmarked(CHATML))
    write_lines(tmp_path / "chats.jsonl", chats(90))
    assert json.loads((tmp_path / "chats.jsonl").read_text().splitlines()[0]) == json.loads(
        next(line for line in PAGE.splitlines() if line.startswith('{"messages"'))
    )
    answers = []
    for command in COMMANDS:
        own_cache = ["data.cache=cache"] if "data=sft" in command else []
        done = moecompile([*shlex.split(command), *own_cache], tmp_path)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        if "task=chat" in command:
            answers.append(done.stdout)
    assert len(answers) == 2 and answers[0] == answers[1] and answers[0].strip()  # of the run, and of peft's adapters
    assert [result_of(tmp_path / name)["task"] for name in ("plan", "verify", "tuned", "longer", "exported")] == [
        "plan", "verify", "train", "train", "export",
    ]  # fmt: skip
    assert result_of(tmp_path / "verify")["passed"]
    losses = losses_of(tmp_path / "tuned") + losses_of(tmp_path / "longer")
    assert losses[-1] < losses[0]
    monkeypatch.chdir(tmp_path)
    (loading,) = re.findall(r"^```text\n(from peft .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {}
    exec(compile(loading, "docs/use/fine-tune.md", "exec", dont_inherit=True), made)
    ids = torch.tensor([[5, 9, 23, 4, 77]])
    with torch.no_grad(), made["model"].disable_adapter():
        before = made["model"](input_ids=ids).logits
    with torch.no_grad():
        assert (made["model"](input_ids=ids).logits - before).abs().max() > 1e-3
