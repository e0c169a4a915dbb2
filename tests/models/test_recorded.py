"""Initial values that are made again one weight at a time, against the model that is built whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.models import initial
from moecompile.models.build import build_model, first_weights
from moecompile.models.initial import Keyed, Replayed
from moecompile.models.recorded import NotRecorded, record, replayed
from moecompile.schema import ModelConfig, ModelInit
from tests.existing_models import CONFIGS, VOCAB
from tests.export.runs import DENSE

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"


class Odd(nn.Module):
    """Weights that are drawn in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Linear(8, 30)
        self.truncated = nn.Parameter(torch.empty(40, 9))
        self.orthogonal = nn.Parameter(torch.empty(12, 12))
        self.scaled = nn.Parameter(torch.randn(50, 7) * 0.1 + torch.arange(7))
        self.narrow = nn.Linear(6, 6, bias=False).to(torch.bfloat16)
        self.padded = nn.Embedding(64, 5, padding_idx=2)
        self.again = nn.Parameter(torch.empty(33, 4))
        self.copied = nn.Parameter(torch.empty(33, 4))
        self.tied = self.again
        self.register_buffer("frequencies", 1.0 / (10.0 ** (torch.arange(4) / 4)), persistent=False)
        nn.init.trunc_normal_(self.truncated, std=0.5, a=-1.0, b=1.0)
        with torch.no_grad():
            for weight in (self.kept.weight, self.again):
                weight.normal_(0.0, 0.02)
            nn.init.orthogonal_(self.orthogonal)
            self.copied.copy_(self.again)
            self.again[5:7].zero_()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def whole(build: Callable[[], nn.Module], seed: int = 3) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return values(build())


@torch.no_grad()
def all_of(weights: Replayed | Keyed) -> dict[str, Tensor]:
    return {name: weights.whole(name) for name in weights.names()}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    def same(x: Tensor, y: Tensor) -> bool:
        return x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())

    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not same(a[name], b[name])]


def test_every_value_is_that_of_the_constructor() -> None:
    state = torch.get_rng_state()
    assert differ(all_of(Replayed(Odd, 3)), whole(Odd)) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert differ(all_of(Replayed(Odd, 4)), whole(Odd)) != []


def settings_of(architecture: str) -> ModelConfig:
    causal = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    settings = DENSE.get(architecture) or {**causal, **CONFIGS[architecture]}
    return ModelConfig(name="tiny", architecture=architecture, config=settings)


@pytest.mark.parametrize("architecture", ["llama", "nemotron_h", "deepseek_v3", "gpt_oss"])
def test_so_are_those_of_transformers(architecture: str) -> None:
    model = settings_of(architecture)
    weights = first_weights(model, 3, structure=nn.Module())
    assert isinstance(weights, Replayed)
    assert differ(all_of(weights), values(build_model(model, 3))) == []


def test_one_weight_is_in_memory_at_a_time() -> None:
    """Not one of the 40 is there when the next one comes, nor what their linears drew first."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(40))
            for layer in self.layers:
                nn.init.normal_(layer.weight)  # type: ignore[arg-type]

    weights, values = Replayed(Deep, 0), replayed(record(Deep), 0)
    for name, _ in zip(weights.names(), values, strict=True):
        held = values.gi_frame.f_locals["memories"].values()  # type: ignore[attr-defined]
        assert sum(memory.nbytes() for memory in held) == 16 * 16 * 4
        with pytest.raises(KeyError):
            weights.whole("layers.0.weight" if name != "layers.0.weight" else "layers.1.weight")


@torch.no_grad()
def test_keyed_rows_do_not_depend_on_what_is_drawn_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "_BLOCK", 60)
    weights, other, reference = Keyed(Odd, 3), Keyed(Odd, 3), whole(Odd)
    by_rows = [name for name, draw in weights._draws.items() if draw.by_rows]
    assert by_rows == ["truncated", "kept.weight", "padded.weight"]  # the others are small, or not made row by row
    for name, expected in reference.items():
        value = weights.whole(name)
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
        for rows in (range(1), range(3, 5), range(expected.shape[0] - 2, expected.shape[0])):
            parts = [part for _, part in other.read(name, rows)]
            assert torch.equal(torch.cat(parts), value[rows.start : rows.stop]), name
        assert torch.equal(
            value.float().reshape(len(value), -1).any(1), expected.float().reshape(len(value), -1).any(1)
        )
    assert torch.equal(weights.whole("frequencies"), reference["frequencies"])
    assert not torch.equal(weights.whole("again")[:5], reference["again"][:5])
    assert torch.equal(weights.whole("copied")[:5], weights.whole("again")[:5])
    assert not torch.equal(Keyed(Odd, 4).whole("again"), weights.whole("again"))
    rows = weights.whole("truncated")
    assert len(rows.unique()) == rows.numel()  # no block has the numbers of another
    part = torch.cat([part for _, part in other.read("truncated", range(3, 30), (slice(2, 4),))])
    assert torch.equal(part, rows[3:30, 2:4])


@torch.no_grad()
def test_keyed_weights_are_distributed_as_the_model_says() -> None:
    model = ModelConfig(architecture="llama", config={**DENSE["llama"], "hidden_size": 256, "initializer_range": 0.05})
    plain, model.init = values(build_model(model, 0)), ModelInit.keyed
    weights = first_weights(model, 0, structure=nn.Module())
    assert differ(all_of(weights), values(build_model(model, 0))) == []  # in one process too
    for name, value in plain.items():
        drawn = weights.whole(name)
        assert torch.allclose(drawn.std(correction=0), value.std(correction=0), rtol=0.03), name
        assert (drawn.mean() - value.mean()).abs() < 0.002, name


class _Values(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3) if torch.rand(()) > 0.5 else torch.zeros(3))


class _Seeds(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(2, 2)


class _SeedsAndRestores(nn.Linear):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            super().__init__(2, 2)


class _OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(1)))


class _Unset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_Values, "its code depends on values"), (_Seeds, "its code seeds the random numbers"),
        (_SeedsAndRestores, "its code seeds the random numbers"),
        (_OwnGenerator, "its code draws from a generator of its own"),
        (_Unset, "weight is not initialized by the model's code"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(NotRecorded, match=reason):
        record(build)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other people's models
@pytest.mark.skipif(not (ZOO / "tiny_models.py").is_file(), reason=f"there is no {ZOO}")
def test_every_family_can_be_repeated() -> None:
    """The exception says why: a list of values decides what its constructor does."""
    families = pytest.importorskip("tests.tasks.test_families")
    tiny_models: Any = sys.modules["tiny_models"]
    wrong: dict[str, Any] = {}
    for name in sorted({*tiny_models.architectures, *families.CHANGES}):
        build = builder(tiny_models, families, name)
        try:
            if found := differ(all_of(Replayed(build, 3)), whole(build)):
                wrong[name] = found
        except NotRecorded as error:
            wrong[name] = str(error).partition(":")[0]
    assert wrong == {"convnext": "its code depends on values"}


def builder(tiny_models: Any, families: Any, name: str) -> Callable[[], nn.Module]:
    """What makes a tiny model of a family, by the zoo's rules."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed, base = tiny_models.architectures.get(name), name.removesuffix("_normalized")
    causal = base in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    kind: Any = getattr(transformers, listed.cls) if listed else auto
    config_kind = getattr(kind, "config_class", None)
    if not isinstance(config_kind, type):
        config_kind = CONFIG_MAPPING[listed.model_type if listed else base]
    overrides = {**tiny_models._ZOO.overrides}
    if name in families.CHANGES:
        overrides[base] = {**overrides.get(base, {}), **families.CHANGES[name]}
    config = tiny_models.tiny_config(config_kind, overrides)
    return lambda: kind(config) if listed else kind.from_config(config)
