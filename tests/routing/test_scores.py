"""The tables of scores: a row for each, and what a row says of it holds for random logits."""

from __future__ import annotations

import pytest
import torch

from moecompile.nn.scores import FUNCTIONS
from moecompile.routing.scores import SCORES


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
