"""Reads the linears of a graph, however they are written: modules, F.linear, `x @ W.T`, addmm, some rows of a linear.

Algorithm:
  1. A linear is a call of nn.Linear or F.linear, or a product with a two-dimensional parameter, transposed or not.
  2. A bias that is added to the product, and views that flatten before and unflatten after it, belong to it.
  3. Parts of a linear's output (chunk, split, slices, every second entry) are linears with some of its rows.

`GraphView` holds them, with the other queries that the search for FFNs needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, TypeGuard

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from moecompile.match.pointwise import torch_name

# -- linears -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """One linear in a graph: y = x W^T + b.

    node: computes y. weight, bias: attribute paths. transposed: whether the weight is stored as (d_in, d_out). rows:
    which rows of the stored weight y has (None: all). inner: other nodes that belong to it. reads: views that flatten x
    for it, which other nodes may use too.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    d_in: int
    d_out: int
    transposed: bool = False
    rows: slice | None = None
    inner: tuple[fx.Node, ...] = ()
    reads: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the linear."""
        return (*self.inner, self.node)

    def weight_of(self, root: nn.Module) -> Tensor:
        """(d_out, d_in)"""
        stored: Tensor = attribute(root, self.weight).detach()
        stored = stored.T if self.transposed else stored
        return stored if self.rows is None else stored[self.rows]

    def bias_of(self, root: nn.Module) -> Tensor | None:
        """(d_out,), or None without a bias."""
        if self.bias is None:
            return None
        stored: Tensor = attribute(root, self.bias).detach()
        return stored if self.rows is None else stored[self.rows]


def attribute(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def read_linears(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, Linear]:
    """Output node -> linear, in graph order. Linears with some rows of another one follow it."""
    reader = _Reader(root)
    linears: dict[fx.Node, Linear] = {}
    for node in graph.nodes:
        linear = reader.linear(node)  # Step 1
        # Steps 2 and 3
        linear = reader.some_rows(node, linears) if linear is None else reader.extended(linear)
        if linear is not None:
            linears[linear.node] = linear
    order = {node: i for i, node in enumerate(graph.nodes)}
    return dict(sorted(linears.items(), key=lambda item: order[item[0]]))


class _Reader:
    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def name(self, node: object) -> str:
        return torch_name(node, self.root.get_submodule) if isinstance(node, fx.Node) else ""

    # -- Step 1 --------------------------------------------------------------------------------------------------------

    def linear(self, node: fx.Node) -> Linear | None:
        if node.op == "call_module":
            return self._module(node)
        form = _FORMS.get(self.name(node)) if node.op in ("call_function", "call_method") else None
        return form(self, node) if form else None

    def _module(self, node: fx.Node) -> Linear | None:
        owner: Any = self.root.get_submodule(str(node.target))
        if type(owner).forward is not nn.Linear.forward or is_parametrized(owner):
            return None
        bias = f"{node.target}.bias" if owner.bias is not None else None
        weight = owner.weight.shape
        return Linear(node, node.all_input_nodes[0], f"{node.target}.weight", bias, d_in=weight[1], d_out=weight[0])

    def functional(self, node: fx.Node) -> Linear | None:
        x, weight, bias = _arguments(node, "input", "weight", "bias")
        return self._linear_of(node, x, weight, bias, transposed=False)

    def product(self, node: fx.Node) -> Linear | None:
        x, weight = _arguments(node, "input", "other")
        return self._linear_of(node, x, weight, None, transposed=True)

    def added_product(self, node: fx.Node) -> Linear | None:
        bias, x, weight = _arguments(node, "input", "mat1", "mat2")
        if set(node.kwargs) & {"beta", "alpha"} or len(node.args) > 3 or bias is None:
            return None
        return self._linear_of(node, x, weight, bias, transposed=True)

    def _linear_of(self, node: fx.Node, x: object, weight: object, bias: object, *, transposed: bool) -> Linear | None:
        """transposed: whether the op takes the weight as (d_in, d_out)."""
        inner: tuple[fx.Node, ...] = ()
        if isinstance(weight, fx.Node) and self._is_transpose(weight):
            inner, weight, transposed = (weight,), weight.args[0], not transposed
        if not is_attribute(weight) or not isinstance(x, fx.Node) or not (bias is None or is_attribute(bias)):
            return None
        shape: tuple[int, ...] = tuple(getattr(attribute(self.root, str(weight.target)), "shape", ()))
        if len(shape) != 2:
            return None
        d_in, d_out = shape if transposed else shape[::-1]
        path = None if bias is None else str(bias.target)
        return Linear(node, x, str(weight.target), path, d_in, d_out, transposed=transposed, inner=inner)

    def _is_transpose(self, node: fx.Node) -> bool:
        dims = {"transpose": ((0, 1), (1, 0), (-1, -2), (-2, -1)), "permute": ((1, 0), ((1, 0),))}
        name, rest = self.name(node), tuple(node.args[1:])
        if not node.args or not is_attribute(node.args[0]):
            return False
        return name in ("t", "T", "mT") or rest in dims.get(name, ())

    # -- Step 2 --------------------------------------------------------------------------------------------------------

    def extended(self, linear: Linear) -> Linear:
        """The linear with its bias and the views around it."""
        linear = self._with_bias(linear)
        before = self._flattened(linear.x)
        after = _only_user(linear.node)
        if before is None or after is None or self.name(after) not in ("view", "reshape", "unflatten"):
            return linear
        if after.meta.get("shape") != (*before.meta["shape"][:-1], linear.d_out):
            return linear
        return replace(linear, node=after, x=before, inner=(*linear.inner, linear.node), reads=(linear.x,))

    def _with_bias(self, linear: Linear) -> Linear:
        user = _only_user(linear.node)
        if linear.bias is not None or user is None or self.name(user) != "add" or set(user.kwargs) & {"alpha"}:
            return linear
        other = next((a for a in user.args if a is not linear.node), None)
        if not is_attribute(other) or len(user.args) != 2:
            return linear
        if tuple(getattr(attribute(self.root, str(other.target)), "shape", ())) != (linear.d_out,):
            return linear
        return replace(linear, node=user, bias=str(other.target), inner=(*linear.inner, linear.node))

    def _flattened(self, node: fx.Node) -> fx.Node | None:
        """The node that `node` flattens to two dimensions; None if it does something else."""
        if self.name(node) not in ("view", "reshape", "flatten") or not isinstance(node.args[0], fx.Node):
            return None
        shape, whole = node.meta.get("shape"), node.args[0].meta.get("shape")
        if not shape or not whole or shape != (prod(whole[:-1]), whole[-1]):
            return None
        return node.args[0]

    # -- Step 3 --------------------------------------------------------------------------------------------------------

    def some_rows(self, node: fx.Node, linears: dict[fx.Node, Linear]) -> Linear | None:
        name = self.name(node)
        if name not in ("getitem", "narrow") or not isinstance(node.args[0], fx.Node):
            return None
        source, between = node.args[0], tuple[fx.Node, ...]()
        base = linears.get(source)
        if base is None and source.args:
            base, between = linears.get(source.args[0]), (source,)  # type: ignore[arg-type]
        if base is None or base.rows is not None:
            return None
        if between:
            pieces = _PIECES.get(self.name(source))
            rows = pieces(source, base, node.args[1]) if pieces else None
        else:
            rows = _narrowed(node, base) if name == "narrow" else _sliced(node, base)
        if rows is None:
            return None
        inner = (*base.nodes, *between)
        width = len(range(*rows.indices(base.d_out)))
        return replace(base, node=node, d_out=width, rows=rows, inner=inner)


_FORMS: dict[str, Callable[[_Reader, fx.Node], Linear | None]] = {
    "linear": _Reader.functional,
    "matmul": _Reader.product,
    "mm": _Reader.product,
    "addmm": _Reader.added_product,
}


def is_attribute(value: object) -> TypeGuard[fx.Node]:
    """Whether a value is a node that reads a parameter or buffer."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _arguments(node: fx.Node, *names: str) -> list[object]:
    by_name: dict[str, object] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [by_name.get(name) for name in names]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_last(dim: object, base: Linear) -> bool:
    return dim == -1 or ("shape" in base.node.meta and dim == len(base.node.meta["shape"]) - 1)


def _chunks(node: fx.Node, base: Linear, index: object) -> slice | None:
    """chunk(y, n, dim), tensor_split(y, n, dim)"""
    count = _pieces(node)
    if not isinstance(count, int) or not isinstance(index, int) or not _along_last(node, base) or base.d_out % count:
        return None
    width = base.d_out // count
    return slice(index * width, (index + 1) * width, 1)


def _splits(node: fx.Node, base: Linear, index: object) -> slice | None:
    """split(y, width or widths, dim)"""
    widths = _pieces(node)
    if not isinstance(index, int) or not _along_last(node, base):
        return None
    if isinstance(widths, int):
        return slice(index * widths, min((index + 1) * widths, base.d_out), 1)
    if not isinstance(widths, (list, tuple)):
        return None
    limits = [width for width in widths[: index + 1] if isinstance(width, int)]
    return slice(sum(limits[:index]), sum(limits), 1) if len(limits) == index + 1 else None


def _pieces(node: fx.Node) -> object:
    """The number of pieces, or their widths."""
    keywords = [value for key, value in node.kwargs.items() if key != "dim"]
    return (*node.args[1:], *keywords, None)[0]


def _along_last(node: fx.Node, base: Linear) -> bool:
    return _is_last(node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0), base)


def _viewed(node: fx.Node, base: Linear, index: object) -> slice | None:
    """y.view(..., n, w)[..., i, :] or y.view(..., w, n)[..., i]"""
    whole, shape = base.node.meta.get("shape"), node.meta.get("shape")
    if not whole or not shape or shape[:-2] != whole[:-1] or shape[-1] * shape[-2] != whole[-1]:
        return None
    if not isinstance(index, tuple) or index[0] is not Ellipsis:
        return None
    if len(index) == 3 and isinstance(index[1], int) and index[2] == slice(None):
        return slice(index[1] * shape[-1], (index[1] + 1) * shape[-1], 1)
    if len(index) == 2 and isinstance(index[1], int):
        return slice(index[1], whole[-1], shape[-1])
    return None


_PIECES = {
    "chunk": _chunks, "tensor_split": _chunks, "split": _splits, "split_with_sizes": _splits,
    "view": _viewed, "reshape": _viewed, "unflatten": _viewed,
}  # fmt: skip


def _sliced(node: fx.Node, base: Linear) -> slice | None:
    """y[..., a:b:c], or y[:, ..., :, a:b:c] with one `:` per leading dimension"""
    if node.target is not operator.getitem and getattr(node.target, "__name__", "") != "__getitem__":
        return None
    index = node.args[1]
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    before = list(index[:-1])
    whole = before == [Ellipsis] or (
        all(part == slice(None) for part in before) and len(before) == len(base.node.meta.get("shape", ())) - 1
    )
    limits = (index[-1].start, index[-1].stop, index[-1].step)
    if not whole or not all(limit is None or isinstance(limit, int) for limit in limits):
        return None
    return slice(*index[-1].indices(base.d_out))


def _narrowed(node: fx.Node, base: Linear) -> slice | None:
    """narrow(y, dim, start, length)"""
    dim, start, length = _arguments(node, "input", "dim", "start", "length")[1:]
    if not _is_last(dim, base) or not isinstance(start, int) or not isinstance(length, int):
        return None
    return slice(start, start + length, 1)


# -- a graph and its module --------------------------------------------------------------------------------------------


class GraphView:
    """A graph and the module that its attribute paths refer to (the traced module, or the recorded model)."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root

    @cached_property
    def linears(self) -> dict[fx.Node, Linear]:
        """Every linear of the graph, in graph order, however it is written."""
        return read_linears(self.graph, self.root)

    @cached_property
    def weight_users(self) -> dict[int, list[fx.Node]]:
        """Id of a weight -> the nodes that use it; tied weights share an id."""
        users: dict[int, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                users.setdefault(id(self.tensor(str(node.target))), []).extend(node.users)
            elif node.op == "call_module":
                for parameter in self.module(str(node.target)).parameters():
                    users.setdefault(id(parameter), []).append(node)
        return users

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Node -> position in the graph."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def name(self, node: object) -> str:
        """The torch name of a node's op: `linear`, `gelu`, `layer_norm`; empty for anything else."""
        return torch_name(node, self.module) if isinstance(node, fx.Node) else ""

    def module(self, path: str) -> nn.Module:
        """The submodule at `path`."""
        return self.root.get_submodule(path)

    def tensor(self, path: str) -> object:
        """The attribute at `path`."""
        return attribute(self.root, path)


def common_owner(paths: Sequence[str]) -> str:
    """The longest module path that contains all attribute (or module) paths."""
    parts = [path.split(".")[:-1] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    # The common path of two linears is their parent; of one linear alone it is the linear.
    return ".".join(shared)
