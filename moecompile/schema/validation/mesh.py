"""Rules of `mesh`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from moecompile.errors import ConfigError
from moecompile.mesh import NOT_YET, MeshSpec, divisors
from moecompile.schema.config import MeshConfig

SEARCHED = "search"
"""`mesh.ep` of a layout that is not chosen yet."""


def mesh_spec(mesh: MeshConfig) -> MeshSpec:
    """The validated mesh; `auto` values are filled in. With an EP size that is to be searched, only its ranks count.

    Raises:
        ConfigError: the sizes do not fit each other, or an axis is not supported yet.
    """
    for axis, reason in NOT_YET.items():
        if getattr(mesh, axis) != 1:
            raise ConfigError(f"mesh.{axis}", getattr(mesh, axis), reason, "Set it to 1")
    if mesh.device not in ("cpu", "cuda", "auto"):
        raise ConfigError("mesh.device", mesh.device, "must be cpu, cuda or auto", "Use one of these")
    world = mesh.num_nodes * mesh.ranks_per_node
    values = {field.name: getattr(mesh, field.name) for field in fields(MeshSpec)}
    spec = MeshSpec(**{**values, "ep": _ep(mesh.ep, world)})
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


def meshes(mesh: MeshConfig) -> list[MeshConfig]:
    """The meshes of which one will be chosen, the largest EP size first; `mesh` alone if there is nothing to search."""
    if mesh.ep != SEARCHED:
        return [mesh]
    return [replace(mesh, ep=ep) for ep in reversed(divisors(mesh.num_nodes * mesh.ranks_per_node))]


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
