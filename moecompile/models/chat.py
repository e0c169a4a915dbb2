"""A model's tokenizer with its chat template, and which tokens of a chat the assistant wrote.

Algorithm:
  1. A template with `{% generation %}` says itself where the assistant's text is; transformers finds it.
  2. Otherwise the whole chat is rendered once, and each message i of the assistant is found in that text:
     start   what is rendered of the messages before it, with the prompt for an answer, is the beginning of the text
     end     what is rendered of the messages up to it is the beginning of the text
     So the span is what the model has to write after the prompt, with the end of the turn.
  3. Templates that render a message in another way when others follow (Qwen3 drops earlier thoughts) break one of
     these. Then the message is rendered once more with another content: where the two texts begin to differ, the
     content begins, and where they end to differ, it ends. What follows it in a chat that it ends is the turn's end.
  4. Where that fails too, the chat is an error: a span is never guessed.
  5. White space after the token that ends a turn (ChatML's line end) is not the assistant's.
  6. Tokens that share a character with a span are the assistant's, as in transformers.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moecompile.errors import ChatError, ConfigError

LIMIT_S = 5.0
"""CPU seconds in which a template must have rendered a chat; a long one takes milliseconds."""

DATE = datetime.date(2026, 1, 1)
"""The date in templates that ask for today's: chats must not depend on the day on which they are rendered."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OTHER = "\ue000\ue001\ue002"  # private characters: a content that no chat has
Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A tokenizer of transformers and its chat template.

    tokenizer: of the library `tokenizers`. pad_id: the token that fills rows up. template: its text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._own, self.template = tokenizer, _on_one_day(str(tokenizer.get_chat_template()))
        self.tokenizer: Tokenizer = tokenizer.backend_tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id = int(next(number for number in ids if number is not None))
        self._is_marked = _MARKED.search(self.template) is not None
        self._ends = tuple(sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}))

    def encode(self, messages: Messages, tools: Sequence[Any] | None = None) -> tuple[list[int], list[bool]]:
        """Tokens of a chat, and whether the assistant wrote each.

        Raises:
            ChatError: the template refuses it, or a span of the assistant cannot be found exactly.
        """
        if self._is_marked:  # Step 1
            out = self._render(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]
        text = self.text(messages, tools)
        encoded = self._own(text, add_special_tokens=False, return_offsets_mapping=True)
        spans, flags = self.spans(messages, tools), []
        for start, end in encoded["offset_mapping"]:  # Step 6
            flags.append(any(start < last and end > first for first, last in spans))
        return list(encoded["input_ids"]), flags

    def prompt(self, messages: Messages) -> list[int]:
        """Tokens of a chat, with the prompt for an answer.

        Raises:
            ChatError: the template refuses it.
        """
        return list(self._own(self.text(messages, prompt=True), add_special_tokens=False)["input_ids"])

    def ends(self) -> set[int]:
        """The tokens that end an answer: the special one that the template writes behind it, and the tokenizer's."""
        found = {self._own.eos_token_id} - {None}
        try:
            tokens, flags = self.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except ChatError:  # it renders other chats only
            return found
        written = [token for token, flag in zip(tokens, flags, strict=True) if flag]
        special = self.tokenizer.get_added_tokens_decoder()
        return found | {token for token in written[-1:] if token in special}

    def rendered(self, messages: Messages, tools: Sequence[Any] | None = None) -> dict[str, bool]:
        """Role -> whether anything of what it says is in the text; of the roles that say something.

        Raises:
            ChatError: the template refuses the chat.
        """
        text, found = self.text(messages, tools), {}
        says = [bool((message.get("content") or "").strip()) for message in messages]
        for role in dict.fromkeys(message["role"] for message, any_ in zip(messages, says, strict=True) if any_):
            other = [
                {**message, "content": _OTHER} if any_ and message["role"] == role else message
                for message, any_ in zip(messages, says, strict=True)
            ]
            try:
                found[role] = self.text(other, tools) != text
            except ChatError:  # so it looks at the content
                found[role] = True
        return found

    def text(self, messages: Messages, tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """The chat as text. prompt: with the prompt for an answer.

        Raises:
            ChatError: the template refuses it.
        """
        return str(self._render(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def spans(self, messages: Messages, tools: Sequence[Any] | None = None) -> list[Span]:
        """Where in the text the assistant's messages are, in characters, for a template that does not say it.

        Raises:
            ChatError: one of them cannot be found exactly.
        """
        text = self.text(messages, tools)
        own = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._span(text, messages, tools, i) for i in own]
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise ChatError(f"the chat template renders two messages of the assistant as one ({_HOW})")
        return spans

    def _span(self, text: str, messages: Messages, tools: Sequence[Any] | None, i: int) -> Span:
        before, until = (  # Step 2
            self._beginning(text, messages[:i], tools, prompt=True),
            self._beginning(text, messages[: i + 1], tools, prompt=False),
        )
        if before is None:  # Step 3
            before = self._content_start(text, messages, tools, i)
        if until is None:
            until = self._content_end(text, messages, tools, i)
            until += self._tail(text[until:], messages[: i + 1], tools)
        if before > until:
            raise ChatError(f"the chat template does not keep messages[{i}] as it was ({_HOW})")
        return before, self._trimmed(text, before, until)

    def _beginning(self, text: str, messages: Messages, tools: Sequence[Any] | None, *, prompt: bool) -> int | None:
        """The length of what is rendered of the first messages, if the whole text begins with it."""
        try:
            beginning = self.text(messages, tools, prompt=prompt)
        except ChatError as error:  # a template may refuse a chat that ends there
            if isinstance(error.__cause__, _Endless):
                raise
            return None
        return len(beginning) if text.startswith(beginning) else None

    def _content_start(self, text: str, messages: Messages, tools: Sequence[Any] | None, i: int) -> int:
        """Where the content of message i begins in `text`, which is rendered of all messages."""
        other = self._with_other_content(messages, tools, i)
        start = _shared(text, other)
        if _OTHER[0] in text or not other[start:].startswith(_OTHER):  # Step 4
            raise _lost(i)
        return start

    def _content_end(self, text: str, messages: Messages, tools: Sequence[Any] | None, i: int) -> int:
        """Where the content of message i ends."""
        other = self._with_other_content(messages, tools, i)
        after = _shared(text[::-1], other[::-1])
        if _OTHER[0] in text or not other[: len(other) - after].endswith(_OTHER):  # Step 4
            raise _lost(i)
        return len(text) - after

    def _with_other_content(self, messages: Messages, tools: Sequence[Any] | None, i: int) -> str:
        return self.text([*messages[:i], {**messages[i], "content": _OTHER}, *messages[i + 1 :]], tools)

    def _tail(self, after: str, messages: Messages, tools: Sequence[Any] | None) -> int:
        """The length of what ends the turn of the last message, if the text `after` its content begins with it."""
        alone, last = self.text(messages, tools), len(messages) - 1
        tail = alone[self._content_end(alone, messages, tools, last) :]
        if not after.startswith(tail):  # Step 4
            raise ChatError(f"the chat template ends messages[{last}] in another way when others follow ({_HOW})")
        return len(tail)

    def _trimmed(self, text: str, start: int, end: int) -> int:
        """`end` without white space after a token that ends the turn (step 5)."""
        written = text[start:end].rstrip()
        return start + len(written) if written.endswith(self._ends) else end

    def _render(self, messages: Messages, tools: Sequence[Any] | None, **options: Any) -> Any:
        try:
            with _limited():
                return self._own.apply_chat_template(
                    [dict(message) for message in messages], tools=tools, chat_template=self.template, **options
                )
        except _Endless as error:
            rule = f"the chat template has not rendered it in {LIMIT_S:.0f} s of CPU time: look for a loop without end"
            raise ChatError(rule) from error
        except Exception as error:  # the code of the template may raise anything
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ChatError(f"the chat template refuses it: {reason}") from error


class _Endless(BaseException):
    """Raised within a template by a signal; no filter of a template catches it."""


@contextmanager
def _limited() -> Iterator[None]:
    """Ends what takes more than `LIMIT_S` of this process's CPU time. Signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Endless

    before = signal.signal(signal.SIGVTALRM, end) or signal.SIG_DFL  # None: not set by Python
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


def _lost(i: int) -> ChatError:
    return ChatError(f"the chat template renders messages[{i}] of the assistant where it cannot be found ({_HOW})")


def _shared(a: str, b: str) -> int:
    """The length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _on_one_day(template: str) -> str:
    """The template with a `strftime_now` that knows `DATE` alone; transformers takes no function from outside."""
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{code}', '{DATE.strftime('%' + code)}')" for code in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}{template}"


_DIRECTIVES = ("-d", "-m", *"YmdbBaAyjHIMSp")
_HOW = "put {% generation %} around it in the template"


def load_chat_template(folder: Path, asked: tuple[str, object] = ("data.kind", "sft")) -> ChatTemplate:
    """The tokenizer and the chat template beside a model.

    Args:
        asked: the key that asks for it and its value, for messages.

    Raises:
        ConfigError: one of them is not there, or cannot be used.
    """
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise _unusable(folder, "it is not one of the library tokenizers, and characters must be found in tokens")
    if not tokenizer.chat_template:
        key, value = asked
        raise ConfigError(
            key, value, f"there is no chat template in {folder}", "Put chat_template.jinja beside the model"
        )  # fmt: skip
    return ChatTemplate(tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model, of transformers, without code of the folder.

    Raises:
        ConfigError: transformers cannot read it so.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the code of the tokenizer may raise anything
        reason = " ".join(str(error).split())[:200]
        raise _unusable(folder, f"transformers cannot read it: {reason}") from error


def _unusable(folder: Path, rule: str) -> ConfigError:
    return ConfigError("data.tokenizer", "model", f"{rule} ({folder})", "Save the model's tokenizer beside it")
