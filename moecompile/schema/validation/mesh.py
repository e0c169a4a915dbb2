"""Rules of `mesh`."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.schema.config import MeshConfig

_NOT_YET = {
    "pp": "pipeline parallelism is not supported: auxiliary losses of earlier stages would not reach the loss, and "
    "FSDP2 loses gradients under schedules that split backward",
}


def mesh_spec(mesh: MeshConfig) -> MeshSpec:
    """The validated mesh; `auto` values are filled in.

    Raises:
        ConfigError: the sizes do not fit each other, or an axis is not supported yet.
    """
    for axis, reason in _NOT_YET.items():
        if getattr(mesh, axis) != 1:
            raise ConfigError(f"mesh.{axis}", getattr(mesh, axis), reason, "Set it to 1")
    if mesh.device not in ("cpu", "cuda", "auto"):
        raise ConfigError("mesh.device", mesh.device, "must be cpu, cuda or auto", "Use one of these")
    world = mesh.num_nodes * mesh.ranks_per_node
    spec = MeshSpec(
        num_nodes=mesh.num_nodes,
        ranks_per_node=mesh.ranks_per_node,
        ep=int_or_auto("mesh.ep", mesh.ep, world),
        dp_replicate=mesh.dp_replicate,
        tp=mesh.tp,
        cp=mesh.cp,
        device=mesh.device,
    )
    dp_shard = int_or_auto("mesh.dp_shard", mesh.dp_shard, spec.dp_shard)
    of = "the world size" + (" / tp" if spec.tp > 1 else " / cp" if spec.cp > 1 else "")
    if dp_shard != spec.dp_shard:
        raise ConfigError(
            "mesh.dp_shard",
            dp_shard,
            f"dp_replicate * dp_shard must be {of}, {mesh.dp_replicate} * {dp_shard} is not {spec.num_batches}",
            f"Use {spec.dp_shard} or auto",
        )
    return spec


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
