"""Fills a sharded model from a folder: each rank reads only its shards, and no rank ever has the whole model.

The model is built, compiled and sharded on the meta device. Then:
  1. Allocate its shards.
  2. Initialize buffers that are in no checkpoint (rotary frequencies) with the model's own code, and counters to zero.
  3. Read unchanged weights and existing experts, by rows or experts.
  4. Read the dense FFN of one upcycled layer at a time, and fill the router, this rank's experts and its part of the
     shared expert and of the projections of a latent width by the same rules as in one process (passes/upcycle.py).
     Adapters get their first values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.errors import ConfigError
from moecompile.match.ffn import FFNMatch
from moecompile.match.regions import Region
from moecompile.mesh import Part
from moecompile.models.build import build_empty
from moecompile.models.pretrained import Pretrained, non_persistent
from moecompile.models.stored import Stored
from moecompile.nn import Experts, Latent, LatentDown, LatentUp, Router, SharedExperts, meters_of, routers_of
from moecompile.nn.adapters import init_adapters, side_of
from moecompile.nn.losses import keepers_of
from moecompile.nn.own_router import own_routers
from moecompile.nn.placement import expert_orders, global_rows, runs_of
from moecompile.passes.rewrite import fill_site
from moecompile.pipeline import Compilation
from moecompile.plan import ExpertsSite, LayerPlan, Plan
from moecompile.schema import Config, ModelLoad
from moecompile.torch_private import apply, local_block, local_part, own_parameters

_FULL = "Use model.load=full, which needs memory for the whole model on every rank"


def loads_sharded(config: Config, world_size: int) -> bool:
    """Whether each rank reads only its shards: with several ranks and a pretrained model."""
    return world_size > 1 and bool(config.model.pretrained) and config.model.load is ModelLoad.sharded


class ShardedImport:
    """A pretrained model that is filled after it was compiled and sharded.

        importing = ShardedImport(config)
        compiled = compile_with_report(importing.model, config, example=...)
        shard(compiled.model, compiled.plan, device_mesh)
        importing.fill(compiled)

    model: its structure, on the meta device.

    Raises:
        ConfigError: the folder's weights are not exactly the model's.
    """

    def __init__(self, config: Config) -> None:
        self.seed = config.seed
        stored = Stored(Path(str(config.model.pretrained)))
        self.model = build_empty(config.model, stored.dtype())
        self.weights = Pretrained(stored, self.model)

    def why_not(self, plan: Plan) -> str | None:
        """Why a model with this plan cannot be filled; None if it can."""
        if plan.mesh.axes(Part.WEIGHTS):
            return f"{plan.mesh.setting(Part.WEIGHTS)} splits weights by columns too, and files are read by rows"
        sites = [layer.site for layer in plan.layers if isinstance(layer.site, ExpertsSite)]
        return next((f"each expert of {site.fqn} is a module" for site in sites if site.form == "modules"), None)

    @torch.no_grad()
    def fill(self, compiled: Compilation, device: torch.device | str = "cpu") -> None:
        """Fills every shard of `compiled.model`.

        Raises:
            ConfigError: experts or buffers that sharded loading does not support.
        """
        model = compiled.model
        if why := self.why_not(compiled.plan):
            raise ConfigError("model.load", "sharded", why, _FULL)
        _materialise(model, torch.device(device))  # Step 1
        _init_buffers(model)  # Step 2
        upcycled = {f"{path}.global_load" for path, _ in own_routers(model)}
        for path, region in compiled.regions.items():
            ffns = {fqn: match for fqn, match in region.matches.items() if isinstance(match, FFNMatch)}
            layers = [layer for layer in region.ordered(compiled.plan.layers) if layer.site.fqn in ffns]
            with _dense_values(region, ffns.values(), self.weights):  # Step 4
                for block, layer in zip(_blocks(model, path) if layers else (), layers, strict=True):
                    block.fill(region.graph, ffns[layer.site.fqn], layer, self.seed)
                    upcycled |= block.names
        orders = expert_orders(model)
        for name, tensor in _unique(model):  # Step 3
            if name not in upcycled and side_of(name) is None:
                local, within = local_part(tensor), local_block(tensor)[1:]
                for first, held in runs_of(global_rows(tensor, orders.get(name))) if local.ndim else [(0, range(0))]:
                    for rows, part in self.weights.read(name.replace(".base_layer.", "."), held, within):
                        start = first + rows.start - held.start
                        (local[start : start + len(rows)] if local.ndim else local).copy_(part)
        if compiled.plan.adapters is not None:
            init_adapters(model, self.seed)


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Allocates tensors that are on the meta device and moves all others to `device`. Tied weights stay tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def real(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if local_part(tensor).is_meta else tensor.to(device)

    apply(model, real)  # FSDP2 sees the new shards through its own
    for first, *others in names.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            own_parameters(model.get_submodule(owner))[attribute] = model.get_parameter(first)


def _init_our_buffers(model: nn.Module) -> set[int]:
    """Initializes correction biases, loads and counters; returns the ids of those that are in no checkpoint."""
    for _, router in routers_of(model):
        router.correction_bias.zero_()
    for _, keeper in keepers_of(model):
        if keeper.global_load is not None:
            keeper.global_load.fill_(1 / keeper.global_load.numel())
    counters = [buffer for _, meter in meters_of(model) for buffer in meter.buffers()]
    for counter in counters:
        counter.zero_()
    return {id(counter) for counter in counters}


def _init_buffers(model: nn.Module) -> None:
    """Initializes buffers that are in no checkpoint.

    Raises:
        ConfigError: the model's code does not initialize one of them.
    """
    ours = _init_our_buffers(model)
    owner: Any = model
    for path, module in model.named_modules():
        owner = module if hasattr(module, "_init_weights") else owner
        buffers = {name: buffer for name, buffer in non_persistent(module).items() if id(buffer) not in ours}
        if not buffers:
            continue
        for buffer in buffers.values():
            buffer.fill_(_unset(buffer))
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # transformers leaves these alone
        with torch.random.fork_rng(devices=[]):
            owner._init_weights(module)
        for name, buffer in buffers.items():
            if bool((buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer)).any()):
                raise ConfigError("model.load", "sharded", f"the buffer {path}.{name} is in no checkpoint", _FULL)


def _unset(buffer: Tensor) -> float | int:
    """A value that marks an uninitialized buffer."""
    if buffer.is_floating_point():
        return float("nan")
    return 0 if buffer.dtype == torch.bool else torch.iinfo(buffer.dtype).min


@dataclass(frozen=True)
class _Block:
    """The modules that replace a dense FFN. names: their weights in the model, which are in no checkpoint."""

    router: Router
    experts: Experts
    shared: SharedExperts | None
    latent: Latent | None
    names: set[str]

    def fill(self, dense: fx.GraphModule, match: FFNMatch, layer: LayerPlan, seed: int) -> None:
        """Fills the router and whole experts of this rank in place, and copies its part of what is made in full."""
        orders, own = expert_orders(self.experts), dict(self.experts.named_parameters(recurse=False))
        rows = {name: global_rows(parameter, orders.get(name)) for name, parameter in own.items()}
        held = max(rows.values(), key=len)  # of a stack that is cut within experts, a rank has a part of each
        in_place = all(local_part(p).shape == (len(held), *p.shape[1:]) for p in own.values())
        experts = _held_experts(self.experts, len(held), in_place=in_place)
        shared = None if self.shared is None else _whole(self.shared)
        latent = None if self.latent is None else _whole_latent(self.latent)
        fill_site(self.router, experts, shared, dense, match, layer, seed, held, latent)
        for name, parameter in () if in_place else own.items():
            first = held.index(rows[name][0]) if rows[name] else 0
            made = experts.get_parameter(name)[first : first + len(rows[name])]
            local_part(parameter).copy_(made[:, *local_block(parameter)[1:]])
        pairs = [(self.shared, shared), *zip(self.latent or (), latent or (), strict=True)]
        for part, whole in pairs:
            for name, parameter in () if part is None else part.named_parameters():
                assert whole is not None
                local_part(parameter).copy_(whole.get_parameter(name)[local_block(parameter)])


def _held_experts(experts: Experts, count: int, *, in_place: bool) -> Experts:
    """`count` uninitialized experts, or this rank's shards as the weights of so many."""
    held = Experts(
        experts.d_model, experts.d_expert, count, gated=experts.gated, activation=experts.activation,
        bias_up=getattr(experts, f"{experts.in_name}_bias") is not None, bias_down=experts.down_proj_bias is not None,
        device="meta" if in_place else local_part(experts.down_proj).device, dtype=experts.down_proj.dtype,
    )  # fmt: skip
    for name, parameter in experts.named_parameters(recurse=False) if in_place else ():
        held.register_parameter(name, nn.Parameter(local_part(parameter), requires_grad=False))
    return held


def _whole(shared: SharedExperts) -> SharedExperts:
    """An uninitialized full shared expert like the sharded one."""
    up, down = shared.up_proj, shared.down_proj
    return SharedExperts(
        down.weight.shape[0], up.weight.shape[0], gated=shared.gate_proj is not None, activation=shared.activation,
        bias_up=up.bias is not None, bias_down=down.bias is not None, gate=shared.gate_weight is not None,
        device=local_part(up.weight).device, dtype=up.weight.dtype,
    )  # fmt: skip


def _whole_latent(latent: Latent) -> Latent:
    """Uninitialized full projections like the sharded ones."""
    d_latent, d_model = latent.down.weight.shape
    where: dict[str, Any] = {"device": local_part(latent.down.weight).device, "dtype": latent.down.weight.dtype}
    up = LatentUp(d_model, d_latent, norm=latent.up.norm_weight is not None, **where)
    return Latent(LatentDown(d_model, d_latent, **where), up)


_PARTS = (Router, Experts, SharedExperts, LatentDown, LatentUp)


def _blocks(model: nn.Module, path: str) -> Iterator[_Block]:
    """The blocks of a region in graph order; each starts with a router."""
    region = model.get_submodule(path)
    assert isinstance(region, fx.GraphModule)
    called = dict.fromkeys(str(node.target) for node in region.graph.nodes if node.op == "call_module")
    parts = [(name, region.get_submodule(name)) for name in called]
    starts = [i for i, (_, module) in enumerate(parts) if isinstance(module, Router)]
    for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
        block = [(name, part) for name, part in parts[start:end] if isinstance(part, _PARTS)]
        prefix = f"{path}." if path else ""
        names = {f"{prefix}{name}.{key}" for name, module in block for key in module.state_dict()}
        (router,) = (module for _, module in block if isinstance(module, Router))
        (experts,) = (module for _, module in block if isinstance(module, Experts))
        shared = next((module for _, module in block if isinstance(module, SharedExperts)), None)
        down = next((module for _, module in block if isinstance(module, LatentDown)), None)
        up = next((module for _, module in block if isinstance(module, LatentUp)), None)
        latent = None if down is None or up is None else Latent(down, up)
        yield _Block(router, experts, shared, latent, names)


@contextmanager
def _dense_values(region: Region, ffns: Iterable[FFNMatch], weights: Pretrained) -> Iterator[None]:
    """Loads the weights of the captured FFNs of a region, and drops them at the end."""
    linears = [linear for match in ffns for linear in (*match.ins, match.down)]
    used = {name for linear in linears for name in (linear.weight, linear.bias) if name}
    empty = {name: region.graph.get_parameter(name) for name in used}
    prefix = f"{region.path}." if region.path else ""
    try:
        for name, parameter in empty.items():
            value = weights.whole(prefix + name).to(parameter.dtype)
            _set(region.graph, name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name, parameter in empty.items():
            _set(region.graph, name, parameter)


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    own_parameters(module.get_submodule(owner))[attribute] = parameter


def _unique(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each tied one once."""
    yield from model.named_parameters()
    kept = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
