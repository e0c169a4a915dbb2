"""Lookups of rows that other ranks have: the graph of the module that reads a table, with its exchanges.

    F.embedding(ids, weight)   ->   unique_ids, send_ids, read_rows, return_rows        on several ranks
                                    read_rows                                           on one

The axis is `rows` until `shard` binds it, as that of other exchanges.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.node import Argument

from moecompile import kept_groups
from moecompile.capture import attributes_of, replace_regions, stand_in
from moecompile.errors import PassError, PlanError
from moecompile.match.lookups import Read, rows_read
from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec, Part, axes_that_split
from moecompile.ops.lookups import read_rows, rows_of_a_rank
from moecompile.passes.base import ModelPass, copy_graph_module, erase_unused, items, op_name
from moecompile.plan import Lookup, Plan

AXIS = "rows"


@dataclass(frozen=True, kw_only=True)
class SpreadRows(ModelPass):
    """Replaces each module that reads planned tables by a graph that looks their rows up.

    readers: path of each such module -> its region, as it was captured.
    """

    readers: Mapping[str, Region]
    name: str = "spread_rows"

    def wants(self, plan: Plan) -> bool:
        """If tables are planned; without readers the graphs stay on one device."""
        return bool(plan.lookups and self.readers)

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """Every planned table has a reader."""
        check_readers(plan, self.readers)

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""
        for path in dict.fromkeys(lookup.module for lookup in plan.lookups):
            region = self.readers[path]
            spread = stand_in(_spread(region, plan), region.module, attributes_of(region.graph))
            replace_regions(model, {path: spread})

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Each planned table is looked up. Over ranks, a lookup goes to the owners of the rows that its ids name, and
        comes back to where these are.
        """
        check_read(model, plan)
        for path in {lookup.module for lookup in plan.lookups} if plan.mesh.axes(Part.ROWS) else ():
            _check_ways(path, model.get_submodule(path))


def check_readers(plan: Plan, readers: Container[str]) -> None:
    """Raises PlanError unless the module that reads each planned table is there, and reads it by rows alone."""
    for lookup in plan.lookups:
        if lookup.module not in readers:
            rule = f"is planned to be spread, and {lookup.module} is no module that reads it by rows alone"
            raise PlanError("lookups", lookup.weight, rule, "Plan again for this model")


def check_read(model: nn.Module, plan: Plan) -> None:
    """Raises PassError unless the model looks every planned table up."""
    if unread := [each.weight for each in plan.lookups if each.weight not in tables_of(model)]:
        raise PassError("spread_rows", unread[0], "its rows are planned to be spread, and no graph looks them up")


def tables_of(model: nn.Module) -> dict[str, str]:
    """Names of the tables that the graphs of a compiled model look up -> the rule by which rows are stepped, or ""."""
    graphs = [(path, module) for path, module in model.named_modules() if isinstance(module, fx.GraphModule)]
    reads = [(path, node) for path, graph in graphs for node in graph.graph.nodes if op_name(node) == "read_rows"]
    return {f"{path}.{node.args[0].target}": node.kwargs.get("by_rows", "") for path, node in reads}


def _check_ways(path: str, graph: nn.Module) -> None:
    assert isinstance(graph, fx.GraphModule)
    for node in (each for each in graph.graph.nodes if op_name(each) == "return_rows"):
        rows, table, places, _, axis = node.args
        asked = rows.args[1]
        ids, places_of = table.args[0].args[0], places.args[0]
        ways = {op_name(table.args[0]), op_name(asked.args[0])}, {asked.args[0], table.args[0]}
        if ways[0] != {"send_ids"} or len(ways[1]) != 1 or ids.args[0] is not places_of or axis != AXIS:
            raise PassError("spread_rows", path, f"{node.name} returns rows of another lookup")
        if table.args[0].args[1] != places_of.args[1]:
            raise PassError("spread_rows", path, f"{node.name} is of a table with {places_of.args[1]} rows")


def _spread(region: Region, plan: Plan) -> fx.GraphModule:
    planned = {each.weight: each for each in plan.lookups if each.module == region.path}
    new, _ = copy_graph_module(region.graph)
    for read, weight in rows_read(new, region.path, planned):
        _replace(new.graph, read, planned[weight], region, plan.mesh)
    erase_unused(new.graph)
    new.recompile()
    new.graph.lint()
    return new


def _replace(graph: fx.Graph, read: Read, lookup: Lookup, region: Region, mesh: MeshSpec) -> None:
    dtype = region.module.get_parameter(str(read.weight.target)).dtype
    by_rows: dict[str, Argument] = {"by_rows": lookup.by_rows} if lookup.by_rows else {}
    ops, item = torch.ops.moecompile, graph.call_function
    with graph.inserting_before(read.node):
        ids = read.ids
        if read.wraps:  # indices of Python count from the end below zero
            ids = item(torch.where, (item(torch.lt, (ids, 0)), item(torch.add, (ids, lookup.rows)), ids))
        if mesh.size(Part.ROWS) == 1:
            out = item(read_rows, (read.weight, ids, read.padding), {"dtype": dtype, **by_rows})
        else:
            unique, places = items(graph, item(ops.unique_ids, (ids, lookup.rows)), "ids_U", "places")
            asked, table = items(graph, item(ops.send_ids, (unique, lookup.rows, AXIS)), "asked_S", "table_2r1")
            rows = item(read_rows, (read.weight, asked, read.padding), by_rows)
            out = item(ops.return_rows, (rows, table, places, dtype, AXIS))
    out.meta.update(read.node.meta)
    read.node.replace_all_uses_with(out)
    graph.erase_node(read.node)


def read_here(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that reads rows of the whole table, which only has the shapes: a stage that does not have it runs this."""
    new, _ = copy_graph_module(graph)
    for node in [each for each in new.graph.nodes if op_name(each) == "return_rows"]:
        rows, _, places, dtype, _ = node.args
        weight, _, padding = rows.args
        with new.graph.inserting_before(node):
            ids = places.args[0].args[0]
            node.replace_all_uses_with(new.graph.call_function(read_rows, (weight, ids, padding), {"dtype": dtype}))
        new.graph.erase_node(node)
        new.graph.erase_node(rows)
    erase_unused(new.graph)
    new.recompile()
    return stand_in(new, graph, attributes_of(graph))


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
