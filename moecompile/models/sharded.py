"""Fills a sharded model from a folder, or with the initial weights of a config: no rank ever has the whole model.

The model is built, compiled and sharded on the meta device. Then:
  1. Allocate its shards.
  2. Initialize counters to zero, and buffers that are in no checkpoint (rotary frequencies) with the model's own code.
  3. Of each weight, as it is there, copy this rank's rows or experts.
  4. Gather the dense FFN of one upcycled layer at a time, and fill the router, this rank's experts and its part of the
     shared expert and of the projections of a latent width by the same rules as in one process (passes/upcycle.py).
     Experts that are modules of their own become rows of stacks.
  5. Adapters get their first values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from moecompile.errors import ConfigError
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch
from moecompile.models.build import build_empty, build_model, first_weights
from moecompile.models.initial import Keyed, Replayed, materialise
from moecompile.models.pretrained import Pretrained, non_persistent
from moecompile.models.recorded import NotRecorded
from moecompile.models.stored import Stored
from moecompile.nn import Experts, Latent, LatentDown, LatentUp, Router, SharedExperts, meters_of, routers_of
from moecompile.nn.adapters import init_adapters, side_of
from moecompile.nn.losses import keepers_of
from moecompile.nn.own_router import own_routers
from moecompile.nn.placement import expert_orders, global_rows, runs_of
from moecompile.nn.stages import is_here
from moecompile.passes.rewrite import fill_site
from moecompile.passes.rewrite_experts import stacked_rows
from moecompile.pipeline import Compilation
from moecompile.plan import LayerPlan, Plan
from moecompile.schema import Config, ModelDevice, ModelLoad
from moecompile.torch_private import local_block, local_part, own_parameters

_FULL = "Use model.load=full, which needs memory for the whole model on every rank"
_MEMINFO = Path("/proc/meminfo")
SMALL = 64_000_000
"""A model from a config with at most so many numbers is built whole, unless `model.load=sharded`: PyTorch itself needs
as much memory, and step 0 can be compared."""


def loads_sharded(config: Config, world_size: int) -> bool:
    """Whether each rank makes only its shards: with several ranks, or a model on the meta device.

    Raises:
        ConfigError: the model cannot be built.
    """
    model = config.model
    if model.device is ModelDevice.meta:
        return True
    if world_size == 1 or model.load is ModelLoad.full or model.package:
        return False
    if model.pretrained or model.load is ModelLoad.sharded:
        return True
    if model.factory:
        return False
    try:
        structure = build_model(replace(model, device=ModelDevice.meta), config.seed)
    except ConfigError:  # it may need values
        return False
    return sum(parameter.numel() for parameter in structure.parameters()) > SMALL


def structure_of(config: Config) -> nn.Module:
    """The model of ranks that make their shards, on the meta device.

    Raises:
        ConfigError: as for `ShardedImport`.
    """
    if config.model.pretrained:
        return ShardedImport(config).model
    if config.model.factory:
        return build_model(config.model, config.seed)
    return build_model(replace(config.model, device=ModelDevice.meta), config.seed)


class ShardedImport:
    """A model that is filled after it was compiled and sharded.

        importing = ShardedImport(config)
        compiled = compile_with_report(importing.model, config, example=...)
        shard(compiled.model, compiled.plan, device_mesh)
        importing.fill(compiled)

    model: its structure, on the meta device. note: how initial weights are drawn, for the user; None: they are read.

    Raises:
        ConfigError: the folder's weights are not exactly the model's, or the config's model cannot be built.
        NotRecorded: the initial weights cannot be made by shards.
    """

    def __init__(self, config: Config) -> None:
        self.seed = config.seed
        self.weights: Pretrained | Replayed | Keyed
        if config.model.factory:
            raise NotRecorded("model.factory builds it with code of its own")
        if config.model.pretrained:
            stored = Stored(Path(str(config.model.pretrained)))
            self.model = build_empty(config.model, stored.dtype())
            self.weights = Pretrained(stored, self.model)
        else:
            self.model = structure_of(config)
            self.weights = first_weights(config.model, config.seed, self.model)
        self.note = self.weights.note
        named = list(self.model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in reversed(named)}
        self._first = {name: first[id(parameter)] for name, parameter in named}

    @torch.no_grad()
    def fill(self, compiled: Compilation, device: torch.device | str = "cpu") -> None:
        """Fills every shard of `compiled.model`.

        Raises:
            ConfigError: there is no memory for them, or one has no values.
        """
        model = compiled.model
        _check_memory(model, torch.device(device), compiled.plan)
        materialise(model, torch.device(device))  # Step 1
        ours = _init_our_buffers(model)  # Step 2
        if isinstance(self.weights, Pretrained):
            _init_buffers(model, ours)
        sites = [*self._upcycled(compiled), *self._stacked(compiled)]
        filled = {f"{path}.global_load" for path, _ in own_routers(model)}.union(*(site.names for site in sites))
        missing = {
            self._of(name): (name, tensor)
            for name, tensor in self._tensors(model, ours)
            if name not in filled and side_of(name) is None
        }
        orders = expert_orders(model)
        for name in self.weights.names():
            if name in missing:  # Step 3
                target, tensor = missing.pop(name)
                self._copy(name, tensor, orders.get(target))
            for site in sites:  # Step 4
                if name in site.missing:
                    site.take(name, self.weights.whole(name))
                    if not site.missing:
                        site.finish(self.seed)
        if missing:
            name, _ = next(iter(missing.values()))
            raise ConfigError("model.load", "sharded", f"{name} is no weight of the model before it is compiled", _FULL)
        if compiled.plan.adapters is not None:  # Step 5
            init_adapters(model, self.seed)

    @torch.no_grad()
    def stand_in(self, elsewhere: Mapping[str, Tensor] = MappingProxyType({})) -> nn.Module:
        """A copy of the model on the CPU with random weights. Its buffers are its own: code divides by some.

        elsewhere: the memory of these parameters, as it is.
        """
        made = copy.deepcopy(self.model)
        materialise(made, torch.device("cpu"), elsewhere)
        for name, parameter in made.named_parameters():
            if name not in elsewhere:
                parameter.normal_(std=0.02)
        if isinstance(self.weights, Pretrained):
            _init_buffers(made, set())
        buffers, weights = dict(made.named_buffers()), self.weights
        if isinstance(weights, Replayed):  # which would draw all weights to come to a buffer
            with suppress(NotRecorded):
                weights = Keyed(weights.build, self.seed)
        for name in weights.names():
            if name in buffers:
                buffers[name].copy_(weights.whole(name))
        return made

    @torch.no_grad()
    def whole(self, elsewhere: Mapping[str, Tensor] = MappingProxyType({})) -> nn.Module:
        """A copy of the model on the CPU with its weights, read a part at a time; arguments as of `stand_in`."""
        made = self.stand_in(elsewhere)
        tensors = dict(made.named_parameters())
        for name in self.weights.names():
            if name in tensors:
                self._copy(name, tensors[name], None)
        return made

    def _of(self, name: str) -> str:
        """The name before compilation, of tied weights the first one."""
        name = name.replace(".base_layer.", ".")
        return self._first.get(name, name)

    def _tensors(self, model: nn.Module, ours: set[int]) -> Iterator[tuple[str, Tensor]]:
        """What `self.weights` fills, each tied weight once: not the buffers `ours`, nor those that no folder has."""
        yield from model.named_parameters()
        kept = model.state_dict().keys() if isinstance(self.weights, Pretrained) else None
        for name, buffer in model.named_buffers():
            if (kept is None and id(buffer) not in ours) or (kept is not None and name in kept):
                yield name, buffer

    def _copy(self, name: str, tensor: Tensor, order: tuple[int, ...] | None) -> None:
        """Copies this rank's part of a weight."""
        local, within = local_part(tensor), local_block(tensor)[1:]
        for first, held in runs_of(global_rows(tensor, order)) if local.ndim else [(0, range(0))]:
            for rows, part in self.weights.read(name, held, within):
                start = first + rows.start - held.start
                (local[start : start + len(rows)] if local.ndim else local).copy_(part)

    def _upcycled(self, compiled: Compilation) -> Iterator[_Upcycled]:
        """The FFNs that are upcycled, with what replaces them."""
        for path, region in compiled.regions.items():
            ffns = {fqn: match for fqn, match in region.matches.items() if isinstance(match, FFNMatch)}
            layers = [layer for layer in region.ordered(compiled.plan.layers) if layer.site.fqn in ffns]
            if not is_here(compiled.model, path):
                continue
            prefix = f"{path}." if path else ""
            for block, layer in zip(_blocks(compiled.model, path) if layers else (), layers, strict=True):
                match = ffns[layer.site.fqn]
                missing = self._weights_of(match, prefix)
                yield _Upcycled(
                    module=region.graph, match=match, missing=missing, names=block.names, block=block, layer=layer
                )

    def _stacked(self, compiled: Compilation) -> Iterator[_Separate]:
        """The experts of stacks that are modules of their own in the model."""
        for path, region in compiled.regions.items():
            for match in region.matches.values():
                if not isinstance(match, ExpertsMatch) or match.ffn is None or not is_here(compiled.model, path):
                    continue
                stack, prefix = compiled.model.get_submodule(f"{path}.experts"), f"{path}." if path else ""
                assert isinstance(stack, Experts)
                names = {f"{prefix}experts.{name}" for name in stack.state_dict()}
                for number, own in enumerate(match.modules):
                    missing = self._weights_of(match.ffn[1], f"{prefix}{own}.")
                    expert = region.module.get_submodule(own)
                    yield _Separate(
                        module=expert, match=match.ffn[1], missing=missing, names=names, stack=stack, number=number
                    )

    def _weights_of(self, match: FFNMatch, prefix: str) -> dict[str, list[str]]:
        """Weight of the model -> its names in the module of the FFN, whose path is the prefix."""
        linears, found = (*match.ins, match.down), dict[str, list[str]]()
        for name in dict.fromkeys(name for linear in linears for name in (linear.weight, linear.bias) if name):
            found.setdefault(self._of(prefix + name), []).append(name)
        return found


def _check_memory(model: nn.Module, device: torch.device, plan: Plan) -> None:
    """Refuses shards that do not fit into the free memory: a CPU's ranks would be killed without a word.

    Raises:
        ConfigError: they do not.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    needed, ranks = sum(local_part(tensor).nbytes for tensor in tensors), 1
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif _MEMINFO.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())):
        free, ranks = int(found[1]) * 1024, plan.mesh.ranks_per_node
    else:
        return
    if needed * ranks > free:
        free_GiB = free / ranks / 2**30
        rule = f"each rank gets {needed / 2**30:,.1f} GiB of weights, and has {free_GiB:,.1f} GiB of free memory"
        fix = "Use more nodes or a smaller model; task=plan says what a rank needs"
        raise ConfigError("mesh.ranks_per_node", plan.mesh.ranks_per_node, rule, fix)


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


def _init_buffers(model: nn.Module, ours: set[int]) -> None:
    """Initializes buffers that are in no checkpoint, except `ours`.

    Raises:
        ConfigError: the model's code does not initialize one of them.
    """
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


@dataclass(kw_only=True)
class _Site:
    """An FFN of the model whose weights are rearranged. missing: weight of the model -> its names in `module`, until it
    is there. names: the weights that are filled from it, which the model does not have before it is compiled.
    """

    module: nn.Module
    match: FFNMatch
    missing: dict[str, list[str]]
    names: set[str]
    _empty: dict[str, nn.Parameter] = field(default_factory=dict)

    def take(self, weight: str, value: Tensor) -> None:
        """Puts the values of a weight into the module."""
        for name in self.missing.pop(weight):
            self._empty[name] = self.module.get_parameter(name)
            _set(self.module, name, nn.Parameter(value.to(self._empty[name].dtype), requires_grad=False))

    def finish(self, seed: int) -> None:
        """Fills what the weights are for, and drops them."""
        self.fill(seed)
        for name, parameter in self._empty.items():
            _set(self.module, name, parameter)

    def fill(self, seed: int) -> None:
        raise NotImplementedError


@dataclass(kw_only=True)
class _Upcycled(_Site):
    """A dense FFN, and the block that replaces it."""

    block: _Block
    layer: LayerPlan

    def fill(self, seed: int) -> None:
        """Fills the block."""
        assert isinstance(self.module, fx.GraphModule)
        self.block.fill(self.module, self.match, self.layer, seed)


@dataclass(kw_only=True)
class _Separate(_Site):
    """One expert that is a module of its own, and the stack with its rows."""

    stack: Experts
    number: int

    def fill(self, seed: int) -> None:
        """Fills its rows, if this rank has them."""
        orders, rows = expert_orders(self.stack), stacked_rows(self.stack, self.module, self.match)
        for name, parameter in self.stack.named_parameters(recurse=False):
            held = global_rows(parameter, orders.get(name))
            if self.number in held:
                local_part(parameter)[held.index(self.number)].copy_(rows[name][local_block(parameter)[1:]])


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    own_parameters(module.get_submodule(owner))[attribute] = parameter
