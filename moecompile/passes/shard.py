"""shard: binds mesh axes to process groups, splits experts over EP ranks, and wraps the model in FSDP2.

Algorithm:
  1. Replace each logical axis in the graphs by the name of its process group.
  2. Keep only this rank's experts, in the planned order: their weights become DTensors, Shard(0) on `ep`. Split the
     planned modules outside of MoE layers over `tp` (tensor_parallel.py), positions over `cp` (context_parallel.py).
  3. fully_shard each layer and the root, each weight over the axes on which the plan sums its class: dense weights over
     (dp_replicate, dp_shard, cp), and tp where their work is split over it; experts over (dp_replicate, edp), along a
     dim that gives each rank its even share (plan/experts.py). Routers stay replicated and outside of FSDP's casts, and
     so do the few weights whose dtype differs from the rest, because FSDP2 does not support them. Gradients are reduced
     in fp32 or wider. Spread embedding tables are no FSDP's (lookups.py).
All gradient reductions are plain sums (docs/understand/gradients.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial, reduce
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moecompile import kept_groups
from moecompile.arguments import check_device_mesh, check_model, check_plan
from moecompile.capture import layers_of
from moecompile.errors import MoecompileError, PassError, PlanError
from moecompile.mesh import MeshSpec, Part, axes_that_split
from moecompile.nn import Experts, routers_of
from moecompile.nn.placement import keep_order, rows_of
from moecompile.nn.stages import passage_of
from moecompile.passes.base import ModelPass, exchanges_of, experts_calls, on_an_axis, op_name, run_on_model
from moecompile.passes.context_parallel import check_exchanged, split_positions
from moecompile.passes.lookups import AXIS, check_read, row_mesh, spread_tables
from moecompile.passes.place import order_of
from moecompile.passes.tensor_parallel import check_one_dtype, classes_of, split_dense
from moecompile.plan import EVEN, Plan, cut_dim, largest_shard
from moecompile.plan.plan import DENSE, EXPERTS, INSIDE, ROUTER, reductions
from moecompile.torch_private import (
    FSDPMeshInfo,
    HSDPMeshInfo,
    ShardPlacementResult,
    has_gradient_hook,
    local_part,
    one_chunk_each,
    one_mesh_each,
    see_attributes,
    sum_gradients,
)

AXIS_PASSES = {"tp": split_dense, "cp": split_positions}
"""Axis whose ranks share a micro-batch -> what splits a model over it: (model, plan, device mesh of the axis)."""


def device_mesh_of(mesh: MeshSpec, device_type: str) -> DeviceMesh:
    """The (dp_replicate, edp, ep) device mesh of the experts, with stages (pp, ...). Needs a process group."""
    return kept_groups.device_mesh(device_type, mesh.expert_dims())


def dense_mesh_of(mesh: MeshSpec, device_type: str) -> DeviceMesh:
    """The device mesh of dense weights: their axes, except those of one rank; dp_shard is always there."""
    return kept_groups.device_mesh(device_type, mesh.dims(("dp_shard",)))


def check_sizes(device_mesh: DeviceMesh, mesh: MeshSpec) -> None:
    """Checks that a device mesh has the planned axes and sizes.

    Raises:
        PlanError: it does not.
    """
    names = device_mesh.mesh_dim_names or ()
    for axis, size in mesh.expert_dims().items():
        if axis not in names:
            rule = f"the device mesh has no such axis, but {', '.join(names) or 'none with a name'}"
            raise PlanError(f"mesh.{axis}", size, rule, "Make it by moecompile.device_mesh_of(plan.mesh, device_type)")
        if (ranks := device_mesh[axis].size()) != size:
            rule = f"the device mesh has {ranks} ranks there"
            raise PlanError(f"mesh.{axis}", size, rule, "Plan for this device mesh")


def shard(model: nn.Module, plan: Plan, device_mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> nn.Module:
    """Shards a lowered model in place and returns it.

    Args:
        model: lowered by `plan`, with the same full weights on every rank.
        device_mesh: from `device_mesh_of`, or any mesh with these axes.
        param_dtype: compute dtype of the layers: FSDP2 gathers their weights in it and casts their inputs. The shards
            that the optimizer sees keep their dtype. None: no casts.

    Raises:
        PlanError: the mesh does not have the planned sizes.
        PassError: the model was not lowered by `plan`.
    """
    check_model(model)
    check_plan(plan)
    check_device_mesh(device_mesh)
    run_on_model([ShardModel(device_mesh=device_mesh, param_dtype=param_dtype)], model, plan)
    return model


@dataclass(frozen=True, kw_only=True)
class ShardModel(ModelPass):
    """device_mesh, param_dtype: as for `shard`."""

    device_mesh: DeviceMesh
    param_dtype: torch.dtype | None = None
    name: str = "shard"

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """The model is cut as planned, the device mesh has the planned sizes, and the graphs the planned exchanges; all
        ranks run the same layers.
        """
        if plan.pipeline is not None and passage_of(model) is None:
            rule = "stages of a pipeline are run by ExpertParallelStrategy alone, with task=train and task=verify"
            raise PlanError("mesh.pp", plan.mesh.pp, rule, "Use mesh.pp=1")
        check_sizes(self.device_mesh, plan.mesh)
        if plan.mesh.stage.world_size > 1:
            _check_all_layers_run(model)
        exchanges = Counter(op_name(node) for module in _graphs(model).values() for node in exchanges_of(module))
        planned = Counter(op for layer in plan.layers for op, _ in layer.scheduled_steps)
        if exchanges != planned:
            rule = (
                f"the model holds the exchanges {dict(exchanges)}, planned are {dict(planned)}: lower it by this plan"
            )
            raise PassError(self.name, "the model", rule)
        check_read(model, plan)

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Shards the model in place.

        Raises:
            PlanError: a weight that shards replace has a gradient hook.
        """
        hooked = {name: weight for name, weight in model.named_parameters() if has_gradient_hook(weight)}
        dense_mesh = dense_mesh_of(plan.mesh, self.device_mesh.device_type)
        rows = row_mesh(plan.mesh, self.device_mesh.device_type) if plan.lookups else None
        bind_axes(model, self.device_mesh, plan.mesh.nodes_per_ep_group, dense_mesh, rows)  # Step 1
        if plan.mesh.ep > 1:
            _shard_experts(model, self.device_mesh["ep"])  # Step 2
        spread = set() if rows is None else spread_tables(model, plan, rows, self.param_dtype)
        for axis in plan.mesh.axes(Part.SEQUENCE, Part.TOKENS):
            AXIS_PASSES[axis](model, plan, dense_mesh[axis])
        if plan.mesh.stage.world_size > 1 or self.param_dtype is not None:
            _wrap(model, plan, self.device_mesh, self.param_dtype, spread)  # Step 3
        kept = set(model.parameters())
        for name in (name for name, weight in hooked.items() if weight not in kept):
            raise PlanError(
                name, "a weight with a gradient hook", "shards replace the weight, and the hook would not run any more",
                "Put the hook on a module, or change gradients in on_before_optimizer_step",
            )  # fmt: skip

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """No exchange is on a logical axis any more; with expert parallelism, every expert weight is sharded; no rank
        has more than its even share of one; attention is exchanged where that is planned.
        """
        if plan.context_parallel:
            check_exchanged(model)
        for path, module in _graphs(model).items():
            for node in on_an_axis(module):
                if str(node.args[-1]) in ("ep", "ep_inter", "ep_intra", AXIS, *axes_that_split(Part.TOKENS)):
                    raise PassError(self.name, path, f"{node.name} is still on the logical axis {node.args[-1]}")
        for owner, name in expert_parameters(model) if plan.mesh.ep > 1 else ():
            parameter = owner.get_parameter(name)
            if not isinstance(parameter, DTensor) or "ep" not in (parameter.device_mesh.mesh_dim_names or ()):
                raise PassError(self.name, name, f"{type(owner).__name__} holds every expert's {name} on every rank")
        if plan.mesh.world_size > 1:
            check_even(model, plan)


_LAYERDROP = ("layerdrop", "speech_encoder_layerdrop")


def _check_all_layers_run(model: nn.Module) -> None:
    """Refuses LayerDrop: a rank that leaves a layer out would give its exchanges of the next one to ranks that do not,
    and at last some would wait for ever.
    """
    modules = dict(model.named_modules())
    owners: dict[str, object] = {path: module for path, module in modules.items() if hasattr(module, _LAYERDROP[0])}
    configs = {f"{path}.config": module.config for path, module in modules.items() if hasattr(module, "config")}
    for path, owner in (owners or configs).items():
        for name in _LAYERDROP:
            if isinstance(rate := getattr(owner, name, 0), float | int) and rate > 0:
                raise PlanError(
                    f"{path}.{name}".lstrip("."), rate,
                    "leaves layers out by chance in training, each rank others, and the exchanges of a layer need all",
                    "Set it to 0, or in the model's config what it comes from (encoder_layerdrop, decoder_layerdrop)",
                )  # fmt: skip


def _graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, fx.GraphModule)}


def bind_axes(
    model: nn.Module, device_mesh: DeviceMesh, num_nodes: int = 1, dense: DeviceMesh | None = None,
    rows: DeviceMesh | None = None,
) -> None:  # fmt: skip
    """Replaces logical axes by process group names in every graph of `model`.

    If a graph uses them, `ep` is split into `ep_inter` (ranks with the same local rank on each of the `num_nodes` nodes
    of an EP group) and `ep_intra` (its ranks on one node). dense: the mesh of dense weights, whose axes may cut tokens.
    rows: the ranks over which rows of embedding tables are spread.
    """
    groups = {axis: device_mesh.get_group(axis).group_name for axis in device_mesh.mesh_dim_names or ()}
    for axis in axes_that_split(Part.TOKENS):
        if dense is not None and axis in (dense.mesh_dim_names or ()):
            groups[axis] = dense.get_group(axis).group_name
    if rows is not None:
        groups[AXIS] = rows.get_group().group_name
    graphs = _graphs(model)
    used = {str(node.args[-1]) for module in graphs.values() for node in on_an_axis(module)}
    if "ep" in groups and used & {"ep_inter", "ep_intra"}:
        sizes = {"ep_inter": num_nodes, "ep_intra": device_mesh["ep"].size() // num_nodes}
        two_levels = kept_groups.split_axis(device_mesh, "ep", sizes)
        groups.update({axis: group.group_name for axis, group in two_levels.items()})
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
    for owner, name, order in _stacks(model):
        parameter = owner.get_parameter(name)
        if order:
            keep_order(owner, name, order)
            rows = torch.tensor(rows_of(order, parameter.shape[0]), device=parameter.device)
            local = parameter.detach().index_select(0, rows.chunk(ep_mesh.size())[ep_mesh.get_local_rank()])
        else:
            local = parameter.detach().chunk(ep_mesh.size(), 0)[ep_mesh.get_local_rank()].clone()
        sharded = DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)
        setattr(owner, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _wrap(
    model: nn.Module, plan: Plan, device_mesh: DeviceMesh, param_dtype: torch.dtype | None, spread: set[nn.Parameter]
) -> None:
    classes = {parameter: kind for parameter, kind in classes_of(model, plan).items() if parameter not in spread}
    classes |= {owner.get_parameter(name): EXPERTS for owner, name in expert_parameters(model)}
    replicated = {parameter for parameter, kind in classes.items() if kind == ROUTER}
    replicated |= spread | (others := _of_another_dtype(model, classes))
    check_one_dtype(model, classes, others)
    infos = _mesh_infos(plan.mesh, device_mesh)

    def place(parameter: Tensor) -> ShardPlacementResult:
        kind = classes[parameter]  # type: ignore[index]
        is_stack, ranks = kind == EXPERTS, infos[kind].shard_mesh_size
        return ShardPlacementResult(Shard(cut_dim(local_part(parameter).shape, ranks) if is_stack else 0), infos[kind])

    kind = type(model).__name__  # FSDP makes another
    plain = {name for name, p in model.named_parameters() if not isinstance(p, DTensor) and p not in replicated}
    wide = reduce(torch.promote_types, (parameter.dtype for parameter in model.parameters()), torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=wide)
    wrap = partial(
        fully_shard, mesh=infos[DENSE].mesh, shard_placement_fn=place, ignored_params=replicated, mp_policy=policy
    )
    for layer in (*layers_of(model), model):
        with one_chunk_each(), one_mesh_each():
            wrap(layer)
        assert isinstance(layer, FSDPModule)
        see_attributes(layer)
        sum_gradients(layer)
    _refuse_alone(model, kind, plain)


class _NotAlone:
    """The hook before a forward of what is not in a layer: its weights are gathered by a call of the whole model."""

    def __init__(self, model: str, path: str, weight: str) -> None:
        self.model, self.path, self.weight = model, path, weight

    def __call__(self, module: nn.Module, _: object) -> None:
        if isinstance(getattr(module, self.weight), DTensor):
            raise MoecompileError(
                f"{self.path}: called by itself, but its weights are in shards, which a call of {self.model} gathers "
                "for its own time. Call that, and take what you need from its output (output_hidden_states) or a hook"
            )


def _refuse_alone(model: nn.Module, kind: str, names: Collection[str]) -> None:
    """Gives each owner of these weights outside of all layers the hook; torch's error would be of DTensors."""
    in_layers = {module for layer in layers_of(model) for module in layer.modules()}
    for path, module in model.named_modules():
        held = [name for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}" in names]
        if held and module is not model and module not in in_layers:
            module.register_forward_pre_hook(_NotAlone(kind, path, held[0]))


def _mesh_infos(mesh: MeshSpec, device_mesh: DeviceMesh) -> dict[str, FSDPMeshInfo]:
    """For each class of weights, the ranks over which FSDP shards it and sums its gradient."""

    @cache  # FSDP gathers weights of the same info together
    def info(of: DeviceMesh, replicas: str, shards: str) -> FSDPMeshInfo:
        if replicas:
            return HSDPMeshInfo(of[replicas, shards], shard_mesh_dim=1, replicate_mesh_dim=0)
        return FSDPMeshInfo(of[shards], shard_mesh_dim=0)

    infos: dict[str, FSDPMeshInfo] = {}
    for each in reductions(mesh):
        replicas = [axis for axis in each.sum_over if axis not in each.sharded_over]
        if each.parameters == EXPERTS and mesh.ep > 1:
            infos[EXPERTS] = info(device_mesh, "_".join(replicas), "edp")
        elif each.parameters == EXPERTS:  # its edp has the ranks over which tokens inside MoE layers are split
            infos[EXPERTS] = infos.get(INSIDE, infos[DENSE])
        elif each.parameters != ROUTER:
            shards = ["dp_shard", *(axis for axis in each.sum_over if axis not in ("dp_shard", *replicas))]
            of = kept_groups.device_mesh(device_mesh.device_type, mesh.dims(replicas, shards))
            infos[each.parameters] = info(of, "_".join(replicas), "_".join(shards))
    return infos


def _of_another_dtype(model: nn.Module, classes: Mapping[nn.Parameter, str]) -> set[nn.Parameter]:
    """The weights whose dtype is not that of most numbers: transformers keeps some routers and norms in fp32."""
    others: set[nn.Parameter] = set()
    for trained in (True, False):  # frozen weights may be narrower than the trained adapters beside them
        mine = [p for p, kind in classes.items() if kind != ROUTER and p.requires_grad is trained]
        sizes: Counter[torch.dtype] = Counter()
        for parameter in mine:
            sizes[parameter.dtype] += parameter.numel()
        most = max(sizes, key=sizes.__getitem__, default=None)
        others.update(parameter for parameter in mine if parameter.dtype != most)
    return others


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """The weights that no mesh cuts: those of our routers, and the few of another dtype than most."""
    classes = dict.fromkeys(model.parameters(), DENSE)
    for _, router in routers_of(model):
        classes |= dict.fromkeys(router.parameters(), ROUTER)
    return {p for p, kind in classes.items() if kind == ROUTER} | _of_another_dtype(model, classes)


def check_even(model: nn.Module, plan: Plan) -> None:
    """Checks that no rank has more than its even share of a stack of experts, where a cut allows it (plan/experts.py).

    Raises:
        PlanError: a rank has more of one.
    """
    mesh, names = plan.mesh, {parameter: name for name, parameter in model.named_parameters()}
    whole = _of_another_dtype(model, dict.fromkeys(names, DENSE))
    for owner, name in expert_parameters(model):
        parameter = owner.get_parameter(name)
        if parameter in whole:
            continue
        held, share = _largest_part(parameter), parameter.numel() / (mesh.ep * mesh.edp_shard)
        of_rank = (parameter.shape[0] // mesh.ep, *parameter.shape[1:])
        if held > max(EVEN * share, largest_shard(of_rank, mesh.edp_shard)):
            rule = (
                f"a rank has {held:,} of the {parameter.numel():,} numbers of {names[parameter]}, "
                f"{held / share:.2f} times its even share, so the plan's memory and bytes are not those of this model"
            )
            fix = "Use mesh.ep and mesh.dp_replicate whose product is the number of ranks"
            raise PlanError("mesh.ep", mesh.ep, rule, fix)


def _largest_part(parameter: Tensor) -> int:
    """Numbers of a weight on the rank that has the most."""
    sizes = list(parameter.shape)
    if isinstance(parameter, DTensor):  # FSDP's axes come first, and cut what ep has left
        for size, placement in reversed(list(zip(parameter.device_mesh.shape, parameter.placements, strict=True))):
            if not placement.is_replicate():
                sizes[placement.dim] = -(-sizes[placement.dim] // size)  # type: ignore[attr-defined]
    return prod(sizes)


def expert_parameters(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of every weight that is stacked over experts.

    The owner is an `Experts`, or for existing experts the GraphModule that calls them.
    """
    return [(owner, name) for owner, name, _ in _stacks(model)]


def _stacks(model: nn.Module) -> list[tuple[nn.Module, str, tuple[int, ...]]]:
    """Each expert stack with its planned expert order (place.py); () means by id."""
    graphs = _graphs(model).values()
    calls = [(module, call) for module in graphs for call in experts_calls(module)]
    orders = {module.get_submodule(str(call.target)): order_of(call) for module, call in calls}
    stacked: list[tuple[nn.Module, str, tuple[int, ...]]] = []
    for module in model.modules():
        if isinstance(module, Experts):
            order = orders.get(module, ())
            stacked += [(module, name, order) for name, _ in module.named_parameters(recurse=False)]
        elif isinstance(module, fx.GraphModule):
            found = {str(w.target): order_of(call) for call in experts_calls(module) for w in _weights(call)}
            split = ((path.rpartition("."), order) for path, order in found.items())
            stacked += [(module.get_submodule(owner), name, order) for (owner, _, name), order in split]
    return stacked


def _weights(call: fx.Node) -> list[fx.Node]:
    """The weights that existing experts are called with."""
    return [argument for argument in call.args[2:] if isinstance(argument, fx.Node)]
