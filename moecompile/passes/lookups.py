"""Lookups of rows that other ranks have: the graph of the module that reads a table, with its exchanges.

    F.embedding(ids, weight)   ->   unique_ids, send_ids, read_rows, return_rows        on several ranks
                                    read_rows                                           on one

The axis is `rows` until `shard` binds it, as that of other exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.node import Argument

from moecompile import kept_groups
from moecompile.errors import PassError, PlanError
from moecompile.match.lookups import Read, rows_read
from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec, Part, axes_that_split
from moecompile.ops.lookups import read_rows, rows_of_a_rank
from moecompile.passes.base import copy_graph_module, erase_unused, items, op_name
from moecompile.plan import Lookup, Plan

AXIS = "rows"


@dataclass(frozen=True, kw_only=True)
class SpreadRows:
    """Replaces each lookup in a planned table. mesh: without ranks that share rows, nothing is exchanged."""

    lookups: Sequence[Lookup]
    mesh: MeshSpec
    name: str = "spread_rows"
    stage: str = "spread"
    detail: str = "rows of embedding tables are read where they are"

    def run(self, region: Region) -> Region:
        """The region with a new graph.

        Raises:
            PassError: its graph does not read every planned table of this module.
        """
        planned = {each.weight: each for each in self.lookups if each.module == region.path}
        new, _ = copy_graph_module(region.graph)
        found = rows_read(new, region.path, planned)
        if missing := planned.keys() - {weight for _, weight in found}:
            raise PassError(self.name, region.path, f"does not read {min(missing)}, which is planned")
        for read, weight in found:
            self._replace(new.graph, read, planned[weight], region)
        erase_unused(new.graph)
        new.recompile()
        new.graph.lint()
        self.ensures(region.path, new, [planned[weight] for _, weight in found])
        return region.with_graph(new)

    def ensures(self, path: str, after: fx.GraphModule, read: Sequence[Lookup]) -> None:
        """Each lookup in `read` goes to the owners of the rows that its ids name, and comes back to where these are.

        Raises:
            PassError: one does not.
        """
        returns = [node for node in after.graph.nodes if op_name(node) == "return_rows"]
        wanted = len(read) if self.mesh.size(Part.ROWS) > 1 else 0
        if len(returns) != wanted:
            raise PassError(self.name, path, f"has {len(returns)} lookups over ranks, planned are {wanted}")
        for node in returns:
            rows, table, places, _, axis = node.args
            asked = rows.args[1]
            ids, places_of = table.args[0].args[0], places.args[0]
            ways = {op_name(table.args[0]), op_name(asked.args[0])}, {asked.args[0], table.args[0]}
            if ways[0] != {"send_ids"} or len(ways[1]) != 1 or ids.args[0] is not places_of or axis != AXIS:
                raise PassError(self.name, path, f"{node.name} returns rows of another lookup")
            if table.args[0].args[1] != places_of.args[1]:
                raise PassError(self.name, path, f"{node.name} is of a table with {places_of.args[1]} rows")

    def _replace(self, graph: fx.Graph, read: Read, lookup: Lookup, region: Region) -> None:
        dtype = region.module.get_parameter(str(read.weight.target)).dtype
        by_rows: dict[str, Argument] = {"by_rows": lookup.by_rows} if lookup.by_rows else {}
        ops, item = torch.ops.moecompile, graph.call_function
        with graph.inserting_before(read.node):
            ids = read.ids
            if read.wraps:  # indices of Python count from the end below zero
                ids = item(torch.where, (item(torch.lt, (ids, 0)), item(torch.add, (ids, lookup.rows)), ids))
            if self.mesh.size(Part.ROWS) == 1:
                out = item(read_rows, (read.weight, ids, read.padding), {"dtype": dtype, **by_rows})
            else:
                unique, places = items(graph, item(ops.unique_ids, (ids, lookup.rows)), "ids_U", "places")
                asked, table = items(graph, item(ops.send_ids, (unique, lookup.rows, AXIS)), "asked_S", "table_2r1")
                rows = item(read_rows, (read.weight, asked, read.padding), by_rows)
                out = item(ops.return_rows, (rows, table, places, dtype, AXIS))
        out.meta.update(read.node.meta)
        read.node.replace_all_uses_with(out)
        graph.erase_node(read.node)


def rules_of(model: nn.Module) -> dict[str, str]:
    """Names of the tables of a compiled model that are stepped by rows, with the rule."""
    found = dict[str, str]()
    for path, graph in model.named_modules():
        for node in graph.graph.nodes if isinstance(graph, fx.GraphModule) else ():
            if op_name(node) == "read_rows" and (rule := node.kwargs.get("by_rows")):
                found[f"{path}.{node.args[0].target}"] = rule
    return found


def row_mesh(mesh: MeshSpec, device_type: str) -> DeviceMesh:
    """The ranks over which rows are spread: all of a stage with different tokens."""
    axes = mesh.axes(Part.ROWS) or axes_that_split(Part.STORED)[:1]
    return kept_groups.device_mesh(device_type, mesh.dims(axes))["_".join(axes)]


def spread_tables(
    model: nn.Module, plan: Plan, mesh: DeviceMesh, param_dtype: torch.dtype | None = None
) -> set[nn.Parameter]:
    """Keeps this rank's rows of every planned table, in place; returns these weights, which FSDP leaves alone.

    Args:
        mesh: from `row_mesh`. param_dtype: the dtype of the rows that are looked up; None: that of the table.

    Raises:
        PlanError: a planned table is not in the model, or has another shape.
    """
    spread = set[nn.Parameter]()
    for lookup in plan.lookups:
        path, _, name = lookup.weight.rpartition(".")
        try:
            owner = model.get_submodule(path)
            whole = owner.get_parameter(name)
        except AttributeError as error:
            rule = "is no weight of the model"
            raise PlanError("lookups", lookup.weight, rule, "Plan again for this model") from error
        if tuple(whole.shape) != (lookup.rows, lookup.width):
            rule = f"has the shape {list(whole.shape)}, planned is {[lookup.rows, lookup.width]}"
            raise PlanError("lookups", lookup.weight, rule, "Plan again for this model")
        own = whole
        if mesh.size() > 1:
            each = rows_of_a_rank(lookup.rows, mesh.size())
            local = whole.detach()[each * mesh.get_local_rank() :][:each].clone()
            rows = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
            )
            own = nn.Parameter(rows, requires_grad=whole.requires_grad)
            setattr(owner, name, own)
        spread.add(own)
        if param_dtype is not None:
            _cast_rows(model, lookup, param_dtype)
    return spread


def _cast_rows(model: nn.Module, lookup: Lookup, dtype: torch.dtype) -> None:
    graph = model.get_submodule(lookup.module)
    assert isinstance(graph, fx.GraphModule)
    for node in graph.graph.nodes:
        if op_name(node) == "return_rows":
            node.args = (*node.args[:3], dtype, node.args[-1])
        elif op_name(node) == "read_rows" and "dtype" in node.kwargs:
            node.kwargs = {**node.kwargs, "dtype": dtype}
    graph.recompile()
