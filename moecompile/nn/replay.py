"""Router replay: records which experts every token chose, and makes routers choose them again.

Only the choice is replayed. Routing weights are computed from the live scores of the chosen experts, so gradients reach
the router, and so do its scale and normalization.

    our routers           `Router.choose` returns the ids
    a model's own router  its call of `torch.topk` returns them, with its live scores at these ids

Legend: T tokens, L layers, K top-k, E experts, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moecompile.errors import ArgumentError, MoecompileError
from moecompile.mesh import Part, axes_that_split
from moecompile.nn.chosen import replayed_or_live
from moecompile.nn.context import positions_of
from moecompile.nn.existing import ExistingMeter
from moecompile.nn.meter import LoadMeter
from moecompile.nn.router import Router
from moecompile.torch_private import in_backward

NOT_RECORDED = -1
"""In place of an expert id: this token chooses for itself."""


@dataclass(frozen=True)
class ReplayLayer:
    """One MoE layer: path of its router (of its experts, if the router is the model's own), sizes."""

    path: str
    num_experts: int
    top_k: int


@dataclass
class Routes:
    """What forwards chose, in their order. ids: layer -> a tensor (T, K) for each forward, int64, before drops."""

    layers: list[ReplayLayer]
    ids: dict[str, list[Tensor]] = field(default_factory=dict)

    def stacked(self, forward: int = 0) -> Tensor:
        """One forward's choices as (T, L, K), as serving systems return them.

        Raises:
            MoecompileError: there is no such forward, or the layers' top-k or numbers of tokens differ.
        """
        recorded = min((len(self.ids[layer.path]) for layer in self.layers), default=0)
        if not -recorded <= forward < recorded:
            raise MoecompileError(
                f"forward {forward} is not recorded: there are {recorded}, in {len(self.layers)} layers"
            )
        chosen = [self.ids[layer.path][forward] for layer in self.layers]
        if len({ids.shape for ids in chosen}) > 1:
            raise MoecompileError(f"layers differ in tokens or top-k: {[tuple(ids.shape) for ids in chosen]}")
        return torch.stack(chosen, dim=1)


def replay_layers(model: nn.Module) -> list[ReplayLayer]:
    """The MoE layers of a compiled model, in model order.

    Raises:
        MoecompileError: experts choose tokens in a layer, it ignores its router (`routing.workload`), or this rank has
            a part of every sequence.
    """
    if positions_of(model) is not None:
        axis = axes_that_split(Part.SEQUENCE)[0]
        rule = f"routes are of whole sequences, and mesh.{axis} gives a rank a part of them"
        raise MoecompileError(f"{rule}. Use mesh.{axis}=1")
    return [_layer(path, module) for path, module in _routed(model)]


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Records the choices of all forwards inside, except those that are computed again in backward.

    `with record_routes(model) as routes:` gives them layer by layer as `routes.ids`, and stacked, (T, L, K), by
    `routes.stacked()`.

    Padding and assignments that a model's own router drops are `NOT_RECORDED`.
    """
    routes = Routes(replay_layers(model))
    with ExitStack() as stack:
        for path, module in _routed(model):
            chosen = routes.ids.setdefault(path, [])
            stack.enter_context(_recording(module, chosen))
        yield routes


@contextmanager
def replay_routes(model: nn.Module, ids: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
    """Every forward inside chooses these experts, also when it is computed again in backward.

    Args:
        ids: (T, L, K) or (B, S, L, K), any integer type, of this rank's tokens and of all layers; or layer -> (T, K),
            or (B, S, K), of which a forward with shorter sequences uses the first columns. A negative id, or one that
            is no expert, stands for a token that chooses for itself.

    Raises:
        ArgumentError: shapes do not fit the model.
        MoecompileError: a layer cannot be replayed.
    """
    by_layer = _by_layer(replay_layers(model), ids)
    with ExitStack() as stack:
        for path, module in _routed(model):
            stack.enter_context(_replaying(model, path, module, by_layer[path]))
        yield


def _by_layer(layers: Sequence[ReplayLayer], ids: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(ids, Tensor):
        flat = ids.flatten(0, 1) if ids.dim() == 4 else ids
        if flat.dim() != 3 or flat.shape[1] != len(layers):
            raise ArgumentError(
                "ids", tuple(ids.shape), f"must be (tokens, {len(layers)} layers, top-k) or have two dims for tokens",
                f"Give the layers in this order: {', '.join(layer.path for layer in layers)}",
            )  # fmt: skip
        ids = {layer.path: flat[:, i] for i, layer in enumerate(layers)}
    for layer in layers:
        if layer.path not in ids:
            raise ArgumentError("ids", list(ids), f"has no entry for {layer.path}", "Give the ids of every layer")
        if ids[layer.path].dim() not in (2, 3) or ids[layer.path].shape[-1] != layer.top_k:
            shape = tuple(ids[layer.path].shape)
            raise ArgumentError("ids", shape, f"must be (tokens, {layer.top_k}) for {layer.path}", "Give its top-k ids")
        if (dtype := ids[layer.path].dtype).is_floating_point or dtype is torch.bool:
            raise ArgumentError("ids", dtype, f"must be whole numbers for {layer.path}", "Give ids of experts")
    return dict(ids)


def _routed(model: nn.Module) -> Iterator[tuple[str, Router | ExistingMeter]]:
    """Our routers, and the meters behind the model's own ones."""
    for path, module in model.named_modules():
        if isinstance(module, Router):
            yield path, module
        elif isinstance(module, ExistingMeter):
            experts = path.rpartition(".")[0]
            if hasattr(model.get_submodule(experts), "identity_experts"):
                raise MoecompileError(f"{experts} cannot be recorded or replayed: it has experts without weights")
            yield experts, module


def _layer(path: str, module: Router | ExistingMeter) -> ReplayLayer:
    if isinstance(module, ExistingMeter):
        return ReplayLayer(path, module.num_experts, module.top_k)
    config = module.config
    if config.choice == "expert" or config.workload != "none":
        why = "experts choose tokens" if config.choice == "expert" else f"routing.workload={config.workload} chooses"
        raise MoecompileError(f"{path} cannot be recorded or replayed: {why} there")
    return ReplayLayer(path, module.num_experts, config.top_k)


@contextmanager
def _recording(module: Router | ExistingMeter, chosen: list[Tensor]) -> Iterator[None]:
    def record(ids_TK: Tensor) -> None:
        if not in_backward():
            chosen.append(ids_TK.detach().masked_fill(ids_TK >= module.num_experts, NOT_RECORDED))

    if isinstance(module, Router):
        module.on_choice = record
        try:
            yield
        finally:
            module.on_choice = None
    else:
        handle = module.register_forward_pre_hook(lambda _, args: record(args[0]))
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _replaying(model: nn.Module, path: str, module: Router | ExistingMeter, ids_TK: Tensor) -> Iterator[None]:
    if isinstance(module, Router):
        module.replayed = ids_TK
        try:
            yield
        finally:
            module.replayed = None
        return
    block = model.get_submodule(path.rpartition(".")[0])
    with ExitStack() as stack:
        hooks = _InBlock(path, module, ids_TK)
        for handle in (
            block.register_forward_pre_hook(hooks.start),
            module.register_forward_pre_hook(hooks.check),
            block.register_forward_hook(hooks.end, always_call=True),
        ):
            stack.callback(handle.remove)
        yield


class _InBlock:
    """Replays in the block of a model's own router, between the block's start and its experts."""

    def __init__(self, path: str, meter: LoadMeter, ids_TK: Tensor) -> None:
        self.path, self.meter, self.ids = path, meter, ids_TK
        self.modes: list[_TopK] = []

    def start(self, *_: Any) -> None:
        mode = _TopK(self.ids, self.meter.num_experts)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self.modes.append(mode)

    def check(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """The experts get the ids that were replayed, from one call of topk."""
        mode = self.modes[-1]
        if len(mode.replaced) != 1 or not _same(args[0], mode.replaced[0], self.meter.num_experts):
            calls = f"{len(mode.replaced)} calls of torch.topk choose {mode.ids.shape[-1]} of {mode.num_experts}"
            raise MoecompileError(f"{self.path}: routes cannot be replayed through the model's own router: {calls}")

    def end(self, *_: Any) -> None:
        self.modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _same(ids_TK: Tensor, replayed_TK: Tensor, num_experts: int) -> bool:
    """Whether the experts get these ids, whatever the router drops (padding)."""
    return bool(((ids_TK == replayed_TK) | (ids_TK >= num_experts)).all())


class _TopK(TorchFunctionMode):
    """`topk` over the experts returns the ids to replay, and the live values there."""

    def __init__(self, ids_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self.ids, self.num_experts = ids_TK, num_experts
        self.replaced: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return out
        scores, top_k = args[0] if args else (kwargs or {})["input"], self.ids.shape[-1]
        if scores.shape[-1] != self.num_experts or out.indices.shape[-1] != top_k:
            return out
        ids_TK = replayed_or_live(self.ids, out.indices.reshape(-1, top_k), self.num_experts)
        self.replaced.append(ids_TK)
        ids = ids_TK.view_as(out.indices)
        return torch.return_types.topk((scores.gather(-1, ids), ids))
