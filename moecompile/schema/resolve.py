"""Rules that need the config alone. What needs the model (hidden size, number of sites) is checked by `make_plan`."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.schema.config import (
    BalanceConfig,
    Config,
    ExpertsConfig,
    MeshConfig,
    RoutingConfig,
)
from moecompile.schema.enums import (
    BalanceRule,
    Choice,
    ExpertInit,
    ModelDevice,
    Score,
    SiteKind,
    TaskName,
    TokenizerSource,
    Workload,
)
from moecompile.schema.export import check_export
from moecompile.schema.implied import SOURCES, has_experts
from moecompile.schema.per_layer import LayerSettings
from moecompile.schema.ranges import Whole, check_numbers, check_schedule
from moecompile.schema.slices import site_slice


def mesh_spec(mesh: MeshConfig) -> MeshSpec:
    """The validated mesh; `auto` values are filled in.

    Raises:
        ConfigError: sizes that do not fit each other, or an axis that does not exist yet.
    """
    for axis in ("tp", "pp", "cp"):
        if getattr(mesh, axis) != 1:
            raise ConfigError(f"mesh.{axis}", getattr(mesh, axis), "this axis does not exist yet", "Set it to 1")
    if mesh.device not in ("cpu", "cuda", "auto"):
        raise ConfigError("mesh.device", mesh.device, "must be cpu, cuda or auto", "Use one of these")
    world = mesh.num_nodes * mesh.ranks_per_node
    spec = MeshSpec(
        num_nodes=mesh.num_nodes,
        ranks_per_node=mesh.ranks_per_node,
        ep=_int_or_auto("mesh.ep", mesh.ep, world),
        dp_replicate=mesh.dp_replicate,
        device=mesh.device,
    )
    dp_shard = _int_or_auto("mesh.dp_shard", mesh.dp_shard, spec.dp_shard)
    if dp_shard != spec.dp_shard:
        raise ConfigError(
            "mesh.dp_shard",
            dp_shard,
            f"dp_replicate * dp_shard must be the world size, {mesh.dp_replicate} * {dp_shard} is not {world}",
            f"Use {spec.dp_shard} or auto",
        )
    return spec


def validate(config: Config) -> None:
    """Checks every rule that needs no model.

    Raises:
        ConfigError: the first rule that is broken.
    """
    # Where the model has experts, what the config says of experts and routers is not what holds.
    sites = config.experts.sites
    existing = sites is SiteKind.existing or (sites is SiteKind.auto and has_experts(config))
    check_name(config.name)
    check_numbers(config)
    mesh = mesh_spec(config.mesh) if existing else validate_transform(config)
    _check_model(config)
    _check_data(config, mesh)
    check_schedule(config)
    check_export(config)


def check_name(name: str) -> None:
    """Whether a name can be that of one folder.

    Raises:
        ConfigError: it is empty, or leads elsewhere.
    """
    if not name.strip() or name in (".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise ConfigError(
            "name", name, "is part of the run directory, so it must be the name of one folder",
            "Use letters, digits, - and _; hydra.run.dir=FOLDER says where a run goes",
        )  # fmt: skip
    if len(name.encode()) > 200:
        raise ConfigError("name", name, "is longer than a folder's name may be", "Use a shorter one")


def validate_transform(config: Config) -> MeshSpec:
    """Checks the rules of the transform alone (mesh, experts, routing, balance), as the Python API needs them.

    Raises:
        ConfigError: the first rule that is broken.
    """
    mesh = mesh_spec(config.mesh)
    _check_nodes(config, mesh)
    validate_settings(LayerSettings(experts=config.experts, routing=config.routing, balance=config.balance), mesh)
    return mesh


def validate_settings(settings: LayerSettings, mesh: MeshSpec) -> None:
    """Checks the settings of one layer; an error of a change by `per_layer` names it.

    Raises:
        ConfigError: the first rule that is broken.
    """
    try:
        check_numbers(settings)
        _check_experts(settings.experts)
        _check_routing(settings.routing, settings.experts, mesh)
        _check_router_kind(settings.routing)
        _check_virtual_groups(settings.experts, settings.routing, mesh)
        _check_balance(settings.balance, settings.routing)
    except ConfigError as error:
        raise ConfigError(settings.path_of(error.path), error.value, error.rule, error.fix) from None


def _check_router_kind(routing: RoutingConfig) -> None:
    """Rules between choice, score and the rest."""
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


def _check_balance(balance: BalanceConfig, routing: RoutingConfig) -> None:
    if balance.rule is BalanceRule.bias and not balance.rate:
        raise ConfigError("balance.rate", balance.rate, "must be positive", "Use 0.001 or balance.rule=none")
    if routing.choice is Choice.expert:
        losses = [name for name in ("micro_batch", "sequence", "global_batch") if getattr(balance.losses, name)]
        if balance.rule is BalanceRule.bias or losses:
            path = "balance.rule" if balance.rule is BalanceRule.bias else f"balance.losses.{losses[0]}"
            raise ConfigError(
                path, "bias" if balance.rule is BalanceRule.bias else getattr(balance.losses, losses[0]),
                "has no meaning where experts choose tokens: their load is even by itself", "Leave it out",
            )  # fmt: skip


def _check_model(config: Config) -> None:
    sources = {name: getattr(config.model, name) for name in SOURCES}
    given = [name for name, value in sources.items() if value]
    if len(given) != 1:
        raise ConfigError(
            "model",
            given or None,
            "exactly one of model.architecture, model.pretrained, model.package and model.factory must be given",
            "Select a model group, for example model=llama_nano, or give one of the four",
        )
    task = config.task.name
    if config.model.device is ModelDevice.meta and task in (TaskName.train, TaskName.bench):
        raise ConfigError(
            "model.device", "meta", f"the model has shapes and no values, so task={task.value} cannot run it",
            "Use task=plan or task=compile, or model.device=cpu if it fits into memory",
        )  # fmt: skip
    if config.model.device is ModelDevice.meta and (config.model.pretrained or config.model.package):
        raise ConfigError(
            "model.device", "meta", f"model.{given[0]} loads values", "Use model.device=cpu, or model.architecture"
        )


def _check_experts(experts: ExpertsConfig) -> None:
    site_slice(experts.layers)
    if experts.init is ExpertInit.copy and experts.granularity != 1:
        raise ConfigError(
            "experts.init", "copy", f"copies whole FFNs but experts.granularity={experts.granularity}",
            "Use experts.init=virtual_group, or experts.granularity=1",
        )  # fmt: skip
    if _is_sliced(experts) and experts.num_shared >= experts.granularity:
        raise ConfigError(
            "experts.num_shared", experts.num_shared,
            f"must leave a slice to the routed experts, experts.granularity={experts.granularity}",
            "Lower it or raise experts.granularity",
        )  # fmt: skip


def _is_sliced(experts: ExpertsConfig) -> bool:
    """Whether the routed experts are slices of the dense FFN."""
    sliced_drop = experts.init is ExpertInit.drop and experts.granularity > 1
    return experts.init is ExpertInit.virtual_group or sliced_drop


def _check_virtual_groups(experts: ExpertsConfig, routing: RoutingConfig, mesh: MeshSpec) -> None:
    """A virtual group is one copy of all routed slices; top-k must be able to choose it whole."""
    if not _is_sliced(experts):
        return
    size = experts.granularity - experts.num_shared
    groups, _ = resolve_groups(routing, experts.num_routed, mesh)
    rule = f"must be a multiple of the routed slices, experts.granularity - experts.num_shared = {size}"
    for path, value in (("experts.num_routed", experts.num_routed), ("routing.top_k", routing.top_k)):
        if value % size:
            up = (value // size + 1) * size
            raise ConfigError(path, value, rule, f"Use {up}, or experts.init=random")
    if experts.num_routed // groups % size:
        raise ConfigError(
            "routing.groups", groups, f"a virtual group of {size} experts would straddle routing groups",
            f"Make experts.num_routed / routing.groups a multiple of {size}",
        )  # fmt: skip


def _check_routing(routing: RoutingConfig, experts: ExpertsConfig, mesh: MeshSpec) -> None:
    if routing.top_k > experts.num_routed:
        raise ConfigError(
            "routing.top_k", routing.top_k,
            f"a token cannot use more than experts.num_routed={experts.num_routed} experts",
            f"Use at most {experts.num_routed}, or raise experts.num_routed",
        )  # fmt: skip
    if experts.num_routed % mesh.ep:
        below = experts.num_routed // mesh.ep * mesh.ep
        valid = [n for n in (below, below + mesh.ep) if n]
        raise ConfigError(
            "experts.num_routed", experts.num_routed, f"must be a multiple of mesh.ep={mesh.ep}",
            f"Use {' or '.join(map(str, valid))}",
        )  # fmt: skip
    resolve_groups(routing, experts.num_routed, mesh)


def resolve_groups(routing: RoutingConfig, num_experts: int, mesh: MeshSpec) -> tuple[int, int]:
    """(groups, top_groups), with `auto` filled in and the topology proven (docs/understand/routing.md).

    Groups belong to the model: with given `groups` the mesh only bounds them. `max_nodes` promises that each token
    reaches at most that many nodes.

    Raises:
        ConfigError: groups that do not divide the experts, that would straddle nodes, or that cannot keep `max_nodes`.
    """
    nodes = mesh.nodes_per_ep_group
    _check_max_nodes(routing, nodes)
    groups = _int_or_auto("routing.groups", routing.groups, nodes if routing.max_nodes else 1)
    Whole(1).check("routing.groups", groups)
    if num_experts % groups:
        raise ConfigError(
            "routing.groups", groups, f"must divide experts.num_routed={num_experts}",
            f"Use a divisor of {num_experts}, or change experts.num_routed",
        )  # fmt: skip
    top_groups = _top_groups(routing, groups, nodes)
    if top_groups < groups and groups % nodes:
        raise ConfigError(
            "routing.groups", groups, f"a group would straddle nodes: the EP group spans {nodes} nodes",
            f"Use a multiple of {nodes}, or a mesh whose EP group spans a divisor of {groups} nodes",
        )  # fmt: skip
    per_group = num_experts // groups
    if routing.top_k > top_groups * per_group:
        raise ConfigError(
            "routing.top_k", routing.top_k,
            f"only {top_groups} groups x {per_group} experts = {top_groups * per_group} experts are open to a token",
            "Lower routing.top_k or raise routing.top_groups",
        )  # fmt: skip
    if routing.max_nodes and min(top_groups, nodes) > routing.max_nodes:
        raise ConfigError(
            "routing.top_groups", top_groups,
            f"lets a token reach {min(top_groups, nodes)} nodes, but routing.max_nodes={routing.max_nodes}",
            f"Use routing.top_groups={routing.max_nodes}",
        )  # fmt: skip
    return groups, top_groups


def _check_nodes(config: Config, mesh: MeshSpec) -> None:
    """Groups of a recipe go with any mesh; a limit that the caller gives must mean something on this one."""
    limit, nodes = config.routing.max_nodes, mesh.num_nodes
    asked = "routing.max_nodes" in config.given and config.trainer.resume is None
    if asked and limit is not None and limit > nodes:
        raise ConfigError(
            "routing.max_nodes", limit, f"the mesh has {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or a mesh with more nodes",
        )  # fmt: skip


def _check_max_nodes(routing: RoutingConfig, nodes: int) -> None:
    if routing.max_nodes is None:
        return
    if routing.groups == "auto" and routing.max_nodes > nodes:
        raise ConfigError(
            "routing.max_nodes", routing.max_nodes, f"the EP group spans only {nodes} node{'s' * (nodes > 1)}",
            f"Use at most {nodes}, or let the EP group span more nodes (mesh, mesh.ep)",
        )  # fmt: skip


def _top_groups(routing: RoutingConfig, groups: int, nodes: int) -> int:
    if routing.top_groups is None:
        limit = routing.max_nodes or groups
        if limit > groups:
            raise ConfigError(
                "routing.max_nodes", limit, f"there are only routing.groups={groups} groups",
                f"Use at most {groups}, or raise routing.groups",
            )  # fmt: skip
        return limit
    if routing.top_groups > groups:
        raise ConfigError(
            "routing.top_groups", routing.top_groups, f"there are only routing.groups={groups} groups",
            f"Use at most {groups}",
        )  # fmt: skip
    return routing.top_groups


def _check_data(config: Config, mesh: MeshSpec) -> None:
    _check_tokenizer(config)
    if config.task.name in (TaskName.train, TaskName.verify, TaskName.bench):
        accumulation_steps(config, mesh)


def _check_tokenizer(config: Config) -> None:
    data, model = config.data, config.model
    if data.tokenizer is TokenizerSource.train:
        if data.vocab_size is None:
            raise ConfigError(
                "data.vocab_size", None, "data.tokenizer=train makes so many entries", "Give a number, such as 2048"
            )
        return
    if not (model.pretrained or model.package):
        raise ConfigError(
            "data.tokenizer", "model", f"the model {model.name} is not a pretrained one, so it has no tokenizer",
            "Use data=moby_dick, or model.pretrained or model.package",
        )  # fmt: skip
    if data.vocab_size is not None:
        raise ConfigError(
            "data.vocab_size", data.vocab_size, "data.tokenizer=model has the entries that it has", "Use null"
        )


def accumulation_steps(config: Config, mesh: MeshSpec) -> int:
    """Micro-batches per rank and optimizer step.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    data, world = config.data, mesh.world_size
    per_step = data.micro_batch_size * world
    if data.global_batch_size % per_step:
        up = (data.global_batch_size // per_step + 1) * per_step
        raise ConfigError(
            "data.global_batch_size", data.global_batch_size,
            f"must be a multiple of data.micro_batch_size * ranks = {data.micro_batch_size} * {world} = {per_step}",
            f"Use {up}, or a micro_batch_size that divides {data.global_batch_size} / {world}",
        )  # fmt: skip
    return data.global_batch_size // per_step


def _int_or_auto(path: str, value: int | str, auto: int) -> int:
    if value == "auto":
        return auto
    try:
        return int(value)
    except ValueError:
        raise ConfigError(path, value, "must be a number or auto", "Give a whole number or auto") from None
