"""Rules that need only the config, by subject. `build_plan` checks those that need the model (hidden size, sites)."""

from __future__ import annotations

from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.named_code import FACTORY
from moecompile.schema.config import Config
from moecompile.schema.enums import ExpertInit, ExportFormat, ModelDevice, SiteKind, TaskName
from moecompile.schema.implied import SOURCES, has_experts
from moecompile.schema.per_layer import LayerSettings
from moecompile.schema.ranges import check_numbers
from moecompile.schema.validation.adapters import check_adapters
from moecompile.schema.validation.experts import (
    check_experts,
    check_placement,
    check_shared,
    check_widening,
    virtual_group,
)
from moecompile.schema.validation.launcher import check_launcher, of_the_job
from moecompile.schema.validation.mesh import commonest, mesh_spec, meshes
from moecompile.schema.validation.optimizer import check_optimizer
from moecompile.schema.validation.routing import balance_spec, check_choice, check_nodes, router_config
from moecompile.schema.validation.run import check_data, check_schedule


def validate(config: Config) -> None:
    """Checks every rule that needs no model. Of meshes that are to be searched, one must keep them.

    Raises:
        ConfigError: the first rule that is broken.
    """
    check_launcher(config)
    config, errors = of_the_job(config), list[ConfigError]()
    for mesh in meshes(config.mesh):
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
    check_export(config)
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
        router = router_config(routing, experts.num_routed, mesh)
        check_choice(routing)
        router.check_experts(experts.num_routed, virtual_group(experts.init, experts.granularity, experts.num_shared))
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
    given = [key for key in config.given if key != FACTORY]  # the run's, which the caller must name again
    if others := [key for key in given if key.partition(".")[0] not in ("export", "task", "hydra")]:
        raise ConfigError(
            others[0], "...", "task=export takes the model and its plan from the run, so other keys have no effect",
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
    task = config.task.name
    if config.model.device is ModelDevice.meta and task in (TaskName.train, TaskName.bench):
        raise ConfigError(
            "model.device", "meta", f"the model has shapes but no values, so task={task.value} cannot run it",
            "Use task=plan or task=compile, or model.device=cpu if it fits into memory",
        )  # fmt: skip
    if config.model.device is ModelDevice.meta and (config.model.pretrained or config.model.package):
        raise ConfigError(
            "model.device", "meta", f"model.{given[0]} loads values", "Use model.device=cpu, or model.architecture"
        )
