"""Rules of `routing` and `balance`, and what the two resolve into."""

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
    Score,
    Workload,
    check_balance,
    check_groups,
)
from moecompile.schema.config import BalanceConfig, Config, RoutingConfig
from moecompile.schema.validation.mesh import int_or_auto


def router_config(routing: RoutingConfig, num_experts: int, mesh: MeshSpec) -> RouterConfig:
    """The validated router; `auto` values are filled in.

    Raises:
        ConfigError: as `resolve_groups`, or an option that contradicts another one.
    """
    groups, top_groups = resolve_groups(routing, num_experts, mesh)
    options = {field.name: _plain(getattr(routing, field.name)) for field in fields(RouterConfig)}
    options |= {"groups": groups, "top_groups": top_groups}
    if routing.capacity_factor is None:
        options["drop"] = "none"
    return RouterConfig(**options)


def balance_spec(balance: BalanceConfig, routing: RoutingConfig) -> BalanceSpec:
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
        **vars(balance.losses),
    )
    check_balance(_plain(routing.choice), spec)
    return spec


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def check_expert_choice(routing: RoutingConfig) -> None:
    """What a token decides cannot be asked for where experts choose.

    Raises:
        ConfigError: the first key that is given all the same.
    """
    if routing.choice is not Choice.expert:
        return
    for path, value, wrong, fix in (
        ("routing.score", routing.score.value, routing.score is Score.softmax_after_topk, "softmax or sigmoid"),
        ("routing.normalize", True, routing.normalize, "false"),
        ("routing.top_groups", routing.top_groups, routing.top_groups is not None, "null"),
        ("routing.max_nodes", routing.max_nodes, routing.max_nodes is not None, "null"),
        ("routing.workload", routing.workload.value, routing.workload is not Workload.none, "none"),
    ):  # fmt: skip
        if wrong:
            raise ConfigError(
                path, value, "has no meaning where experts choose tokens", f"Use {fix}, or routing.choice=token"
            )


def check_nodes(config: Config, mesh: MeshSpec) -> None:
    """Groups of a recipe go with any mesh; a limit that the caller gives must mean something on this one.

    Raises:
        ConfigError: more nodes than the mesh has.
    """
    limit, nodes = config.routing.max_nodes, mesh.num_nodes
    asked = "routing.max_nodes" in config.given and config.trainer.resume is None
    if asked and limit is not None and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the mesh has {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or a mesh with more nodes",
        )  # fmt: skip


def resolve_groups(routing: RoutingConfig, num_experts: int, mesh: MeshSpec) -> tuple[int, int]:
    """(groups, top_groups), with `auto` filled in and the topology proven (docs/routing.md).

    Groups belong to the model: with given `groups` the mesh only bounds them. `max_nodes` promises that each token
    reaches at most that many nodes.

    Raises:
        ConfigError: groups that do not divide the experts, that would straddle nodes, or that cannot keep `max_nodes`.
    """
    nodes, limit = mesh.nodes_per_ep_group, routing.max_nodes
    if limit is not None and routing.groups == "auto" and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the EP group spans only {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or let the EP group span more nodes (mesh, mesh.ep)",
        )  # fmt: skip
    groups = int_or_auto("routing.groups", routing.groups, nodes if limit else 1)
    top_groups = _top_groups(routing, groups)
    if routing.top_k > num_experts:
        raise ConfigError(
            "routing.top_k", routing.top_k, f"a token cannot use more than experts.num_routed={num_experts} experts",
            f"Use at most {num_experts}, or raise experts.num_routed",
        )  # fmt: skip
    check_groups(routing.top_k, groups, top_groups, num_experts)
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
    return groups, top_groups


def _top_groups(routing: RoutingConfig, groups: int) -> int:
    if routing.top_groups is not None:
        return routing.top_groups
    limit = routing.max_nodes or groups
    if limit > groups:
        raise ConfigError(
            "routing.max_nodes", limit, f"there are only routing.groups={groups} groups",
            f"Use at most {groups}, or raise routing.groups",
        )  # fmt: skip
    return limit
