"""What the choice of a model says of the rest: a folder takes the place of the model group, and brings its tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.schema import ModelDevice, TokenizerSource, validate


def test_a_folder_is_known_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export and chat read it from the run's `resolved.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    model = compose_config(["model.pretrained=./mine"]).model
    assert (model.pretrained, model.name) == (str(tmp_path / "mine"), "mine")


@pytest.mark.parametrize("recipe", [[], ["recipe=deepseek_ep"], ["recipe=upcycle_smollm2"], ["model.name=mine"]])
@pytest.mark.parametrize("source", ["pretrained", "package"])
def test_a_source_takes_the_place_of_the_model_group(source: str, recipe: list[str], tmp_path: Path) -> None:
    value = str(tmp_path / "some-model") if source == "pretrained" else "some-model"
    config = compose_config([*recipe, f"model.{source}={value}"])
    model = config.model
    assert getattr(model, source) == value
    assert [model.architecture, model.pretrained, model.package, model.factory].count(None) == 3
    assert (model.name, model.config, model.published) == (
        "mine" if "model.name=mine" in recipe else "some-model",
        {},
        None,
    )
    assert (config.data.tokenizer, config.data.vocab_size) == (TokenizerSource.model, None)
    validate(config)


def test_a_factory_has_no_tokenizer() -> None:
    config = compose_config(["model.factory=package.module:function"])
    assert (config.model.architecture, config.model.config) == (None, {})
    assert (config.data.tokenizer, config.data.vocab_size) == (TokenizerSource.train, 2048)
    validate(config)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["data=moby_dick"], (TokenizerSource.train, 2048)),
        (["data.vocab_size=300"], (TokenizerSource.train, 300)),
        (["data.tokenizer=train"], (TokenizerSource.train, 2048)),
        (["data.seq_len=16"], (TokenizerSource.model, None)),
    ],
)
def test_what_is_given_stays(given: list[str], expected: tuple[TokenizerSource, int | None]) -> None:
    data = compose_config(["model.pretrained=somewhere", *given]).data
    assert (data.tokenizer, data.vocab_size) == expected


def test_what_a_folder_cannot_have() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.config\.hidden_size=13: model\.pretrained=x has a config of its own\."
    ):
        compose_config(["model.pretrained=x", "model.config.hidden_size=13"])
    for more in ("model=qwen3_nano", "model.architecture=llama"):
        with pytest.raises(ConfigError, match="exactly one of"):
            validate(compose_config(["model.pretrained=x", more]))
    assert compose_config(["model=deepseek_v3"]).model.device is ModelDevice.meta
    assert compose_config(["recipe=deepseek_ep", "model.pretrained=x"]).model.device is ModelDevice.cpu


@pytest.mark.parametrize("kind", [{"num_local_experts": 6}, {"n_routed_experts": 6}])
def test_experts_of_a_folder_need_not_fit_the_config(kind: dict[str, int], tmp_path: Path) -> None:
    """The config's eight experts cannot be split over six ranks; those of the model can."""
    overrides = [f"model.pretrained={tmp_path}", "mesh.ranks_per_node=6", "data.global_batch_size=24"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=re.escape("experts.num_routed=8: must be a multiple of mesh.ep=6")):
        validate(compose_config(overrides))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", **kind}))
    validate(compose_config(overrides))


def test_a_corpus_takes_the_tokenizer_of_the_model_that_is_given() -> None:
    mine = ["model.pretrained=some-model", "data=corpus", "data.path=x"]
    assert compose_config(mine).data.tokenizer is TokenizerSource.model
    assert compose_config([*mine, "data.vocab_size=300"]).data.tokenizer is TokenizerSource.train
    assert compose_config(["data=corpus", "data.path=x"]).data.tokenizer is TokenizerSource.train
    assert compose_config(["data=sft", "data.path=x"]).data.vocab_size is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=corpus", "data.path=x", "data.layout=pad"], "data.layout=pad: data.kind=corpus does not read it. Leave it out, or use data=sft."),
        (["data.text_field=body"], "data.text_field=body: data.kind=text does not read it. Leave it out, or use data=corpus."),
        (["data.cache=x"], "data.cache=x: data.kind=text does not read it. Leave it out, or use data=corpus or data=sft."),
        (["data=corpus", "data.path=x", "data.corpus=moby_dick"], "data.corpus=moby_dick: data.kind=corpus does not read it. Leave it out, or use data=moby_dick."),
    ],
)  # fmt: skip
def test_a_key_that_the_kind_of_data_does_not_read_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate(compose_config(overrides))
