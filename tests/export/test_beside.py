"""What an original folder holds beside weights comes out of task=export: of existing MoE and of upcycled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from moecompile.compose import compose_config
from moecompile.errors import ConfigError, VerificationFailed
from moecompile.export import beside
from moecompile.models.build import build_model
from moecompile.runtime.data import train_tokenizer
from tests.existing_models import moe_model
from tests.export.runs import SEQ, tiny_config, tiny_run
from tests.export.test_export import exported

VOCAB = 300
TEMPLATE = "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}"
OWN = {"my_field": {"notes": [1, 2]}, "license_of_data": "public domain"}


def original(folder: Path, kind: str) -> Path:
    """What people publish."""
    model: Any
    if kind == "mixtral":
        model = moe_model("mixtral", vocab_size=VOCAB, max_position_embeddings=64)
    else:
        model = build_model(tiny_config(kind, [], {"vocab_size": VOCAB}).model, 0)
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 7, 9], bos_token_id=1, pad_token_id=0, do_sample=True, temperature=0.6, top_p=0.95,
    )  # fmt: skip
    model.save_pretrained(folder)
    trained = train_tokenizer("the whale, the whale, the white whale and the ship; " * 40, 270)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|tool|>"]})
    tokenizer.add_tokens(["Ahab"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **OWN}))
    (folder / "preprocessor_config.json").write_text('{"size": 3}')
    (folder / "LICENSE").write_text("do what you like")
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"weights")
    return folder


def run_of(folder: Path, run: Path, *more: str) -> Path:
    return tiny_run(run, compose_config([f"model.pretrained={folder}", f"data.seq_len={SEQ}", *more]))


@pytest.mark.parametrize(
    "kind", ["mixtral", "llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3", "olmo2"))]
)
def test_all_of_it_comes_out(kind: str, tmp_path: Path) -> None:
    folder = original(tmp_path / "original", kind)
    exported(run_of(folder, tmp_path / "run"), tmp_path / "out")
    out = tmp_path / "out" / "model"
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.eos_token_id, generation.temperature, generation.top_p) == ([2, 7, 9], 0.6, 0.95)
    config = AutoConfig.from_pretrained(out)
    assert {key: getattr(config, key) for key in OWN} == OWN
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    text = "Ahab <|turn|> the white whale <|tool|>"
    assert after(text).input_ids == before(text).input_ids
    assert after.tokenize(text)[0] == "Ahab" and "<|tool|>" in after.all_special_tokens
    messages = [{"role": "user", "content": "the ship"}]
    assert after.apply_chat_template(messages, tokenize=False) == "<|turn|>the ship"
    assert (after.model_max_length, after.eos_token, after.pad_token) == (77, "<|end|>", "<|pad|>")
    names = {path.name for path in out.iterdir()}
    assert {"preprocessor_config.json", "LICENSE", "generation_config.json", "tokenizer.json"} <= names
    assert not names & {"modeling_mine.py", "pytorch_model.bin", "original", "hf_quant_config.json"}


def test_a_tokenizer_of_the_runs_own_takes_the_place_of_the_originals(tmp_path: Path) -> None:
    folder = original(tmp_path / "original", "llama")
    run = run_of(folder, tmp_path / "run", "experts.num_routed=4", "data=moby_dick", f"data.vocab_size={VOCAB}")
    train_tokenizer("another text about other things, " * 40, 265).save(str(run / "tokenizer.json"))
    exported(run, tmp_path / "out")
    out = tmp_path / "out" / "model"
    assert not (out / "chat_template.jinja").exists()
    assert len(AutoTokenizer.from_pretrained(out)) == 265
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7, 9]


def test_a_tokenizer_that_is_code_of_the_folder_is_told(tmp_path: Path) -> None:
    """Training reads tokenizer.json alone."""
    folder = original(tmp_path / "original", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **code}))
    (folder / "tokenization_mine.py").write_text("raise SystemExit")
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer=model: transformers cannot read it: .* contains custom code"
    ):
        exported(run_of(folder, tmp_path / "run", "data.tokenizer=model", "data.vocab_size=null"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("lost", ["generation", "field", "template", "token"])
def test_what_gets_lost_is_found(lost: str, tmp_path: Path) -> None:
    folder = original(tmp_path / "original", "llama")
    out = original(tmp_path / "out", "llama")
    beside.compare(folder, out, tokenizer=True)
    if lost == "generation":
        GenerationConfig(eos_token_id=2).save_pretrained(out)
        says = r"generation_config\.json says eos_token_id=2, the original \[2, 7, 9\]"
    elif lost == "field":
        settings = json.loads((out / "config.json").read_text())
        del settings["my_field"]
        (out / "config.json").write_text(json.dumps(settings))
        says = r"config\.json says my_field=None, the original \{'notes'"
    elif lost == "template":
        (out / "chat_template.jinja").write_text("other")
        says = "the tokenizer's chat template differ"
    else:
        tokenizer = AutoTokenizer.from_pretrained(out)
        tokenizer.add_tokens(["Ishmael"])
        tokenizer.save_pretrained(out)
        says = "the tokenizer's vocabulary differ"
    with pytest.raises(VerificationFailed, match=says):
        beside.compare(folder, out, tokenizer=True)
