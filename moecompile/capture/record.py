"""Records one forward as a dataflow graph of torch functions, without tracing the model's Python."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from moecompile.errors import CaptureError
from moecompile.torch_private import is_fake, tree_leaves, version_of

# -- caches of transformers' models, which their configs switch on and off --------------------------------------------


def cache_configs(model: nn.Module) -> list[Any]:
    """The configs inside `model` that switch caches on and off."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in configs.values() if isinstance(getattr(config, "use_cache", None), bool)]


@contextlib.contextmanager
def caches(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Switches caches on or off in the configs. Off while a model is recorded: replayed calls would fill them."""
    before = [(config, config.use_cache) for config in cache_configs(model)]
    for config, _ in before:
        config.use_cache = on
    try:
        yield
    finally:
        for config, use_cache in before:
            config.use_cache = use_cache


# -- the recording -----------------------------------------------------------------------------------------------------


Example = Mapping[str, Tensor] | tuple[Any, ...] | Tensor


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of a module's first call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


TENSOR = "tensor"
"""What stands for a tensor in the form of a result."""


def form_of(value: Any) -> Any:
    """A result without its tensors: `TENSOR` for each, lists and tuples of forms, None; another type by its name."""
    if isinstance(value, Tensor):
        return TENSOR
    if type(value) in (list, tuple):
        return type(value)(form_of(item) for item in value)
    return None if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


@dataclass
class Recording:
    """One forward of `model`.

    graph: a dataflow graph for matching, not for execution: one node per torch function call; `meta["owner"]` is the
    path of the module that made the call, and `meta["same"]`, if the result is the unchanged first argument, its node;
    parameters are `get_attr` nodes. calls: first call of every module that ran. runs: how often each of them ran. read,
    made: the nodes of the tensors in the arguments and in the result of the first call; None for a tensor that no node
    stands for. forms: that result, see `form_of`.
    """

    model: nn.Module
    example: Example
    graph: fx.Graph
    calls: dict[str, ModuleCall] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    read: dict[str, list[fx.Node | None]] = field(default_factory=dict)
    made: dict[str, list[fx.Node | None]] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)


def record(
    model: nn.Module, example: Example, *, opaque: Callable[[nn.Module], bool] = lambda module: False
) -> Recording:
    """Runs `model` once on `example` (evaluation mode, no gradients) and records the forward.

    Training flags, random state, parameters and buffers are restored.

    Args:
        example: keyword tensors, a tuple of positional arguments, or one tensor.
        opaque: modules that cannot run on the meta device because they depend on values; they return an empty tensor
            like their first argument there.

    Raises:
        CaptureError: the model cannot be run on the example.
    """
    recording = Recording(model, example, fx.Graph())
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    mode = _Recorder(recording.graph, {id(t): name for name, t in _tensors(model)})
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(_watched(module, names[module], recording, mode))
            if is_meta(module) and opaque(module):
                stack.enter_context(_not_run(module))
        stack.enter_context(undisturbed(model))
        if is_meta(model):
            stack.enter_context(_masks_without_values())
        try:
            with mode:
                call_with(model, example)
        except Exception as error:
            raise CaptureError(f"the model cannot be run on the example: {type(error).__name__}: {error}") from error
    return recording


def call_with(model: nn.Module, example: Example) -> Any:
    """Calls `model` on an example in any of its three forms."""
    if isinstance(example, Tensor):
        return model(example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example)


class _Recorder(TorchFunctionMode):
    """Adds one node per torch function call."""

    def __init__(self, graph: fx.Graph, names: dict[int, str]) -> None:
        super().__init__()
        self.graph, self.names = graph, names
        self.nodes: dict[int, fx.Node] = {}
        self.keep: list[Tensor] = []  # ids stay unique only while the tensors live
        self.owners: list[str] = [""]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [self._convert(a) for a in args]
        named = {key: self._convert(value) for key, value in kwargs.items()}
        given = args[0] if args and isinstance(args[0], Tensor) else None
        before = None if given is None else version_of(given)
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func.__name__ == "__setitem__":  # an in-place write gives its target a new node
            outputs = [args[0]]
        if not outputs:
            return out
        node = self.graph.create_node("call_function", func, tuple(inputs), named)
        node.meta["owner"], node.meta["shape"] = self.owners[-1], tuple(outputs[0].shape)
        node.meta["dtype"] = outputs[0].dtype
        if given is not None and out is given and version_of(given) == before:  # a cast to the dtype that it has
            node.meta["same"] = inputs[0]
        for i, tensor in enumerate(outputs):
            self._bind(tensor, node if len(outputs) == 1 else self._item(node, i, tensor))
        return out

    def nodes_of(self, values: Any) -> list[fx.Node | None]:
        """The node of every tensor in `values`."""
        return [self.nodes.get(id(leaf)) for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

    def _item(self, node: fx.Node, index: int, tensor: Tensor) -> fx.Node:
        item = self.graph.create_node("call_function", operator.getitem, (node, index))
        item.meta["owner"], item.meta["shape"] = self.owners[-1], tuple(tensor.shape)
        return item

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.keep.append(tensor)
        self.nodes[id(tensor)] = node

    def _convert(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._convert(item) for item in value)
        if isinstance(value, slice):
            return slice(self._convert(value.start), self._convert(value.stop), self._convert(value.step))
        return value if isinstance(value, (int, float, bool, str, EllipsisType)) else None

    def _node(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self.nodes:
            name = self.names.get(id(tensor))
            if name is None:
                node = self.graph.placeholder(f"input_{len(self.nodes)}")
            else:
                node = self.graph.create_node("get_attr", name)
            node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
            self._bind(tensor, node)
        return self.nodes[id(tensor)]


@contextlib.contextmanager
def _watched(module: nn.Module, names: list[str], recording: Recording, mode: _Recorder) -> Iterator[None]:
    """Records the first call of `module` and makes it the owner of the nodes inside.

    A module with several names (an activation that all layers share) goes by its name below the caller.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caller = mode.owners[-1]
        name = next((name for name in names if name.startswith(f"{caller}.")), names[0])
        recording.calls.setdefault(name, ModuleCall(args, dict(kwargs)))
        recording.runs[name] += 1
        recording.read.setdefault(name, mode.nodes_of((args, kwargs)))
        mode.owners.append(name)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = mode.owners.pop()
        recording.made.setdefault(name, mode.nodes_of(output))
        recording.forms.setdefault(name, form_of(output))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _not_run(module: nn.Module) -> Iterator[None]:
    """Calls of `module` return an empty tensor like their first argument."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return torch.empty_like(first)

    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def is_meta(module: nn.Module) -> bool:
    """Whether `module` is on the meta device."""
    return next((parameter.is_meta for parameter in module.parameters()), False)


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode. Restores training flags and buffers (statistics, counters) at the end."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, value in buffers:
            with torch.no_grad():
                buffer.copy_(value)
            setattr(module, name, buffer)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A forward as it is recorded: evaluation mode, no gradients, no caches, no fused layers, random state restored."""
    with (
        in_mode(model, training=False), caches(model, on=False), without_fast_path(), torch.no_grad(),
        random_state_kept(model),
    ):  # fmt: skip
        yield


def random_state_kept(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Restores at the end the random states of the CPU and of the GPUs that hold `model`."""
    devices = {tensor.device.index for _, tensor in _tensors(model) if tensor.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices))


def seed_generators(seed: int) -> None:
    """Seeds the generators that are in use: of the CPU, and of CUDA.

    `torch.manual_seed` also keeps a formatted stack for each kind of accelerator that may be initialized later, which
    takes milliseconds a call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def calls_with_caches(recording: Recording, paths: Collection[str]) -> dict[str, ModuleCall]:
    """First calls of the modules at `paths` in a forward with caches, as in `generate`; empty if the model has none."""
    model = recording.model
    if is_meta(model) or not cache_configs(model):
        return {}
    cached = Recording(model, recording.example, fx.Graph())
    mode = _Recorder(cached.graph, {})
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(_watched(model.get_submodule(path), [path], cached, mode))
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(caches(model, on=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(random_state_kept(model))
        call_with(model, recording.example)
    return cached.calls


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Turns off the fast path of torch's attention and encoder layers, a fused op in evaluation mode, FFN included."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _masks_without_values() -> Iterator[None]:
    """Makes transformers believe that it is traced; otherwise its masks depend on values, which meta tensors lack."""
    masks = sys.modules.get("transformers.masking_utils")
    is_tracing = getattr(masks, "is_tracing", None)
    if masks is None or is_tracing is None:
        yield
        return
    masks.is_tracing = lambda *_, **__: True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.is_tracing = is_tracing  # type: ignore[attr-defined]


@contextlib.contextmanager
def one_sequence_in_a_row() -> Iterator[None]:
    """Keeps transformers from looking whether rows have several sequences, which is said by values."""
    masks = sys.modules.get("transformers.masking_utils")
    looks = getattr(masks, "find_packed_sequence_indices", None)
    if masks is None or looks is None:
        yield
        return

    def find(position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if position_ids.is_meta or is_fake(position_ids) else looks(position_ids, *args, **kwargs)

    masks.find_packed_sequence_indices = find  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = looks  # type: ignore[attr-defined]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
