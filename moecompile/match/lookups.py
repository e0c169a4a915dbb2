"""Finds lookups in embedding tables by dataflow: which weight is read by rows, and whether its ids are computed.

Algorithm, on the recorded forward:
  1. A lookup reads rows of a two-dimensional parameter by integers: `F.embedding`, `index_select`, `table[ids]`.
  2. Its ids are given if they are an input, a constant or a range that was at most viewed, cut or cast; else they are
     computed of an input: hashes of n-grams (Engram, PLE), or ids with some replaced.
  3. All that reads the weight must be lookups of one module, whose Python is traced as that of FFNs is. Else the table
     is refused, with the reason: tied to an output head, used whole, renormalized while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from moecompile.capture import Recording, trace_region
from moecompile.errors import CaptureError
from moecompile.match.regions import FoundLookup, Region

_VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "permute", "transpose"),
        *("getitem", "__getitem__", "narrow", "select", "slice", "contiguous", "clone", "detach"),
        *("to", "long", "int", "type_as"),
    )
)
"""Functions after which ids are still those that they were."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A node that reads rows. ids: of which. padding: a row without a gradient, -1: none. wraps: whether negative ids
    count from the end.
    """

    node: fx.Node
    weight: fx.Node
    ids: fx.Node
    padding: int = -1
    wraps: bool = False
    refused: str = ""


def find_lookups(recording: Recording) -> list[FoundLookup]:
    """The tables of a model, in the order of their first lookups."""
    model, found = recording.model, dict[str, FoundLookup]()
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    of_name = {name: parameter for parameter, mine in names.items() for name in mine}
    for read in reads_of(recording.graph):
        weight = of_name.get(str(read.weight.target))
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():  # Step 1
            continue
        lookup = FoundLookup(
            weight=names[weight][0], module=str(read.node.meta["owner"]), rows=weight.shape[0], width=weight.shape[1],
            computed=_is_computed(read.ids), ids=prod(read.node.meta["shape"][:-1]),
        )  # fmt: skip
        earlier = found.get(lookup.weight)
        reason = read.refused or _why_not(read, names[weight], recording)
        if earlier is not None:
            both = earlier.computed or lookup.computed
            lookup = replace(earlier, computed=both, ids=earlier.ids + lookup.ids)
        found[lookup.weight] = replace(lookup, refused=lookup.refused or reason)
    return list(found.values())


def reads_of(graph: fx.Graph) -> Iterator[Read]:
    """The nodes of a recorded or traced graph that read rows of an attribute (step 1)."""
    for node in graph.nodes:
        read = _read_of(node)
        if read is not None and isinstance(read.ids, fx.Node) and read.weight.op == "get_attr":
            yield read


def _read_of(node: fx.Node) -> Read | None:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    known = _READERS.get(name.strip("_"))
    if known is None or node.op not in ("call_function", "call_method"):
        return None
    return known(node, *node.args, **node.kwargs)


def _embedding(
    node: fx.Node, input: Any, weight: Any = None, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Read | None:  # fmt: skip
    if node.target is torch.embedding:  # has the table first, and other options
        return _plain_embedding(node)
    if not (isinstance(input, fx.Node) and isinstance(weight, fx.Node)):
        return None
    reason = "its rows are renormalized when they are read (max_norm)" if max_norm is not None else ""
    reason = reason or "its gradient is scaled by frequency" * scale_grad_by_freq
    reason = reason or "its gradient is sparse already (sparse=True)" * sparse
    padding = -1 if padding_idx is None else padding_idx
    if padding < -1 or (padding == -1 and padding_idx is not None):
        padding += int(weight.meta["shape"][0])
    return Read(node=node, weight=weight, ids=input, padding=padding, refused=reason)


def _plain_embedding(node: fx.Node) -> Read | None:
    weight, ids = node.args[:2]
    if not (isinstance(ids, fx.Node) and isinstance(weight, fx.Node)):
        return None
    has_options = len(node.args) > 2 or bool(node.kwargs)
    return Read(node=node, weight=weight, ids=ids, refused="torch.embedding has options" * has_options)


def _index_select(node: fx.Node, weight: Any, dim: Any, index: Any) -> Read | None:
    if dim != 0 or not (isinstance(index, fx.Node) and isinstance(weight, fx.Node)):
        return None
    return Read(node=node, weight=weight, ids=index)


def _getitem(node: fx.Node, weight: Any, index: Any) -> Read | None:
    if not (isinstance(index, fx.Node) and isinstance(weight, fx.Node) and _is_by_rows(node, weight, index)):
        return None
    return Read(node=node, weight=weight, ids=index, wraps=True)


_READERS: dict[str, Callable[..., Read | None]] = {
    "embedding": _embedding, "index_select": _index_select, "getitem": _getitem,
}  # fmt: skip


def _is_by_rows(node: fx.Node, weight: fx.Node, ids: fx.Node) -> bool:
    """Whether indexing reads a row for each entry: a mask would read those that it has."""
    shapes = [each.meta.get("shape") for each in (weight, ids, node)]
    table, index, out = shapes
    if table is None or index is None or out is None or len(table) != 2:
        return False
    return tuple(out) == (*index, table[1]) and ids.meta.get("dtype") not in (torch.bool, torch.uint8)


def _is_computed(ids: fx.Node) -> bool:
    """Step 2."""
    node = ids
    while node.op in ("call_function", "call_method"):
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name not in _VIEWS or not node.all_input_nodes:
            return _has_input(node)
        node = node.all_input_nodes[0]
    return False


def _has_input(node: fx.Node) -> bool:
    """Whether it depends on what the model is given."""
    seen, pending = {node}, [node]
    while pending:
        each = pending.pop()
        if each.op == "placeholder":
            return True
        new = [other for other in each.all_input_nodes if other not in seen]
        seen.update(new)
        pending += new
    return False


def _why_not(read: Read, names: list[str], recording: Recording) -> str:
    """Step 3."""
    owner = str(read.node.meta["owner"])
    if len(names) > 1:
        return f"it is also {names[1]}"
    lookups = {each.node: each for each in reads_of(recording.graph) if each.weight is read.weight}
    for user in read.weight.users:
        if user not in lookups:
            return (
                f"{user.meta['owner'] or 'the model'} uses it whole ({getattr(user.target, '__name__', user.target)})"
            )
        if user.meta["owner"] != owner:
            return f"{owner or 'the model'} and {user.meta['owner'] or 'the model'} both read it"
    if owner not in recording.calls or not owner:
        return f"{owner or 'the model itself'} is not called as a module of the model"
    holder = names[0].rpartition(".")[0]
    if holder != owner and not holder.startswith(f"{owner}."):
        return f"{owner} reads it, and it is a weight of {holder or 'the model'}"
    return ""


def region_of(lookup: FoundLookup, recording: Recording, regions: Container[str] = ()) -> Region:
    """The traced module that reads a table.

    Args:
        regions: paths of the modules that become graphs for another reason.

    Raises:
        CaptureError: its Python cannot be traced, has hooks that would be lost, or holds or is in one of `regions`.
    """
    path, module = lookup.module, recording.model.get_submodule(lookup.module)
    inside = [f"{path}.{name}" for name, _ in module.named_modules() if name]
    parents = [path[:i] for i, letter in enumerate(path) if letter == "."]
    if nested := next((other for other in (path, *parents, *inside) if other in regions), None):
        raise CaptureError(f"{path} holds it, and {nested} becomes another graph")
    graph = trace_region(module, recording.calls[path], frozenset())
    reads = [read for read in reads_of(graph.graph) if f"{path}.{read.weight.target}" == lookup.weight]
    nodes = {read.node for read in reads}
    others = [user for read in reads for user in read.weight.users if user not in nodes and not _is_size(user)]
    if not reads or others:
        raise CaptureError("its traced graph does not read it by rows alone")
    return Region(path=path, graph=graph, module=module, matches={})


def _is_size(user: fx.Node) -> bool:
    """Whether a node reads a size, which is that of the whole table on every rank."""
    return (user.target is getattr and user.args[1] in ("shape", "ndim", "dtype", "device")) or (
        user.op == "call_method" and user.target in ("size", "dim", "numel")
    )


def rows_read(graph: fx.GraphModule, path: str, weights: Mapping[str, object]) -> list[tuple[Read, str]]:
    """The lookups of a traced module at `path` in these weights, with the name of the weight in the model."""
    named = [(read, f"{path}.{read.weight.target}") for read in reads_of(graph.graph)]
    return [(read, name) for read, name in named if name in weights]
