"""Which tokens the assistant wrote: with templates of real families, as they come and with `{% generation %}`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from moecompile.errors import ChatError, ConfigError
from moecompile.models.chat import DATE, ChatTemplate, _Endless, load_chat_template
from tests.chat_models import CHATML, FAMILIES, LLAMA3, save_mixtral, tokenizer, unmarked

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Call me"}, {"role": "assistant", "content": "Ishmael."}],
    "three turns": [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": " a whale \u00e9\U0001f40b "},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "assistant"},  # what a template writes too
        {"role": "user", "content": "a whale"},
        {"role": "assistant", "content": "a whale"},
    ],
    "thoughts": [
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\none\n</think>\n\nTwo."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\none\n</think>\n\nTwo."},
    ],
    "nothing": [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}],
}
# Family -> how an answer is written: what is before its end, and the end.
ENDS = {
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi3": "<|end|>",
    "qwen3": "<|im_end|>", "r1": "<|endoftext|>",
}  # fmt: skip


def answers(family: str, chat: list[dict[str, Any]]) -> str:
    """What the family's assistant writes, by hand: the independent side."""
    out = ""
    for i, message in enumerate(chat):
        content = message["content"]
        if message["role"] != "assistant":
            continue
        if family in ("llama3", "gemma", "mistral"):
            content = content.strip()
        if family == "mistral":
            content = f" {content}"
        if family in ("qwen3", "r1") and "</think>" in content:
            thoughts, content = content.split("</think>")
        else:
            thoughts = ""
        if family == "qwen3":
            content = content.lstrip("\n")
            if i == len(chat) - 1:
                content = f"<think>\n{thoughts.split('<think>')[-1].strip(chr(10))}\n</think>\n\n{content}"
        out += content + ENDS[family]
    return out


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_what_the_assistant_writes(family: str, chat: str) -> None:
    """Equal to the template's own marks, token by token, and to the answers written down by hand."""
    plain, marked = (ChatTemplate(tokenizer(t)) for t in (unmarked(FAMILIES[family]), FAMILIES[family]))
    tokens, targets = plain.encode(CHATS[chat])
    expected = marked.encode(CHATS[chat])
    own = tokenizer(FAMILIES[family]).apply_chat_template(
        CHATS[chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert expected == (own["input_ids"], [bool(flag) for flag in own["assistant_masks"]])
    assert (tokens, targets) == expected
    written = tokenizer(None).decode([token for token, flag in zip(tokens, targets, strict=True) if flag])
    assert written == answers(family, CHATS[chat])


def test_spans_are_found_where_others_follow() -> None:
    """The beginning of a chat is no beginning of the text here: the number of messages is at the front."""
    template = "{{ messages | length }} messages\n" + unmarked(CHATML)
    text = ChatTemplate(tokenizer(template)).text(CHATS["three turns"])
    spans = ChatTemplate(tokenizer(template)).spans(CHATS["three turns"])
    contents = [m["content"] + "<|im_end|>" for m in CHATS["three turns"] if m["role"] == "assistant"]
    assert [text[start:end].removesuffix("\n") for start, end in spans] == contents


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content | length }}|{% endfor %}", r"renders messages\[1\] of the assistant where it cannot"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ '</s>' if loop.last else '|' }}{% endfor %}", r"ends messages\[1\] in another way when others follow"),
        ("{% for m in messages %}{{ raise_exception('no whales') }}{% endfor %}", "refuses it: no whales"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "refuses it: "),
    ],
)  # fmt: skip
def test_a_span_is_never_guessed(template: str, rule: str) -> None:
    with pytest.raises(ChatError, match=rule):
        ChatTemplate(tokenizer(template)).encode(CHATS["three turns"])


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        LOOP + CHATML,
        LOOP + unmarked(CHATML),
        unmarked(CHATML) + "{% if add_generation_prompt %}" + LOOP + "{% endif %}",  # in the prompts alone
        "{{ 9 ** (9 ** 9) }}" + CHATML,
    ],
    ids=["marked", "unmarked", "prompt", "power"],
)
def test_a_template_without_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, armed, arm = [], set(), signal.setitimer

    class Counted(_Endless):
        def __init__(self) -> None:
            ended.append(self)

    def armed_with(timer: int, seconds: float) -> tuple[float, float]:
        armed.add((timer, seconds))
        return arm(timer, seconds)

    monkeypatch.setattr(signal, "setitimer", armed_with)
    monkeypatch.setattr("moecompile.models.chat._Endless", Counted)
    monkeypatch.setattr("moecompile.models.chat.LIMIT_S", 0.3)
    endless, before = ChatTemplate(tokenizer(template)), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(ChatError, match=r"^the chat template has not rendered it in 0 s of CPU time: look for a loop"):
        endless.encode(CHATS["three turns"])
    # Not tried again with each message. By count: a machine that is stopped for a while counts it as CPU time.
    assert len(ended) == 1 and armed == {(signal.ITIMER_VIRTUAL, 0.3), (signal.ITIMER_VIRTUAL, 0.0)}
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert ChatTemplate(tokenizer(CHATML)).encode(CHATS["one turn"])


def test_what_a_template_leaves_out() -> None:
    chat = [{"role": "system", "content": "Be a whale."}, *CHATS["one turn"], {"role": "tool", "content": " "}]
    rendered = {"system": True, "user": True, "assistant": True}
    for template in FAMILIES.values():
        found = ChatTemplate(tokenizer(template)).rendered(CHATS["thoughts"])
        assert found == {"user": True, "assistant": True}
    assert ChatTemplate(tokenizer(CHATML)).rendered(chat) == rendered
    silent = CHATML.replace(
        "{% else %}{{ message.content }}", "{% else %}{{ message.content if message.role != 'system' }}"
    )
    assert ChatTemplate(tokenizer(silent)).rendered(chat) == {**rendered, "system": False}
    ends = "{% for message in messages %}<|im_end|>{% endfor %}"
    assert ChatTemplate(tokenizer(ends)).rendered(chat) == dict.fromkeys(rendered, False)
    strict = CHATML + "{% if messages[0].content[0] != 'B' %}{{ raise_exception('no') }}{% endif %}"
    assert ChatTemplate(tokenizer(strict)).rendered(chat) == rendered


def test_system_messages_tools_and_the_date() -> None:
    template = (
        unmarked(CHATML)
        + "{{ tools | length if tools else 0 }} {% set day = strftime_now('%d %b %Y') %}{{ day }} {{ strftime_now('%A, %Y-%m-%d') }}"
    )
    chat = [{"role": "system", "content": "Be a whale."}, *CHATS["one turn"]]
    tool = {"type": "function", "function": {"name": "swim", "parameters": {"type": "object", "properties": {}}}}
    text = ChatTemplate(tokenizer(template)).text(chat, [tool])
    assert "system\nBe a whale." in text and text.endswith(f"1 {DATE:%d %b %Y} {DATE:%A, %Y-%m-%d}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "swim"}}]}
    with_calls = unmarked(LLAMA3).replace(
        "{{ message.content | trim }}",
        "{{ message.tool_calls[0].function.name if message.tool_calls else message.content | trim }}",
    )
    tokens, targets = ChatTemplate(tokenizer(with_calls)).encode(
        [CHATS["one turn"][0], call, *CHATS["one turn"]], [tool]
    )
    written = tokenizer(None).decode([token for token, flag in zip(tokens, targets, strict=True) if flag])
    assert written == "swim<|eot_id|>Ishmael.<|eot_id|>"


def test_a_folder_without_a_template_or_a_tokenizer(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "none", None)
    with pytest.raises(ConfigError) as caught:
        load_chat_template(folder)
    assert str(caught.value) == (
        f"data.kind=sft: there is no chat template in {folder}. Put chat_template.jinja beside the model."
    )
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"^data.tokenizer=model: transformers cannot read it: .*Save the model's"):
        load_chat_template(folder)
    loaded = load_chat_template(save_mixtral(tmp_path / "some", CHATML))
    assert loaded.encode(CHATS["one turn"]) == ChatTemplate(tokenizer(CHATML)).encode(CHATS["one turn"])
    assert loaded.pad_id == 0
