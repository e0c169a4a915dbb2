"""The tables of scores: a row for each, and what a row says of it holds for random logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moecompile
from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.nn.scores import FUNCTIONS
from moecompile.routing.scores import SCORES
from moecompile.schema import validate


def test_every_score_has_its_rows() -> None:
    assert list(SCORES) == list(FUNCTIONS)


@pytest.mark.parametrize("name", SCORES)
def test_a_row_says_what_the_functions_do(name: str) -> None:
    rule, functions = SCORES[name], FUNCTIONS[name]
    logits = 20 * torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = functions.score(logits)
    chosen = scores.topk(3).values
    weights = functions.weigh(chosen)
    assert rule.in_unit_interval == bool(((scores >= 0) & (scores <= 1)).all())
    assert rule.after_topk == torch.equal(scores, logits)
    assert rule.sums_to_one == torch.allclose(weights.sum(1), torch.ones(50, dtype=torch.float64))
    shares = functions.distribute(logits, scores)
    torch.testing.assert_close(shares.sum(1), torch.ones(50, dtype=torch.float64))
    assert (shares >= 0).all() and torch.equal(shares.argsort(), logits.argsort())
    if not rule.sums_to_one:  # which sums to the number of chosen, not of all
        equal = functions.weigh(functions.score(torch.zeros(6, dtype=torch.float64)))
        torch.testing.assert_close(equal, torch.full_like(equal, rule.at_zero(6)))


def test_a_registered_score_is_a_row_of_both_tables_until_its_handle_is_removed() -> None:
    before = list(SCORES)
    with moecompile.register_score("mine", torch.exp, weigh=lambda scores: scores / scores.sum(-1, keepdim=True)):
        assert list(SCORES) == list(FUNCTIONS) == [*before, "mine"]
        test_a_row_says_what_the_functions_do("mine")
        assert SCORES["mine"].sums_to_one and compose_config(["routing.score=mine"]).routing.score == "mine"
        validate(compose_config(["routing.score=mine"]))
        with pytest.raises(ConfigError, match=r"^balance\.rule=quantile: needs scores in \[0, 1\], and those of"):
            validate(compose_config(["routing.score=mine", "balance.rule=quantile"]))
    assert list(SCORES) == list(FUNCTIONS) == before
    with pytest.raises(ConfigError, match=r"^routing\.score=mine: must be one of \['softmax', .*plugins=\[MODULE\]\.$"):
        validate(compose_config(["routing.score=mine"]))


@pytest.mark.parametrize("name", ["softmax", "own"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^name={name}: there is such a score already"):
        moecompile.register_score(name, torch.exp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": torch.log}, r"^mine\.score=\[6, 8\]: must return finite values"),
        ({"score": torch.exp, "weigh": lambda scores: scores.sum(-1)}, r"^mine\.weigh=\[6\]: must return finite values"),
        ({"score": torch.exp, "distribute": lambda logits, scores: scores}, r"^mine\.distribute=.*: shares must sum to 1"),
        ({"score": torch.exp, "in_unit_interval": True}, r"^mine\.in_unit_interval=True: scores of logits in \[-8, 8\] lie in"),
    ],
)  # fmt: skip
def test_functions_that_are_no_score_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moecompile.register_score("mine", **options)
    assert "mine" not in SCORES and "mine" not in FUNCTIONS
