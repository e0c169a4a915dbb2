"""A GraphModule that replaces a module in a model and stays what other code expects: an instance of the same class,
with its attributes and with all submodules and tensors that the graph does not use.

Other code reads attributes of a layer, finds layers by their class (to record hidden states, to split a model), and
wraps the forward of every subclass (gradient checkpointing in transformers).
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

from moecompile.torch_private import move_hooks, non_persistent, own_buffers, own_modules, own_parameters


class _Bare:
    """Base class between GraphModule and the original class, whose constructor requires arguments."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]


class Kept:
    """A mixin for GraphModules that keep the class of the original module."""

    def recompile(self) -> Any:
        """Calls __init_subclass__ for the new forward: the original class may wrap the forwards of its subclasses."""
        code = super().recompile()  # type: ignore[misc]
        super(type(self), type(self)).__init_subclass__()
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies plain attributes too; GraphModule copies only its graph and modules."""
        new = super().__deepcopy__(memo)  # type: ignore[misc]
        _copy_attributes(self, new, memo)  # type: ignore[arg-type]
        _same_persistence(self, new)  # type: ignore[arg-type]
        return new


def stand_in(graph_module: fx.GraphModule, module: nn.Module, gone: Collection[str]) -> fx.GraphModule:
    """`graph_module` as an instance of the class of `module`, with all parts of `module` that it lacks.

    Args:
        graph_module: the graph to run. module: the module that it replaces; its parts are shared, not copied.
        gone: paths of the modules and parameters of `module` that the captured graph used. Those that `graph_module`
            does not use any more are left out.
    """
    original: type = type(module)
    if isinstance(module, Kept):
        original = next(base for base in original.__mro__ if not issubclass(base, (fx.GraphModule, Kept, _Bare)))
    elif isinstance(module, fx.GraphModule):
        return graph_module
    new = _class_of(original)(graph_module, graph_module.graph, class_name=original.__name__)
    new.training = module.training
    added = nn.Module()
    for registry in ("_modules", "_parameters", "_buffers"):
        setattr(added, registry, dict(getattr(new, registry)))
        getattr(new, registry).clear()
    _merge(new, added, module, frozenset(gone), "")
    _same_persistence(module, new)
    _copy_attributes(module, new, None)
    return new


@cache
def _class_of(original: type) -> type[fx.GraphModule]:
    """The class of GraphModules that are instances of `original`."""
    bases = (Kept, fx.GraphModule, _Bare, original)
    kept_class: type[fx.GraphModule] = types.new_class(
        original.__name__, bases, exec_body=lambda names: names.update(__module__=original.__module__)
    )
    kept_class.__qualname__ = original.__qualname__
    return kept_class


def _merge(new: nn.Module, added: nn.Module, old: nn.Module, gone: frozenset[str], prefix: str) -> None:
    """Fills `new` with the parts of `added` and those that only `old` has, in the order of `old`."""
    for name, child in old.named_children():
        part = _part(own_modules(added).get(name), child, gone, prefix + name)
        if part is not None:
            new.add_module(name, part)
    for name, child in added.named_children():
        if name not in own_modules(new):
            new.add_module(name, child)
    for name, parameter in {**own_parameters(old), **own_parameters(added)}.items():
        if prefix + name not in gone or name in own_parameters(added):
            new.register_parameter(name, parameter)
    for name, buffer in {**own_buffers(old), **own_buffers(added)}.items():
        if prefix + name not in gone or name in own_buffers(added):
            new.register_buffer(name, buffer)


def _part(added: nn.Module | None, old: nn.Module, gone: frozenset[str], path: str) -> nn.Module | None:
    """The module at `path`, where the original is `old` and the graph has `added`; None if there is none any more."""
    if path in gone:
        return added
    if not any(other.startswith(f"{path}.") for other in gone):
        return old
    shell = shell_of(old)  # fx replaces the parents of used modules by plain modules
    _merge(shell, added or nn.Module(), old, gone, f"{path}.")
    return shell if own_modules(shell) or own_parameters(shell) or own_buffers(shell) else None


def shell_of(module: nn.Module) -> nn.Module:
    """A module of the same class with the same plain attributes, without children, parameters, buffers and hooks."""
    shell = type(module).__new__(type(module))
    nn.Module.__init__(shell)
    shell.training = module.training
    _copy_attributes(module, shell, None)
    return shell


def _same_persistence(old: nn.Module, new: nn.Module) -> None:
    """Keeps non-persistent buffers out of the state dict where fx has copied their owners."""
    owners = dict(old.named_modules())
    for path, module in new.named_modules():
        if path in owners and owners[path] is not module:
            non_persistent(module).update(non_persistent(owners[path]) & set(own_buffers(module)))


def _copy_attributes(old: nn.Module, new: nn.Module, memo: dict[int, Any] | None) -> None:
    """Copies plain attributes that `new` lacks; with a `memo`, deeply."""
    for name, value in vars(old).items():
        if name not in vars(new) and not isinstance(value, Tensor):
            object.__setattr__(new, name, value if memo is None else copy.deepcopy(value, memo))


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists of modules, or of dicts that are used as lists: the layers of a model.

    A list of embeddings, one for each head or codebook, has none.
    """
    for child in model.children():
        if all(isinstance(each, nn.Embedding) for each in child.children()):
            continue
        if isinstance(child, nn.ModuleList) or _is_list(child):
            yield from (layer for layer in child.children() if any(True for _ in layer.parameters()))
        else:
            yield from layers_of(child)


def _is_list(module: nn.Module) -> bool:
    """Whether a dict of modules has layers: several of one class, with parts, none of which has a list of its own.

    Others hold the parts of one layer, the linears of an FFN, or towers. A layer that became a graph has its own class.
    """
    if not isinstance(module, nn.ModuleDict) or type(module).forward is not nn.Module.forward:
        return False
    classes = {type(child) for child in module.values() if not isinstance(child, fx.GraphModule)}
    parts = [list(child.children()) for child in module.values()]
    return (
        len(parts) > 1 and len(classes) < 2 and all(parts)
        and not any(isinstance(part, nn.ModuleList) for each in parts for part in each)
    )  # fmt: skip


def replace_regions(model: nn.Module, regions: Mapping[str, nn.Module]) -> nn.Module:
    """Replaces each region by its new module. If a region is the whole model, returns the new module."""
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
