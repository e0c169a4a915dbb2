"""A GraphModule that takes a module's place in a model, and stays what the code around expects: an instance of its
class, with its attributes, and with everything of it that the graph does not use.

Code around reads attributes of a layer, finds layers by their class (to record hidden states, to split a model), and
wraps the forward of every subclass (gradient checkpointing in transformers).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

from moecompile.torch_private import move_hooks


class _Bare:
    """Stands between GraphModule and the original class, whose constructor wants arguments of its own."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]


class Kept:
    """What a GraphModule that keeps a class does differently from other GraphModules."""

    def recompile(self) -> Any:
        """The original class may wrap the forwards of its subclasses, and this is where a new one comes to be."""
        code = super().recompile()  # type: ignore[misc]
        super(type(self), type(self)).__init_subclass__()
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """GraphModule copies its graph and modules alone."""
        new = super().__deepcopy__(memo)  # type: ignore[misc]
        _copy_attributes(self, new, memo)  # type: ignore[arg-type]
        _same_persistence(self, new)  # type: ignore[arg-type]
        return new


def stand_in(graph_module: fx.GraphModule, module: nn.Module, gone: Collection[str]) -> fx.GraphModule:
    """`graph_module` as an instance of the class of `module`, with all of `module` that it does not have itself.

    Args:
        graph_module: what is to run. module: whose place it takes; its parts are shared, not copied.
        gone: paths of the modules and parameters of `module` that the graph was made from. Those that it does not use
            any more are left out.
    """
    original: type = type(module)
    if isinstance(module, Kept):
        original = next(base for base in original.__mro__ if not issubclass(base, (fx.GraphModule, Kept, _Bare)))
    elif isinstance(module, fx.GraphModule):
        return graph_module
    new = _class_of(original)(graph_module, graph_module.graph, class_name=original.__name__)
    new.training = module.training
    made = nn.Module()
    for tensors in ("_modules", "_parameters", "_buffers"):
        setattr(made, tensors, dict(getattr(new, tensors)))
        getattr(new, tensors).clear()
    _carry(new, made, module, frozenset(gone), "")
    _same_persistence(module, new)
    _copy_attributes(module, new, None)
    return new


@cache
def _class_of(original: type) -> type[fx.GraphModule]:
    """GraphModules that are instances of `original`."""
    bases = (Kept, fx.GraphModule, _Bare, original)
    made: type[fx.GraphModule] = types.new_class(
        original.__name__, bases, exec_body=lambda names: names.update(__module__=original.__module__)
    )
    made.__qualname__ = original.__qualname__
    return made


def _carry(new: nn.Module, made: nn.Module, old: nn.Module, gone: frozenset[str], prefix: str) -> None:
    """Fills `new` with the parts of `made` and, in the order of `old`, with those that only `old` has."""
    for name, child in old.named_children():
        part = _part(made._modules.get(name), child, gone, prefix + name)
        if part is not None:
            new.add_module(name, part)
    for name, added in made.named_children():
        if name not in new._modules:
            new.add_module(name, added)
    for name, parameter in {**old._parameters, **made._parameters}.items():
        if prefix + name not in gone or name in made._parameters:
            new.register_parameter(name, parameter)
    for name, buffer in {**old._buffers, **made._buffers}.items():
        if prefix + name not in gone or name in made._buffers:
            new.register_buffer(name, buffer)


def _part(made: nn.Module | None, old: nn.Module, gone: frozenset[str], path: str) -> nn.Module | None:
    """What stands at `path`, where `old` stood and the graph has `made`; None for nothing."""
    if path in gone:
        return made
    if not any(other.startswith(f"{path}.") for other in gone):
        return old
    shell = shell_of(old)  # fx makes plain modules of what is around the modules that a graph uses
    _carry(shell, made or nn.Module(), old, gone, f"{path}.")
    return shell if shell._modules or shell._parameters or shell._buffers else None


def shell_of(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes, without children, parameters, buffers and hooks."""
    shell = type(module).__new__(type(module))
    nn.Module.__init__(shell)
    shell.training = module.training
    _copy_attributes(module, shell, None)
    return shell


def _same_persistence(old: nn.Module, new: nn.Module) -> None:
    """Buffers that stay out of the state dict do so in the copies that fx has made of their owners."""
    owners = dict(old.named_modules())
    for path, module in new.named_modules():
        if path in owners and owners[path] is not module:
            kept_out = owners[path]._non_persistent_buffers_set & set(module._buffers)
            module._non_persistent_buffers_set.update(kept_out)


def _copy_attributes(old: nn.Module, new: nn.Module, memo: dict[int, Any] | None) -> None:
    """Plain attributes, deeply copied where there is a `memo`."""
    for name, value in vars(old).items():
        if name not in vars(new) and not isinstance(value, Tensor):
            object.__setattr__(new, name, value if memo is None else copy.deepcopy(value, memo))


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost module lists: the layers of a model."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from layers_of(child)


def replace_regions(model: nn.Module, regions: Mapping[str, nn.Module]) -> nn.Module:
    """Puts each region's new module in its place; the model itself is replaced where it is the region."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for fqn, module in regions.items():
        region = model.get_submodule(fqn)
        move_hooks(region, module)
        for path in paths[id(region)]:
            if path == "":
                model = module
            else:
                model.set_submodule(path, module)
    return model


def attributes_of(graph_module: fx.GraphModule) -> set[str]:
    """Paths of the modules and tensors that a graph uses."""
    return {str(node.target) for node in graph_module.graph.nodes if node.op in ("call_module", "get_attr")}
