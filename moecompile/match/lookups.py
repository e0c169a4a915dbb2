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

from moecompile.capture import Recording, broken_rule, calls_with_caches, trace_region
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
    reads = {read.node for read in reads_of(recording.graph)}
    whole = {
        of_name.get(str(node.target)) for node in recording.graph.nodes
        if node.op == "get_attr" and not reads.issuperset(node.users)
    }  # fmt: skip
    for read in reads_of(recording.graph):
        weight = of_name.get(str(read.weight.target))
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():  # Step 1
            continue
        lookup = FoundLookup(
            weight=names[weight][0], module=str(read.node.meta["owner"]), rows=weight.shape[0], width=weight.shape[1],
            computed=_is_computed(read.ids), ids=prod(read.node.meta["shape"][:-1]), is_used_whole=weight in whole,
        )  # fmt: skip
        earlier = found.get(lookup.weight)
        reason = read.refused or _why_not(read, names[weight], recording)
        if earlier is not None:
            both = earlier.computed or lookup.computed
            lookup = replace(earlier, computed=both, ids=earlier.ids + lookup.ids, reads=earlier.reads + 1)
        found[lookup.weight] = replace(lookup, refused=lookup.refused or reason)
    return list(found.values())


def reads_of(graph: fx.Graph) -> Iterator[Read]:
    """The nodes of a recorded or traced graph that read rows of an attribute (step 1)."""
    for node in graph.nodes:
        read = _read_of(node)
        if read is not None and read.weight.op == "get_attr":
            yield read


def _read_of(node: fx.Node) -> Read | None:
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    form = _FORMS.get(name.strip("_"))
    if form is None or node.op not in ("call_function", "call_method"):
        return None
    if node.target is torch.embedding:  # has the table first
        form = _FORMS["torch.embedding"]
    given = {**dict(zip(form.names, node.args, strict=False)), **node.kwargs}
    weight, ids = given.pop(form.weight, None), given.pop(form.ids, None)
    if not (isinstance(weight, fx.Node) and isinstance(ids, fx.Node)):
        return None
    return form.read(Read(node=node, weight=weight, ids=ids), given)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A function that may read rows. names: of its arguments, of which two are the table and the ids. read: what it
    reads, with its other arguments.
    """

    names: tuple[str, ...]
    weight: str
    ids: str
    read: Callable[[Read, dict[str, Any]], Read | None]


def _embedding(read: Read, given: dict[str, Any]) -> Read:
    reason = "its rows are renormalized when they are read (max_norm)" if given.get("max_norm") is not None else ""
    reason = reason or "its gradient is scaled by frequency" * bool(given.get("scale_grad_by_freq"))
    reason = reason or "its gradient is sparse already (sparse=True)" * bool(given.get("sparse"))
    padding = given.get("padding_idx")
    if padding is None:
        return replace(read, refused=reason)
    return replace(read, padding=padding % int(read.weight.meta["shape"][0]), refused=reason)


def _plain_embedding(read: Read, given: dict[str, Any]) -> Read:
    return replace(read, refused="torch.embedding has options" * bool(given))


def _index_select(read: Read, given: dict[str, Any]) -> Read | None:
    return read if given == {"dim": 0} else None


def _getitem(read: Read, given: dict[str, Any]) -> Read | None:
    return replace(read, wraps=True) if _is_by_rows(read.node, read.weight, read.ids) else None


_FORMS = {
    "embedding": _Form(
        names=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        weight="weight", ids="input", read=_embedding,
    ),
    "torch.embedding": _Form(
        names=("weight", "indices", "padding_idx"), weight="weight", ids="indices", read=_plain_embedding
    ),
    "index_select": _Form(names=("input", "dim", "index"), weight="input", ids="index", read=_index_select),
    "getitem": _Form(names=("table", "index"), weight="table", ids="index", read=_getitem),
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
        CaptureError: its Python cannot be traced, does something else with a cache, or it holds or is in one of
            `regions`.
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
    cached = calls_with_caches(recording, [path]) if graph.meta.get("asserted") else {}
    if path in cached and (rule := broken_rule(graph, module, cached[path])):
        raise CaptureError(f"its Python does something else with a cache: {rule}")
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
