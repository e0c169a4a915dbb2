"""Measures each distinct MoE layer, forward and backward on one rank, against a dense FFN with the same active FLOPs.

Algorithm:
  1. Group layers that differ only in their position; each group is measured once.
  2. Build the layer with all of its experts on one rank: a dense FFN of the site's form is rewritten by the layer's
     plan; of existing experts only the call is taken, without the model's own router.
  3. Build a dense FFN with the same activation; its width is top-k times that of an expert, plus the shared expert's.
  4. In every round, run both on the same new random input (so with new counts), in alternating order.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from moecompile.bench.measure import Times, kept_bytes, medians, timed
from moecompile.capture import Example, is_meta
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch, activation_module
from moecompile.match.regions import Region
from moecompile.mesh import MeshSpec
from moecompile.nn import Experts, Router, set_random_key
from moecompile.nn.existing import ExistingExperts, MatrixExperts
from moecompile.nn.padding import IDS, Padding, TokenIds
from moecompile.nn.scaled_input import standard_calls
from moecompile.passes.base import experts_calls
from moecompile.passes.run import on_one_device, on_the_mesh, run_passes
from moecompile.pipeline import transform
from moecompile.pipeline.captured import capture_planned
from moecompile.plan import ExpertsSite, FFNSite, LayerPlan, Plan, on_one_process, reductions
from moecompile.schema import Compiled, Config, Precision
from moecompile.torch_private import compile_whole

WEIGHT_STD = 0.02
_VOCABULARY = 2**15
Draw = Callable[[torch.Generator], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The cost of one MoE layer and of the dense FFN. sites: all equal layers. ratio: median over the rounds.

    has_router: whether our router is part of it. tokens: of the input. dense_kept, moe_kept: bytes that forward saves
    for backward, without the weights.
    """

    sites: tuple[str, ...]
    num_experts: int
    d_expert: int
    d_shared: int
    top_k: int
    has_router: bool
    tokens: int
    dense: Times
    moe: Times
    ratio: float
    dense_kept: int
    moe_kept: int

    @property
    def kept_ratio(self) -> float:
        """moe_kept over dense_kept."""
        return self.moe_kept / self.dense_kept


class DenseFFN(nn.Module):
    """up -> activate -> down; gate and up projections are one linear.

    Args:
        site: determines the form. width: of the hidden activation. activate: output of `up` -> hidden activation.
    """

    def __init__(self, site: FFNSite | ExpertsSite, width: int, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(site.d_model, site.num_in_projections * width, bias=site.bias_up)
        self.down, self.activate = nn.Linear(width, site.d_model, bias=site.bias_down), activate

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.down(self.activate(self.up(x)))
        return out


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A layer with its dense counterpart. draw: draws new inputs, of which the first one has a gradient."""

    sites: tuple[str, ...]
    layer: LayerPlan
    dense: nn.Module
    moe: fx.GraphModule
    draw: Draw


def measure_layers(
    model: nn.Module, plan: Plan, config: Config, example: Example, device: torch.device
) -> list[LayerCost]:
    """Measures the layers that `plan` makes from `model`, which is not compiled and is not changed.

    Args:
        example: as for `compile_model`. device: where to run.
    """
    return [_cost(pair, config, device) for pair in layer_pairs(model, plan, config, example, device)]


def layer_pairs(model: nn.Module, plan: Plan, config: Config, example: Example, device: torch.device) -> Iterator[Pair]:
    """One pair for each distinct layer, built lazily."""
    with standard_calls(model, example):
        yield from _pairs(model, plan, config, example, device)


def _pairs(model: nn.Module, plan: Plan, config: Config, example: Example, device: torch.device) -> Iterator[Pair]:
    captured = capture_planned(model, plan, config, example)
    groups: dict[LayerPlan, list[str]] = {}  # Step 1
    for layer in on_one_process(plan).layers:
        groups.setdefault(_without_position(layer), []).append(layer.site.fqn)
    dtype = next(model.parameters()).dtype
    for layer, sites in groups.items():
        region = captured.regions[captured.region_of[sites[0]]]
        match, layer = region.matches[sites[0]], _at(layer, sites[0])
        if isinstance(match, ExpertsMatch):
            dense, moe = _existing(layer, region)
            draw: Draw = partial(_draw_routed, match, config=config, dtype=_narrow(dtype, config))
        else:
            dense, moe = _rewritten(_at(layer, ""), region.graph, match)
            draw = partial(_draw_hidden, layer.site.d_model, config=config, dtype=_narrow(dtype, config))
        for module in (dense, moe):
            _prepare(module, device, dtype, config)
        draw = drawing_ids(moe, draw, (config.data.micro_batch_size, config.data.seq_len), device)
        if config.trainer.compile is Compiled.regions:
            compile_whole(moe)
        yield Pair(sites=tuple(sites), layer=layer, dense=dense, moe=moe, draw=draw)


def _narrow(dtype: torch.dtype, config: Config) -> torch.dtype:
    """The dtype in which layers compute."""
    return torch.bfloat16 if config.trainer.precision is Precision.bf16_params else dtype


def _without_position(layer: LayerPlan) -> LayerPlan:
    return dataclasses.replace(layer, site=dataclasses.replace(layer.site, fqn="", index=0))


def _at(layer: LayerPlan, fqn: str) -> LayerPlan:
    return dataclasses.replace(layer, site=dataclasses.replace(layer.site, fqn=fqn))


# -- Steps 2 and 3 ---------------------------------------------------------------------------------------------------


class _Activation(nn.Module):
    """What is between the linears. parts: number of its inputs. width: set if it needs vectors of a whole FFN."""

    def __init__(self, activation: nn.Module, parts: int, width: int | None) -> None:
        super().__init__()
        self.activation, self.parts, self.width = activation, parts, width

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., parts * F) -> (..., F)."""
        inputs = [hidden]
        if self.parts == 2:
            gate, up = hidden.chunk(2, -1)
            inputs = [gate, up]
        if self.width is not None:
            inputs = [part.unflatten(-1, (-1, self.width)) for part in inputs]
        out: Tensor = self.activation(*inputs)
        return out if self.width is None else out.flatten(-2)


def _rewritten(layer: LayerPlan, graph: fx.GraphModule, match: FFNMatch) -> tuple[nn.Module, fx.GraphModule]:
    """The dense FFN, and the graph that the layer's plan makes from an FFN like the site's."""
    site, parts = layer.site, layer.site.num_in_projections
    activation = activation_module(graph, match)
    source = DenseFFN(site, site.d_ff, _Activation(activation, parts, None))
    mesh = MeshSpec()
    moe = transform(fx.symbolic_trace(source), Plan(mesh=mesh, layers=(layer,), reductions=reductions(mesh)))
    width = site.d_ff if match.whole else None
    return DenseFFN(site, _width(layer), _Activation(copy.deepcopy(activation), parts, width)), moe


def _existing(layer: LayerPlan, region: Region) -> tuple[nn.Module, fx.GraphModule]:
    """The dense FFN, and the rewritten graph of one call of the model's existing experts."""
    steps = (*on_one_device(seed=0), *on_the_mesh())
    moe = copy.deepcopy(run_passes(steps, {region.path: region}, {region.path: [layer]})[region.path].graph)
    (call,) = experts_calls(moe)
    experts = moe.get_submodule(str(call.target))
    assert isinstance(experts, (Experts, ExistingExperts))
    return DenseFFN(layer.site, _width(layer), partial(_activated, experts)), moe


def _activated(experts: Experts | ExistingExperts, hidden: Tensor) -> Tensor:
    """The activation of existing experts, applied to the outputs of their gate and up projections, gate first."""
    out: Tensor
    if isinstance(experts, MatrixExperts):
        gate, up = hidden.chunk(2, -1)
        out = experts.own.get_submodule("activation_fn")(gate) * up
    elif isinstance(experts, ExistingExperts):
        out = experts.gate(hidden) if "gate_up_proj" in experts.names else experts.own.get_submodule("act_fn")(hidden)
    else:
        out = experts.activation(*hidden.chunk(2 if experts.gated else 1, -1))
    return out


def _width(layer: LayerPlan) -> int:
    return layer.routing.top_k * layer.experts.d_expert + layer.experts.d_shared


@torch.no_grad()
def _prepare(module: nn.Module, device: torch.device, dtype: torch.dtype, config: Config) -> None:
    """Moves and casts a module to run it, except routers, which are not cast. Meta parameters get random values."""
    if is_meta(module):
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.normal_(std=WEIGHT_STD)
    for part in module.modules():
        if not isinstance(part, Router):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.to(_narrow(dtype, config))
    module.to(device)


# -- Step 4 ----------------------------------------------------------------------------------------------------------


def _draw_hidden(d_model: int, generator: torch.Generator, *, config: Config, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(B, S, D)."""
    data = config.data
    return (torch.randn(data.micro_batch_size, data.seq_len, d_model, generator=generator).to(dtype),)


def _draw_routed(
    match: ExpertsMatch, generator: torch.Generator, *, config: Config, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Hidden states (T, D), evenly chosen expert ids (T, K) and weights (T, K), in the form of the model's call."""
    (hidden,) = _draw_hidden(match.call.d_model, generator, config=config, dtype=dtype)
    tokens = hidden.shape[0] * hidden.shape[1]
    scores = torch.randn(tokens, match.num_experts + match.num_identity, generator=generator)
    weights, ids = scores.softmax(-1).topk(match.call.top_k)
    if match.call.one_hot:
        ids = nn.functional.one_hot(ids, match.num_experts)
    return hidden.flatten(0, 1) if match.call.is_flat else hidden, ids, weights.to(dtype)


def _cost(pair: Pair, config: Config, device: torch.device) -> LayerCost:
    generator = torch.Generator().manual_seed(config.seed)
    modules, measured = {"dense": pair.dense, "moe": pair.moe}, {"dense": list[Times](), "moe": list[Times]()}
    kept: dict[str, int] = {}
    for i in range(config.bench.warmup + config.bench.rounds):
        inputs = [tensor.to(device) for tensor in pair.draw(generator)]
        direction = torch.randn(inputs[0].shape, generator=generator).to(inputs[0])
        set_random_key(pair.moe, config.seed, i, 0)
        for name in ("dense", "moe") if i % 2 else ("moe", "dense"):
            run = _Run(modules[name], inputs[: 1 if name == "dense" else None], direction, config)
            times = timed(run.both, device)
            if i >= config.bench.warmup:
                measured[name].append(times)
    for name, module in modules.items():
        run = _Run(module, inputs[: 1 if name == "dense" else None], direction, config)
        kept[name] = kept_bytes(run.forward, (*module.parameters(), *module.buffers()))
    pairs = zip(measured["moe"], measured["dense"], strict=True)
    experts, routing = pair.layer.experts, pair.layer.routing
    return LayerCost(
        sites=pair.sites,
        num_experts=experts.num_routed,
        d_expert=experts.d_expert,
        d_shared=experts.d_shared,
        top_k=routing.top_k,
        has_router=isinstance(pair.layer.site, FFNSite),
        tokens=config.data.micro_batch_size * config.data.seq_len,
        dense=medians(measured["dense"]),
        moe=medians(measured["moe"]),
        ratio=statistics.median(moe.decisive_ms / dense.decisive_ms for moe, dense in pairs),
        dense_kept=kept["dense"],
        moe_kept=kept["moe"],
    )


class _Run:
    """One forward, or forward and backward, in the config's precision, without earlier gradients."""

    def __init__(self, module: nn.Module, inputs: list[Tensor], direction: Tensor, config: Config) -> None:
        self.module, self.direction, self.mixed = module, direction, config.trainer.precision is Precision.bf16_mixed
        self.inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
        module.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        """Runs forward and returns the output."""
        with torch.autocast(self.direction.device.type, torch.bfloat16, enabled=self.mixed):
            out: Tensor = self.module(*self.inputs)
        return out

    def both(self) -> None:
        """Runs forward and backward."""
        out = self.forward()
        out.backward(self.direction.to(out.dtype))


def drawing_ids(layer: nn.Module, draw: Draw, shape: tuple[int, int], device: torch.device) -> Draw:
    """`draw`, which also gives `layer` the ids (B, S) of its tokens, if it reads them; they are new in each round."""
    readers = [part for part in layer.modules() if isinstance(part, TokenIds)]
    call = Padding()
    for part in readers:
        part.padding = call

    def drawn(generator: torch.Generator) -> tuple[Tensor, ...]:
        call.now = {IDS: torch.randint(_VOCABULARY, shape, generator=generator).to(device)}
        return draw(generator)

    return drawn if readers else draw
