"""Traces one region: turns a module into a GraphModule with the same call signature and the same results."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture.guided import Holds, trace_guarded
from moecompile.capture.record import ModuleCall, in_mode, random_state_kept, seed_generators, without_fast_path
from moecompile.errors import CaptureError
from moecompile.torch_private import tree_leaves


def trace_region(module: nn.Module, call: ModuleCall, inlined: Collection[str] | None = None) -> fx.GraphModule:
    """A GraphModule for `module`, proven equal on the recorded call.

    Args:
        module: the region; its parameters are shared, not copied.
        call: a recorded call. Every argument becomes a placeholder; the graph asserts what Python branches on.
        inlined: paths of the modules below the region whose Python is traced; all others stay calls. None: everything
            but linears and dropouts is traced.

    Raises:
        CaptureError: the region's Python depends on tensor values, or its graph does not compute the same.
    """
    if "forward" in vars(module):
        raise CaptureError("it has a forward of its own, beside that of its class, which would be lost")
    args, kwargs = fresh_arguments(call)
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    try:
        with _quiet(module, training=False):
            graph, asserted = trace_guarded(module, arguments, inlined)
    except Exception as error:
        raise CaptureError(f"cannot be traced: {type(error).__name__}: {error}") from error
    graph_module = fx.GraphModule(module, graph, class_name=type(module).__name__)
    graph_module.meta["asserted"] = asserted
    _dropouts_follow_training(graph_module)
    shared = set(module.modules())  # they keep their training flags
    for new in set(graph_module.modules()) - shared:
        new.training = module.training
    _check_equal(module, graph_module, call)
    return graph_module


def trace_again(traced: fx.GraphModule, module: nn.Module, call: ModuleCall) -> fx.GraphModule:
    """Reuses the graph of another region for `module`, proven equal on the recorded call.

    Args:
        traced: result of `trace_region` for a module with the same structure. module, call: as there.

    Raises:
        CaptureError: the graph does not compute the same as `module`.
    """
    graph, root = fx.Graph(), dict[str, Any]()
    graph.output(graph.graph_copy(traced.graph, {}))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            root[str(node.target)] = _attribute(module, traced, str(node.target))
    graph_module = fx.GraphModule(root, graph, class_name=type(module).__name__)
    graph_module.training = module.training
    graph_module.meta["asserted"] = traced.meta["asserted"]
    _check_equal(module, graph_module, call)
    return graph_module


def broken_rule(graph_module: fx.GraphModule, module: nn.Module, call: ModuleCall) -> str | None:
    """The first assertion of a traced graph on its arguments that another call of its module violates."""
    arguments = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    arguments.apply_defaults()
    asserted: dict[str, Holds] = graph_module.meta["asserted"]
    for name, holds in asserted.items():
        if not holds.test(arguments.arguments.get(name), holds.value):
            return holds.rule
    return None


def _attribute(module: nn.Module, traced: fx.GraphModule, path: str) -> Any:
    """The attribute of `module` at `path`; or a copy of an attribute that tracing has added (a dropout, a constant)."""
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            break
        value = getattr(value, name)
    else:
        return value
    owner, _, name = path.rpartition(".")
    return copy.deepcopy(getattr(traced.get_submodule(owner), name))


def fresh_arguments(call: ModuleCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of the arguments, because a forward may modify them in place; the originals if they cannot be copied."""
    try:
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
    except Exception:  # some objects do not support it
        return call.args, call.kwargs
    return args, kwargs


def _dropouts_follow_training(graph_module: fx.GraphModule) -> None:
    """Replaces F.dropout, in which tracing freezes `self.training`, by Dropout modules, which read it at run time."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        name = f"dropout_{len(list(graph_module.children()))}"
        graph_module.add_submodule(name, nn.Dropout(rate))
        with graph_module.graph.inserting_before(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            new = graph_module.graph.call_module(name, (source,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


@contextlib.contextmanager
def _quiet(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Runs `module` without side effects: no gradients, and random state, flags and buffers are restored."""
    with torch.no_grad(), random_state_kept(module), in_mode(module, training=training), without_fast_path():
        seed_generators(0)
        yield


def _check_equal(module: nn.Module, graph_module: fx.GraphModule, call: ModuleCall) -> None:
    for training in (False, True):
        expected, got = (outputs_of(m, call, training=training) for m in (module, graph_module))
        if len(expected) != len(got) or not all(_equal(a, b) for a, b in zip(expected, got, strict=True)):
            mode = "training" if training else "evaluation"
            raise CaptureError(f"its traced graph does not compute the same as the module in {mode} mode")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compares values, or shapes and dtypes on the meta device."""
    return torch.equal(a, b) if not a.is_meta else (a.shape, a.dtype) == (b.shape, b.dtype)


def outputs_of(module: nn.Module, call: ModuleCall, *, training: bool = False) -> list[Tensor]:
    """The tensors that `module` returns for a call, without side effects, from the same random state at every call."""
    args, kwargs = fresh_arguments(call)
    with _quiet(module, training=training):  # not __call__: its hooks move to the graph
        return [leaf for leaf in tree_leaves(module.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
