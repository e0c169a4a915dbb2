"""The guided tracer: what Python decides by is asserted, what it only passes on stays an argument, sizes stay open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture import ModuleCall, trace_region
from moecompile.errors import CaptureError
from tests.tiny import text, tokens

D = 8


class Mixer(nn.Module):
    """Stands for attention: a leaf with options of its own; returns a tuple, as transformers' do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.got: dict[str, Any] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        self.got = options
        scores = x.sum() if options.get("scores") else None
        y = self.linear(x)
        return y if mask is None else y * mask, scores


class Layer(nn.Module):
    """A layer with its FFN inline, in the manner of OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.fc1, self.fc2 = Mixer(), nn.LayerNorm(D), nn.Linear(D, 16), nn.Linear(16, D)
        self.rate = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, **options: Any) -> Tensor:
        mixed, _ = self.mix(x, mask=mask, cache=cache, **options)
        x = self.norm(x + mixed)
        shape = x.shape
        flat = x.reshape(-1, x.size(-1))
        flat = flat + F.dropout(self.fc2(F.relu(self.fc1(flat))), p=self.rate, training=self.training)
        return flat.view(shape)


def traced(module: nn.Module, *args: Any, inlined: frozenset[str] = frozenset(), **kwargs: Any) -> fx.GraphModule:
    return trace_region(module.eval(), ModuleCall(args, kwargs), inlined)


def x_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return tokens(batch * length, D, seed).view(batch, length, D)


def test_a_layer_in_our_notation() -> None:
    """Before: the class above. After: leaves are calls, sizes are nodes, keywords that are passed on are one argument."""
    assert (
        text(traced(Layer(), x_of(2, 3)))
        == """\
%0 = placeholder x
%1 = placeholder mask
%2 = placeholder cache
%3 = placeholder **options
%4 = get_attr mix
%5 = pass_on(%4, (%0,), {'mask': %1, 'cache': %2}, %3)
%6 = getitem(%5, 0)
%7 = add(%0, %6)
%8 = norm[LayerNorm](%7)
%9 = getattr(%8, 'shape')
%10 = size(%8, -1)
%11 = reshape(%8, -1, %10)
%12 = fc1[Linear](%11)
%13 = relu(%12, inplace=False)
%14 = fc2[Linear](%13)
%15 = dropout_4[Dropout](%14)
%16 = add(%11, %15)
%17 = view(%16, %9)
output(%17)
"""
    )


def test_other_sizes_fit_and_what_was_none_may_be_given() -> None:
    layer = Layer()
    graph_module = traced(layer, x_of(2, 3))
    for x in (x_of(1, 1), x_of(5, 7)):
        for options in ({}, {"mask": torch.rand(D)}, {"cache": object()}, {"scores": True, "flag": 3}):
            assert torch.equal(graph_module(x, **options), layer(x, **options))
    cache = object()
    graph_module(x_of(1, 2), cache=cache, flag=3)
    assert graph_module.mix.got == {"cache": cache, "flag": 3}


def test_keywords_that_were_given_may_be_left_out_later() -> None:
    layer = Layer()
    graph_module = traced(layer, x_of(2, 3), mask=torch.ones(D), cache={"a": 1}, flag=2)
    for options in ({}, {"mask": torch.rand(D)}, {"flag": 5, "other": None}):
        assert torch.equal(graph_module(x_of(1, 4), **options), layer(x_of(1, 4), **options))
    assert graph_module.mix.got == {"cache": None, "flag": 5, "other": None}


class AsksForMask(Layer):
    """Its Python, not its leaf, asks whether there is a mask."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed, _ = self.mix(x)
        if mask is not None:
            mixed = mixed * mask
        return self.fc2(F.relu(self.fc1(x + mixed)))


def test_what_python_asks_for_is_asserted_both_ways() -> None:
    layer, mask = AsksForMask(), torch.rand(D)
    without, with_mask = traced(layer, x_of(2, 3)), traced(layer, x_of(2, 3), mask)
    assert torch.equal(without(x_of(1, 1)), layer(x_of(1, 1)))
    assert torch.equal(with_mask(x_of(1, 1), mask + 1), layer(x_of(1, 1), mask + 1))
    with pytest.raises(AssertionError, match="mask was None when the model was captured"):
        without(x_of(1, 1), mask)
    with pytest.raises(AssertionError, match="mask was given when the model was captured"):
        with_mask(x_of(1, 1))


class BranchesOnShape(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        if x.shape[1] > 2 and x.dtype == torch.float32:
            h = h.clamp(max=0.5)
        return self.fc2(h)


def test_a_decision_on_sizes_is_asserted_and_not_baked_in_silently() -> None:
    layer = BranchesOnShape()
    graph_module = traced(layer, x_of(2, 3))
    assert torch.equal(graph_module(x_of(4, 9)), layer(x_of(4, 9)))
    with pytest.raises(AssertionError, match=r"gt\(.*\) was True when the model was captured"):
        graph_module(x_of(4, 2))


class TakesPairs(Layer):
    def forward(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = positions
        assert len(positions) == 2
        mixed, scores = self.mix(x * cos + sin, positions=positions)
        return self.fc2(F.relu(self.fc1(x + mixed))), scores


def test_tuples_are_unpacked_and_passed_on_whole() -> None:
    layer, positions = TakesPairs(), (torch.rand(D), torch.rand(D))
    graph_module = traced(layer, x_of(2, 3), positions)
    got = graph_module(x_of(1, 5), positions)
    assert torch.equal(got[0], layer(x_of(1, 5), positions)[0])
    assert got[1] is None
    assert graph_module.mix.got["positions"] is positions


class WritesInPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 0.0
        return self.fc2(F.relu(self.fc1(x)))


def test_writes_in_place_are_nodes() -> None:
    layer = WritesInPlace()
    graph_module = traced(layer, x_of(2, 3))
    assert torch.equal(graph_module(x_of(4, 2)), layer(x_of(4, 2)))


class KeepsState(Layer):
    def forward(self, x: Tensor, store: list[Tensor]) -> Tensor:
        store.append(x)
        return self.fc2(F.relu(self.fc1(x)))


def test_what_the_recorded_call_was_given_is_not_changed_by_tracing() -> None:
    store: list[Tensor] = []
    graph_module = traced(KeepsState(), x_of(2, 3), store)
    assert store == []
    graph_module(x_of(1, 1), store)
    assert len(store) == 1


class DecidesByValues(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x if x.sum() > 0 else -x)))


def test_a_decision_by_values_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot be traced: TraceError: symbolically traced variables"):
        traced(DecidesByValues(), x_of(2, 3))
