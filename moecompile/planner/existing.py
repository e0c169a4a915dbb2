"""Plans experts that the model has already: their number, top-k and groups are read from it, never from the config.

Algorithm, for each site:
  1. Values that the caller sets for what the model determines are an error; those of recipes and presets are ignored.
  2. The mesh must fit the model: ep divides the number of experts.
  3. The most nodes that a token can reach follow from the model's groups and the placement. If `routing.max_nodes` is
     lower, it is refused if the caller set it, else ignored.
  4. Balance what the model's own router allows, and drop what is over a capacity that the caller sets;
     what it does not allow is refused if the caller set it, else ignored. Losses that the config leaves open are those
     that the model's config has coefficients for.
`notes` lists the ignored values.

Losses and the bias rule are planned wherever the router allows them. A capacity drops tokens, so that step 0 is no
longer the model's: it is planned only if the caller sets it, and that of a recipe or preset is ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan import (
    BalancePlan,
    DispatchPlan,
    ExpertPlacement,
    ExpertsSite,
    LayerPlan,
    Plan,
    PlannedSite,
    RoutingPlan,
    layer_of,
    own_routing,
)
from moecompile.routing import OWN_LOSSES, Workload
from moecompile.schema import (
    SOURCES,
    AdapterKind,
    BalanceRule,
    Config,
    ExpertInit,
    ExpertsConfig,
    LayerSettings,
    TaskName,
    is_described,
    is_open,
    layer_settings,
    losses_of,
    with_workload,
)

_NOT_READ = {
    "experts": ("sites", "match", "layers", "backend"),
    "routing": ("max_nodes", "replay", "capacity_factor", "drop"),
}  # these are still used
_WIDENED = ("experts.init", "experts.num_routed", "experts.widen")  # already carried out
_EVERYWHERE = ExpertsConfig()
_NAMES = {
    "experts.num_routed": "num_experts", "routing.top_k": "top_k", "routing.groups": "groups",
    "routing.top_groups": "top_groups",
}  # fmt: skip
_OF_SCORES = ("micro_batch", "sequence", "global_batch")
_OF_CHOICES = ("micro_batch", "global_batch")
_CAPACITY = "routing.capacity_factor"


def only_existing(sites: Sequence[PlannedSite]) -> bool:
    """Whether there are sites, and all of them are in the model already."""
    return bool(sites) and all(isinstance(site, ExpertsSite) for site in sites)


def check_given(sites: Sequence[PlannedSite], config: Config, widened: str) -> None:
    """Refuses values of the caller that the model determines (step 1), unless there are dense sites to apply them to.

    Args:
        widened: `ModelFacts.widened`.

    Raises:
        ConfigError: there is such a value; the message has the site and the model's value.
    """
    widens = config.experts.init is ExpertInit.widen
    if widens and not (widened and only_existing(sites)):
        raise ConfigError(
            "experts.init", "widen", "makes a larger model before anything is planned, and this one was given as it is",
            "Call moecompile.widen_experts, and plan its model with the other settings",
        )  # fmt: skip
    if not only_existing(sites):
        return
    first = sites[0]
    assert isinstance(first, ExpertsSite)
    for key in _given(config):
        if widens and key.startswith(_WIDENED):
            continue
        path = ".".join(key.split(".")[2:]) if key.startswith("per_layer.") else key
        group, _, name = path.partition(".")
        if group not in _NOT_READ or not name or name in _NOT_READ[group]:
            continue
        reason = f"has {path}={getattr(first, _NAMES[path])}" if path in _NAMES else "determines that itself"
        raise ConfigError(
            key, _value(config, key), f"{first.fqn} is in the model already, and the model {reason}",
            "Leave it out",
        )  # fmt: skip


def existing_layer(
    site: ExpertsSite,
    settings: LayerSettings,
    mesh: MeshSpec,
    config: Config,
    dispatch: Callable[[RoutingPlan, ExpertPlacement], DispatchPlan],
    own: Mapping[str, float],
) -> LayerPlan:
    """The plan of one site.

    Args:
        settings: of this layer; only its balance, its capacity and `routing.max_nodes` are used.
        config: records which of them the caller set.
        dispatch: chooses the dispatch.
        own: what `own_balance` returns.

    Raises:
        ConfigError: the mesh, the node limit or the balance does not fit the model.
    """
    _check_ep(site, mesh)  # Step 2
    _check_misfits(site, settings, mesh, config)  # Steps 3 and 4
    placement = ExpertPlacement(
        num_experts=site.num_experts, ep=mesh.ep, nodes=mesh.nodes_per_ep_group, num_identity=site.num_identity
    )
    routing = planned_routing(site, settings, config)
    return layer_of(site, placement, dispatch(routing, placement), planned_balance(site, settings, own), routing)


def most_nodes(site: ExpertsSite, mesh: MeshSpec) -> int:
    """The most nodes that one token can reach, limited by its open groups and by its top-k."""
    return _most_nodes(site.num_experts, site.groups, site.top_groups, site.top_k, mesh.nodes_per_ep_group)


@cache  # a search asks for every layer of every candidate
def _most_nodes(num_experts: int, groups: int, top_groups: int, top_k: int, nodes: int) -> int:
    """See `most_nodes`.

    Groups are consecutive experts, and so are the experts of a node: a group is on the nodes first .. last. The largest
    union of M such ranges is built from left to right: best[(m, end)] is the most nodes that m groups cover up to node
    `end`.
    """
    size, per_node = num_experts // groups, num_experts // nodes
    best = {(0, -1): 0}
    for group in range(groups):
        first, last = group * size // per_node, ((group + 1) * size - 1) // per_node
        for (count, end), covered in list(best.items()):
            if count < top_groups:
                more = covered + last - max(first, end + 1) + 1
                best[count + 1, last] = max(more, best.get((count + 1, last), 0))
    return min(nodes, top_k, max(covered for (count, _), covered in best.items() if count == top_groups))


def notes(plan: Plan, config: Config, widened: str = "", own_losses: Mapping[str, float] | None = None) -> list[str]:
    """Notes for the user about settings that nothing reads; and about existing experts: values read from the model,
    settings that it ignores, losses of its own routers, placement of groups.

    Args:
        widened, own_losses: as in `ModelFacts`.
    """
    sites = [layer.site for layer in plan.layers if isinstance(layer.site, ExpertsSite)]
    if not sites:
        return [*_unused_notes(plan, config), *_workload_notes(config)]
    return [
        *_unused_notes(plan, config),
        *_workload_notes(config),
        *([f"widened: {widened}"] if widened else []),
        _read_note(sites, config),
        *_ignored_notes(plan, config),
        *_loss_notes(plan, config, own_losses or {}),
        *dict.fromkeys(note for site in sites if (note := _groups_note(site, plan.mesh))),
    ]


def _unused_notes(plan: Plan, config: Config) -> Iterator[str]:
    """`ignored: balance.rate=0.5 (no layer has a correction bias that is nudged)`: what only another setting reads. No
    error: a sweep over that other setting may say both.
    """
    if config.plan is not None or config.per_layer:
        return
    no_bias = (not any(layer.balance.rate for layer in plan.layers), "no layer has a correction bias that is nudged")
    no_limit = all(layer.routing.top_groups == layer.routing.groups for layer in plan.layers)
    workload, init = config.routing.workload, config.experts.init.value
    for key, (is_unused, why) in {
        "balance.rate": no_bias,
        "balance.update": no_bias,
        "experts.drop_ratio": (init != ExpertInit.drop, f"experts.init={init}"),
        "experts.shared_gate": (not config.experts.num_shared, "experts.num_shared=0"),
        "routing.drop": (all(layer.routing.drop == "none" for layer in plan.layers), "routing.capacity_factor=null"),
        "routing.group_score": (no_limit, "all groups of experts are open to a token"),
        "routing.skew": (workload not in (Workload.zipf, Workload.drift), f"routing.workload={workload.value}"),
        "routing.hot_experts": (not workload.has_hot_experts, f"routing.workload={workload.value}"),
    }.items():
        if is_unused and key in config.given:
            group, _, name = key.partition(".")
            value = getattr(getattr(config, group), name)
            yield f"ignored: {key}={getattr(value, 'value', value)} ({why})"


_PLANNED_STEP = (TaskName.plan, TaskName.rehearse, TaskName.search, TaskName.import_config)  # they read `workload`


def _workload_notes(config: Config) -> Iterator[str]:
    """`ignored: workload.seq_len=4096 (...)`: a described step, where another one is run."""
    task, workload, (read, _) = config.task.name, config.workload, with_workload(config)
    is_run = (read.data, read.trainer) == (config.data, config.trainer) and not is_described(workload)
    if task in _PLANNED_STEP or is_run:
        return
    why = f"task={task.value} runs the step of data, trainer and mesh; task=plan, rehearse and search read workload"
    names = [key.partition(".")[2] for key in config.given if key.startswith("workload.")]
    for name in names:
        value = getattr(workload, name)
        yield f"ignored: workload.{name}={getattr(value, 'value', value)} ({why})"
    if not names:
        yield f"ignored: workload={workload.name} ({why})"


def _ignored_notes(plan: Plan, config: Config) -> Iterator[str]:
    """`ignored: routing.max_nodes=1 (the router of ... is the model's own ...)`, each key once."""
    ignored: dict[str, str] = {}
    for i, layer in enumerate(plan.layers):
        if isinstance(layer.site, ExpertsSite):
            settings = layer_settings(config, layer.site.fqn, i, len(plan.layers))
            for misfit in _misfits(layer.site, settings, plan.mesh, config):
                ignored.setdefault(settings.path_of(misfit.key), f"{misfit.value} ({misfit.rule})")
    selected = config.experts
    if only_existing([layer.site for layer in plan.layers]) and selection(config) != (selected.match, selected.layers):
        for name in ("match", "layers"):
            if not is_given(config, f"experts.{name}") and getattr(selected, name) != getattr(_EVERYWHERE, name):
                ignored[f"experts.{name}"] = f"{getattr(selected, name)} (it selects FFNs of the recipe's own model)"
    yield from (f"ignored: {path}={what}" for path, what in ignored.items())


def _loss_notes(plan: Plan, config: Config, losses: Mapping[str, float]) -> Iterator[str]:
    """For each loss of the model's own routers that the config leaves open: our coefficient, or why it is not used."""
    if config.plan is not None:
        return
    settings = [layer_settings(config, layer.site.fqn, i, len(plan.layers)) for i, layer in enumerate(plan.layers)]
    for name, coefficient in losses.items():
        loss, path = OWN_LOSSES[name], f"model.config.{name}={coefficient:g}"
        layers = [
            (layer, layer.site) for layer, own in zip(plan.layers, settings, strict=True)
            if isinstance(layer.site, ExpertsSite) and is_open(own.balance, loss)
        ]  # fmt: skip
        if used := dict.fromkeys(value for layer, _ in layers if (value := getattr(layer.balance, loss))):
            shares = " and ".join(f"{value:.3g}" for value in used)
            yield f"{path}: trained with balance.losses.{loss}={shares} a layer; balance=none trains without"
        for reason in dict.fromkeys(filter(None, (_why_not_own(site, loss, config) for _, site in layers))):
            yield f"{path}: not used {'in some layers' if used else '(no load balance)'}: {reason}"


def _why_not_own(site: ExpertsSite, loss: str, config: Config) -> str | None:
    if config.adapters.kind is not AdapterKind.none and not config.adapters.train_router:
        return "the routers are frozen (adapters.train_router=false)"
    reason = _why_no_loss(site, loss)
    return None if reason is None else f"the router of {site.fqn}: {reason}"


def own_balance(
    site: ExpertsSite, sites: Sequence[PlannedSite], config: Config, losses: Mapping[str, float]
) -> dict[str, float]:
    """Our losses -> coefficients that equal those of the model's own config.

    transformers' loss is top_k times ours, of all layers of a stack together (`load_balancing_loss_func`); each layer
    has its share of the coefficient here, for its own load, so that even layers have the same loss.

    Args:
        sites: all that are planned. losses: `ModelFacts.own_losses`.
    """
    names = tuple(each.fqn for each in sites if isinstance(each, ExpertsSite))
    found: dict[str, float] = {}
    for name, coefficient in losses.items():
        loss = OWN_LOSSES[name]
        if _why_not_own(site, loss, config) is None:
            found[loss] = (
                coefficient * (site.top_k if loss == "micro_batch" else 1) / _stacks(names)[stack_of(site.fqn)]
            )
    return found


@cache  # as `_most_nodes`
def _stacks(names: tuple[str, ...]) -> Counter[str]:
    """How many sites each stack has."""
    return Counter(map(stack_of, names))


@cache
def stack_of(fqn: str) -> str:
    """What is before the number of a site's layer: `encoder.block`, `model.layers`."""
    return re.split(r"\.\d+(?=\.|$)", fqn, maxsplit=1)[0]


def selection(config: Config) -> tuple[str, str]:
    """`experts.match` and `experts.layers` for existing experts; those of a recipe apply only to the recipe's model."""
    own_model = "model" in config.given or any(is_given(config, f"model.{name}") for name in SOURCES)
    chosen = config.experts
    match = chosen.match if not own_model or is_given(config, "experts.match") else _EVERYWHERE.match
    layers = chosen.layers if not own_model or is_given(config, "experts.layers") else _EVERYWHERE.layers
    return match, layers


def _read_note(sites: Sequence[ExpertsSite], config: Config) -> str:
    """`read from the model: experts.num_routed=256 (config: 8), routing.top_k=8 (config: 2)`."""
    parts = []
    for path, name in _NAMES.items():
        values = dict.fromkeys(getattr(site, name) for site in sites)
        config_value = _value(config, path)
        differs = f" (config: {'null' if config_value is None else config_value})" * (list(values) != [config_value])
        if max(values) > 1:  # groups=1 is not listed
            parts.append(f"{path}={' and '.join(map(str, values))}{differs}")
    return f"read from the model: {', '.join(parts)}"


def _groups_note(site: ExpertsSite, mesh: MeshSpec) -> str | None:
    """What the router's groups limit on this mesh."""
    nodes = mesh.nodes_per_ep_group
    if site.groups == 1 or mesh.ep == 1:
        return None
    groups = f"each token may use {site.top_groups} of the {site.groups} expert groups"
    if nodes == 1:
        return f"{groups}; an EP group is on one node here, so this limits no traffic between nodes"
    reach = most_nodes(site, mesh)
    if site.groups % nodes == 0:
        where = f"{site.groups // nodes} on each of the {nodes} nodes of an EP group"
    else:
        where = f"which do not fill the {nodes} nodes of an EP group evenly, so groups straddle nodes"
    limit = f"a token reaches up to {reach} of them" if reach < nodes else "a token may reach all of them"
    return f"{groups}, {where}; {limit}"


def _check_ep(site: ExpertsSite, mesh: MeshSpec) -> None:
    if site.num_experts % mesh.ep:
        fitting = [n for n in range(1, site.num_experts + 1) if not site.num_experts % n and not mesh.world_size % n]
        rule = f"must divide the {site.num_experts} experts of {site.fqn}"
        raise ConfigError("mesh.ep", mesh.ep, rule, f"Use one of {fitting}, or mesh.ep=search")


def _misfits(site: ExpertsSite, settings: LayerSettings, mesh: MeshSpec, config: Config) -> Iterator[Misfit]:
    """Steps 3 and 4."""
    limit, reach = settings.routing.max_nodes, most_nodes(site, mesh)
    if limit is not None and reach > limit:
        groups = f"{site.top_groups} of {site.groups} groups" if site.groups > 1 else f"top-{site.top_k} without groups"
        yield Misfit(
            "routing.max_nodes", limit,
            f"the router of {site.fqn} is the model's own ({groups}) and lets a token reach {reach} nodes",
            f"Use {reach} or null, or a mesh whose EP group spans fewer nodes",
        )  # fmt: skip
    yield from balance_misfits(site, settings)
    yield from capacity_misfits(site, settings, config)


def _check_misfits(site: ExpertsSite, settings: LayerSettings, mesh: MeshSpec, config: Config) -> None:
    for misfit in _misfits(site, settings, mesh, config):
        path = settings.path_of(misfit.key)
        if is_given(config, path):
            raise ConfigError(path, misfit.value, misfit.rule, misfit.fix)


def _given(config: Config) -> Iterator[str]:
    """The keys that the caller set; `per_layer`, which is set as a whole, is expanded to the keys of its layers."""
    for key in config.given:
        if key != "per_layer":
            yield key
            continue
        for name, change in config.per_layer.items():
            for group in ("experts", "routing"):
                yield from (f"per_layer.{name}.{group}.{changed}" for changed in getattr(change, group))


def _value(config: Config, key: str) -> Any:
    """The config's value at a dotted path; enum members as their values."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return getattr(value, "value", value)


@dataclass(frozen=True)
class Misfit:
    """A value of the config that the model's own router cannot comply with. key: without `per_layer.NAME`."""

    key: str
    value: Any
    rule: str
    fix: str


def balance_misfits(site: ExpertsSite, settings: LayerSettings) -> Iterator[Misfit]:
    """Losses and a bias rule that the model's own router does not allow."""
    for name, value in vars(settings.balance.losses).items():
        if value and (reason := _why_no_loss(site, name)):
            rule = f"the router of {site.fqn} is the model's own, and {reason}"
            yield Misfit(f"balance.losses.{name}", value, rule, "Use 0")
    if settings.balance.rule is BalanceRule.quantile:
        yield Misfit(
            "balance.rule", "quantile",
            f"the router of {site.fqn} is the model's own, and only routers that are made here solve for their bias",
            "Use balance.rule=bias" if site.correction_bias else "Use balance.rule=none",
        )  # fmt: skip
    if settings.balance.rule is BalanceRule.bias and not site.correction_bias:
        yield Misfit(
            "balance.rule", "bias",
            f"the router of {site.fqn} is the model's own and has no buffer e_score_correction_bias to update",
            "Use balance=aux, or balance=none",
        )  # fmt: skip


def _why_no_loss(site: ExpertsSite, name: str) -> str | None:
    if site.score == "unknown":
        return "no module beside its experts returns its logits"
    if site.score == "other" and name in _OF_SCORES:
        return "it makes something else of its logits than a softmax or a sigmoid over its experts"
    if site.own_capacity and name in _OF_CHOICES:
        return "it drops tokens itself, so what it chose before is not known"
    if name == "sequence" and not site.has_sequences:
        return "it is not called with sequences"
    return None


def capacity_misfits(site: ExpertsSite, settings: LayerSettings, config: Config) -> Iterator[Misfit]:
    """A capacity that is not the caller's, or that the model's own router does not allow."""
    factor = settings.routing.capacity_factor
    if factor is None:
        return
    where = f"the router of {site.fqn} is the model's own"
    if site.own_capacity:
        rule = f"{where} and has a capacity of its own"
        yield Misfit(_CAPACITY, factor, rule, "Use null, and set the model's own in model.config")
    elif not is_given(config, settings.path_of(_CAPACITY)):
        yield Misfit(_CAPACITY, factor, f"{where}, and you did not ask to drop its tokens", "Use null")


def planned_routing(site: ExpertsSite, settings: LayerSettings, config: Config) -> RoutingPlan:
    """The model's own routing, with the capacity that the caller sets."""
    factor = settings.routing.capacity_factor
    if factor is None or any(capacity_misfits(site, settings, config)):
        return own_routing(site)
    return own_routing(site, factor, settings.routing.drop.value)


def planned_balance(site: ExpertsSite, settings: LayerSettings, own: Mapping[str, float]) -> BalancePlan:
    """The balance without what the router does not allow, which has been refused or is ignored.

    Args:
        own: what `own_balance` returns, for losses that are left open.
    """
    balance = settings.balance
    updated = balance.rule is BalanceRule.bias and site.correction_bias
    losses = {name: 0.0 if _why_no_loss(site, name) else value for name, value in losses_of(balance, own).items()}
    return BalancePlan(
        rule="bias" if updated else "none", rate=balance.rate if updated else 0.0, update=balance.update.value,
        recenter=balance.recenter and updated, **losses,
    )  # fmt: skip


def is_given(config: Config, path: str) -> bool:
    """Whether the caller set the key at a dotted path, or the group or `per_layer` that contains it."""
    return any(path == key or path.startswith(f"{key}.") for key in config.given)
