"""`model.attention`: what is asked for, refused, planned and rehearsed."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.build import _attention_checked, build_model, example_inputs
from moecompile.models.source import source_model
from moecompile.passes.context_parallel import configs_of, eager_on_meta, implementation_of
from moecompile.pipeline.facts import facts_of
from moecompile.schema import validate
from moecompile.tasks.inputs import check_inputs
from moecompile.tasks.verify import shrink
from tests.runtime.test_rehearsal import described, no_group, rehearsed, rows_of
from tests.tiny import tiny_llama

LONG = ["model.config.num_hidden_layers=2", "data.seq_len=2048", "data.micro_batch_size=1", "data.global_batch_size=8"]


def test_each_config_of_a_model_gets_its_attention_back() -> None:
    model = tiny_llama().to("meta")
    tower = nn.Module()
    tower.config = type("Config", (), {"_attn_implementation": "sdpa"})()
    model.tower = tower
    model.config._attn_implementation = "flex_attention"
    with eager_on_meta(model):
        assert [config._attn_implementation for config in configs_of(model)] == ["eager", "sdpa"]
        tower.config._attn_implementation = "eager"  # as transformers sets those of configs inside
    assert [config._attn_implementation for config in configs_of(model)] == ["flex_attention", "sdpa"]


def test_a_model_has_the_attention_that_is_asked_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    for source in ("model=llama_nano", f"model.pretrained={tmp_path}"):
        for name, wanted in (("auto", "sdpa"), ("eager", "eager"), ("flex_attention", "flex_attention")):
            assert implementation_of(source_model(compose_config([source, f"model.attention={name}"]))) == wanted


def test_attention_of_a_gpu_is_planned_and_rehearsed_without_one(tmp_path: Path) -> None:
    sizes = ["hidden_size=64", "intermediate_size=64", "num_attention_heads=8", "num_key_value_heads=2", "head_dim=8"]
    base = [
        "model=gpt_oss_20b", *(f"model.config.{size}" for size in sizes), "model.config.vocab_size=256", *LONG,
        "mesh=h100_8", "mesh.ranks_per_node=4", "mesh.ep=4", "trainer.progress_bar=false", "hardware=laptop",
    ]  # fmt: skip
    peaks = []
    for name in ("eager", "flex_attention"):
        config, plan, facts, run = described([f"model.attention={name}"], base=base)
        with no_group():
            rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path / name), plan, facts, run)
        (peak,) = (row for row in rows if row.name == "peak")
        peaks.append(peak)
    eager, flex = peaks
    assert eager.seen - flex.seen == pytest.approx(eager.planned - flex.planned, rel=0.08)
    assert eager.seen > 4 * flex.seen


def test_another_mistake_is_not_blamed_on_it() -> None:
    asked = compose_config(["model.attention=eager"]).model
    with pytest.raises(ValueError, match="heads"), _attention_checked(asked):
        raise ValueError("num_attention_heads must divide hidden_size")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=gpt_oss_20b", "model.attention=sdpa"], "model.attention=sdpa: transformers refuses it: GptOssForCausalLM does"),
        (["model.attention=flash_attention_2"], "model.attention=flash_attention_2: transformers refuses it: FlashAttention2"),
        (["model=deepseek_v4_flash", "model.attention=flex_attention"], "model.attention=flex_attention: transformers refuses"),
    ],
)  # fmt: skip
def test_what_transformers_refuses_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(compose_config(overrides).model, 0)
    assert str(caught.value).startswith(message)
    lacks = "flash_attention" in overrides[0]
    assert str(caught.value).endswith("flex_attention, which keep as much." if lacks else "Use model.attention=auto.")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention=flex_attention", "mesh=cpu_1x2"], "model.attention=flex_attention: has no backward on a CPU"),
        (["model.attention=eager", "model.factory=a:b", "model.architecture=null"], "model.attention=eager: is for models of"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_asked_for(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_config(overrides))
    assert str(caught.value).startswith(message)
    validate(compose_config(["task=plan", "model.attention=flex_attention", "mesh=cpu_1x2"]))
    with pytest.raises(
        ConfigError, match=r"^model\.attention=flex_attention: has no backward on a CPU, and no GPU is fou"
    ):
        check_inputs(compose_config(["model.attention=flex_attention", "mesh.device=auto"]))
    verified, said = shrink(compose_config(["task=verify", "model.attention=flex_attention", "mesh=h100_8"]), 1)
    assert verified.model.attention.value == "auto" and any("verification runs on CPUs" in each for each in said)


def test_the_example_is_short_and_sequences_are_long() -> None:
    """A plan's example has at most 512 tokens; pairs are those of the sequences of training."""
    model = source_model(compose_config(["model.attention=eager"]))
    kept = [facts_of(model, example_inputs(model, length)).kept for length in (64, 512)]
    short, long = ({of.scores for of in each(4, 1024, 1, False).values()} for each in kept if each is not None)
    assert short == long and min(long) > 0
