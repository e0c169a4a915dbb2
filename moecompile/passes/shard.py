"""shard: binds mesh axes to process groups, splits experts over EP ranks, and wraps the model in FSDP2.

Algorithm:
  1. Replace each logical axis in the graphs by the name of its process group.
  2. Keep only this rank's experts: expert weights become DTensors, Shard(0) on `ep`.
  3. fully_shard each layer and the root: dense weights over (dp_replicate, dp_shard), experts over
     (dp_replicate, edp). Routers stay replicated and outside of FSDP's casts, and so do the few weights whose dtype
     differs from the rest, because FSDP2 does not support them. Gradients are reduced in fp32 or wider.
All gradient reductions are plain sums (docs/understand/gradients.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moecompile.arguments import check_model, check_plan
from moecompile.capture import layers_of
from moecompile.errors import PassError, PlanError
from moecompile.mesh import EXPERT_AXES, MeshSpec
from moecompile.nn import Experts, routers_of
from moecompile.passes.base import exchanges_of, experts_calls, on_an_axis, op_name, run_on_model
from moecompile.plan import Plan
from moecompile.torch_private import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult, split_axis

_LOGICAL = ("ep", "ep_inter", "ep_intra")


def device_mesh_of(mesh: MeshSpec, device_type: str) -> DeviceMesh:
    """The (dp_replicate, edp, ep) device mesh of the experts. Needs a process group."""
    return init_device_mesh(device_type, tuple(map(mesh.size, EXPERT_AXES)), mesh_dim_names=EXPERT_AXES)


def shard(model: nn.Module, plan: Plan, device_mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> nn.Module:
    """Shards a lowered model in place and returns it.

    Args:
        model: lowered by `plan`, with the same full weights on every rank.
        device_mesh: from `device_mesh_of`, or any mesh with these axes.
        param_dtype: compute dtype of the layers: FSDP2 gathers their weights in it and casts their inputs. The shards
            that the optimizer sees keep their dtype. None: no casts.

    Raises:
        PlanError: the mesh does not have the planned sizes. PassError: the model was not lowered by `plan`.
    """
    check_model(model)
    check_plan(plan)
    run_on_model(ShardModel(device_mesh=device_mesh, param_dtype=param_dtype), model, plan)
    return model


@dataclass(frozen=True, kw_only=True)
class ShardModel:
    """device_mesh, param_dtype: as for `shard`."""

    device_mesh: DeviceMesh
    param_dtype: torch.dtype | None = None
    name: str = "shard"

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """The device mesh has the planned sizes, and the graphs have the planned exchanges."""
        if plan.mesh.tp > 1:
            raise PlanError("mesh.tp", plan.mesh.tp, "weights cannot be split over tp yet", "Use mesh.tp=1")
        for axis in EXPERT_AXES:
            size, ranks = plan.mesh.size(axis), self.device_mesh[axis].size()
            if ranks != size:
                raise PlanError(
                    f"mesh.{axis}", size, f"the device mesh has {ranks} ranks there", "Plan for this device mesh"
                )
        exchanges = Counter(op_name(node) for module in _graphs(model).values() for node in exchanges_of(module))
        planned = Counter(op for layer in plan.layers for op, _ in layer.scheduled_steps)
        if exchanges != planned:
            rule = (
                f"the model holds the exchanges {dict(exchanges)}, planned are {dict(planned)}: lower it by this plan"
            )
            raise PassError(self.name, "the model", rule)

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Shards the model in place."""
        bind_axes(model, self.device_mesh, plan.mesh.nodes_per_ep_group)  # Step 1
        if plan.mesh.ep > 1:
            _shard_experts(model, self.device_mesh["ep"])  # Step 2
        if plan.mesh.world_size > 1 or self.param_dtype is not None:
            _wrap(model, plan.mesh, self.device_mesh, self.param_dtype)  # Step 3

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """No exchange is on a logical axis any more; with expert parallelism, every expert weight is sharded."""
        for path, module in _graphs(model).items():
            for node in on_an_axis(module):
                if str(node.args[-1]) in _LOGICAL:
                    raise PassError(self.name, path, f"{node.name} is still on the logical axis {node.args[-1]}")
        for owner, name in expert_parameters(model) if plan.mesh.ep > 1 else ():
            parameter = owner.get_parameter(name)
            if not isinstance(parameter, DTensor) or "ep" not in (parameter.device_mesh.mesh_dim_names or ()):
                raise PassError(self.name, name, f"{type(owner).__name__} holds every expert's {name} on every rank")


def _graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, fx.GraphModule)}


def bind_axes(model: nn.Module, device_mesh: DeviceMesh, num_nodes: int = 1) -> None:
    """Replaces logical axes by process group names in every graph of `model`.

    If a graph uses them, `ep` is split into `ep_inter` (ranks with the same local rank on each of the `num_nodes` nodes
    of an EP group) and `ep_intra` (its ranks on one node).
    """
    groups = {axis: device_mesh.get_group(axis).group_name for axis in device_mesh.mesh_dim_names or ()}
    graphs = _graphs(model)
    used = {str(node.args[-1]) for module in graphs.values() for node in on_an_axis(module)}
    if "ep" in groups and used & {"ep_inter", "ep_intra"}:
        sizes = {"ep_inter": num_nodes, "ep_intra": device_mesh["ep"].size() // num_nodes}
        two_levels = split_axis(device_mesh, "ep", sizes)
        groups.update({axis: two_levels.get_group(axis).group_name for axis in sizes})
    for path, module in graphs.items():
        nodes = on_an_axis(module)
        for node in nodes:
            axis = str(node.args[-1])
            if axis not in groups:
                raise PassError(
                    "shard", path, f"{node.name} uses axis {axis}, which is bound already or not in the mesh"
                )
            node.args = (*node.args[:-1], groups[axis])
        if nodes:
            module.recompile()


def _shard_experts(model: nn.Module, ep_mesh: DeviceMesh) -> None:
    """Each rank slices its own experts from the full weights that it already has; nothing is broadcast."""
    for owner, name in expert_parameters(model):
        parameter = owner.get_parameter(name)
        local = parameter.detach().chunk(ep_mesh.size(), 0)[ep_mesh.get_local_rank()].clone()
        sharded = DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)
        setattr(owner, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _wrap(model: nn.Module, mesh: MeshSpec, device_mesh: DeviceMesh, param_dtype: torch.dtype | None) -> None:
    experts = {owner.get_parameter(name) for owner, name in expert_parameters(model)}
    replicated = {parameter for _, router in routers_of(model) for parameter in router.parameters()}
    others = [parameter for parameter in model.parameters() if parameter not in replicated]
    for trained in (True, False):  # frozen weights may be narrower than the trained adapters beside them
        replicated |= _of_another_dtype([p for p in others if p.requires_grad is trained])
    experts_info: FSDPMeshInfo
    dense_info: FSDPMeshInfo
    # Dense weights have their own mesh: its dp_shard axis is (edp, ep) of the experts' mesh, in the same order.
    if mesh.dp_replicate > 1:
        sizes, names = (mesh.dp_replicate, mesh.dp_shard), ("dp_replicate", "dp_shard")
        dense_mesh = init_device_mesh(device_mesh.device_type, sizes, mesh_dim_names=names)
        experts_info = HSDPMeshInfo(device_mesh["dp_replicate", "edp"], shard_mesh_dim=1, replicate_mesh_dim=0)
        dense_info = HSDPMeshInfo(dense_mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    else:
        dense_mesh = init_device_mesh(device_mesh.device_type, (mesh.dp_shard,), mesh_dim_names=("dp_shard",))
        experts_info = FSDPMeshInfo(device_mesh["edp"], shard_mesh_dim=0)
        dense_info = FSDPMeshInfo(dense_mesh, shard_mesh_dim=0)

    def place(parameter: Tensor) -> ShardPlacementResult:
        return ShardPlacementResult(Shard(0), experts_info if parameter in experts and mesh.ep > 1 else dense_info)

    wide = reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()), torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=wide)
    wrap = partial(fully_shard, mesh=dense_mesh, shard_placement_fn=place, ignored_params=replicated, mp_policy=policy)
    for layer in (*layers_of(model), model):
        wrap(layer)
        assert isinstance(layer, FSDPModule)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)


def _of_another_dtype(parameters: Sequence[nn.Parameter]) -> set[nn.Parameter]:
    """The weights whose dtype is not that of most numbers: transformers keeps some routers and norms in fp32."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    most = max(sizes, key=sizes.__getitem__, default=None)
    return {parameter for parameter in parameters if parameter.dtype != most}


def expert_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of every weight that is stacked over experts.

    The owner is an `Experts`, or for existing experts the GraphModule that calls them.
    """
    stacked: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, Experts):
            stacked += [(module, name) for name, _ in module.named_parameters(recurse=False)]
        elif isinstance(module, fx.GraphModule):
            weights = [argument for call in experts_calls(module) for argument in call.args[2:]]  # of existing experts
            paths = dict.fromkeys(str(weight.target) for weight in weights if isinstance(weight, fx.Node))
            owned = (path.rpartition(".") for path in paths)
            stacked += [(module.get_submodule(owner), name) for owner, _, name in owned]
    return stacked
