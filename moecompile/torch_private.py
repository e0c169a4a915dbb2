"""All uses of private torch names, so that a torch upgrade has one file to check; and helpers for DTensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, is_dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._library.effects import EffectType
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group, _world
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_param, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, TrainingState
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn import functional as F
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils._triton import has_triton
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachingTorchDispatchMode,
    _VersionWrapper,
    create_selective_checkpoint_contexts,
)  # fmt: skip

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

__all__ = [
    "MASK_FUNCTIONS",
    "OPS",
    "ORDERED",
    "FSDPMeshInfo",
    "HSDPMeshInfo",
    "OpWatcher",
    "ShardPlacementResult",
    "TorchDispatchMode",
    "all_gather_single",
    "apply",
    "backward_number",
    "check",
    "checked_already",
    "compile_whole",
    "device_of",
    "drop_unreduced",
    "fake_group",
    "fake_tensors",
    "fake_values",
    "gathered_bytes",
    "group_of_members",
    "groups_of",
    "has_gradient_hook",
    "has_triton",
    "hooks_of",
    "hooks_of_weights",
    "in_backward",
    "init_process_group",
    "is_fake",
    "keeping",
    "local_block",
    "local_part",
    "memory_of",
    "move_hooks",
    "non_persistent",
    "one_chunk_each",
    "one_mesh_each",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "parameters_of",
    "process_group_by_name",
    "process_group_of",
    "scalar_of",
    "see_attributes",
    "set_attribute",
    "set_timeouts",
    "sum_gradients",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "unflattened",
    "unsafe_view",
    "unwrapped",
    "version_of",
    "watch_resizes",
    "whole_ops",
    "whole_shapes_unseen",
    "without_scores",
    "without_values",
]

OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
"""The types of a registered op in a graph."""
check = torch._assert
unsafe_view = torch.ops.aten._unsafe_view.default
ORDERED = EffectType.ORDERED
"""Of an op that compilers must not move before or after another such op."""
MASK_FUNCTIONS = (F._canonical_mask.__name__, F._none_or_dtype.__name__)
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip

_HOOK_WORDS = {
    "_forward_pre_hooks": "a forward pre-hook", "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook", "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a state-dict hook", "_state_dict_hooks": "a state-dict hook",
    "_load_state_dict_pre_hooks": "a state-dict hook", "_load_state_dict_post_hooks": "a state-dict hook",
}  # fmt: skip


def compile_whole(module: nn.Module) -> None:
    """Compiles the forward of `module` with torch.compile as one graph, in which sizes may depend on values.

    Not `module.compile`, whose graph has hooks too, and what computes a forward again.
    """
    import torch._dynamo  # here, because it loads sympy

    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    module.forward = torch.compile(module.forward, fullgraph=True)


class _AtEnd(torch.autograd.Function):
    """Identity of the roots of a backward."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *roots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        return tuple(root.view_as(root) for root in roots)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        torch.autograd.Variable._execution_engine.queue_callback(ctx.call)
        return None, *grads


def at_end_of_backward(roots: Sequence[torch.Tensor], call: Callable[[], None]) -> list[torch.Tensor]:
    """Roots whose backward calls `call` when all gradients are there, before what others do at its end (FSDP2)."""
    return list(_AtEnd.apply(call, *roots))  # type: ignore[no-untyped-call]


def root_state(model: FSDPModule) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Reads and writes what FSDP2's root and its groups of weights take part in: forward, backward or neither."""
    state = model._get_fsdp_state()

    def read() -> list[TrainingState]:
        return [state._training_state, *(group._training_state for group in groups_of(model))]

    def write(values: list[TrainingState]) -> None:
        state._training_state, *of_groups = values
        for group, value in zip(groups_of(model), of_groups, strict=True):
            group._training_state = value

    return read, write


def dispatch_modes() -> list[TorchDispatchMode]:
    """The modes of this thread, which another one does not have: the outermost first."""
    return list(_get_current_dispatch_mode_stack())


@contextmanager
def under_modes(modes: Sequence[TorchDispatchMode]) -> Iterator[None]:
    """The modes of another thread, which they stay in, in this one."""
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for mode in reversed(modes):
            _pop_mode(getattr(mode, "_mode_key", None))


def in_backward() -> bool:
    """Whether the autograd engine is running: true in backward and in the recomputation of checkpointed regions."""
    return backward_number() != -1


def backward_number() -> int:
    """A number of the backward that the autograd engine is running, unlike that of any other; -1 outside."""
    return int(torch._C._current_graph_task_id())


def _fsdp_params(model: nn.Module) -> Iterator[FSDPParam]:
    """FSDP2's records of the weights that it has gathered at least once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in groups_of(module):
                yield from (param for param in group.fsdp_params if hasattr(param, "_unsharded_param"))


def groups_of(module: FSDPModule) -> list[FSDPParamGroup]:
    """The weights of an FSDP2 module that are gathered together, by their mesh."""
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    only = state._fsdp_param_group  # before torch 2.12
    return only.groups if isinstance(only, _AsOne) else [only] if only else []


def sum_gradients(module: FSDPModule) -> None:
    """FSDP2 sums the gradients of the module's own weights, and divides nothing.

    Of weights that no other rank has, it would make another whole gradient to divide by the factor 1.
    """
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    for group in groups_of(module):
        info = group.mesh_info
        if isinstance(info, FSDPMeshInfo) and not isinstance(info, HSDPMeshInfo) and info.shard_mesh_size == 1:
            group.gradient_divide_factor = None


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own dictionary of its parameters, without those of children; setting an entry checks nothing."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The same for buffers."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The same for children."""
    return module._modules


def without_values(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, with its plain attributes: nothing of it keeps weights alive.

    Hooks, a forward of the instance, and the graph of a GraphModule would: they refer to the module.
    """

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(tensor, device="meta")
        return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made

    new: nn.Module = object.__new__(type(module))
    nn.Module.__init__(new)
    own = {name for name in vars(new) if name != "training"} | {"forward", "_graph"}
    vars(new).update({name: value for name, value in vars(module).items() if name not in own})
    children = module._modules.items()
    vars(new)["_modules"] = {name: None if child is None else without_values(child) for name, child in children}
    for registry in ("_parameters", "_buffers"):
        tensors = vars(module)[registry].items()
        vars(new)[registry] = {name: None if tensor is None else empty(tensor) for name, tensor in tensors}
    return new


def non_persistent(module: nn.Module) -> set[str]:
    """The module's own set of the buffers that are not in its state dict."""
    return module._non_persistent_buffers_set


def apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces every parameter and buffer, also those of FSDP."""
    module._apply(function)


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows with every write in place."""
    return tensor._version


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that optimizers have: always shards, also if `model.parameters()` has gathered weights."""
    shards = {param._unsharded_param: param.sharded_param for param in _fsdp_params(model)}
    return [shards.get(parameter, parameter) for parameter in model.parameters()]


def know_all_sharded(model: FSDPModule) -> None:
    """Lets FSDP2 know the modules inside that are sharded, which it else looks for at the first forward.

    A module that is not there then gathers, frees and reduces as if it was a model of its own. No-op later.
    """
    model._get_fsdp_state()._lazy_init()


def see_attributes(module: FSDPModule) -> None:
    """Lets FSDP2 see tensors that the module returns as attributes of a plain object (`output.logits`).

    It looks into tuples, mappings and dataclasses alone. Backward begins at what it sees: without that, the gradients
    of a model without layers of its own are never summed, and nobody says so.
    """

    def watch(_: nn.Module, args: Any, output: Any) -> None:
        state = module._get_fsdp_state()
        if isinstance(output, (torch.Tensor, tuple, list, dict)) or is_dataclass(output):
            return
        if state._training_state is TrainingState.PRE_BACKWARD:  # a layer that backward computes again
            return
        for value in getattr(output, "__dict__", {}).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                value.register_hook(state._pre_backward)

    cast(nn.Module, module).register_forward_hook(watch)


def drop_unreduced(model: nn.Module) -> None:
    """Drops gradients that FSDP2 has accumulated without reducing them, or without summing them over replicas, which
    zero_grad does not clear.
    """
    for param in _fsdp_params(model):
        param.unsharded_accumulated_grad = param._unsharded_param.grad = None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in groups_of(module):
                group._partial_reduce_output = None


def keeping(kept: Collection[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts for the first and the recomputed forward, which gets the results of the ops `kept` from the first.

    Like torch's selective checkpointing, except that a result that is modified in place later (some routers divide
    their top-k in place) is copied first, so that the recomputed forward gets the original.
    """

    caching, cached = create_selective_checkpoint_contexts(partial(_policy, kept))
    return _CopyOnWrite(kept, caching.storage), cached


def _policy(kept: Collection[Any], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


class _CopyOnWrite(_CachingTorchDispatchMode):
    def __init__(self, kept: Collection[Any], storage: Any) -> None:
        super().__init__(partial(_policy, kept), storage)
        self._kept, self._memory = kept, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self._copy(_written(func, args, kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func in self._kept:
            self._memory.update(memory_of(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out

    def _copy(self, memory: set[int]) -> None:
        if memory.isdisjoint(self._memory):  # nearly always; the storage has an entry for every op
            return

        def copied(kept: Any) -> Any:
            if not isinstance(kept.val, torch.Tensor) or memory_of(kept.val) not in memory:
                return kept
            changed = copy(kept)
            changed.val = kept.val.clone()
            changed.version = changed.val._version
            return changed

        for results in self.storage.values():
            for number, result in results.items() if isinstance(results, dict) else enumerate(results):
                if any(isinstance(leaf, _VersionWrapper) for leaf in tree_leaves(result)):
                    results[number] = tree_map(copied, result)


def _written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """The memory of the tensors that a function writes to."""
    by_name = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    leaves = tree_leaves([by_name.get(name) for name in writes])
    return {memory_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}


def memory_of(tensor: torch.Tensor) -> int:
    """An id of the storage, equal for all views of a tensor."""
    return int(tensor.untyped_storage()._cdata)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a DTensor (of expert weights: this rank's experts); a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_block(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Where this rank's part is in the whole tensor, one slice per dim; `whole[local_block(tensor)]` is this part."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def process_group_by_name(name: str) -> ProcessGroup | None:
    """The process group that c10d registered as `name`, or None."""
    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]  # GroupName is a NewType of str
    except (RuntimeError, ValueError, KeyError):
        return None


def all_gather_single(
    out: torch.Tensor, block: torch.Tensor, group: ProcessGroup, *, async_op: bool = False
) -> dist.Work | None:
    """Gathers the blocks of all ranks into `out`. Before torch 2.13 the function had another name, deprecated there."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return cast("dist.Work | None", gather(out, block, group=group, async_op=async_op))


def reduce_scatter_single(out: torch.Tensor, blocks: torch.Tensor, group: ProcessGroup) -> None:
    """Sums the blocks that all ranks have for this one into `out`. Before torch 2.13, as above."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, blocks, group=group)


def device_of(group: ProcessGroup | None = None) -> torch.device:
    """Where collectives of a group (None: of all ranks) want their tensors: NCCL has none on the CPU."""
    on_gpu = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def fake_tensors() -> FakeTensorMode:
    """A mode with fake tensors and symbolic values, in which code can detect that it is traced."""
    from torch._subclasses import FakeTensorMode  # here, because these load sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it is a tensor of `fake_tensors`, not a real one."""
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)


class OpWatcher(TorchDispatchMode):
    """Calls `watched` for each operation of aten, which runs it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def watched(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.watched(func, tuple(args), dict(kwargs or {}))


@contextmanager
def whole_ops(fill: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Makes constructors run on fake tensors as they do on real ones.

    * `trunc_normal_`, which draws until all is inside its bounds, calls `fill(function, tensor, mean, std, a, b)`.
    * `module.to(dtype)` gives parameters other data, as on real tensors. On fake ones torch swaps the objects, which
      fails for parameters that are referred to weakly.
    """
    init, utils = torch.nn.init, torch.utils
    trunc_normal, swap_tensors = init._no_grad_trunc_normal_, utils.swap_tensors

    def fill_whole(tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: Any = None) -> Any:
        if generator is not None or not is_fake(tensor):
            return trunc_normal(tensor, mean, std, a, b, generator=generator)
        return fill(trunc_normal, tensor, mean, std, a, b)

    def set_data(old: torch.Tensor, new: torch.Tensor) -> None:
        old.data = new

    init._no_grad_trunc_normal_, utils.swap_tensors = fill_whole, set_data
    try:
        yield
    finally:
        init._no_grad_trunc_normal_, utils.swap_tensors = trunc_normal, swap_tensors


def init_process_group(*args: Any, **kwargs: Any) -> None:
    """torch's, of which each call wraps `sys.excepthook` once more: here it is wrapped once in a process."""
    sys.excepthook = unwrapped(sys.excepthook)
    dist.init_process_group(*args, **kwargs)


def unwrapped(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook below those of process groups."""
    while getattr(hook, "__qualname__", "") == "init_process_group.<locals>._distributed_excepthook":
        hook = inspect.getclosurevars(hook).nonlocals["old_hook"]
    return hook


def fake_group(rank: int, world_size: int) -> None:
    """Makes this process, until it ends, rank `rank` of ranks that do not exist: collectives return at once, nothing is
    sent, and objects that another rank would send are this one's.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the back end

    init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    dist.broadcast_object_list = lambda *args, **kwargs: None


class _Chunks(Sequence[torch.Tensor]):
    """What `torch.chunk` makes of a tensor, and empty tensors up to `num`, each of them made when it is asked for."""

    def __init__(self, tensor: torch.Tensor, num: int, dim: int) -> None:
        self.tensor, self.num, self.dim = tensor, num, dim

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.num:
            raise IndexError(i)
        whole = self.tensor.shape[self.dim]
        size = -(-whole // self.num)
        if whole and i * size >= whole:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, i * size, min(size, whole - i * size))


@contextmanager
def one_chunk_each() -> Iterator[None]:
    """FSDP2 makes of each weight the shards of this rank and of the first one, and not those of all ranks."""
    chunk = _fsdp_param._chunk_with_empty
    _fsdp_param._chunk_with_empty = _Chunks  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = chunk


# -- a mesh for each weight, which FSDP2 of torch 2.11 has not ---------------------------------------------------------
#
# From 2.12 on, `shard_placement_fn` may return a `ShardPlacementResult`, a placement and a mesh, and FSDP2 makes of a
# module's weights one group for each mesh. Before, a module has one group and one mesh. Modules inside modules, one for
# each mesh, would not do: gradients of experts may come after those of their rows (ops/collect.py), and only the layer
# around waits for both. So the groups are made here, and a module is given them as one.


@dataclass(frozen=True)
class _ShardPlacementResult:
    """As of torch 2.12."""

    placement: Shard | None
    mesh_info: FSDPMeshInfo


if not TYPE_CHECKING:  # an image of 2.11 may have the name, so it is asked for, not the version
    ShardPlacementResult = getattr(_fsdp_common, "ShardPlacementResult", _ShardPlacementResult)


class _AsOne:
    """Groups of weights that FSDP2 of torch 2.11 takes for one.

    What it calls is called on each in turn, as 2.12 does; hooks around a forward pass on what the former returned. What
    it sets is set on each. What it reads is alike for all, but for the weights and for what one of them has not done.
    """

    def __init__(self, groups: list[FSDPParamGroup]) -> None:
        vars(self)["groups"] = groups

    def __getattr__(self, name: str) -> Any:
        found = [getattr(group, name) for group in self.groups]
        if not callable(found[0]):
            return found[0]
        return lambda *args, **kwargs: [call(*args, **kwargs) for call in found] and None

    def __setattr__(self, name: str, value: Any) -> None:
        for group in self.groups:
            # Set is whether weights are freed after the forward; each group is gathered again over its own mesh.
            own = name == "post_forward_mesh_info" and value is not None
            setattr(group, name, group.mesh_info if own else value)

    @property
    def fsdp_params(self) -> list[FSDPParam]:
        return list(chain.from_iterable(group.fsdp_params for group in self.groups))

    @property
    def is_unsharded(self) -> bool:
        return all(group.is_unsharded for group in self.groups)

    @property
    def _training_state(self) -> TrainingState:
        states: list[TrainingState] = [group._training_state for group in self.groups]
        return next((state for state in states if state != TrainingState.POST_BACKWARD), states[0])

    @_training_state.setter
    def _training_state(self, state: TrainingState) -> None:
        for group in self.groups:
            group._training_state = state

    @contextmanager
    def use_training_state(self, state: TrainingState) -> Iterator[None]:
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.use_training_state(state))
            yield

    def pre_forward(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for group in self.groups:
            args, kwargs = group.pre_forward(module, args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, given: Any, output: Any) -> Any:
        for group in self.groups:
            output = group.post_forward(module, given, output)
        return output

    def post_backward(self) -> None:
        for group in self.groups:
            if group._training_state is not TrainingState.POST_BACKWARD:
                group.post_backward()


@contextmanager
def one_mesh_each() -> Iterator[None]:
    """`fully_shard` takes a placement function that returns a `ShardPlacementResult` for each weight."""
    if hasattr(_fsdp_common, "ShardPlacementResult"):
        yield
        return
    made: Any = _fsdp_param_group.FSDPParamGroup

    def by_mesh(
        params: list[nn.Parameter], modules: Any, mesh_info: Any, post_forward: Any, device: Any,
        place: Callable[[nn.Parameter], ShardPlacementResult], *rest: Any,
    ) -> Any:  # fmt: skip
        of_mesh: dict[int, list[nn.Parameter]] = {}
        infos = {id(info): info for info in (place(param).mesh_info for param in params)}
        for param in params:
            of_mesh.setdefault(id(place(param).mesh_info), []).append(param)
        groups = [
            made(found, modules, infos[key], post_forward and infos[key], device, lambda p: place(p).placement, *rest)
            for key, found in of_mesh.items()
        ]
        return _AsOne(groups)

    _fsdp_param_group.FSDPParamGroup = by_mesh  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        _fsdp_param_group.FSDPParamGroup = made  # type: ignore[misc]


@contextmanager
def checked_already(is_right: Callable[[TensorStorageMetadata], bool]) -> Iterator[None]:
    """Torch DCP does not compare the chunks of an entry with one another if `is_right` says that they tile it."""
    from torch.distributed.checkpoint import default_planner  # here, because a model without a checkpoint needs none
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    validate = default_planner._validate_global_plan

    def of_others(plans: list[SavePlan], metadata: Metadata) -> Any:
        entries = metadata.state_dict_metadata.items()
        others = {
            name: entry for name, entry in entries if not (isinstance(entry, TensorStorageMetadata) and is_right(entry))
        }
        return validate(plans, replace(metadata, state_dict_metadata=others))

    default_planner._validate_global_plan = of_others  # type: ignore[assignment]
    try:
        yield
    finally:
        default_planner._validate_global_plan = validate


def process_group_of(argument: Any) -> ProcessGroup | None:
    """The process group that an argument of an op of c10d stands for; None if it is something else."""
    return ProcessGroup.unbox(argument) if isinstance(argument, torch.ScriptObject) and _is_group(argument) else None


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type()).endswith("ProcessGroup")


def scalar_of(func: Any) -> bool:
    """Whether an op reads the value of a tensor (`.item()`, `bool`, `tolist`)."""
    return func is torch.ops.aten._local_scalar_dense.default


@contextmanager
def watch_resizes(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Calls `seen` with each storage that is resized: FSDP2 frees what it has gathered so, which no op shows."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        seen(storage)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def without_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float, is_causal: bool,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention by the operators of GPUs that keep no matrix of scores, for fake tensors of any device."""
    if mask is None and q.shape[-1] == v.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention.default
        grouped: torch.Tensor = flash(q, k, v, dropout, is_causal, scale=scale)[0]
        return grouped
    if mask is not None and mask.dtype is torch.bool:
        mask = mask.to(q.dtype)  # as torch does for each call
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] < q.shape[1] else x for x in (k, v))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    out: torch.Tensor = efficient(q, k, v, mask, True, dropout, is_causal, scale=scale)[0]
    return out


def gathered_bytes(model: nn.Module, *, at_once: bool) -> int:
    """Bytes of weights that FSDP2 has gathered at most: those of the root and of the largest layer; at_once: of all."""
    sizes = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            params = [param for group in groups_of(module) for param in group.fsdp_params]
            outputs = [out for param in params for out in getattr(param, "all_gather_outputs", ())]
            sizes.append(sum(out.numel() * out.element_size() for out in outputs))
    return sum(sizes) if at_once or not sizes else sizes[0] + max(sizes[1:], default=0)


@contextmanager
def fake_values() -> Iterator[None]:
    """Inside, all tensors have shapes and no values, and sizes are numbers. An op that fails is not logged."""
    from torch._subclasses import FakeTensorMode, fake_tensor  # here, because it loads sympy

    was, fake_tensor.log.disabled = fake_tensor.log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        fake_tensor.log.disabled = was


@contextmanager
def whole_shapes_unseen() -> Iterator[None]:
    """Modes do not see the fake tensors by which DTensor finds out the shapes of whole tensors; they take no memory."""
    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def apart(*args: Any) -> Any:
        with _disable_current_modes():
            return find(*args)

    ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = find  # type: ignore[method-assign]


def unflattened(device_mesh: DeviceMesh, axis: str, sizes: dict[str, int]) -> DeviceMesh:
    """A mesh with `axis` split into the axes `sizes`, the last one varying fastest; creates their process groups."""
    return device_mesh._unflatten(axis, tuple(sizes.values()), tuple(sizes))


def group_of_members(ranks: Sequence[int], *, name: str, purpose: str) -> ProcessGroup:
    """A process group that its members alone make, this rank among them, as `new_group` with local synchronization.

    Args:
        ranks: global ranks. name: the same on all members, and of no other group. torch itself would count the groups
            that a rank is in, which differ where some ranks are in a group that others are not in. purpose: its
            `group_desc`.
    """
    name_of = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        group: ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True, group_desc=purpose)
    finally:
        distributed_c10d._process_group_name = name_of
    return group


def set_timeouts(timeout: timedelta) -> None:
    """Gives every process group of this rank the same timeout; those of a device mesh start with 30 minutes."""
    for group in list(_world.pg_map):
        if dist.get_backend(group) != "fake":
            group.set_timeout(timeout)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves the forward and backward hooks of `old` to `new`; their handles stay valid."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def hooks_of(module: nn.Module) -> list[str]:
    """Hooks of `module` itself in words: on it, on its own parameters, or a forward of the instance.

    Global hooks (torch.nn.modules.module) do not count: they run on every other module too.
    """
    hooks = [words for name, words in _HOOK_WORDS.items() if getattr(module, name)]
    if "forward" in vars(module) and not isinstance(module, torch.fx.GraphModule):
        hooks.append("a forward of its own")
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return list(dict.fromkeys([*hooks, *hooks_of_weights(module, own)]))


def hooks_of_weights(module: nn.Module, names: Collection[str]) -> list[str]:
    """Gradient hooks on those of the module's own parameters that have these names, in words."""
    return [
        f"a gradient hook on its {name}"
        for name, parameter in module.named_parameters(recurse=False)
        if name in names and has_gradient_hook(parameter)
    ]


def has_gradient_hook(parameter: nn.Parameter) -> bool:
    """Whether something is called with the parameter's gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Sets `module.name` so that deep copies have it too, which a GraphModule would drop."""
    setattr(module, name, value)
    if isinstance(module, torch.fx.GraphModule):
        module.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})[name] = value
