"""The job to verify: a few optimizer steps of the user's config, prepared the same way for one process and N ranks.

    weights   experts, routers and adapters are independently random: with equal experts, a router's gradient is only
              rounding. No two entries are equal (entries.py)
    batches   real text; numbers of targets differ between micro-batches; of several steps, one rank has none in step 0
    noise     dropout and jitter are off
    replay    with `routing.replay`, both sides replay experts that are drawn at random in step 0: each in its own way

Legend: V vocabulary, B sequences of a micro-batch, S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from moecompile.errors import ConfigError, MoecompileError
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.nn import Experts, Router, routers_of, set_random_key
from moecompile.nn.adapters import side_of
from moecompile.nn.replay import replay_layers, replay_routes
from moecompile.pipeline import compile_model, make_plan
from moecompile.plan import Plan
from moecompile.runtime.data import IGNORED
from moecompile.runtime.module import LanguageModule
from moecompile.schema import Config, accumulation_steps, mesh_spec
from moecompile.torch_private import in_backward
from moecompile.verify.diagnosis import Axes
from moecompile.verify.dropout import without_dropout
from moecompile.verify.entries import Places, make_distinct

_EXPERT_STD, _ROUTER_STD = 0.1, 0.5
Batch = dict[str, Tensor]


@dataclass(kw_only=True)
class Trace:
    """The record of one side. Everything is indexed by global micro-batch, in the order of one process.

    losses: cross entropy per optimizer step, nats per token. norms: global gradient norm before clipping, per step.
    loads: tokens per expert of every layer, per step. outputs: logits of each micro-batch of step 0, in evaluation
    mode. inputs: token ids of every micro-batch. routes: router -> experts (sorted) of each micro-batch of step 0;
    choices: the same before drops and sorting; flips: with replayed choices, the number of tokens for which the router
    itself would choose other experts. grads: gradients of step 0, before clipping. weights: parameters and buffers
    after the last step. Of N ranks only: saved: the entries of a checkpoint, with the optimizer's; restored: the same
    after they were overwritten and loaded; places: of weights on the ranks; held: `Places.held` of the gradients;
    expert_axes, dense_axes: of the mesh.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    routes: dict[str, list[Tensor]] = field(default_factory=dict)
    choices: dict[str, list[Tensor]] = field(default_factory=dict)
    flips: int = 0
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    restored: dict[str, Tensor] = field(default_factory=dict)
    places: Places | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    expert_axes: Axes = field(default_factory=lambda: Axes({}))
    dense_axes: Axes = field(default_factory=lambda: Axes({}))


def noiseless_plan(config: Config) -> Plan:
    """The plan for the config's mesh, with jitter off."""
    model = source_model(config)
    plan = make_plan(model, config, example=example_inputs(model, config.data.seq_len))
    layers = tuple(
        dataclasses.replace(layer, routing=dataclasses.replace(layer.routing, jitter=0.0)) for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=layers)


def build(config: Config, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """The model lowered by `plan`, with all experts, routers and adapters random, depending only on the seed."""
    model = source_model(config).to(dtype)
    model = compile_model(model, config, example=example_inputs(model, config.data.seq_len), plan=plan)
    _randomize(model, config.seed)
    make_distinct(model, config.seed)
    without_dropout(model)
    return model


def uneven(batch: Batch, number: int, config: Config) -> Batch:
    """Micro-batch `number` of the run with some targets masked: their counts differ, and in the first of several steps
    those of the second place among ranks (or every fourth one, with one micro-batch at a time) have none. Of a single
    step each has some, since a rank without any is not tried.
    """
    world = mesh_spec(config.mesh).num_batches
    accumulate = accumulation_steps(config, mesh_spec(config.mesh))
    per_step = world * accumulate
    step, place = divmod(number, per_step)
    labels = batch["labels"].clone()
    masked = place // accumulate == 1 if world > 1 else place % 4 == 1
    is_first = step == 0 and config.trainer.max_steps > 1
    keep = 0 if masked and is_first and per_step > 1 else labels.shape[1] - number % (labels.shape[1] // 2)
    labels[:, keep:] = IGNORED
    return {**batch, "labels": labels}


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1)
    for module in model.modules():
        if isinstance(module, (Experts, Router)):
            std = _ROUTER_STD if isinstance(module, Router) else _EXPERT_STD
            for parameter in module.parameters(recurse=False):
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
                parameter.copy_(drawn)
    for name, parameter in model.named_parameters():
        if side_of(name):  # one half of them starts at zero, so that the other half would have no gradient
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * _EXPERT_STD)


@torch.no_grad()
def evaluated(module: LanguageModule, batch: Batch, seed: int, number: int) -> Tensor:
    """Logits in evaluation mode, (B, S, V); the mode of the module is restored.

    Args:
        number: of the micro-batch in one process; routers that draw (`routing.workload`) draw by it and the seed.
    """
    training = module.training
    module.eval()
    set_random_key(module, seed, 0, number)
    try:  # the forward of a stage of a pipeline does not return
        logits: Tensor = module.logits(batch)
    finally:
        module.train(training)
    return logits.detach().clone()


@contextmanager
def recorded_routes(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Adds every router's expert ids of this micro-batch to `trace.routes` and `trace.choices`.

    A forward that is recomputed in backward adds nothing.
    """

    def add(records: dict[str, list[Tensor]], name: str, ids: Tensor) -> None:
        if not in_backward():
            records.setdefault(name, []).append(ids.detach().clone())

    with ExitStack() as stack:
        for name, router in routers_of(model):
            stack.enter_context(_watched(router, partial(add, trace.choices, name)))
            handle = router.register_forward_hook(
                lambda _module, _args, output, name=name: add(trace.routes, name, output[1].sort(dim=1).values)
            )
            stack.callback(handle.remove)
        yield


def drawn_routes(model: nn.Module, config: Config, batch: Batch, number: int) -> dict[str, Tensor]:
    """Experts to replay in micro-batch `number` (layer -> (T, K)), random ones; none without `routing.replay`.

    Raises:
        ConfigError: a layer cannot be replayed.
    """
    if config.routing.replay is None:
        return {}
    try:
        layers = replay_layers(model)
    except MoecompileError as error:
        fix = "Use routing.replay=null"
        raise ConfigError("routing.replay", config.routing.replay, str(error), fix) from error
    generator, found = torch.Generator().manual_seed(config.seed * 1_000_003 + number), {}
    for layer in layers:
        tokens = batch["labels" if "decoder" in layer.path.split(".") else "input_ids"].numel()
        found[layer.path] = torch.rand(tokens, layer.num_experts, generator=generator).topk(layer.top_k).indices
    return found


@contextmanager
def replayed_routes(model: nn.Module, choices: Mapping[str, Tensor], trace: Trace) -> Iterator[None]:
    """Replaces every router's expert ids of this micro-batch by `choices`, and counts differences in `trace.flips`.

    With expert choice, nothing is replaced. The choices of models' own routers are replayed as on the ranks.
    """

    def replay(name: str, ids: Tensor) -> Tensor:
        replayed = choices[name]
        trace.flips += int((ids.sort(dim=1).values != replayed.sort(dim=1).values).any(1).sum())
        return replayed

    ours = routers_of(model)
    with ExitStack() as stack:
        if set(choices) - {name for name, _ in ours}:
            stack.enter_context(replay_routes(model, choices))
        for name, router in ours:
            if name in choices:
                stack.enter_context(_watched(router, partial(replay, name)))
        yield


@contextmanager
def _watched(router: Router, on_choice: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Calls `on_choice` with the expert ids that the router chooses; what it returns, if not None, replaces them."""
    choose = router.choose

    def watched(scores_TE: Tensor, tokens_T: Tensor | None = None) -> Tensor:
        ids = choose(scores_TE, tokens_T)
        replaced = on_choice(ids)
        return ids if replaced is None else replaced

    router.choose = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        router.choose = choose  # type: ignore[method-assign]
