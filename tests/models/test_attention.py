"""`model.attention`, and what matrices of scores need: counted, planned, and rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from moecompile.capture import layers_of
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.models.build import _attention_checked, build_model, example_inputs
from moecompile.models.source import source_model
from moecompile.passes.context_parallel import configs_of, eager_on_meta, implementation_of
from moecompile.pipeline.attention import scores_of
from moecompile.pipeline.facts import facts_of
from moecompile.planner import ModelFacts, RunFacts
from moecompile.planner.memory import Scores, largest_in_words, memory_of_fullest_rank, scores_bytes
from moecompile.planner.params import ScoresFact, SplitFact
from moecompile.schema import validate
from moecompile.tasks.inputs import check_inputs
from moecompile.tasks.verify import shrink
from tests.existing_models import moe_model
from tests.runtime.test_rehearsal import described, no_group, rehearsed, rows_of
from tests.tiny import ids, tiny_llama

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def eager_llama(**changes: Any) -> nn.Module:
    model = tiny_llama(**LLAMA, **changes)
    model.config._attn_implementation = "eager"
    return model


def kept_by_hand(model: nn.Module, length: int, names: Sequence[str] = ("input_ids",)) -> float:
    """Bytes that autograd keeps in a forward whose shape ends with (length, length or one more), by storage."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim > 2 and tensor.shape[-2] == length and tensor.shape[-1] in (length, length + 1):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**dict.fromkeys(names, torch.zeros(1, length, dtype=torch.int64))).logits
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [eager_llama, lambda: moe_model("gpt_oss", max_position_embeddings=512)])
def test_what_is_kept_is_what_autograd_keeps(build: Any, dtype: torch.dtype) -> None:
    model, length = build().to(dtype), 384
    fact = scores_of(model, {"input_ids": ids()})[0][dtype.itemsize]
    layers = len(model.model.layers)
    assert kept_by_hand(model, length) == pytest.approx(layers * fact.kept * length**2, rel=0.02)
    assert fact.made > fact.kept / 3


def bert(rate: float = 0.0) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=64, attention_probs_dropout_prob=rate, hidden_dropout_prob=0.0)
    return BertForMaskedLM._from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


def t5() -> nn.Module:
    """Decoder layers have two attentions each, with a bias by distance."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=64, num_layers=2, num_heads=4, d_kv=16, d_ff=64, vocab_size=64, dropout_rate=0.0)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


def albert() -> nn.Module:
    """One layer that runs four times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    config = AlbertConfig(**sizes, **rates, vocab_size=64, embedding_size=16)
    return AlbertForMaskedLM._from_config(config, attn_implementation="eager")  # type: ignore[no-any-return]


OTHERS = {"bert": bert, "with dropout": lambda: bert(0.1), "t5": t5, "albert": albert}


@pytest.mark.parametrize("name", OTHERS)
def test_all_attentions_of_a_layer_are_counted_as_in_training(name: str) -> None:
    model, length = OTHERS[name]().train(), 384
    names = ("input_ids", "decoder_input_ids") if name == "t5" else ("input_ids",)
    fact = scores_of(model, {each: ids() for each in names})[0][4]
    kept = kept_by_hand(model, length, names)
    assert kept == pytest.approx(len([*layers_of(model)]) * fact.kept * length**2, rel=0.02)


class OwnAttention(LlamaAttention):
    """A class of this file, in which transformers' functions are not there."""


def test_what_cannot_be_counted_ends_nothing_and_is_said() -> None:
    model = eager_llama()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.__class__ = OwnAttention
    assert scores_of(model, {"input_ids": ids()}) == scores_of(eager_llama(), {"input_ids": ids()})

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError

    with mock.patch("moecompile.pipeline.attention._bytes_of_pairs", broken):
        facts = facts_of(eager_llama(), {"input_ids": ids()})
    assert (facts.scores, facts.no_scores) == ({}, "what eager attention needs for its scores (IndexError)")
    run = RunFacts(tokens_per_rank=64, compute_bytes=4)
    text = largest_in_words(memory_of_fullest_rank((), MeshSpec(), facts, run), (), MeshSpec(), facts, run)
    assert text.endswith(". Not counted: what eager attention needs for its scores (IndexError)")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert scores_of(model, {"input_ids": ids()})[1].endswith("which transformers' interface does not see")


def test_advice_is_what_is_possible_here() -> None:
    fact = ScoresFact(kept=1e6, made=2e6, instead=("sdpa", "flex_attention"))
    facts = ModelFacts(params_total=1, num_layers=1, d_model=8, scores={4: fact})
    run = RunFacts(tokens_per_rank=64, compute_bytes=4, checkpointing="full")

    def said(mesh: MeshSpec) -> str:
        return largest_in_words(memory_of_fullest_rank((), mesh, facts, run), (), mesh, facts, run)

    assert said(MeshSpec(device="cuda")).endswith("; model.attention=sdpa or flex_attention makes none")
    for mesh in (MeshSpec(), MeshSpec(device="cuda", ranks_per_node=2, cp=2)):
        assert said(mesh).endswith("; model.attention=sdpa makes none")


def test_scores_of_four_heads_by_hand() -> None:
    found, _ = scores_of(eager_llama(), {"input_ids": ids()})
    assert {size: round(fact.kept / 4) for size, fact in found.items()} == {2: 6, 4: 4, 8: 12}  # softmax is in fp32
    assert found[4].instead == ("sdpa", "flex_attention") and not found[4].is_split
    assert scores_of(tiny_llama(), {"input_ids": ids()}) == ({}, "")
    q_proj = SplitFact(
        path="model.layers.0.self_attn.q_proj", pattern="", style="colwise", kind="linear", size=1, size_name="",
        params=1, site=None,
    )  # fmt: skip
    assert scores_of(eager_llama(), {"input_ids": ids()}, (q_proj,))[0][4].is_split


def test_pairs_of_a_rank() -> None:
    facts = ModelFacts(params_total=1, scores={4: ScoresFact(kept=10.0, made=20.0, is_split=True)})
    run = RunFacts(tokens_per_rank=64, compute_bytes=4, micro_batch_size=2)  # two sequences of 32
    assert scores_bytes(MeshSpec(), facts, run) == Scores(2 * 32**2 * 10.0, 2 * 32**2 * 20.0)
    split = scores_bytes(MeshSpec(ranks_per_node=4, tp=2, cp=2), facts, replace(run, tokens_per_rank=32))
    assert split == Scores(2 * 32**2 * 10.0 / 4, 2 * 32**2 * 20.0 / 4)
    assert scores_bytes(MeshSpec(), facts, replace(run, compute_bytes=2)) == Scores()


def test_memory_has_them_where_they_are_kept_or_computed_again() -> None:
    fact = ScoresFact(kept=10.0, made=20.0)
    facts, of = ModelFacts(params_total=1, num_layers=3, d_model=8), MeshSpec()

    def more(**changes: Any) -> int:
        run = RunFacts(tokens_per_rank=1000, compute_bytes=4, micro_batch_size=1, **changes)
        with_scores = memory_of_fullest_rank((), of, replace(facts, scores={4: fact}), run)
        return with_scores.activations - memory_of_fullest_rank((), of, facts, run).activations

    assert more(checkpointing="none") == pytest.approx((3 * 10 + 20) * 1000**2, rel=0.01)
    assert more(checkpointing="full") == pytest.approx((10 + 20) * 1000**2, rel=0.01)


LONG = [
    "model.config.num_hidden_layers=2", "data.seq_len=2048", "data.micro_batch_size=1", "data.global_batch_size=8",
    "mesh=cpu_1x4", "data.vocab_size=300", "trainer.progress_bar=false",
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_rank_holds_the_scores_that_are_planned(checkpointing: str, tmp_path: Path) -> None:
    """Most of its memory is scores."""
    base = ["model=llama_nano", "model.attention=eager", f"trainer.checkpointing={checkpointing}", *LONG]
    config, plan, facts, run = described([], base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    scores = scores_bytes(plan.mesh, facts, run)
    assert scores.kept + scores.made > peak.planned / 2
    assert peak.seen == pytest.approx(peak.planned, rel=0.08)


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


# -- model.attention ---------------------------------------------------------------------------------------------------


def test_a_model_has_the_attention_that_is_asked_for(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    for source in ("model=llama_nano", f"model.pretrained={tmp_path}"):
        for name, wanted in (("auto", "sdpa"), ("eager", "eager"), ("flex_attention", "flex_attention")):
            assert implementation_of(source_model(compose_config([source, f"model.attention={name}"]))) == wanted


def test_attention_of_a_gpu_is_planned_and_rehearsed_without_one(tmp_path: Path) -> None:
    sizes = ["hidden_size=64", "intermediate_size=64", "num_attention_heads=8", "num_key_value_heads=2", "head_dim=8"]
    base = [
        "model=gpt_oss_20b", *(f"model.config.{size}" for size in sizes), "model.config.vocab_size=256", *LONG[:4],
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
    assert str(caught.value).startswith(message) and str(caught.value).endswith("Use model.attention=auto.")


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
    short, long = (scores_of(model, example_inputs(model, length))[0][4].kept for length in (64, 512))
    assert short == pytest.approx(long, rel=1e-6)
