"""Rules that need only the config, by subject. `build_plan` checks those that need the model (hidden size, sites)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, divisors
from moecompile.named_code import FACTORY
from moecompile.ranges import Real
from moecompile.routing import (
    AUTO_LOSSES,
    LOAD_LOSSES,
    BalanceRule,
    BalanceSpec,
    Choice,
    RouterConfig,
    Workload,
    check_balance,
)
from moecompile.routing.scores import SCORES
from moecompile.schema.config import (
    BalanceConfig,
    Config,
    ExpertsConfig,
    MeshConfig,
    RoutingConfig,
    TaskConfig,
    WeightGroupConfig,
)
from moecompile.schema.enums import (
    AdapterKind,
    Baseline,
    DataKind,
    ExpertInit,
    ExportFormat,
    LauncherKind,
    ModelAttention,
    ModelDevice,
    ModelInit,
    ModelLoad,
    Objective,
    OptimizerKind,
    SiteKind,
    StateKind,
    TaskName,
    TokenizerSource,
    WidenTopK,
)
from moecompile.schema.implied import SOURCES, has_experts
from moecompile.schema.moments import MOMENTS
from moecompile.schema.per_layer import LayerSettings, site_slice
from moecompile.schema.ranges import check_numbers


def validate(config: Config) -> None:
    """Checks every rule that needs no model. Of meshes that are to be searched, one must keep them.

    Raises:
        ConfigError: the first rule that is broken.
    """
    check_launcher(config)
    config, errors = of_the_job(config), list[ConfigError]()
    for mesh in meshes(config):
        try:
            return _validate(replace(config, mesh=mesh))
        except ConfigError as error:
            errors.append(error)
    raise commonest(errors)


def _validate(config: Config) -> None:
    # If the model has experts already, the config of experts and routers is not used.
    sites = config.experts.sites
    widens = config.experts.init is ExpertInit.widen
    existing = widens or sites is SiteKind.existing or (sites is SiteKind.auto and has_experts(config))
    check_name(config.name)
    check_numbers(config)
    check_widening(config)
    mesh = mesh_spec(config.mesh) if existing else validate_transform(config)
    check_model(config)
    check_data(config, mesh)
    check_schedule(config)
    check_optimizer(config)
    check_moments(config)
    check_export(config)
    check_chat(config)
    check_adapters(config)


def check_name(name: str) -> None:
    """Checks that a name can be the name of one folder.

    Raises:
        ConfigError: it is empty, too long, or a path.
    """
    if not name.strip() or name in (".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise ConfigError(
            "name", name, "is part of the run directory, so it must be the name of one folder",
            "Use letters, digits, - and _; hydra.run.dir=FOLDER sets the run directory",
        )  # fmt: skip
    if len(name.encode()) > 200:
        raise ConfigError("name", name, "is longer than a folder's name may be", "Use a shorter one")


def validate_transform(config: Config) -> MeshSpec:
    """Checks only the rules of the transform (mesh, experts, routing, balance), for the Python API.

    Raises:
        ConfigError: the first rule that is broken.
    """
    mesh = mesh_spec(config.mesh)
    check_nodes(config, mesh)
    validate_settings(LayerSettings(experts=config.experts, routing=config.routing, balance=config.balance), mesh)
    return mesh


def validate_settings(settings: LayerSettings, mesh: MeshSpec) -> None:
    """Checks the settings of one layer; errors caused by a change in `per_layer` name it.

    Raises:
        ConfigError: the first rule that is broken.
    """
    experts, routing, balance = settings.experts, settings.routing, settings.balance
    try:
        check_numbers(settings)
        check_experts(experts)
        check_shared(experts, routing)
        check_placement(experts.num_routed, mesh.ep)
        slices = virtual_group(experts.init, experts.granularity, experts.num_shared)
        router = router_config(routing, experts.num_routed, mesh, slices)
        check_choice(routing)
        router.check_experts(experts.num_routed, slices)
        balance_spec(balance, router)
    except ConfigError as error:
        raise ConfigError(settings.path_of(error.path), error.value, error.rule, error.fix) from None


def check_export(config: Config) -> None:
    """Checks the rules that need no run.

    Raises:
        ConfigError: the first rule that is broken.
    """
    export = config.export
    if config.task.name is not TaskName.export:
        return
    if export.run is None and export.checkpoint is None:
        raise ConfigError(
            "export.run", None, "task=export needs a run that was trained", "Give export.run=RUN_DIRECTORY"
        )
    if export.family is not None and export.format is ExportFormat.native:
        raise ConfigError(
            "export.family", export.family, "has no meaning with export.format=native", "Leave one of them out"
        )
    _refuse_others(config)


def check_chat(config: Config) -> None:
    """Checks that there is something to talk to.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if config.task.name is not TaskName.chat:
        return
    if config.chat.run is None:
        raise ConfigError("chat.run", None, "task=chat needs a model", "Give chat.run=RUN_DIRECTORY, or a folder")
    _refuse_others(config)


def _refuse_others(config: Config) -> None:
    """Refuses keys of other groups than the task's own: model and plan are those of a run."""
    task = config.task.name.value
    given = [key for key in config.given if key != FACTORY]  # the run's, which the caller must name again
    if others := [key for key in given if key.partition(".")[0] not in (task, "task", "hydra")]:
        raise ConfigError(
            others[0], "...", f"task={task} takes the model and its plan from the run, so other keys have no effect",
            "Leave it out",
        )  # fmt: skip


def check_model(config: Config) -> None:
    """Checks that one model is given, on a device that the task can use.

    Raises:
        ConfigError: the first rule that is broken.
    """
    sources = {name: getattr(config.model, name) for name in SOURCES}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ConfigError(
            "model",
            given or None,
            "exactly one of model.architecture, model.pretrained, model.package and model.factory must be given",
            "Select a model group, for example model=llama_nano, or give one of the four",
        )
    model = config.model
    if model.init is not ModelInit.auto and not model.architecture:
        raise ConfigError(
            "model.init", model.init.value, f"is for models from a config, and model.{given[0]} gives the weights",
            "Leave it out, or use model.architecture",
        )  # fmt: skip
    if model.attention is not ModelAttention.auto and model.factory:
        raise ConfigError(
            "model.attention", model.attention.value, "is for models of transformers, and model.factory builds its own",
            "Leave it out, and choose it there",
        )  # fmt: skip
    is_trained = config.task.name in (TaskName.train, TaskName.bench)
    if model.attention.is_on_a_gpu and config.mesh.device == "cpu" and is_trained:
        raise ConfigError(
            "model.attention", model.attention.value, "has no backward on a CPU (mesh.device=cpu)",
            "Use model.attention=auto, or a mesh of GPUs",
        )  # fmt: skip
    if model.device is ModelDevice.meta:
        _check_meta(config, given[0])


def _check_meta(config: Config, source: str) -> None:
    """Checks that the model needs no values, or that ranks can make their shards of it alone."""
    if source in ("pretrained", "package"):
        raise ConfigError(
            "model.device", "meta", f"model.{source} loads values", "Use model.device=cpu, or model.architecture"
        )
    if config.task.name not in (TaskName.train, TaskName.bench):
        return
    whole = (
        (source == "factory", "model.factory builds the model whole, with code of its own"),
        (config.model.load is ModelLoad.full, "model.load=full makes the whole model on every rank"),
        (config.experts.init is ExpertInit.widen, "experts.init=widen copies whole weights"),
        (config.trainer.baseline is not Baseline.none, "trainer.baseline builds the dense model whole"),
    )
    if reason := next((text for holds, text in whole if holds), None):
        raise ConfigError(
            "model.device", "meta", f"{reason}, and on this device it has no values",
            "Change that, or use model.device=cpu if it fits into the memory of each rank",
        )  # fmt: skip


# -- mesh -----------------------------------------------------------------------------------------------------------

SEARCHED = "search"
"""`mesh.ep` of a layout that is not chosen yet."""


def mesh_spec(mesh: MeshConfig) -> MeshSpec:
    """The validated mesh; `auto` values are filled in. With an EP size that is to be searched, only its ranks count.

    Raises:
        ConfigError: the sizes do not fit each other, or an axis is not supported yet.
    """
    if mesh.device not in ("cpu", "cuda", "auto"):
        raise ConfigError("mesh.device", mesh.device, "must be cpu, cuda or auto", "Use one of these")
    world = mesh.num_nodes * mesh.ranks_per_node
    values = {field.name: getattr(mesh, field.name) for field in fields(MeshSpec)}
    spec = MeshSpec(**{**values, "ep": _ep(mesh.ep, max(1, world // max(1, mesh.pp)))})
    dp_shard = int_or_auto("mesh.dp_shard", mesh.dp_shard, spec.dp_shard)
    of = " / ".join(("the world size", *spec.sharing))
    if dp_shard != spec.dp_shard:
        raise ConfigError(
            "mesh.dp_shard",
            dp_shard,
            f"dp_replicate * dp_shard must be {of}, {mesh.dp_replicate} * {dp_shard} is not {spec.num_batches}",
            f"Use {spec.dp_shard} or auto",
        )
    return spec


def _ep(value: int | str, world: int) -> int:
    if value in ("auto", SEARCHED):
        return world
    try:
        return int(value)
    except ValueError:
        raise ConfigError("mesh.ep", value, "must be a number, auto or search", "Give one of these") from None


def meshes(config: Config) -> list[MeshConfig]:
    """The meshes of which one will be chosen, the largest EP size first; its own alone if there is nothing to search.

    task=search begins with an EP size that nobody has given, a preset's, and with others where that cannot be.
    """
    mesh, axes = config.mesh, config.search.axes
    own = [mesh] if mesh.ep != SEARCHED else []
    varies = config.task.name is TaskName.search and "mesh.ep" not in config.given and (not axes or "ep" in axes)
    if own and not varies:
        return own
    return own + [replace(mesh, ep=ep) for ep in reversed(divisors(mesh.num_nodes * mesh.ranks_per_node))]


def commonest(errors: Sequence[ConfigError]) -> ConfigError:
    """Of the errors of several meshes, the one that most of them have: the others are of their sizes."""
    paths = [error.path for error in errors]
    return max(errors, key=lambda error: paths.count(error.path))


def int_or_auto(path: str, value: int | str, auto: int) -> int:
    """The number, or the argument `auto` if the value is "auto".

    Raises:
        ConfigError: neither a number nor "auto".
    """
    if value == "auto":
        return auto
    try:
        return int(value)
    except ValueError:
        raise ConfigError(path, value, "must be a number or auto", "Give a whole number or auto") from None


# -- experts, which are also checked for plans, as these may be edited by hand --------------------------------------


def check_experts(experts: ExpertsConfig) -> None:
    """Checks the rules that need only this group.

    Raises:
        ConfigError: the first rule that is broken.
    """
    site_slice(experts.layers)
    check_slices(experts.init, experts.granularity, experts.num_shared)
    check_latent(experts.latent_size, experts.latent_norm)


def check_widening(config: Config) -> None:
    """Checks what init=widen, which makes a larger model before anything is planned, does not go together with.

    Raises:
        ConfigError: the first rule that is broken.
    """
    experts, widen = config.experts, config.experts.widen
    if experts.init is not ExpertInit.widen:
        if given := next((key for key in config.given if key.startswith("experts.widen.")), None):
            value = getattr(widen, given.rpartition(".")[2], None)
            rule = f"has no effect with experts.init={experts.init.value}"
            raise ConfigError(given, getattr(value, "value", value), rule, "Use experts.init=widen, or leave it out")
        return
    if experts.sites in (SiteKind.dense, SiteKind.both):
        raise ConfigError(
            "experts.sites", experts.sites.value, "are dense FFNs, and experts.init=widen copies experts",
            "Use experts.sites=auto, or experts.init=copy",
        )  # fmt: skip
    if widen.top_k is WidenTopK.kept and not widen.noise:
        raise ConfigError(
            "experts.widen.noise", widen.noise, "leaves copies alike, and with experts.widen.top_k=kept rounding alone "
            "would decide which copy a token gets", "Use 0.01, or experts.widen.top_k=scaled",
        )  # fmt: skip
    for key, value, broken, what in (
        ("plan", config.plan, config.plan is not None, "is a plan of the model after it"),
        ("adapters.kind", config.adapters.kind.value, config.adapters.kind is not AdapterKind.none, "are for weights "
         "that are in a folder"),
    ):  # fmt: skip
        if broken:
            rule = f"{what}, and experts.init=widen makes a new model at each start"
            fix = "Save the larger model first (moecompile.widen_experts), and give its folder as model.pretrained"
            raise ConfigError(key, value, rule, fix)


def is_sliced(init: str, granularity: int) -> bool:
    """Whether routed experts are slices of the dense FFN, not full copies of it or randomly initialized."""
    return init == "virtual_group" or (init == "drop" and granularity > 1)


def virtual_group(init: str, granularity: int, num_shared: int) -> int:
    """How many routed experts together are one copy of the dense FFN's routed slices (1 without slices)."""
    return granularity - num_shared if is_sliced(init, granularity) else 1


def check_slices(init: str, granularity: int, num_shared: int) -> None:
    """Checks that the number of slices fits the initialization.

    Raises:
        ConfigError: init=copy with slices, or no slice is left for the routed experts.
    """
    if init == "copy" and granularity != 1:
        raise ConfigError(
            "experts.init", "copy", f"copies whole FFNs but experts.granularity={granularity}",
            "Use experts.init=virtual_group, or experts.granularity=1",
        )  # fmt: skip
    if is_sliced(init, granularity) and num_shared >= granularity:
        raise ConfigError(
            "experts.num_shared", num_shared,
            f"must leave a slice for the routed experts, experts.granularity={granularity}",
            "Lower it or raise experts.granularity",
        )  # fmt: skip


def check_latent(latent_size: int | None, latent_norm: bool) -> None:
    """Checks that a norm in the latent width has one.

    Raises:
        ConfigError: there is no latent width.
    """
    if latent_norm and latent_size is None:
        raise ConfigError(
            "experts.latent_norm", True, "is a norm in the latent width, but experts.latent_size=null",
            "Give experts.latent_size, or use experts.latent_norm=false",
        )  # fmt: skip


def check_shared(experts: Any, routing: Any) -> None:
    """Checks what a shared expert that the router weighs needs. Pass both values from a config, or both from a plan.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if not experts.shared_routed:
        return
    for path, value, broken, rule, fix in (
        ("experts.num_shared", experts.num_shared, not experts.num_shared, "leaves no shared expert to weigh", "Use 1"),
        ("experts.shared_gate", True, experts.shared_gate, "is another weight of the shared expert", "Use false"),
        ("routing.score", routing.score, routing.score != "sigmoid", "has no score for a shared expert", "Use sigmoid"),
        ("routing.normalize", False, not routing.normalize, "leaves no sum to share", "Use true"),
        ("routing.choice", routing.choice, routing.choice == "expert", "gives a token no sum to share", "Use token"),
    ):
        if broken:
            value = getattr(value, "value", value)
            why = "and experts.shared_routed=true makes the router weigh it beside the chosen experts"
            raise ConfigError(path, value, f"{rule}, {why}", f"{fix}, or experts.shared_routed=false")


def check_placement(num_routed: int, ep: int) -> None:
    """Checks that every EP rank gets the same number of experts.

    Raises:
        ConfigError: ep does not divide the number of experts.
    """
    if num_routed % ep:
        below = num_routed // ep * ep
        valid = [n for n in (below, below + ep) if n]
        raise ConfigError(
            "experts.num_routed", num_routed, f"must be a multiple of mesh.ep={ep}",
            f"Use {' or '.join(map(str, valid))}",
        )  # fmt: skip


# -- routing and balance, and their resolved forms ------------------------------------------------------------------


def router_config(routing: RoutingConfig, num_experts: int, mesh: MeshSpec, slices: int = 1) -> RouterConfig:
    """The validated router, with `auto` filled in and the node limit checked (docs/understand/routing.md).

    Groups are a property of the model: with explicit `groups` the mesh only limits them. `max_nodes` guarantees that
    each token reaches at most that many nodes.

    Args:
        slices: routed slices of the dense FFN (`virtual_group`).

    Raises:
        ConfigError: options contradict each other, or groups do not divide the experts, would straddle nodes or cannot
            guarantee `max_nodes`.
    """
    nodes = mesh.nodes_per_ep_group
    options = {field.name: _plain(getattr(routing, field.name)) for field in fields(RouterConfig)}
    options["groups"], options["top_groups"] = _resolved_groups(routing, nodes, slices)
    if routing.capacity_factor is None:
        options["drop"] = "none"
    router = RouterConfig(**options)
    router.check_experts(num_experts)
    _check_topology(router, routing.max_nodes, nodes)
    return router


def balance_spec(balance: BalanceConfig, router: RouterConfig) -> BalanceSpec:
    """The validated balance of a layer with this router, with `auto` filled in.

    Raises:
        ConfigError: the first rule that is broken.
    """
    has_rule = balance.rule is BalanceRule.bias
    if has_rule and not balance.rate:
        raise ConfigError("balance.rate", balance.rate, "must be positive", "Use 0.001 or balance.rule=none")
    rule = BalanceRule.none if balance.rule is BalanceRule.auto else balance.rule
    spec = BalanceSpec(
        rule=_plain(rule),
        rate=balance.rate if has_rule else 0.0,
        update=_plain(balance.update),
        recenter=balance.recenter,
        **losses_of(balance, AUTO_LOSSES if router.choice == "token" else {}),
    )
    check_balance(router, spec)
    return spec


def losses_of(balance: BalanceConfig, own: Mapping[str, float]) -> dict[str, float]:
    """Coefficients of the auxiliary losses; those of `own` where the config leaves them open."""
    given = {name: value or 0.0 for name, value in vars(balance.losses).items()}
    return {**given, **{name: value for name, value in own.items() if is_open(balance, name)}}


def is_open(balance: BalanceConfig, loss: str) -> bool:
    """Whether the config leaves it open how large a loss is: of those over the load, all of them."""
    group = LOAD_LOSSES if loss in LOAD_LOSSES else (loss,)
    return balance.rule is BalanceRule.auto and all(getattr(balance.losses, name) is None for name in group)


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
        ("routing.score", routing.score, SCORES[routing.score].after_topk, "softmax or sigmoid"),
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


def _resolved_groups(routing: RoutingConfig, nodes: int, slices: int) -> tuple[int, int]:
    """(groups, top_groups) of an EP group that spans `nodes` nodes."""
    limit = routing.max_nodes
    if routing.even_groups and limit is not None:
        rule = "limits a token to some groups, and routing.even_groups=true lets it choose experts of every group"
        raise ConfigError("routing.max_nodes", limit, rule, "Use null, or routing.even_groups=false")
    if limit is not None and routing.groups == "auto" and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the EP group spans only {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or let the EP group span more nodes (mesh, mesh.ep)",
        )  # fmt: skip
    if routing.even_groups and routing.groups == "auto" and slices == 1:
        rule = "is the number of routed slices of an FFN with routing.even_groups=true, and here there are not several"
        fix = "Give the number of groups, a divisor of experts.num_routed and of routing.top_k"
        raise ConfigError("routing.groups", "auto", rule, fix)
    groups = int_or_auto("routing.groups", routing.groups, slices if routing.even_groups else nodes if limit else 1)
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


# -- adapters -------------------------------------------------------------------------------------------------------


def check_adapters(config: Config) -> None:
    """Checks the rules that need no model.

    Raises:
        ConfigError: the first rule that is broken.
    """
    adapters = config.adapters
    if adapters.kind is AdapterKind.none:
        given = [key for key in config.given if key.startswith("adapters.") and key != "adapters.kind"]
        if given:
            value = getattr(adapters, given[0].partition(".")[2], None)
            raise ConfigError(given[0], value, "has no effect without adapters", "Use adapters=lora, or leave it out")
        return
    if adapters.dense is None and adapters.experts is None:
        raise ConfigError(
            "adapters.dense", None, "is null as adapters.experts is, so there would be no adapters",
            "Give a pattern for one of them, or use adapters=none",
        )  # fmt: skip
    if adapters.dropout and adapters.experts is not None:
        raise ConfigError(
            "adapters.dropout", adapters.dropout, "has no meaning for adapters of experts, in peft as here: they are "
            "added to stacked weights, which have no input of their own", "Use 0, or adapters.experts=null",
        )  # fmt: skip


# -- optimizer.muon and optimizer.groups ----------------------------------------------------------------------------

_NUM_COEFFICIENTS = 3
_LR_SCALE = Real("[0, inf)", "Use 1.0")
_WEIGHT_DECAY = Real("[0, inf)", "Use 0.1, or 0 for none")
_FINITE = Real("(-inf, inf)", "Use [3.4445, -4.775, 2.0315]")


def check_optimizer(config: Config) -> None:
    """Checks the rules that need no model; whether every pattern matches is known when the model is there.

    Raises:
        ConfigError: the first rule that is broken.
    """
    optimizer = config.optimizer
    is_muon = optimizer.kind is OptimizerKind.muon
    given = [key for key in config.given if key.startswith("optimizer.muon.")]
    if given and not is_muon:
        value = getattr(optimizer.muon, given[0].rpartition(".")[2], None)
        raise ConfigError(
            given[0], getattr(value, "value", value), "has no effect with AdamW", "Use optimizer=muon, or leave it out"
        )
    if len(optimizer.muon.coefficients) != _NUM_COEFFICIENTS:
        raise ConfigError(
            "optimizer.muon.coefficients", optimizer.muon.coefficients, "must be three numbers",
            "Use [3.4445, -4.775, 2.0315]",
        )  # fmt: skip
    for i, coefficient in enumerate(optimizer.muon.coefficients):
        _FINITE.check(f"optimizer.muon.coefficients[{i}]", coefficient)
    for i, group in enumerate(optimizer.groups):
        _LR_SCALE.check(f"optimizer.groups[{i}].lr_scale", group.lr_scale)
        if group.weight_decay is not None:
            _WEIGHT_DECAY.check(f"optimizer.groups[{i}].weight_decay", group.weight_decay)
        if group.kind is not None and not is_muon:
            raise ConfigError(
                f"optimizer.groups[{i}].kind", group.kind.value, "chooses among the two optimizers of optimizer=muon",
                "Use optimizer=muon, or leave it out",
            )  # fmt: skip


def check_moments(config: Config) -> None:
    """Checks what a kind of moments can be combined with.

    Raises:
        ConfigError: adapters, which have few numbers, or a decay that its rounding would undo.
    """
    optimizer = config.optimizer
    if optimizer.state is StateKind.auto:
        return
    kind, name = MOMENTS[optimizer.state], optimizer.state.value
    if not kind.may_adapt and config.adapters.kind is not AdapterKind.none:
        raise ConfigError(
            "optimizer.state", name, "saves nothing with adapters: their rows are short, and keep fp32 moments",
            "Use optimizer.state=bf16, or leave it out",
        )  # fmt: skip
    rates = {f"optimizer.betas[{i}]": beta for i, beta in enumerate(optimizer.betas)}
    if optimizer.kind is OptimizerKind.muon:
        rates["optimizer.muon.momentum"] = optimizer.muon.momentum
    for path, rate in rates.items():
        if rate > kind.slowest:
            raise ConfigError(
                path, rate, f"is so slow a decay that {name} moments would be rounded back to what they were: "
                f"at most {kind.slowest:.6g}", "Use optimizer.state=int8 or fp32, or a smaller rate",
            )  # fmt: skip


def group_of(name: str, groups: Sequence[WeightGroupConfig]) -> int | None:
    """The index of the first group whose pattern matches the name of a weight; None: no group's."""
    return next((i for i, group in enumerate(groups) if fnmatchcase(name, group.match)), None)


# -- data, optimizer and trainer ------------------------------------------------------------------------------------

_ONLY_FOR = {
    "data.text_field": (DataKind.corpus,),
    "data.layout": (DataKind.sft,),
    "data.cache": (DataKind.corpus, DataKind.sft),
    "data.corpus": (DataKind.text,),
}
"""Keys that only some kinds of data read."""
_GROUPS = {DataKind.text: "moby_dick", DataKind.corpus: "corpus", DataKind.sft: "sft"}
_READ_DATA = (TaskName.train, TaskName.verify, TaskName.bench, TaskName.data)
_BETA = Real("[0, 1)", "Use [0.9, 0.95]")


def check_data(config: Config, mesh: MeshSpec) -> None:
    """Checks that the tokenizer fits the model, and the batch fits the mesh.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_kind(config)
    _check_tokenizer(config)
    if config.task.name in (TaskName.train, TaskName.verify, TaskName.bench):
        accumulation_steps(config, mesh)


def _check_kind(config: Config) -> None:
    data = config.data
    for key, kinds in _ONLY_FOR.items():
        if key in config.given and data.kind not in kinds:
            value = getattr(data, key.removeprefix("data."))
            raise ConfigError(
                key, getattr(value, "value", value), f"data.kind={data.kind.value} does not read it",
                f"Leave it out, or use {' or '.join(f'data={_GROUPS[kind]}' for kind in kinds)}",
            )  # fmt: skip
    if data.kind is DataKind.text:
        return
    if data.path is None and (config.task.name in _READ_DATA or data.epochs is not None):
        raise ConfigError(
            "data.path", None, f"data.kind={data.kind.value} needs files", "Give a file, a folder or a pattern"
        )
    if data.kind is DataKind.sft and data.tokenizer is not TokenizerSource.model:
        raise ConfigError(
            "data.tokenizer",
            data.tokenizer.value,
            "chats need the chat template beside a pretrained model",
            "Use model",
        )
    if data.kind is DataKind.sft and data.objective is not Objective.causal:
        raise ConfigError(
            "data.objective", data.objective.value, "chats are learned token by token", "Use data.objective=causal"
        )


def _check_tokenizer(config: Config) -> None:
    data, model = config.data, config.model
    if data.tokenizer is TokenizerSource.train:
        if data.vocab_size is None:
            raise ConfigError(
                "data.vocab_size", None, "data.tokenizer=train needs a size", "Give a number, such as 2048"
            )
        return
    if not (model.pretrained or model.package):
        raise ConfigError(
            "data.tokenizer", "model", f"the model {model.name} is not pretrained, so it has no tokenizer",
            "Use data=moby_dick, or model.pretrained or model.package",
        )  # fmt: skip
    if data.vocab_size is not None:
        raise ConfigError("data.vocab_size", data.vocab_size, "data.tokenizer=model has a fixed vocabulary", "Use null")


def accumulation_steps(config: Config, mesh: MeshSpec) -> int:
    """Micro-batches per rank and optimizer step; ranks of one TP or CP group share them.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    data, world = config.data, mesh.num_batches
    ranks = " / ".join(("ranks", *mesh.sharing))
    per_step = data.micro_batch_size * world
    if data.global_batch_size % per_step:
        up, (part, rest) = (data.global_batch_size // per_step + 1) * per_step, divmod(data.global_batch_size, world)
        raise ConfigError(
            "data.global_batch_size", data.global_batch_size,
            f"must be a multiple of data.micro_batch_size * {ranks} = {data.micro_batch_size} * {world} = {per_step}",
            f"Use {up}" if rest else f"Use {up}, or a micro_batch_size that divides {part}",
        )  # fmt: skip
    return data.global_batch_size // per_step


def check_schedule(config: Config) -> None:
    """Checks the rules of `optimizer` beyond the ranges of its numbers.

    Raises:
        ConfigError: the first rule that is broken.
    """
    optimizer, max_steps, epochs = config.optimizer, config.trainer.max_steps, config.data.epochs
    if epochs is not None and "trainer.max_steps" in config.given:
        raise ConfigError(
            "data.epochs", epochs, f"trainer.max_steps={max_steps} says another length of the run", "Give one of them"
        )
    if len(optimizer.betas) != 2:
        raise ConfigError("optimizer.betas", optimizer.betas, "must be two numbers", "Use [0.9, 0.95]")
    for i, beta in enumerate(optimizer.betas):
        _BETA.check(f"optimizer.betas[{i}]", beta)
    # A run that the caller shortens keeps the recipe's warm-up, and may end before it does.
    shortened = (
        epochs is not None or "trainer.max_steps" in config.given
    ) and "optimizer.warmup_steps" not in config.given
    if optimizer.warmup_steps > max_steps and not shortened:
        raise ConfigError(
            "optimizer.warmup_steps", optimizer.warmup_steps,
            f"the run ends after trainer.max_steps={max_steps}, before optimizer.lr is reached",
            f"Use at most {max_steps}, or raise trainer.max_steps",
        )  # fmt: skip


# -- launcher, and the config that a submitted job has --------------------------------------------------------------

_TASKS = (TaskName.train, TaskName.bench)
_DECIDED = {
    "--nodes": "mesh.num_nodes", "-N": "mesh.num_nodes", "--ntasks": "mesh", "-n": "mesh",
    "--ntasks-per-node": "mesh.ranks_per_node", "--distribution": "the order of ranks", "-m": "the order of ranks",
    "--gpus-per-node": "mesh.ranks_per_node and mesh.device", "--cpus-per-task": "launcher.cpus_per_rank",
    "-c": "launcher.cpus_per_rank", "--signal": "launcher.signal_s", "--requeue": "launcher.requeue",
    "--no-requeue": "launcher.requeue", "--time": "launcher.time", "-t": "launcher.time",
    "--partition": "launcher.partition", "-p": "launcher.partition", "--account": "launcher.account",
    "-A": "launcher.account", "--qos": "launcher.qos", "-q": "launcher.qos", "--chdir": "the folder of the command",
    "-D": "the folder of the command", "--output": "hydra.run.dir", "-o": "hydra.run.dir",
}  # fmt: skip
"""Options of sbatch -> what decides them."""


def of_the_job(config: Config) -> Config:
    """The config with the task of the job that task=submit submits; another task's config is returned as it is."""
    if config.task.name is not TaskName.submit:
        return config
    return replace(config, task=TaskConfig(name=config.launcher.task))


def check_launcher(config: Config) -> None:
    """Checks what is written into the job.

    Raises:
        ConfigError: the first rule that is broken.
    """
    launcher = config.launcher
    if launcher.task not in _TASKS:
        raise ConfigError(
            "launcher.task", launcher.task.value, "does not run on the ranks of a mesh", "Use train or bench"
        )
    if config.task.name is TaskName.submit and launcher.kind is LauncherKind.local:
        raise ConfigError("launcher", "local", "submits nothing", "Use launcher=slurm, or leave out task=submit")
    named = {name: getattr(launcher, name) for name in ("partition", "account", "qos", "time", "interface", "python")}
    lines = {**named, **{f"directives[{i}]": text for i, text in enumerate(launcher.directives)},
             **{f"setup[{i}]": text for i, text in enumerate(launcher.setup)}}  # fmt: skip
    for name, text in lines.items():
        if text is not None and (not text.strip() or not text.isprintable()):
            raise ConfigError(f"launcher.{name}", repr(text), "must be one line of text", "Write one line, or null")
    for i, text in enumerate(launcher.directives):
        option = text.replace("=", " ").split()[0]
        if not option.startswith("-"):
            raise ConfigError(f"launcher.directives[{i}]", text, "is no option of sbatch", "Write --name=value")
        if option in _DECIDED:
            raise ConfigError(
                f"launcher.directives[{i}]", text, f"is decided by {_DECIDED[option]}", "Leave it out, and set that"
            )
