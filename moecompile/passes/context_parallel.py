"""context_parallel: every rank of a CP group computes its own positions, and attention its own heads.

Algorithm:
  1. Each layer's arguments are cut to this rank's positions (moecompile.nn.context): the hidden states of the first
     layer, and the positions of all. Masks of attention are made by the model for whole sequences, and stay whole.
  2. transformers' attention interface gets a function that exchanges positions for heads, runs the implementation that
     the model had, and exchanges back. Masks are made as that implementation wants them. The model's configs name it.
  3. Padding masks are cut where an MoE layer reads them, and the losses of routers are computed from the logits of all
     ranks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from moecompile.capture import is_meta, layers_of
from moecompile.errors import ConfigError, PassError, PlanError
from moecompile.nn import routers_of
from moecompile.nn.context import CutLayer, Positions, exchanged_attention, keep_positions
from moecompile.nn.own_router import own_routers
from moecompile.nn.padding import padding_of
from moecompile.nn.stages import passage_of
from moecompile.plan import Plan
from moecompile.schema import ModelAttention
from moecompile.torch_private import is_fake, without_scores

IMPLEMENTATIONS = ("sdpa", "eager")
"""transformers' implementations of attention that take any heads and whole masks."""
ON_A_GPU = tuple(each.value for each in ModelAttention if each.is_on_a_gpu)
_PREFIX = "moecompile_cp_"


def split_positions(model: nn.Module, plan: Plan, cp: DeviceMesh) -> None:
    """Makes a lowered model compute this rank's positions, in place.

    With stages, the model has the layers of some alone, and was checked before it was cut.

    Raises:
        PlanError: the model's attention is not what was planned.
    """
    if passage_of(model) is None:
        check_positions(model, plan)
    group = cp.get_group()
    positions = Positions(group.group_name, dist.get_rank(group), group.size())
    paths = {module: path for path, module in model.named_modules()}
    layers = [(paths[layer], layer) for layer in layers_of(model)]
    first = layers[0][0] if plan.pipeline is None else plan.pipeline.stages[0].layers[0]
    for path, layer in layers:  # Step 1
        CutLayer(path, layer, positions, is_first=path == first)
    keep_positions(model, positions)
    model.register_forward_pre_hook(_without_labels, with_kwargs=True)
    name = _PREFIX + implementation_of(model)  # Step 2
    register_attention(name, exchanged_attention, implementation_of(model))
    for config in configs_of(model):
        config._attn_implementation = name
    if (padding := padding_of(model)) is not None:  # Step 3
        padding.positions = positions
    for _, router in routers_of(model):
        router.positions = positions.axis
    for _, reader in own_routers(model):
        reader.positions = positions.axis


def check_positions(model: nn.Module, plan: Plan) -> None:
    """Checks that the whole model has the attention that is planned.

    Raises:
        PlanError: it has not.
    """
    for entry in plan.context_parallel:
        matches = re.compile(re.escape(entry.modules).replace(r"\*", r"\d+")).fullmatch
        found = sum(matches(path) is not None for path, _ in model.named_modules())
        if found != entry.layers:
            rule = f"{found} of the model's modules have this path, planned are {entry.layers}"
            raise PlanError("context_parallel", entry.modules, rule, "Plan again for this model")


def check_exchanged(model: nn.Module) -> None:
    """Raises PassError unless the model's attention is ours."""
    if not implementation_of(model).startswith(_PREFIX):
        raise PassError("shard", "the model", f"its attention is {implementation_of(model)}, which sees one rank only")


def implementation_of(model: nn.Module) -> str:
    """The name of the attention that the model's configs choose."""
    return str(getattr(next(configs_of(model), None), "_attn_implementation", None))


def configs_of(model: nn.Module) -> Iterator[Any]:
    """The configs inside `model` that choose an implementation of attention, each once."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return (config for config in configs.values() if hasattr(config, "_attn_implementation"))


def register_attention(name: str, function: Callable[..., Any], inner: str, *, has_masks: bool = True) -> None:
    """Registers `function(implementation, module, query, ...)` with transformers, with the masks of `inner` or none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(_implementation(inner, module), module, *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner] if has_masks else _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention knows that it is causal."""


def _implementation(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that transformers would call in `module`; eager ones are written beside each model."""
    modules = (sys.modules[kind.__module__] for kind in type(module).__mro__)  # a class of its own has none
    of_model: Any = next(each for each in modules if hasattr(each, "ALL_ATTENTION_FUNCTIONS"))
    eager = getattr(of_model, "eager_attention_forward", None)
    function: Callable[..., Any] = of_model.ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


@contextmanager
def attention_replaced(model: nn.Module, function: Callable[..., Any], *, has_masks: bool = True) -> Iterator[None]:
    """Inside, the attention of every layer is `function(implementation, module, query, ...)`."""
    configs = list(configs_of(model))
    before = [config._attn_implementation for config in configs]
    register_attention("moecompile_replaced", partial(function), before[0], has_masks=has_masks)
    try:
        for config in configs:
            config._attn_implementation = "moecompile_replaced"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextmanager
def eager_on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, attention that does not run on the meta device is eager there."""
    configs = list(configs_of(model))
    before = [config._attn_implementation for config in configs]
    try:
        for config, name in zip(configs, before, strict=True):
            if name in ON_A_GPU and is_meta(model):
                config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@contextmanager
def attention_of_a_gpu(model: nn.Module) -> Iterator[None]:
    """Attention as a GPU computes it. A torch function mode would be off in backward, where layers compute again."""
    before = F.scaled_dot_product_attention

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_attend if query.is_meta or is_fake(query) else before)(query, *args, **kwargs)

    F.scaled_dot_product_attention = attend
    is_on_a_gpu = implementation_of(model) in ON_A_GPU
    try:
        with attention_replaced(model, _attend_instead, has_masks=False) if is_on_a_gpu else nullcontext():
            yield
    finally:
        F.scaled_dot_product_attention = before


def _attend_instead(
    inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """In place of those that do not run without a GPU, and have no masks of all pairs; keys are repeated."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    output = _attend(query, key, value, attention_mask, is_causal=True, scale=others.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if query.device.type != "meta" and torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each.to(narrow) for each in (query, key, value))
    return without_scores(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _without_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None:
        raise ConfigError(
            "labels", tuple(kwargs["labels"].shape), "the model computes the logits of this rank's positions only",
            "Call it without labels, shift them, and take moecompile.own_positions(model, labels) for the loss",
        )  # fmt: skip
