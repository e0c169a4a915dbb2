"""task=chat: asks a trained run, an export, adapters or a folder of transformers, in the model's chat template.

Algorithm:
  1. Load the model of `chat.run` on one device, and the chat template beside it.
  2. One message (`chat.message`, or what is piped in) gets one answer, which alone is printed. On a terminal, lines are
     asked for until the input ends; each answer is given with all turns before it.
  3. transformers' `generate` writes an answer: the likeliest tokens at temperature 0, until the turn ends.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompile import waiting
from moecompile.errors import ConfigError
from moecompile.export import PLAN, find_run, load_adapters, load_run
from moecompile.models.build import build_model, no_progress_bars, pretrained_folder
from moecompile.models.chat import ChatTemplate, load_chat_template
from moecompile.named_code import named_in
from moecompile.rundir import RESOLVED
from moecompile.schema import ChatConfig, Config, ModelConfig, TokenizerSource

Turns = list[dict[str, Any]]
_AGAIN, _LONG = "/new", 60


def run(config: Config, run_dir: Path) -> None:
    """Answers one message, or a conversation on the terminal. Writes no files.

    Raises:
        ConfigError: there is no model, template or message, or the chat is longer than the model's positions.
    """
    chat = config.chat
    message = chat.message
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message is not None and not message.strip():
        raise ConfigError("chat.message", message, "is empty", "Give a message, there or on the standard input")
    model, template = load(config)
    waiting.done()
    torch.manual_seed(config.seed)
    begin: Turns = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    if message is not None:  # Step 2
        answer(model, template, [*begin, {"role": "user", "content": message}], chat)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can then be edited
    print(f"{chat.run}: an answer to each line, {_AGAIN} begins again, Ctrl-D ends", flush=True)
    turns = list(begin)
    with suppress(EOFError):
        while True:
            turns = _turn(input("\n> ").strip(), turns, begin, model, template, chat)


def _turn(line: str, turns: Turns, begin: Turns, model: nn.Module, template: ChatTemplate, chat: ChatConfig) -> Turns:
    """The turns after a line on the terminal."""
    if line == _AGAIN:
        return list(begin)
    if not line:
        return turns
    asked = [*turns, {"role": "user", "content": line}]
    try:
        return [*asked, {"role": "assistant", "content": answer(model, template, asked, chat)}]
    except ConfigError as error:  # the chat has become too long
        print(f"{error} {_AGAIN} begins again.", flush=True)
        return turns


# -- the model (step 1) ---------------------------------------------------------------------------------------------


def load(config: Config) -> tuple[nn.Module, ChatTemplate]:
    """The model of `chat.run` in evaluation mode, and its chat template.

    Raises:
        ConfigError: there is no model, or no template beside it.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given = Path(str(config.chat.run))
    asked = ("chat.run", given)
    folder = next((path for path in (given / "model", given) if _kind(path)), given)
    kind = _kind(folder)
    if kind == PLAN:
        trained = find_run(str(folder), None, named=named_in(config), key="chat.run")
        of_model = trained.config.data.tokenizer is TokenizerSource.model
        beside = pretrained_folder(trained.config.model) if of_model else None
        if (folder / "tokenizer_config.json").is_file():
            beside = folder
        if beside is None:
            rule = f"its tokens are not those of a pretrained {trained.config.model.name}, so there is no chat template"
            raise ConfigError("chat.run", given, rule, "Give a run with data=sft")
        template = load_chat_template(beside, asked)  # before the model, which takes longer
        model = load_run(trained)
    elif kind == _ADAPTERS:
        base = str(json.loads((folder / _ADAPTERS).read_text(encoding="utf-8")).get("base_model_name_or_path"))
        if not Path(base, _MODEL).is_file():
            rule = f"adapts the model {base}, which is not there"
            raise ConfigError("chat.run", given, rule, f"Name its folder in {_ADAPTERS}, or export merged adapters")
        template = load_chat_template(folder if (folder / "tokenizer_config.json").is_file() else Path(base), asked)
        with no_progress_bars():
            model = load_adapters(build_model(ModelConfig(pretrained=base), config.seed), folder)
    elif kind == _MODEL:
        template = load_chat_template(folder, asked)
        model = build_model(ModelConfig(pretrained=str(folder)), config.seed)
    else:
        raise ConfigError(
            "chat.run", given, "is no run that was trained, no export and no folder of transformers",
            "Give the run directory of task=train or task=export, or a folder that save_pretrained wrote",
        )  # fmt: skip
    if not hasattr(model, "generate"):
        raise ConfigError("chat.run", given, f"its {type(model).__name__} writes no text", "Give a language model")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), template


_ADAPTERS, _MODEL = "adapter_config.json", "config.json"


def _kind(folder: Path) -> str | None:
    """The file that says what is in a folder; None: no model."""
    if all((folder / name).is_file() for name in (RESOLVED, PLAN)):
        return PLAN
    return next((name for name in (_ADAPTERS, _MODEL) if (folder / name).is_file()), None)


# -- an answer (step 3) ---------------------------------------------------------------------------------------------


class _Shown:
    """Prints tokens as they are written; of transformers' streamers."""

    def __init__(self, template: ChatTemplate) -> None:
        self._tokenizer, self._ids, self.text = template.tokenizer, list[int](), ""
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then one token at a time."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):  # else half of a character
            print(text[len(self.text) :], end="", flush=True)
            self.text = text

    def end(self) -> None:
        """Prints the rest, and ends the line."""
        text = self._tokenizer.decode(self._ids)
        print(text[len(self.text) :], flush=True)
        self.text = text


@torch.no_grad()
def answer(model: Any, template: ChatTemplate, turns: Turns, chat: ChatConfig) -> str:
    """Writes and prints the answer to the last of the turns.

    Raises:
        ConfigError: the turns have more tokens than the model has positions.
        ChatError: the template refuses them.
    """
    ids = template.prompt(turns)
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or len(ids) + chat.max_tokens
    room = min(chat.max_tokens, positions - len(ids))
    if room < 1:
        rule = f"the chat has {len(ids):,} tokens, and the model positions for {positions:,}"
        last = turns[-1]["content"]
        raise ConfigError("chat.message", last if len(last) < _LONG else f"{last[:_LONG]} ...", rule, "Ask for less")
    own = model.generation_config.eos_token_id
    ends = {*template.ends(), *(own if isinstance(own, list) else [own])} - {None}
    sampled = chat.temperature > 0
    shown = _Shown(template)
    inputs = torch.tensor([ids], device=model.device)
    model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=room, do_sample=sampled,
        temperature=chat.temperature if sampled else None, top_p=1.0 if sampled else None,
        top_k=0 if sampled else None, eos_token_id=sorted(ends), pad_token_id=template.pad_id, streamer=shown,
    )  # fmt: skip
    return shown.text
