"""Lookups in embedding tables are found by dataflow: what is read by rows, by which ids, and why it is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.capture import record
from moecompile.errors import CaptureError
from moecompile.match.lookups import FoundLookup, find_lookups, reads_of, region_of
from tests.table_models import build

IDS = torch.randint(1, 300, (2, 8))


def found_in(model: nn.Module, example: Any = IDS) -> dict[str, FoundLookup]:
    return {each.weight: each for each in find_lookups(record(model, example))}


def test_every_form_of_hashed_tables_is_found() -> None:
    found = found_in(build(), {"input_ids": IDS})
    assert not any(each.refused for each in found.values())
    assert {name: (each.rows, each.width, each.computed, each.ids) for name, each in found.items()} == {
        "model.embed_tokens.weight": (300, 16, False, 16),
        "tables.heads.heads.0.weight": (37, 8, True, 16),
        "tables.heads.heads.1.weight": (38, 8, True, 16),
        "tables.indexed.table": (74, 16, True, 16),
        "tables.selected.holder.weight": (41, 16, True, 32),
    }


class Model(nn.Module):
    """A table that is read by what `ids` makes of the input; its rows are used as `then` says."""

    def __init__(self, ids: Any = lambda x: x, then: Any = lambda rows, table: rows, **options: Any) -> None:
        super().__init__()
        self.table, self.ids, self.then = nn.Embedding(300, 4, **options), ids, then

    def forward(self, x: Tensor) -> Tensor:
        """(B, S) -> (B, S, 4)"""
        return self.then(self.table(self.ids(x)), self.table)


@pytest.mark.parametrize(
    ("ids", "computed"),
    [
        (lambda x: x, False), (lambda x: x.long().flatten().view(2, 8), False), (lambda x: x[:, 1:], False),
        (lambda x: torch.arange(x.shape[1]), False), (lambda x: x + 0, True), (lambda x: x % 7, True),
        (lambda x: torch.where(x > 9, x, 0), True), (lambda x: x.cumsum(1) % 300, True),
    ],
)  # fmt: skip
def test_ids_are_given_or_computed(ids: Any, computed: bool) -> None:
    assert found_in(Model(ids))["table.weight"].computed is computed


@pytest.mark.parametrize(
    ("then", "options", "reason"),
    [
        (lambda rows, table: rows @ table.weight.T, {}, "uses it whole"),
        (lambda rows, table: rows + F.embedding(IDS, table.weight), {}, "both read it"),
        (lambda rows, table: rows, {"max_norm": 1.0}, "max_norm"),
        (lambda rows, table: rows, {"scale_grad_by_freq": True}, "frequency"),
        (lambda rows, table: rows, {"sparse": True}, "sparse=True"),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_says_why(then: Any, options: dict[str, Any], reason: str) -> None:
    assert reason in found_in(Model(then=then, **options))["table.weight"].refused


def test_a_tied_table_is_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(300, 4), "b": nn.Linear(4, 300, bias=False)})
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["b"](model["a"](x))  # type: ignore[method-assign,assignment]
    assert "it is also b.weight" in found_in(model)["a.weight"].refused


def test_a_mask_and_a_slice_are_no_lookups() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.table[x[0] > 9].sum() + self.table[1:3].sum() + x

    assert found_in(Masked()) == {}


@pytest.mark.parametrize(
    ("read", "padding"),
    [
        (lambda w, x: torch.index_select(input=w, dim=0, index=x.flatten()), None),
        (lambda w, x: w.index_select(dim=0, index=x.flatten()), None),
        (lambda w, x: F.embedding(weight=w, input=x, padding_idx=-2), 298),
        (torch.embedding, None),
        (lambda w, x: torch.embedding(weight=w, indices=x), None),
    ],
)  # fmt: skip
def test_arguments_may_be_named(read: Any, padding: int | None) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(300, 4))

        def forward(self, x: Tensor) -> Tensor:
            return read(self.table, x)

    recording = record(_Around(Reader()), IDS)
    assert [(each.weight, each.refused) for each in find_lookups(recording)] == [("inner.table", "")]
    assert [each.padding for each in reads_of(recording.graph)] == [-1 if padding is None else padding]


class _Around(nn.Module):
    """The model itself is no module that could be replaced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """As the inner one."""
        return self.inner(x)


def test_python_that_asks_for_a_cache_is_left_alone() -> None:
    class Config:
        use_cache = False

    class Reader(nn.Embedding):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return super().forward(x % 7) if cache is None else super().forward(x)

    class Cached(_Around):
        config = Config()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, cache=object() if self.config.use_cache else None)

    recording = record(Cached(Reader(300, 4)), IDS)
    (found,) = find_lookups(recording)
    with pytest.raises(CaptureError, match="something else with a cache"):
        region_of(found, recording)
