"""What the models of transformers have of capacity, losses and metrics, as docs/understand/existing-models.md says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.nn.scaled_input import standard_calls
from moecompile.pipeline.captured import capture_planned
from moecompile.plan import ExpertsSite
from tests.existing_models import CONFIGS, moe_inputs, moe_model
from tests.families import is_installed
from tests.tiny import config

PAGE = Path(__file__).parents[2] / "docs" / "understand" / "existing-models.md"
IDS = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module, example: Any) -> list[ExpertsSite]:
    with standard_calls(model, example):
        captured = capture_planned(model, None, config(), example)
    return [site for site in captured.sites if isinstance(site, ExpertsSite)]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_meta_device_has_the_same(architecture: str) -> None:
    example = moe_inputs(architecture, IDS)
    with torch.device("meta"):
        empty = moe_model(architecture)
    found = [(site.score, site.has_sequences, site.own_capacity) for site in sites_of(empty, _on_meta(example))]
    assert found == [
        (site.score, site.has_sequences, site.own_capacity) for site in sites_of(moe_model(architecture), example)
    ]
    assert {score for score, _, _ in found} == {"sigmoid" if architecture == "deepseek_v3" else "softmax"}


def _on_meta(example: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in example.items()}


class Block(nn.Module):
    """An MoE block around Mixtral's experts with a router of its own."""

    def __init__(self, route: Callable[[Tensor], tuple[Tensor, Tensor]], gate: nn.Module) -> None:
        super().__init__()
        self.route, self.gate = route, gate
        self.experts = moe_model("mixtral").model.layers[0].mlp.experts  # type: ignore[union-attr,index]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        ids, weights = self.route(self.gate(tokens))
        return self.experts(tokens, ids, weights).view_as(x)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2)
    return ids, weights


def _after(logits: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.float().topk(2)
    return ids, best.sigmoid()


def _softplus(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = F.softplus(logits).sqrt().topk(2)
    return ids, weights


def _capped(logits: Tensor) -> tuple[Tensor, Tensor]:
    return _softmax(30 * torch.tanh(logits / 30))


def _constant(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(logits), 2, dtype=torch.int64), torch.ones(len(logits), 2)


@pytest.mark.parametrize(
    ("route", "score"),
    [(_softmax, "softmax"), (_after, "sigmoid"), (_softplus, "other"), (_capped, "unknown"), (_constant, "unknown")],
)
def test_the_score_is_found_by_dataflow(route: Callable[[Tensor], tuple[Tensor, Tensor]], score: str) -> None:
    """Logits that no module returns are not found: those of `_capped` are made in the block."""
    (site,) = sites_of(Block(route, nn.Linear(32, 4)), torch.randn(2, 3, 32))
    assert (site.score, site.has_sequences) == (score, score != "unknown")


class Whole(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(0, 1))


def test_without_sequences_there_is_no_loss_of_each() -> None:
    (site,) = sites_of(Whole(Block(_softmax, nn.Linear(32, 4))), torch.randn(2, 3, 32))
    assert (site.score, site.has_sequences) == ("softmax", False)


def _listed() -> dict[str, set[str]]:
    """Row of the table -> its families."""
    rows = re.findall(r"^\| (softmax|sigmoid|other|unknown|own capacity) \| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    return {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other people's models
def test_the_table_of_families() -> None:
    zoo = pytest.importorskip("tests.match.test_zoo")
    builds: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        name: lambda name=name: zoo.tiny_models.build(name) for name in zoo.tiny_models.names("moe")
    }
    builds |= {name: lambda n=name, c=c: zoo.language_model(n, c[1]) for name, c in zoo.LANGUAGE_MODELS.items()}
    builds["dbrx"] = zoo.dbrx
    listed = {name: zoo.tiny_models.architectures[name].model_type for name in zoo.tiny_models.names("moe")}
    missing = {name for name in builds if not is_installed(listed.get(name, name))}
    found: dict[str, set[str]] = {}
    for name in builds.keys() - missing:
        for site in sites_of(*builds[name]()):
            found.setdefault(site.score, set()).add(name)
    found["own capacity"] = {"switch_transformers"}
    assert {kind: names - missing for kind, names in _listed().items()} == found


def test_a_recording_knows_what_modules_read_and_made() -> None:
    from moecompile.capture import record

    recording = record(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(1, 2))
    (first,), (second,) = recording.made["0"], recording.read["1"]
    assert isinstance(first, fx.Node) and first is second and recording.made["1"] != [first]
