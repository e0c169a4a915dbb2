"""build_plan: decisions, and errors that say what to change."""

from __future__ import annotations

import re

import pytest

from moecompile.errors import ConfigError
from moecompile.passes.build_plan import build_plan, select
from moecompile.plan import FFNSite, Plan
from moecompile.planner import ModelFacts
from tests.models import config

FACTS = ModelFacts(params_total=10_000)
EP4 = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]


def site(index: int, fqn: str = "", d_ff: int = 48) -> FFNSite:
    return FFNSite(
        fqn=fqn or f"model.layers.{index}.mlp", kind="gated", d_model=16, d_ff=d_ff, bias_up=False, bias_down=False,
        activation="silu, mul", index=index,
    )  # fmt: skip


SITES = [*(site(i) for i in range(4)), site(4, "encoder.mlp")]


def plan(*overrides: str, sites: list[FFNSite] | None = None) -> Plan:
    return build_plan(SITES if sites is None else sites, config(*overrides), FACTS)


def names(*overrides: str) -> list[int]:
    return [chosen.index for chosen in select(SITES, config(*overrides))]


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "selected"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["experts.match='*'"], [0, 1, 2, 3, 4]),
        (["experts.match=model.*"], [0, 1, 2, 3]),
        (["experts.match='*.layers.[12].mlp'"], [1, 2]),
        (["experts.match=encoder.mlp"], [4]),
        (["experts.layers='1:'"], [1, 2, 3, 4]),
        (["experts.layers='::2'"], [0, 2, 4]),
        (["experts.layers='-1:'"], [4]),
        (["experts.layers='[1:3]'"], [1, 2]),
        (["experts.layers='::-2'"], [4, 2, 0]),
        (["experts.match=model.*", "experts.layers='-1:'"], [3]),
    ],
)
def test_sites_are_selected_by_name_and_by_position(overrides: list[str], selected: list[int]) -> None:
    assert names(*overrides) == selected


def test_a_pattern_that_matches_nothing() -> None:
    message = (
        "experts.match=decoder.*: matches none of the 5 FFNs (model.layers.0.mlp, model.layers.1.mlp, "
        "model.layers.2.mlp, ...). Change the pattern."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan("experts.match=decoder.*")


def test_a_slice_that_selects_nothing() -> None:
    message = "experts.layers=7:: selects none of 5 FFNs. Use ':' for all of them."
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan("experts.layers='7:'")


def test_a_model_without_a_site_has_an_empty_plan() -> None:
    empty = plan(sites=[])
    assert empty.layers == ()
    assert empty.estimate is not None
    assert empty.estimate.params_total == 10_000


# -- decisions -------------------------------------------------------------------------------------------------------


def test_a_layer_holds_what_the_config_says() -> None:
    made = plan(
        *EP4, "experts.num_routed=12", "experts.granularity=4", "experts.num_shared=1", "experts.init=virtual_group",
        "routing.top_k=3", "routing.score=sigmoid", "routing.scale=2.5", "routing.groups=4", "routing.top_groups=1",
        "routing.group_score=topk_over_m", "routing.max_nodes=1", "balance.rule=bias", "balance.rate=0.01",
    )  # fmt: skip
    assert len(made.layers) == 5
    layer = made.layers[1]
    assert layer.site == SITES[1]
    assert vars(layer.experts) == {
        "num_routed": 12, "granularity": 4, "num_shared": 1, "d_expert": 12, "d_shared": 12, "init": "virtual_group",
    }  # fmt: skip
    assert vars(layer.routing) == {
        "top_k": 3, "score": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "top_groups": 1,
        "group_score": "topk_over_m",
    }  # fmt: skip
    assert (layer.balance.rule, layer.balance.rate) == ("bias", 0.01)
    assert (layer.placement.num_experts, layer.placement.ep, layer.placement.experts_per_rank) == (12, 4, 3)


def test_without_a_balance_rule_the_rate_is_zero() -> None:
    assert plan("balance.rate=0.5").layers[0].balance.rate == 0.0


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["dispatch.kind=auto"], "local"),
        (["dispatch.kind=flat"], "local"),  # with one EP rank nothing has to travel, whatever is asked for
        (["dispatch.kind=local"], "local"),
        ([*EP4, "dispatch.kind=flat"], "flat"),
        ([*EP4, "dispatch.kind=dedup"], "dedup"),
        ([*EP4, "dispatch.kind=auto", "routing.top_k=4"], "dedup"),
        ([*EP4, "dispatch.kind=auto", "routing.top_k=1"], "flat"),
        ([*EP4, "mesh.ep=1", "dispatch.kind=auto"], "local"),
    ],
)
def test_dispatch(overrides: list[str], kind: str) -> None:
    assert {layer.dispatch.kind for layer in plan(*overrides).layers} == {kind}


def test_groups_resolve_to_the_nodes_once() -> None:
    routing = plan(*EP4, "routing.max_nodes=1").layers[0].routing
    assert (routing.groups, routing.top_groups) == (2, 1)
    routing = plan(*EP4).layers[0].routing
    assert (routing.groups, routing.top_groups) == (1, 1)


# -- impossible ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experts.init=random", "experts.granularity=5"],
            "experts.granularity=5: must divide d_ff=48 of model.layers.0.mlp. Use a divisor of 48.",
        ),
        (
            [*EP4, "dispatch.kind=local"],
            "dispatch.kind=local: experts are spread over mesh.ep=4 ranks. Use auto, flat or dedup.",
        ),
        ([*EP4, "experts.num_routed=6"], "experts.num_routed=6: must be a multiple of mesh.ep=4. Use 4 or 8."),
        (
            ["routing.top_k=9"],
            "routing.top_k=9: a token cannot use more than experts.num_routed=8 experts. Use at most 8, or raise "
            "experts.num_routed.",
        ),
    ],
)
def test_impossible_plans_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan(*overrides)
