"""Traces one region: turns a module into a GraphModule with the same call signature and the same results."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture.guided import Holds, trace_guarded
from moecompile.capture.record import ModuleCall, in_mode, random_state_kept, seed_generators, without_fast_path
from moecompile.errors import CaptureError
from moecompile.torch_private import tree_leaves, tree_map_only


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
    if not _same_gradients(module, graph_module, call):
        raise CaptureError(
            "its traced graph does not have the gradients of the module: a graph holds no torch.no_grad and no "
            "autograd.Function"
        )


def _same_gradients(module: nn.Module, graph_module: fx.GraphModule, call: ModuleCall) -> bool:
    """Whether autograd records the same operations in both; or else, whether it computes the same gradients."""
    for look in (_backward_graph, _gradients):
        try:
            expected = _in_autograd(module, module, call, look)
        except Exception:  # the module itself cannot be trained
            return True
        try:
            got = _in_autograd(graph_module, module, call, look)
        except Exception:  # the graph asserts what is so without gradients alone
            return False
        if len(expected) == len(got) and all(map(_alike, expected, got)):
            return True
    return False


def _in_autograd(
    run: nn.Module, module: nn.Module, call: ModuleCall, look: Callable[[list[Tensor], list[Tensor]], list[Any]]
) -> list[Any]:
    """What `look` says of (outputs, leaves) of a call in training mode. The leaves are the inputs of `run` and the
    trained weights of `module`.
    """
    leaves: list[Tensor] = []

    def watched(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()  # a forward may write into its inputs

    with _quiet(run, training=True), torch.enable_grad():
        args, kwargs = tree_map_only(Tensor, watched, fresh_arguments(call))
        outputs = [leaf for leaf in tree_leaves(run.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return look([out for out in outputs if out.requires_grad], [*leaves, *module.parameters()])


def _backward_graph(outputs: list[Tensor], leaves: list[Tensor]) -> list[Any]:
    """Every node that autograd has recorded, in the order of a walk from the outputs: its name and its edges."""
    numbers, found = {id(leaf): i for i, leaf in enumerate(leaves)}, list[Any]()
    seen: dict[Any, int] = {}
    stack = [out.grad_fn for out in reversed(outputs)]
    while stack:
        node = stack.pop()
        if node in seen:
            found.append(seen[node])
        elif node is None:
            found.append(None)
        else:
            seen[node] = len(seen)
            after = [following for following, _ in node.next_functions]
            leaf = getattr(node, "variable", None)
            found.append((node.name(), len(after), None if leaf is None else numbers.get(id(leaf))))
            stack.extend(reversed(after))
    return found


def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Any]:
    """The gradient of a random sum of the outputs, for every leaf that has one."""
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    if not outputs:
        return [None] * len(trained)
    seed_generators(0)
    seeds = [torch.randn_like(out) for out in outputs]
    return list(torch.autograd.grad(outputs, trained, seeds, allow_unused=True))


def _alike(a: Any, b: Any) -> bool:
    """Equal; for tensors, but for rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.is_meta:
        return _equal(a, b)
    largest = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=torch.finfo(a.dtype).eps ** 0.5 * largest, equal_nan=True)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compares values, or shapes and dtypes on the meta device."""
    return torch.equal(a, b) if not a.is_meta else (a.shape, a.dtype) == (b.shape, b.dtype)


def outputs_of(module: nn.Module, call: ModuleCall, *, training: bool = False) -> list[Tensor]:
    """The tensors that `module` returns for a call, without side effects, from the same random state at every call."""
    args, kwargs = fresh_arguments(call)
    with _quiet(module, training=training):  # not __call__: its hooks move to the graph
        return [leaf for leaf in tree_leaves(module.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
