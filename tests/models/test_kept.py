"""What layers keep for backward, counted on the meta device, against what autograd saves in a real forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from moecompile.capture import layers_of
from moecompile.compose import compose_config
from moecompile.match.sites import may_be_experts
from moecompile.mesh import MeshSpec
from moecompile.models.build import build_model
from moecompile.passes.context_parallel import configs_of
from moecompile.pipeline import make_plan
from moecompile.pipeline.captured import planning_facts
from moecompile.pipeline.facts import facts_of
from moecompile.pipeline.kept import LONG as LONGEST
from moecompile.pipeline.kept import KeptLayers, kinds_of
from moecompile.plan import FFN
from moecompile.planner import ModelFacts, RunFacts
from moecompile.planner.memory import (
    activations,
    largest_in_words,
    layer_bytes,
    memory_of_fullest_rank,
    reason_not_counted,
)
from moecompile.planner.params import LayerFact, LayerKept, SplitFact
from moecompile.schema import ModelConfig
from moecompile.torch_private import tree_leaves
from tests.architectures import inputs_of, model_of
from tests.distributed.classifier import Classifier
from tests.existing_models import moe_model
from tests.runtime.test_rehearsal import described, no_group, rehearsed, rows_of
from tests.tasks.test_families import family
from tests.tiny import ids, tiny_llama

LENGTH = 256
LONG = {"max_position_embeddings": 512}


def saved(model: nn.Module, name: str, batch: int, precision: str, *, without: str = "") -> int:
    """Bytes that autograd saves in the layers."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        return _saved(model, inputs_of(name, ids(batch, LENGTH)), without)


def _saved(model: nn.Module, inputs: dict[str, Tensor], without: str) -> int:
    """By storage: not those of weights, nor what all layers are given, nor inside of modules of this name, but for
    their input.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held: list[object] = []  # or another would come to lie there
    skipped = {module for path, module in model.named_modules() if without and path.rpartition(".")[2] == without}
    counts = [False]  # of the modules that run, the innermost last
    is_mixed = torch.is_autocast_enabled("cpu")

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if counts[-1] and storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held.extend(given)
        hidden, *others = (x.untyped_storage() for x in given)
        if module in skipped:
            if not is_mixed or any(map(may_be_experts, module.modules())):  # others cast it first
                found[hidden.data_ptr()] = hidden.nbytes()
        else:
            known.update({x.data_ptr() for x in others} - {hidden.data_ptr()})
        counts.append(module not in skipped)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        counts.pop()

    with ExitStack() as stack:
        for module in (*layers_of(model), *skipped):
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        output = model(**inputs)
    del output
    return sum(found.values())


def counted(model: nn.Module, name: str, batch: int, precision: str, *, with_ffn: bool) -> float:
    """The same, by `KeptLayers`."""
    facts = planning_facts(model, compose_config(["experts.sites=auto"]), inputs_of(name))[1]
    number = next(model.parameters()).element_size()
    assert facts.kept is not None
    kept = facts.kept(number, LENGTH, batch, precision == "mixed")
    assert kept.keys() == {fact.path for fact in facts.layers}, facts.kept.reason
    of_token = sum(of.rest + of.norms + of.attention + of.ffn * with_ffn for of in kept.values())
    return batch * LENGTH * (of_token + LENGTH * sum(of.scores for of in kept.values()))


def eager(model: nn.Module) -> nn.Module:
    for config in configs_of(model):
        config._attn_implementation = "eager"
    return model


def bert(rate: float = 0.0, **changes: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=64, attention_probs_dropout_prob=rate, hidden_dropout_prob=0.0, **changes)
    return eager(BertForMaskedLM(config))


def albert() -> nn.Module:
    """One layer that runs four times."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return eager(AlbertForMaskedLM(AlbertConfig(**sizes, **rates, vocab_size=64, embedding_size=16)))


DENSE: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: model_of("llama", **LONG),
    "llama, eager": lambda: eager(model_of("llama", **LONG)),
    "qwen3": lambda: model_of("qwen3", **LONG),
    "gpt_neox": lambda: model_of("gpt_neox", **LONG),
    "gemma2": lambda: model_of("gemma2", **LONG),
    "t5": lambda: eager(model_of("t5", dropout_rate=0.0)),
    "bert": bert,
    "bert with dropout": lambda: bert(0.1),
    "albert": albert,
}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_saves_what_is_counted(name: str, precision: str) -> None:
    if (name, precision) == ("albert", "mixed"):
        pytest.skip("autocast casts the weights of a layer once, and we count them in each of its runs")
    model = DENSE[name]().to(PRECISIONS[precision]).train()
    for batch in (1, 2):
        found = saved(model, name, batch, precision)
        assert counted(model, name, batch, precision, with_ffn=True) == pytest.approx(found, rel=0.01)


def test_a_model_of_a_folder_saves_what_is_counted_by_its_own_code(tmp_path: Path) -> None:
    """Every folder was taken for a Llama, where transformers puts kernels of a hub into copies without values."""
    made: Any = model_of("gemma2", **LONG)
    made.save_pretrained(tmp_path)
    model = build_model(ModelConfig(pretrained=str(tmp_path)), 0)
    plan = make_plan(model, ["experts.num_routed=4"], example=inputs_of("gemma2"))
    assert plan.estimate is not None and reason_not_counted(plan.estimate.largest) == ""
    assert counted(model, "gemma2", 1, "fp32", with_ffn=True) == pytest.approx(
        saved(model, "gemma2", 1, "fp32"), rel=0.01
    )


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: moe_model("mixtral", **LONG),
    "gpt_oss": lambda: moe_model("gpt_oss", **LONG),  # eager, with sinks
    "deepseek_v3": lambda: moe_model("deepseek_v3", **LONG, v_head_dim=16),  # with others a CPU makes scores
    "qwen3_moe": lambda: moe_model("qwen3_moe", **LONG),
    "afmoe": lambda: family("afmoe"),  # windows, which are masks
    "qwen3_next": lambda: family("qwen3_next"),  # a recurrence in three of four layers
    "deepseek_v4": lambda: family("deepseek_v4"),  # four residual streams, keys that are compressed
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=pytest.mark.slow if name == "deepseek_v4" and precision != "mixed" else ())
        for name in EXPERTS
        for precision in PRECISIONS
    ],
)
def test_a_model_with_experts_saves_what_is_counted(name: str, precision: str) -> None:
    """All but what the experts, their router and shared experts save."""
    model = EXPERTS[name]().to(PRECISIONS[precision]).train()
    for batch in (1, 2):
        found = saved(model, name, batch, precision, without="mlp")
        assert counted(model, name, batch, precision, with_ffn=False) == pytest.approx(found, rel=0.012)


@pytest.mark.parametrize(("number", "norms"), [(4, 2 * 4), (2, 2 * (4 + 2 - 2))])
def test_parts_of_a_llama_by_hand(number: int, norms: int) -> None:
    """Norms keep what they were given in fp32, over its size; in bf16 a copy of it, which is not there to begin with."""
    example = inputs_of("llama")
    facts = planning_facts(model_of("llama", **LONG), compose_config(["experts.sites=auto"]), example)[1]
    assert facts.kept is not None
    (of,) = set(facts.kept(number, LENGTH, 1, False).values())
    d_model, d_ff, heads, key_heads = 32, 64, 4, 2
    assert (of.width, of.rest) == (
        d_model * number,
        4 * d_model * number,
    )  # two inputs of norms, of attention, of the FFN
    assert of.norms == pytest.approx(2 * 4 + d_model * norms)  # and a size in fp32
    assert of.ffn == 4 * d_ff * number
    queries, sums = 2 * heads * 8 + 2 * key_heads * 8, heads * 4  # with the output; log-sum-exp in fp32
    assert of.attention == pytest.approx(queries * number + sums, abs=0.1)  # and the state of a generator


def test_weights_of_another_dtype_than_most_keep_theirs() -> None:
    """fp32 sinks in bf16 attention: scores become fp32, and are kept a second time."""
    narrow, wide = (family("deepseek_v4").to(torch.bfloat16).train() for _ in range(2))
    for layer in layers_of(wide):
        layer.self_attn.sinks.data = layer.self_attn.sinks.data.float()
    found = saved(wide, "deepseek_v4", 1, "bf16", without="mlp")
    kept = counted(wide, "deepseek_v4", 1, "bf16", with_ffn=False)
    assert kept == pytest.approx(found, rel=0.012)
    assert kept > 1.2 * counted(narrow, "deepseek_v4", 1, "bf16", with_ffn=False)


def test_a_reason_is_that_of_the_last_answer() -> None:
    kept = facts_of(tiny_llama(), {"input_ids": ids()}).kept
    assert kept is not None
    with mock.patch("moecompile.pipeline.kept._alone", side_effect=IndexError):
        assert not kept(4, 16, 1, False) and kept.reason == "model.layers.0: IndexError"
    assert kept(4, 32, 1, False) and not kept.reason
    assert not kept(4, 16, 1, False) and kept.reason == "model.layers.0: IndexError"


def test_a_model_of_rows_of_numbers_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """They have no positions; and a failure under fake tensors, which torch would log with its stack, says nothing."""
    example = torch.zeros(1, 6)
    kept = facts_of(Classifier(), example).kept
    assert kept is not None
    with caplog.at_level("ERROR"):
        assert not kept(2, 128, 4, True) and kept.reason == "the forward: ValueError: the example has no sequences"
        with mock.patch("moecompile.pipeline.kept._long", return_value=torch.zeros(4, 128)):
            assert not kept(4, 128, 4, True) and kept.reason.startswith("the forward: RuntimeError: ")
    assert not caplog.records


def test_layers_are_alike_if_only_their_place_differs() -> None:
    llama, qwen, gemma = (list(layers_of(DENSE[name]())) for name in ("llama", "qwen3", "gemma2"))
    assert kinds_of([*llama, *qwen]) == [0, 0, 1, 1]
    assert kinds_of(gemma) == [0, 1]  # every other one has a window
    llama[1].self_attn.scaling = 0.5
    assert kinds_of(llama) == [0, 1]


def test_scores_of_four_heads_by_hand() -> None:
    kept = facts_of(eager(tiny_llama(num_attention_heads=4, **LONG)), {"input_ids": ids()}).kept
    assert kept is not None and kept.makes_scores and kept.instead == ("sdpa", "flex_attention") and not kept.is_split
    scores = {size: {round(of.scores / 4, 1) for of in kept(size, 4096, 1, False).values()} for size in (2, 4, 8)}
    assert scores == {2: {6}, 4: {4}, 8: {12}}  # softmax is in fp32
    plain = facts_of(tiny_llama(), {"input_ids": ids()}).kept
    assert (
        plain is not None and not plain.makes_scores and {of.scores for of in plain(4, 4096, 1, False).values()} == {0}
    )
    q_proj = SplitFact(
        path="model.layers.0.self_attn.q_proj", pattern="", style="colwise", kind="linear", size=1, size_name="",
        params=1, site=None,
    )  # fmt: skip
    model = eager(tiny_llama())
    assert (
        KeptLayers(model, {"input_ids": ids()}, facts_of(model).layers, (q_proj,)).is_split is False
    )  # no parts known
    parts = facts_of(model, {"input_ids": ids()}, None).layers
    named = tuple(replace(fact, parts=(("attention", ("self_attn",)),)) for fact in parts)
    assert KeptLayers(model, {"input_ids": ids()}, named, (q_proj,)).is_split


def test_longer_sequences_grow_as_those_that_are_run() -> None:
    kept = facts_of(eager(tiny_llama(**LONG)), {"input_ids": ids()}).kept
    assert kept is not None
    (short, *_), (long, *_) = kept(4, LONGEST, 1, False).values(), kept(4, 16 * LONGEST, 1, False).values()
    assert long == short and long.scores > 0
    other = facts_of(tiny_llama(), {"input_ids": ids()}).kept
    assert other is not None
    (short, *_), (long, *_) = other(4, 64, 1, False).values(), other(4, 4 * LONGEST, 1, False).values()
    assert long.attention == pytest.approx(short.attention)


def test_what_cannot_be_counted_ends_nothing_and_is_said() -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise IndexError("no   such\nplace.")

    facts = facts_of(eager(tiny_llama()), {"input_ids": ids()})
    run = RunFacts(tokens_per_rank=64, compute_bytes=4)
    with mock.patch("moecompile.pipeline.kept._alone", broken):
        text = largest_in_words(memory_of_fullest_rank((), MeshSpec(), facts, run), (), MeshSpec(), facts, run)
        assert reason_not_counted(text) == "model.layers.0: IndexError: no such place"
    says = (
        ". What its layers keep is taken as Llama's, without the scores of eager attention: their code could not be run"
    )
    assert text.endswith(f"{says} (model.layers.0: IndexError: no such place)")
    assert facts_of(tiny_llama()).kept is None  # without an example


@dataclass
class Said:
    """A `Kept` whose layers are all like this one."""

    of: LayerKept
    makes_scores: bool = True
    instead: tuple[str, ...] = ()
    is_split: bool = False
    reason: str = ""

    def __call__(self, compute_bytes: int, seq_len: int, micro_batch_size: int, is_mixed: bool) -> dict[str, LayerKept]:
        return {f"layers.{i}": self.of for i in range(3)}


WITHOUT = LayerKept(width=32, rest=100, norms=50, attention=70, ffn=40, made=5)
SCORES = replace(WITHOUT, scores=10, scores_made=20)
LAYERS = tuple(LayerFact(path=f"layers.{i}", parts=((FFN, ("mlp",)),)) for i in range(3))


def test_advice_is_what_is_possible_here() -> None:
    kept = Said(replace(SCORES, scores_made=2e6), instead=("sdpa", "flex_attention"))
    facts = ModelFacts(params_total=1, num_layers=3, layers=LAYERS, kept=kept)
    run = RunFacts(tokens_per_rank=64, compute_bytes=4, checkpointing="full")

    def said(mesh: MeshSpec) -> str:
        return largest_in_words(memory_of_fullest_rank((), mesh, facts, run), (), mesh, facts, run)

    assert said(MeshSpec(device="cuda")).endswith("; model.attention=sdpa or flex_attention makes none")
    for mesh in (MeshSpec(), MeshSpec(device="cuda", ranks_per_node=2, cp=2)):
        assert said(mesh).endswith("; model.attention=sdpa makes none")


def test_bytes_of_a_rank() -> None:
    facts = ModelFacts(params_total=1, num_layers=3, layers=LAYERS, kept=Said(SCORES, is_split=True))
    run = RunFacts(tokens_per_rank=64, compute_bytes=4, micro_batch_size=2)  # two sequences of 32
    (of,) = set(layer_bytes((), MeshSpec(), facts, run).values())
    pairs = 2 * 32**2
    assert (of.scores, of.attention, of.made) == (10 * pairs, 70 * 64 + 10 * pairs, 5 * 64 + 20 * pairs)
    (of,) = set(
        layer_bytes((), MeshSpec(ranks_per_node=4, tp=2, cp=2), facts, replace(run, tokens_per_rank=32)).values()
    )
    assert (of.scores, of.width, of.ffn) == (10 * pairs / 4, 32 * 32, 40 * 32)


def test_memory_of_layers_that_keep_all_or_are_computed_again() -> None:
    facts = ModelFacts(params_total=1, num_layers=3, layers=LAYERS, kept=Said(SCORES))

    def made(**changes: Any) -> float:
        run = RunFacts(tokens_per_rank=1000, compute_bytes=4, micro_batch_size=1, **changes)
        return activations((), MeshSpec(), facts, run).peak / 1000

    layer = 100 + 50 + 70 + 40 + 10 * 1000
    assert made(checkpointing="none") == 3 * layer + 5 + 20 * 1000
    assert made(checkpointing="full") == 3 * 32 + layer + 5 + 20 * 1000
    assert made(checkpointing="none", in_flight=2) == 6 * layer + 5 + 20 * 1000


LONG_RUN = [
    "model.config.num_hidden_layers=2", "data.seq_len=2048", "data.micro_batch_size=1", "data.global_batch_size=8",
    "mesh=cpu_1x4", "data.vocab_size=300", "trainer.progress_bar=false",
]  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_rank_holds_the_scores_that_are_planned(checkpointing: str, tmp_path: Path) -> None:
    """Most of its memory is scores."""
    base = ["model=llama_nano", "model.attention=eager", f"trainer.checkpointing={checkpointing}", *LONG_RUN]
    config, plan, facts, run = described([], base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert max(of.made for of in layer_bytes(plan.layers, plan.mesh, facts, run).values()) > peak.planned / 3
    assert peak.seen == pytest.approx(peak.planned, rel=0.08)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_rank_holds_what_is_planned_under_autocast(checkpointing: str, tmp_path: Path) -> None:
    """fp32 weights; experts that are not one op, as on a GPU."""
    base = [
        "model=llama_nano", "+model.config.hidden_act=gelu", "trainer.precision=bf16_mixed",
        f"trainer.checkpointing={checkpointing}", *LONG_RUN,
    ]  # fmt: skip
    config, plan, facts, run = described([], base=base)
    assert not plan.layers[0].fused
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert peak.seen == pytest.approx(peak.planned, rel=0.08)


class Remembers(nn.Module):
    """A block that keeps masks and losses. least: positions that a sequence must have for it to run."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.a, self.mlp = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.masks, self.losses, self.least = dict[int, Tensor](), list[Tensor](), least

    def forward(self, x: Tensor) -> Tensor:
        mask = self.masks.setdefault(x.shape[1], torch.ones(x.shape[1], x.shape[1], device=x.device))
        self.losses.append(x.sum())
        x = x + mask @ self.a(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Own(nn.Module):
    """A model of no library. least: as above, of its second layer."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(64, 8), nn.ModuleList([Remembers(0), Remembers(least)])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.emb(ids)
        for layer in self.layers:
            x = layer(x) if x.shape[1] >= layer.least else x
        return x


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("form", ["tensor", "tuple", "keyword"])
def test_a_model_of_ones_own_is_counted_and_left_as_it_was(form: str, is_mixed: bool) -> None:
    model = Own()
    model.layers[1].requires_grad_(requires_grad=False)
    example = {"tensor": ids(), "tuple": (ids(),), "keyword": {"ids": ids()}}[form]
    with torch.inference_mode() if form == "tuple" else torch.no_grad():
        facts = facts_of(model, example)
        assert facts.kept is not None
        trained, frozen = facts.kept(4, 16, 1, is_mixed).values()
    assert not facts.kept.reason and 0 < frozen.rest < trained.rest
    assert all(not layer.masks and not layer.losses for layer in model.layers)
    assert model(ids(1, 16)).device.type == "cpu"


def test_a_layer_that_runs_for_long_sequences_alone() -> None:
    facts = facts_of(Own(least=12), ids())
    assert facts.kept is not None
    facts.kept.makes_scores = True  # half of 16 positions are run, too
    assert len(facts.kept(4, 16, 1, False)) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_estimate_that_cannot_begin_ends_nothing() -> None:
    model = Own()
    model.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    facts = facts_of(model, ids())
    assert facts.kept is not None and not facts.kept(4, 16, 1, False) and facts.kept.reason


class Loops(nn.Module):
    """A block that goes through positions one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, states = x[:, 0], list[Tensor]()
        for i in range(x.shape[1]):
            state = torch.tanh(self.a(state) + x[:, i])
            states.append(state)
        return torch.stack(states, 1)


def test_code_that_loops_over_positions_is_run_on_few() -> None:
    model = Own()
    model.layers[0] = Loops()
    model.layers[0].least = 0
    facts = facts_of(model, ids())
    assert facts.kept is not None
    lengths = list[int]()
    with mock.patch.object(Loops, "forward", _noting(Loops.forward, lengths)):
        few, many = facts.kept(4, 100, 1, False)["layers.0"], facts.kept(4, 4096, 1, False)["layers.0"]
    assert max(lengths) == 128 and many.rest == pytest.approx(few.rest, rel=0.05)


def _noting(forward: Any, lengths: list[int]) -> Any:
    def noted(self: nn.Module, x: Tensor) -> Any:
        lengths.append(x.shape[1])
        return forward(self, x)

    return noted
