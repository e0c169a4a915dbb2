"""The promise of `routing.max_nodes`, counted token by token on four simulated nodes."""

from __future__ import annotations

import pytest
import torch

from moecompile.nn import Router
from moecompile.pipeline import compile_model, plan_of
from moecompile.routing.scores import SCORES
from tests.tiny import Gated, tokens

NODES, TOKENS = 4, 512
CLUSTER = ["mesh.num_nodes=4", "mesh.ranks_per_node=2", "experts.num_routed=32", "routing.top_k=6"]


def most_nodes_of_a_token(*overrides: str) -> int:
    """Largest number of nodes on which the experts of one token lie, over random routers, biases and tokens."""
    model = compile_model(Gated(), [*CLUSTER, *overrides], example=tokens())
    (layer,) = plan_of(model).layers
    router = next(module for module in model.modules() if isinstance(module, Router))
    assert layer.placement.nodes == NODES
    ranks_per_node = layer.placement.ep // NODES
    node_of = torch.tensor([layer.placement.rank_of(expert) // ranks_per_node for expert in range(32)])
    most = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
            router.correction_bias.copy_(torch.randn(32, generator=generator))
            _, ids_TK = router(tokens(TOKENS, seed=seed))
        reached_TN = torch.zeros(TOKENS, NODES).scatter_(1, node_of[ids_TK], 1.0)
        most = max(most, int(reached_TN.sum(1).max()))
    return most


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("group_score", ["max", "top2", "topk_over_m"])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_token_reaches_more_nodes_than_promised(limit: int, group_score: str, score: str) -> None:
    most = most_nodes_of_a_token(
        f"routing.max_nodes={limit}", f"routing.group_score={group_score}", f"routing.score={score}"
    )
    assert most == limit  # the limit is used, and never passed


def test_groups_of_the_model_keep_the_promise_too() -> None:
    given = ["routing.groups=8", "routing.top_groups=2", "routing.max_nodes=2"]  # two groups on each node
    assert most_nodes_of_a_token(*given) == 2


def test_without_a_limit_tokens_reach_every_node() -> None:
    assert most_nodes_of_a_token() == NODES
