"""Positions of a rank: how tensors and a layer's arguments are cut, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moecompile
from moecompile.errors import ConfigError, MoecompileError
from moecompile.nn.context import CutLayer, Positions, cut_arguments, keep_positions, key_copies
from moecompile.nn.padding import Padding, TokenMask
from moecompile.nn.replay import replay_layers

SECOND = Positions("", 1, 2)
HIDDEN = torch.arange(24.0).view(1, 8, 3)


def cut(is_first: bool = True, **given: Any) -> dict[str, Any]:
    return cut_arguments(
        {"hidden_states": HIDDEN if is_first else HIDDEN[:, :4], **given}, SECOND, is_first=is_first, where="layers.0"
    )


def test_positions_are_contiguous_parts() -> None:
    assert SECOND.cut(torch.arange(8), 0).tolist() == [4, 5, 6, 7]
    message = "tokens of a sequence=7: must be a multiple of mesh.cp=2, so that ranks have equally many positions. Pad"
    with pytest.raises(ConfigError, match=re.escape(message)):
        SECOND.cut(torch.arange(7), 0)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_layer_gets_its_positions_and_whole_masks(is_first: bool) -> None:
    mask, rotary = torch.zeros(1, 1, 8, 8), torch.arange(16).view(1, 8, 2)
    found = cut(is_first, attention_mask=mask, position_ids=torch.arange(8)[None], position_embeddings=(rotary, rotary))
    assert found["hidden_states"].shape == (1, 4, 3)
    assert torch.equal(found["hidden_states"], HIDDEN[:, 4:] if is_first else HIDDEN[:, :4])
    assert found["attention_mask"] is mask
    assert found["position_ids"].tolist() == [[4, 5, 6, 7]]
    assert all(torch.equal(part, rotary[:, 4:]) for part in found["position_embeddings"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": object()}, "layers.0 is given a cache of keys and values, which mesh.cp cannot fill"),
        ({"bias": torch.zeros(8)}, "layers.0 is given the tensor bias, and it is not known where its positions are"),
        ({"position_ids": torch.arange(6)}, "positions (6,) are not those of 8 tokens"),
    ],
)
def test_arguments_that_cannot_be_cut_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MoecompileError, match=re.escape(message)):
        cut(**given)


def test_a_layer_without_exchanged_attention_does_not_run() -> None:
    layer = nn.Linear(3, 3)
    CutLayer("layers.0", layer, SECOND, is_first=True)
    with pytest.raises(MoecompileError, match=r"layers.0 ran without the attention that mesh.cp exchanges"):
        layer(HIDDEN)


def test_own_positions() -> None:
    model, labels = nn.Linear(3, 3), torch.arange(16).view(2, 8)
    assert moecompile.own_positions(model, labels) is labels
    keep_positions(model, SECOND)
    assert torch.equal(moecompile.own_positions(nn.Sequential(model), labels), labels[:, 4:])


def test_routes_of_parts_are_not_recorded() -> None:
    model = nn.Linear(3, 3)
    keep_positions(model, SECOND)
    with pytest.raises(MoecompileError, match=r"routes are of whole sequences, and mesh.cp gives a rank a part"):
        replay_layers(model)


@pytest.mark.parametrize(("heads", "size", "copies"), [(8, 4, 1), (2, 4, 2), (1, 4, 4), (3, 2, 2), (6, 4, 2)])
def test_heads_of_keys_are_sent_as_often_as_ranks_need(heads: int, size: int, copies: int) -> None:
    assert key_copies(heads, size) == copies


def padding_of_part(mask: Tensor, positions: Positions, x: Tensor) -> list[bool]:
    tokens, padding = TokenMask(), Padding()
    tokens.padding, padding.positions = padding, positions
    padding.start({"attention_mask": mask})
    found = tokens(x)
    assert found is not None
    return list(found.tolist())


def test_padding_is_that_of_the_positions() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]) != 0
    assert padding_of_part(mask, SECOND, torch.zeros(2, 2, 3)) == [True, False, True, True]
    assert padding_of_part(torch.tensor([0, 3, 7]), SECOND, torch.zeros(1, 4, 3)) == [True, True, True, False]
