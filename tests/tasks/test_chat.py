"""task=chat: answers are those of a plain loop over logits, one at a time or in a conversation."""

from __future__ import annotations

import builtins
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.chat import ChatTemplate
from moecompile.schema import validate
from moecompile.tasks import chat as task
from tests.chat_models import CHATML, FAMILIES, save_mixtral, tokenizer, unmarked
from tests.export.runs import SEQ, tiny_run

TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("chat") / "mixtral", unmarked(CHATML))


def asked(folder: Path, *overrides: str) -> None:
    config = compose_config(["task=chat", f"chat.run='{folder}'", f"chat.max_tokens={TOKENS}", *overrides])
    validate(config)
    task.run(config, folder / "nothing is written")


def ids_of(own: Any, turns: Sequence[str]) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return list(own.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def by_hand(folder: Path, *turns: str) -> list[int]:
    """The likeliest token, again and again, without a cache."""
    own, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = ids_of(own, turns)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer = ids[-TOKENS:]
    ends = own.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    return answer[: next((i for i, token in enumerate(answer) if token in ends), TOKENS)]


def test_a_message_has_one_answer_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, own = by_hand(folder, "Call me?"), AutoTokenizer.from_pretrained(folder)
    asked(folder, "chat.message='Call me?'")
    whole = own.decode(ids, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{whole}\n" and len(whole) > TOKENS / 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("Call me?\n"))
    asked(folder)
    assert capsys.readouterr().out == f"{whole}\n"
    asked(folder, "chat.message='Call me?'", "chat.temperature=3.0", "seed=1")
    assert capsys.readouterr().out != f"{whole}\n"
    monkeypatch.setattr(ChatTemplate, "ends", lambda self: {ids[3]})
    first = own.decode(ids[: ids.index(ids[3])], skip_special_tokens=True)
    asked(folder, "chat.message='Call me?'")
    assert capsys.readouterr().out.startswith(first) and len(first) < len(whole)


def test_a_conversation_keeps_its_turns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["Call me?", "", "And the whale?", "/new", "Call me?", "x " * 200, "And the whale?"])
    turns: list[Any] = []

    def line(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def answer(model: Any, template: ChatTemplate, asked: Any, chat: Any) -> str:
        turns.append([message["content"] for message in asked])
        return given(model, template, asked, chat)

    given = task.answer
    monkeypatch.setattr(builtins, "input", line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(task, "answer", answer)
    asked(folder)
    first = turns[1][1]
    assert turns == [["Call me?"], ["Call me?", first, "And the whale?"], ["Call me?"],
                     ["Call me?", first, "x " * 199 + "x"], ["Call me?", first, "And the whale?"]]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count(first) == 2 and "tokens, and the model positions for 128. Ask for less. /new begins" in shown
    own = AutoTokenizer.from_pretrained(folder)
    second = own.decode(by_hand(folder, *turns[1]), skip_special_tokens=True)
    assert second in shown and len(second) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_ends_as_the_template_ends_it(family: str) -> None:
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi3": "<|end|>",
            "qwen3": "<|im_end|>", "r1": "<|endoftext|>"}  # fmt: skip
    template = ChatTemplate(tokenizer(unmarked(FAMILIES[family])))
    of_tokenizer = template.tokenizer.token_to_id("<|endoftext|>")
    assert template.ends() - {of_tokenizer} == {template.tokenizer.token_to_id(ends[family])} - {of_tokenizer}
    plain = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"
    assert ChatTemplate(tokenizer(plain)).ends() <= {of_tokenizer}  # a line end ends nothing


def test_what_cannot_be_asked_is_told(folder: Path, tmp_path: Path) -> None:
    def refused(run: Path, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            asked(run, *overrides)
        return str(caught.value)

    message = "chat.message=x"
    assert refused(tmp_path / "no", message).startswith(
        f"chat.run={tmp_path}/no: is no run that was trained, no export"
    )
    assert refused(folder, "chat.message=' '") == (
        "chat.message= : is empty. Give a message, there or on the standard input."
    )
    assert refused(folder, message, "data.seq_len=8").startswith("data.seq_len=...: task=chat takes the model and its")
    assert refused(folder, f"chat.message='{'x ' * 200}'").endswith("positions for 128. Ask for less.")
    with pytest.raises(ConfigError, match=r"^chat.run=null: task=chat needs a model"):
        validate(compose_config(["task=chat"]))
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    bare = refused(tmp_path / "bare", message)
    assert bare.startswith(f"chat.run={tmp_path}/bare: there is no chat template in")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    assert "adapts the model gone, which is not there. Name its folder in adapter_config.json" in refused(
        tmp_path / "adapters", message
    )


def test_a_run_with_a_tokenizer_of_its_own_is_not_asked_in_the_tokens_of_its_model(
    folder: Path, tmp_path: Path
) -> None:
    own = compose_config([f"model.pretrained={folder}", "data=moby_dick", "data.vocab_size=480", f"data.seq_len={SEQ}"])
    run = tiny_run(tmp_path / "run", own)
    with pytest.raises(ConfigError, match=rf"^chat\.run={run}: its tokens are not those of a pretrained .*data=sft\.$"):
        asked(run, "chat.message=x")
    asked(
        tiny_run(tmp_path / "sft", compose_config([f"model.pretrained={folder}", "data=sft", "data.path=x"])),
        "chat.message=x",
    )
