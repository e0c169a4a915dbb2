"""Traces one region: a module becomes a GraphModule that is called in the same way and computes the same."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from moecompile.capture.record import ModuleCall, in_mode
from moecompile.errors import CaptureError


class _RegionTracer(fx.Tracer):
    """Inlines everything but linears and dropouts; arguments that are no tensors keep their values."""

    def __init__(self, tensor_args: set[str]) -> None:
        super().__init__()
        self.tensor_args = tensor_args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, nn.modules.dropout._DropoutNd))

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Proxies for tensors; other arguments keep their defaults: `if mask is None` takes the recorded branch."""
        positional: list[Any] = [self.root]
        by_name: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value: Any
            if name in self.tensor_args:
                value = self.create_proxy("placeholder", name, (), {})
            else:
                value = self._constant(name, None if parameter.default is parameter.empty else parameter.default)
            if parameter.kind is parameter.KEYWORD_ONLY:
                by_name[name] = value
            else:
                positional.append(value)
        return partial(root_fn, **by_name), positional

    def _constant(self, name: str, value: Any) -> Any:
        """`value` is traced as a constant, and the graph raises when it is called with another one."""
        given = self.create_proxy("placeholder", name, (value,), {})
        same = self.create_proxy("call_function", operator.is_ if value is None else operator.eq, (given, value), {})
        self.create_proxy("call_function", torch._assert, (same, f"{name} was {value} when the model was captured"), {})
        return value


def trace_region(module: nn.Module, call: ModuleCall) -> fx.GraphModule:
    """A GraphModule for `module`, proven equal on the recorded call.

    Args:
        module: the region; its parameters are shared, not copied.
        call: a recorded call; its tensor arguments become placeholders.

    Raises:
        CaptureError: the region's Python depends on values, has arguments that are neither tensors nor None, or its
            graph does not compute the same.
    """
    arguments = _bound_arguments(module, call)
    tracer = _RegionTracer({name for name, value in arguments.items() if isinstance(value, Tensor)})
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise CaptureError(f"cannot be traced: {type(error).__name__}: {error}") from error
    graph_module = fx.GraphModule(module, graph, class_name=type(module).__name__)
    _dropouts_follow_training(graph_module)
    known = set(module.modules())  # shared with the model: their flags are not ours to change
    for new in set(graph_module.modules()) - known:
        new.training = module.training
    _check_equal(module, graph_module, call)
    return graph_module


def trace_again(traced: fx.GraphModule, module: nn.Module, call: ModuleCall) -> fx.GraphModule:
    """The graph of another region over `module`, proven equal on the recorded call.

    Args:
        traced: by `trace_region`, of a module with the same structure. module, call: as there.

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
    _check_equal(module, graph_module, call)
    return graph_module


def _attribute(module: nn.Module, traced: fx.GraphModule, path: str) -> Any:
    """What `path` is in `module`; what tracing has added (a dropout, a constant) is copied."""
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            break
        found = getattr(found, name)
    else:
        return found
    owner, _, name = path.rpartition(".")
    return copy.deepcopy(getattr(traced.get_submodule(owner), name))


def _bound_arguments(module: nn.Module, call: ModuleCall) -> dict[str, Any]:
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    for name, value in bound.arguments.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            value = value or None
        if value is not None and not isinstance(value, Tensor):
            raise CaptureError(f"argument {name} is a {type(value).__name__}; only tensors and None are supported")
    return dict(bound.arguments)


def _dropouts_follow_training(graph_module: fx.GraphModule) -> None:
    """Tracing bakes `self.training` into F.dropout; a Dropout module reads it at run time."""
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        rate = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        name = f"dropout_{len(list(graph_module.children()))}"
        graph_module.add_submodule(name, nn.Dropout(rate))
        with graph_module.graph.inserting_before(node):
            source = node.args[0] if node.args else node.kwargs["input"]
            node.replace_all_uses_with(graph_module.graph.call_module(name, (source,)))
        graph_module.graph.erase_node(node)
    graph_module.recompile()


@torch.no_grad()
def _check_equal(module: nn.Module, graph_module: fx.GraphModule, call: ModuleCall) -> None:
    for training in (False, True):
        wanted, got = (_outputs(m, call, training) for m in (module, graph_module))
        if len(wanted) != len(got) or not all(_equal(a, b) for a, b in zip(wanted, got, strict=True)):
            mode = "training" if training else "evaluation"
            raise CaptureError(f"its traced graph does not compute the same as the module in {mode} mode")


def _equal(a: Tensor, b: Tensor) -> bool:
    """Values on the meta device cannot be compared; shapes can."""
    return torch.equal(a, b) if not a.is_meta else (a.shape, a.dtype) == (b.shape, b.dtype)


def _outputs(module: nn.Module, call: ModuleCall, training: bool) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]), in_mode(module, training=training):
        torch.manual_seed(0)
        return [leaf for leaf in tree_leaves(module(*call.args, **call.kwargs)) if isinstance(leaf, Tensor)]
