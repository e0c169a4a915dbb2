"""Where models may be cut into stages: what crosses, what is refused, and that stages compute what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.errors import PassError
from moecompile.match.boundaries import Boundaries
from moecompile.match.sites import record_model
from moecompile.passes.cut import check_stages
from moecompile.stages import Crossing, Pipeline


class Block(nn.Module):
    """A residual layer, with what a test changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name_of_kind = "full"

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x + self.linear(x).tanh() + sum(others)


class Model(nn.Module):
    """Embedding, layers, norm, head; `around` says what happens between."""

    def __init__(self, around: str = "", layers: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.around = around
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 10, bias=False)
        self.scale = nn.Parameter(torch.ones(layers)) if around == "scales" else None
        if around in ("tied", "tied twice"):
            self.head.weight = self.embed.weight
        if around in ("shared", "tied twice"):
            self.layers[-1].linear.weight = self.layers[0].linear.weight
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.embed(ids)
        mask = (ids > 2).unsqueeze(-1)
        for i, layer in enumerate(self.layers):
            if self.around == "kinds":
                assert layer.name_of_kind == "full" and layer.linear.weight.shape == (4, 4)
            x = layer(x, *([first] if self.around == "skip" else []))
            if self.around == "masked":
                x = x * mask
            if self.around == "scales":
                x = x * self.scale[i]  # type: ignore[index]
        if self.around == "again":
            x = self.layers[0](x)
        return self.head(self.norm(x))


IDS = torch.arange(12).view(3, 4) % 10


def boundaries(around: str = "", layers: int = 4) -> Boundaries:
    return Boundaries(record_model(Model(around, layers), (IDS,)))


def cut(found: Boundaries, *firsts: str) -> Pipeline:
    return Pipeline(schedule="1f1b", ranks=len(firsts) + 1, stages=found.stages(firsts), tied=found.tied)


@pytest.mark.parametrize("around", ["", "masked", "skip", "kinds", "tied"])
@pytest.mark.parametrize("firsts", [("layers.2",), ("layers.1", "layers.2", "layers.3")])
def test_stages_compute_what_the_model_does(around: str, firsts: tuple[str, ...]) -> None:
    found = boundaries(around)
    pipeline = cut(found, *firsts)
    model = found.model
    names = [name for name, _ in model.named_parameters()]
    check_stages(model, pipeline, (IDS,))
    assert [name for name, _ in model.named_parameters()] == names and "forward" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_crosses_is_what_later_stages_read() -> None:
    plain, skip = cut(boundaries(), "layers.1", "layers.2"), cut(boundaries("skip"), "layers.1", "layers.2")
    hidden = [Crossing(unit=f"layers.{i}", places=(0,), numbers=4.0) for i in (0, 1)]
    assert [stage.receives for stage in plain.stages] == [(), (hidden[0],), (hidden[1],)]
    embedded = Crossing(unit="embed", places=(0,), numbers=4.0)  # also through the second stage
    assert [stage.receives for stage in skip.stages] == [(), (embedded, hidden[0]), (embedded, hidden[1])]
    assert [[unit.path for unit in stage.units] for stage in plain.stages] == [
        ["embed", "layers.0"], ["layers.1"], ["layers.2", "layers.3", "norm", "head"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("around", "layers", "reason"),
    [
        ("", 1, "it has 1 layers in a list of modules"),
        ("again", 4, "layers.0 is called 2 times in a forward"),
        ("scales", 4, "the weight scale is used between its layers, and belongs to no module of one stage"),
    ],
)
def test_models_that_cannot_be_cut_anywhere(around: str, layers: int, reason: str) -> None:
    assert boundaries(around, layers).refused.startswith(reason)


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        ("shared", "the weight layers.0.linear.weight is also layers.3.linear.weight, of another stage"),
        ("tied twice", "the weight layers.0.linear.weight is also layers.3.linear.weight, of another stage"),
    ],
)
def test_cuts_that_are_refused(around: str, reason: str) -> None:
    found = boundaries(around)
    assert not found.refused
    with pytest.raises(ValueError, match=reason):
        found.stages(["layers.2"])


def test_stages_that_compute_something_else_are_refused() -> None:
    found = boundaries("skip")
    wrong = cut(boundaries(), "layers.2")  # does not receive what the layers add
    with pytest.raises(PassError, match="does not compute the same in 2 stages"):
        check_stages(found.model, wrong, (IDS,))
    check_stages(found.model, cut(found, "layers.2"), (IDS,))  # it is whole again


# -- other people's models ------------------------------------------------------------------------------------------

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
SHARED = "of another stage"
REFUSED = {
    "albert": "it has 1 layers", "bart": SHARED, "dory": "is called 2 times",
    "t5": SHARED, "whisper": SHARED, "xlstm": "has a tuple in it", "zamba": SHARED, "zamba2": SHARED,
}  # fmt: skip
"""Architecture -> a part of the reason why it is not cut."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not (ZOO / "tiny_models.py").is_file(), reason=f"there is no {ZOO}")
def test_models_of_transformers_are_cut_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ZOO))
    import tiny_models

    reasons: dict[str, str] = {}
    for name in tiny_models.architectures:
        model, inputs = tiny_models.build(name)
        reasons[name] = why_not(model, inputs)
    refused = {name: reason for name, reason in reasons.items() if reason}
    assert refused.keys() == REFUSED.keys(), refused
    assert all(REFUSED[name] in reason for name, reason in refused.items()), refused
    assert len(reasons) - len(refused) >= 108


def why_not(model: nn.Module, inputs: Any) -> str:
    """Why a model cannot run in as many stages as it has layers, at most four; empty: they are equal bit by bit."""
    found = Boundaries(record_model(model, inputs))
    if found.refused:
        return found.refused
    number = min(4, len(found.layers))
    firsts = [found.layers[i * len(found.layers) // number] for i in range(1, number)]
    try:
        check_stages(model, cut(found, *firsts), inputs)
    except (ValueError, PassError) as error:
        return str(error)
    return ""
