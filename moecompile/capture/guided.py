"""The guided tracer: runs a module's Python once, on proxies that know their values in a recorded call.

Every node is executed when it is created. So Python can read lengths of tuples, dtypes and conditions on shapes, while
the graph keeps them symbolic: sizes are nodes, and the graph asserts every condition that Python branched on.

A proxy cannot observe `is None`. So the module is traced again with proxies in place of plain values. If the graph is
the same except where a plain value was passed on, no branch depends on it and the graph accepts any value. Otherwise
the value is a constant, and the graph asserts it.

Algorithm:
  1. Trace with plain values.
  2. Trace with proxies for all of them; if the graph changes, try each alone.
  3. For each argument that was not None but may be: trace with None. If the graph changes, Python branches on it.
  4. Assert all values that Python branches on.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.fx.proxy import Attribute, TraceError
from torch.nn import functional as F

from moecompile.torch_private import MASK_FUNCTIONS, check

# -- the tracer --------------------------------------------------------------------------------------------------------


PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_REST = "moecompile_rest"  # key that passes the `**kwargs` of a forward to the calls inside
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@contextlib.contextmanager
def _mask_functions_are_calls() -> Iterator[None]:
    """Records calls of torch's mask functions as nodes: they check for tensors, and a proxy is not one."""
    originals = {name: getattr(F, name) for name in MASK_FUNCTIONS}

    def call_of(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            proxy = next((a for a in (*args, *kwargs.values()) if type(a) is Value), None)
            if proxy is None:
                return original(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", original, args, kwargs)

        return call

    for name, original in originals.items():
        setattr(F, name, call_of(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def pass_on(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], rest: dict[str, Any]) -> Any:
    """`module(*args, **kwargs)` in a forward that passes on all its keyword arguments."""
    return module(*args, **{**rest, **named})


class Value(fx.Proxy):
    """A proxy that knows its value in the recorded call."""

    tracer: GuidedTracer

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.tracer.values[self.node], name)
        if callable(attribute):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            raise TraceError("len() of a tensor cannot be traced")
        return len(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class GuidedTracer(fx.Tracer):
    """Traces a module from the arguments of a recorded call.

    Args:
        arguments: by parameter name of forward.
        inlined: paths of the modules whose Python is traced; all others stay calls. None: all but linears and dropouts.
        opaque: names of nodes with a plain value (None, a number, a string) that become proxies anyway. Python sees all
            other plain values among the arguments, and every None, as they are.

    Attributes:
        values: node -> its value. sources: name of a node -> the plain value that Python saw instead of a proxy.
    """

    def __init__(
        self, arguments: Mapping[str, Any], inlined: Collection[str] | None = None, opaque: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.arguments, self.inlined, self.opaque = arguments, inlined, opaque
        self.values: dict[fx.Node, Any] = {}
        self.sources: dict[str, Any] = {}
        self._inputs: set[fx.Node] = set()  # placeholders, and items of their values
        self._running = False

    def trace_calls(self, module: nn.Module) -> fx.Graph:
        """The graph of `module`, without unused reads."""
        with _mask_functions_are_calls():
            graph = self.trace(module)
        for node in reversed(list(graph.nodes)):
            is_read = node.op == "get_attr" or (
                node.op == "call_function" and node.target in (operator.getitem, getattr)
            )
            if is_read and not node.users:
                graph.erase_node(node)
        return graph

    # -- leaf modules and inlined modules ----------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m).forward is nn.Linear.forward or isinstance(m, nn.modules.dropout._DropoutNd):
            return True
        return self.inlined is not None and module_qualified_name not in self.inlined

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A leaf becomes a call; keyword arguments that the root only passes on stay a single argument."""
        if self._running:
            return forward(*args, **kwargs)
        kwargs = dict(kwargs)
        rest, path = kwargs.pop(_REST, None), self.path_of_module(m)
        if rest is None:
            return super().call_module(m, forward, args, kwargs)
        if not self.is_leaf_module(m, path):
            kinds = [parameter.kind for parameter in inspect.signature(m.forward).parameters.values()]
            more = {_REST: rest} if inspect.Parameter.VAR_KEYWORD in kinds else {}
            return super().call_module(m, forward, args, {**kwargs, **more})
        passed = self.values[rest.node]
        named = {key: value for key, value in kwargs.items() if not self._is_passed_on(key, value, rest, passed)}
        read = self.create_node("get_attr", path, (), {})
        return self.create_proxy("call_function", pass_on, (Value(read, self), args, named, rest), {})

    def _is_passed_on(self, key: str, value: Any, rest: Value, passed: Mapping[str, Any]) -> bool:
        if key not in passed:
            return False
        if type(value) is Value:
            return value.node.target is operator.getitem and value.node.args == (rest.node, key)
        return isinstance(value, PLAIN) and value == passed[key]

    # -- the root's arguments ----------------------------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder per parameter."""
        positional: list[Any] = [self.root]
        by_name: dict[str, Any] = {}
        optional = False
        own = inspect.signature(inspect.unwrap(root_fn)).parameters
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            optional |= parameter.default is not parameter.empty
            star = _STARS.get(parameter.kind, "")
            default = None if parameter.default is parameter.empty else parameter.default
            node = self.create_node("placeholder", star + name, (default,) if optional and not star else (), {})
            self._inputs.add(node)
            value = self._set_value(node, self.arguments.get(name, {"*": (), "**": {}}.get(star, default)))
            if star == "**":
                rest = Value(node, self)
                by_name |= {key: self._item(rest, key) for key in value}
                by_name[_REST] = rest
            elif star == "*":
                positional.extend(self._wrap(Value(node, self)))
            elif name not in own and name not in self.arguments:  # an old name: a decorator passes it on as the new
                self.sources[node.name] = value
            elif parameter.kind is parameter.KEYWORD_ONLY:
                by_name[name] = self._wrap(Value(node, self))
            else:
                positional.append(self._wrap(Value(node, self)))
        return lambda *args: root_fn(*args, **by_name), positional

    # -- nodes and their values --------------------------------------------------------------------------------------

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        name: str | None = None, type_expr: Any = None, proxy_factory_fn: Any = None,
    ) -> Any:  # fmt: skip
        """Creates the node and executes it."""
        node_args = tuple(self.create_arg(a) for a in args)
        node = self.create_node(kind, target, node_args, self.create_arg(kwargs), name, type_expr)
        self._set_value(node, self._run(node))
        return self._wrap(Value(node, self))

    def _set_value(self, node: fx.Node, value: Any) -> Any:
        self.values[node] = value
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
        return value

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> Any:
        """Executes reads of attributes too, which may come without a proxy (Python sees buffers as tensors)."""
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "get_attr":
            self._set_value(node, self._run(node))
        return node

    def create_arg(self, a: Any) -> Any:
        """Replaces a tuple of all items of a value, in order, by the value."""
        if type(a) is Value:
            return a.node
        if type(a) is tuple and a and type(a[0]) is Value and a[0].node.target is operator.getitem:
            whole: Any = a[0].node.args[0]
            items = [(item.node.args if type(item) is Value else None) for item in a]
            if items == [(whole, i) for i in range(len(a))] and len(self.values[whole]) == len(a):
                return whole
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Traced code gets proxies for parameters; executed nodes get the parameters."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, node: fx.Node) -> Any:
        args: Any = map_arg(node.args, self.values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.values.__getitem__)
        self._running = True
        try:
            if node.op == "get_attr":
                return reduce(getattr, str(node.target).split("."), self.root)
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self._running = False

    def _wrap(self, value: Value) -> Any:
        """What Python sees for a node: a proxy, a tuple of proxies, or a plain value."""
        node, actual = value.node, self.values[value.node]
        if type(actual) in (tuple, torch.Size):
            return tuple(self._item(value, i) for i in range(len(actual)))
        if (actual is None or (node in self._inputs and isinstance(actual, PLAIN))) and node.name not in self.opaque:
            self.sources[node.name] = actual
            return actual
        return value

    def _item(self, whole: Value, key: Any) -> Any:
        node = self.create_node("call_function", operator.getitem, (whole.node, key), {})
        self._set_value(node, self.values[whole.node][key])
        if whole.node in self._inputs:
            self._inputs.add(node)
        return self._wrap(Value(node, self))

    # -- control flow ------------------------------------------------------------------------------------------------

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The recorded truth value, which the graph asserts."""
        value = self.values[obj.node]
        if isinstance(value, Tensor):
            return super().to_bool(obj)  # raises
        truth = bool(value)
        test = self.create_node("call_function", operator.truth if truth else operator.not_, (obj.node,), {})
        self.values[test] = True
        condition = f"{getattr(obj.node.target, '__name__', obj.node.target)}{obj.node.args}"
        rule = f"{condition} was {truth} when the model was captured"
        self.values[self.create_node("call_function", check, (test, rule), {})] = None
        return truth

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The items of a list; iterating over a tensor cannot be traced."""
        value = self.values[obj.node]
        if isinstance(value, Tensor) or not hasattr(value, "__len__"):
            return super().iter(obj)
        return iter([obj[i] for i in range(len(value))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        """The recorded keys."""
        return iter(list(self.values[obj.node]))


# -- what Python branches on -------------------------------------------------------------------------------------------


def trace_guarded(
    module: nn.Module, arguments: Mapping[str, Any], inlined: Collection[str] | None
) -> tuple[fx.Graph, dict[str, Holds]]:
    """A graph that asserts every plain value that the module's Python branches on, and its assertions on arguments."""
    tracer = GuidedTracer(arguments, inlined)  # Step 1
    graph = tracer.trace_calls(module)
    constants = dict(tracer.sources)
    if constants:  # Step 2
        traced = _same_trace(module, tracer, graph, arguments, set(constants))
        if traced is None:
            passed_on = [name for name in constants if _same_trace(module, tracer, graph, arguments, {name})]
            traced = _same_trace(module, tracer, graph, arguments, passed_on)
        if traced is not None:
            tracer, graph = traced
    needed = _not_optional(module, tracer, graph, arguments)  # Step 3
    asserted: dict[str, Holds] = {}
    for node in list(graph.nodes):  # Step 4
        if node.name in tracer.sources:
            value = tracer.sources[node.name]
            name = str(node.target).strip("*") if node.op == "placeholder" else node.name
            rule = f"{name} was {value} when the model was captured"
            holds = Holds(operator.is_ if value is None else operator.eq, value, rule)
        elif node in needed:
            holds = Holds(operator.is_not, None, f"{node.target} was given when the model was captured")
        else:
            continue
        _assert(graph, node, holds)
        if node.op == "placeholder":
            asserted[str(node.target)] = holds
    return graph, asserted


@dataclass(frozen=True)
class Holds:
    """The assertion `test(argument, value)`; if it fails, the graph raises with the message `rule`."""

    test: Callable[[Any, Any], bool]
    value: Any
    rule: str


_Traced = tuple[GuidedTracer, fx.Graph]


def _same_trace(
    module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any], opaque: Collection[str]
) -> _Traced | None:
    """The trace with proxies for `opaque`, if it gives the same graph."""
    other_tracer = GuidedTracer(arguments, tracer.inlined, opaque)
    try:
        other = other_tracer.trace_calls(module)
    except Exception:  # a proxy does not support what Python does with the value
        return None
    return (other_tracer, other) if _same(graph, tracer, other, other_tracer) else None


def _same(a: fx.Graph, in_a: GuidedTracer, b: fx.Graph, in_b: GuidedTracer) -> bool:
    """Whether two graphs are equal, except for plain values in one that are nodes in the other."""
    partner: dict[fx.Node, fx.Node] = {}
    for x, y in zip(a.nodes, b.nodes, strict=False):
        if (x.op, x.target) != (y.op, y.target):
            return False
        if not _equal((x.args, x.kwargs), (y.args, y.kwargs), partner, in_a.values, in_b.values):
            return False
        partner[x] = y
    return len(a.nodes) == len(b.nodes)


def _equal(
    x: Any, y: Any, partner: Mapping[fx.Node, fx.Node], in_x: Mapping[fx.Node, Any], in_y: Mapping[fx.Node, Any]
) -> bool:
    if isinstance(x, fx.Node) and isinstance(y, fx.Node):
        return partner.get(x) is y
    if isinstance(x, fx.Node) or isinstance(y, fx.Node):
        node, value, values = (x, y, in_x) if isinstance(x, fx.Node) else (y, x, in_y)
        return isinstance(values[node], PLAIN) and type(values[node]) is type(value) and values[node] == value
    if isinstance(x, (tuple, list)) and isinstance(y, (tuple, list)):
        return len(x) == len(y) and all(_equal(i, j, partner, in_x, in_y) for i, j in zip(x, y, strict=True))
    if isinstance(x, dict) and isinstance(y, dict):
        return list(x) == list(y) and all(_equal(x[key], y[key], partner, in_x, in_y) for key in x)
    return type(x) is type(y) and bool(x == y)


def _not_optional(
    module: nn.Module, tracer: GuidedTracer, graph: fx.Graph, arguments: Mapping[str, Any]
) -> list[fx.Node]:
    """Placeholders of arguments that may be None but were not, and whose absence changes the graph."""
    parameters = inspect.signature(module.forward).parameters
    needed = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if arguments.get(name) is None or name not in parameters or parameters[name].default is not None:
            continue
        without = GuidedTracer({**arguments, name: None}, tracer.inlined, tracer.opaque)
        try:
            other = without.trace_calls(module)
        except Exception:  # the module itself fails without it
            continue
        tracer.values[node] = None
        if not _same(graph, tracer, other, without):
            needed.append(node)
        tracer.values[node] = arguments[name]
    return needed


def _assert(graph: fx.Graph, node: fx.Node, holds: Holds) -> None:
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder") if node.op == "placeholder" else node
    with graph.inserting_after(last):
        test = graph.call_function(holds.test, (node, holds.value))
    with graph.inserting_after(test):
        graph.call_function(check, (test, holds.rule))
