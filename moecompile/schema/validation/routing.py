"""Rules of `routing` and `balance`, and their resolved forms."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.routing import (
    BalanceRule,
    BalanceSpec,
    Choice,
    RouterConfig,
    Workload,
    check_balance,
)
from moecompile.routing.scores import SCORES
from moecompile.schema.config import BalanceConfig, Config, RoutingConfig
from moecompile.schema.validation.mesh import int_or_auto


def router_config(routing: RoutingConfig, num_experts: int, mesh: MeshSpec) -> RouterConfig:
    """The validated router, with `auto` filled in and the node limit checked (docs/understand/routing.md).

    Groups are a property of the model: with explicit `groups` the mesh only limits them. `max_nodes` guarantees that
    each token reaches at most that many nodes.

    Raises:
        ConfigError: options contradict each other, or groups do not divide the experts, would straddle nodes or cannot
            guarantee `max_nodes`.
    """
    nodes = mesh.nodes_per_ep_group
    options = {field.name: _plain(getattr(routing, field.name)) for field in fields(RouterConfig)}
    options["groups"], options["top_groups"] = _resolved_groups(routing, nodes)
    if routing.capacity_factor is None:
        options["drop"] = "none"
    router = RouterConfig(**options)
    router.check_experts(num_experts)
    _check_topology(router, routing.max_nodes, nodes)
    return router


def balance_spec(balance: BalanceConfig, router: RouterConfig) -> BalanceSpec:
    """The validated balance of a layer with this router.

    Raises:
        ConfigError: the first rule that is broken.
    """
    has_rule = balance.rule is BalanceRule.bias
    if has_rule and not balance.rate:
        raise ConfigError("balance.rate", balance.rate, "must be positive", "Use 0.001 or balance.rule=none")
    spec = BalanceSpec(
        rule=_plain(balance.rule),
        rate=balance.rate if has_rule else 0.0,
        update=_plain(balance.update),
        recenter=balance.recenter,
        **vars(balance.losses),
    )
    check_balance(router, spec)
    return spec


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def check_choice(routing: RoutingConfig) -> None:
    """Refuses options of token choice where experts choose, or a hash does.

    Raises:
        ConfigError: such an option is set (the first one).
    """
    if routing.choice is Choice.hash:
        _check_hash(routing)
    if routing.choice is not Choice.expert:
        return
    for path, value, wrong, fix in (
        ("routing.score", routing.score.value, SCORES[routing.score.value].after_topk, "softmax or sigmoid"),
        ("routing.normalize", True, routing.normalize, "false"),
        ("routing.top_groups", routing.top_groups, routing.top_groups is not None, "null"),
        ("routing.max_nodes", routing.max_nodes, routing.max_nodes is not None, "null"),
        ("routing.workload", routing.workload.value, routing.workload is not Workload.none, "none"),
        ("routing.replay", routing.replay, routing.replay is not None, "null"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(
                path, value, "has no meaning where experts choose tokens", f"Use {fix}, or routing.choice=token"
            )


def _check_hash(routing: RoutingConfig) -> None:
    for path, value, wrong, fix in (
        ("routing.top_groups", routing.top_groups, routing.top_groups is not None, "null"),
        ("routing.max_nodes", routing.max_nodes, routing.max_nodes is not None, "null"),
        ("routing.workload", routing.workload.value, routing.workload is not Workload.none, "none"),
    ):
        if wrong:
            rule = "has no meaning where a hash of the token id chooses"
            raise ConfigError(path, value, rule, f"Use {fix}, or routing.choice=token")


def check_nodes(config: Config, mesh: MeshSpec) -> None:
    """Checks a `max_nodes` that the caller set against the mesh; that of a recipe is accepted with any mesh.

    Raises:
        ConfigError: the limit is more than the nodes of the mesh.
    """
    limit, nodes = config.routing.max_nodes, mesh.num_nodes
    is_given = "routing.max_nodes" in config.given and config.trainer.resume is None
    if is_given and limit is not None and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the mesh has {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or a mesh with more nodes",
        )  # fmt: skip


def _resolved_groups(routing: RoutingConfig, nodes: int) -> tuple[int, int]:
    """(groups, top_groups) of an EP group that spans `nodes` nodes."""
    limit = routing.max_nodes
    if limit is not None and routing.groups == "auto" and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the EP group spans only {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or let the EP group span more nodes (mesh, mesh.ep)",
        )  # fmt: skip
    groups = int_or_auto("routing.groups", routing.groups, nodes if limit else 1)
    if routing.top_groups is not None:
        return groups, routing.top_groups
    if limit is not None and limit > groups:
        raise ConfigError(
            "routing.max_nodes", limit, f"there are only routing.groups={groups} groups",
            f"Use at most {groups}, or raise routing.groups",
        )  # fmt: skip
    return groups, limit or groups


def _check_topology(router: RouterConfig, limit: int | None, nodes: int) -> None:
    """Checks that groups do not straddle nodes if they limit routing, and that at most `limit` nodes are reached."""
    groups, top_groups = router.groups, router.top_groups
    if top_groups < groups and groups % nodes:
        raise ConfigError(
            "routing.groups", groups, f"a group would straddle nodes: the EP group spans {nodes} nodes",
            f"Use a multiple of {nodes}, or a mesh whose EP group spans a divisor of {groups} nodes",
        )  # fmt: skip
    if limit and min(top_groups, nodes) > limit:
        raise ConfigError(
            "routing.top_groups", top_groups,
            f"lets a token reach {min(top_groups, nodes)} nodes, but routing.max_nodes={limit}",
            f"Use routing.top_groups={limit}",
        )  # fmt: skip
