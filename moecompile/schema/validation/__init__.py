"""Rules that need only the config, by subject. `build_plan` checks those that need the model (hidden size, sites)."""

from __future__ import annotations

from dataclasses import replace

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.schema.config import Config
from moecompile.schema.enums import ExpertInit, SiteKind
from moecompile.schema.implied import has_experts
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
from moecompile.schema.validation.export import check_export
from moecompile.schema.validation.launcher import check_launcher, of_the_job
from moecompile.schema.validation.mesh import commonest, mesh_spec, meshes
from moecompile.schema.validation.model import check_model
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
