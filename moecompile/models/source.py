"""The model that a config describes, before it is compiled: built or loaded, and with `experts.init=widen` made larger.

Widening depends on the config, the seed and the weights alone, so all ranks make the same model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.models.widen import NUM_EXPERTS, moe_sites, text_config_of, widen_experts
from moecompile.planner.loads import read_loads, site_loads
from moecompile.schema import Config, ExpertInit

_LOADS = "experts.widen.loads"


def source_model(config: Config) -> nn.Module:
    """The model. Random weights and noise depend only on the seed.

    Raises:
        ConfigError, ArgumentError: it cannot be built, loaded or widened.
    """
    model = build_model(config.model, config.seed)
    if config.experts.init is not ExpertInit.widen:
        return model
    factor, widen = widening_factor(config, getattr(model, "config", None)), config.experts.widen
    example = example_inputs(model, config.data.seq_len)
    load = None
    if widen.loads is not None:
        sizes = {site.fqn: (site.num_experts, site.num_identity) for site in moe_sites(model, example)}
        load = site_loads(Path(widen.loads), sizes, key=_LOADS)
    with torch.random.fork_rng(devices=[]):
        widened = widen_experts(
            model, factor, example=example, top_k=widen.top_k.value, load=load, noise=widen.noise, seed=config.seed
        )
    return widened.model


def source_structure(config: Config) -> nn.Module:
    """As `source_model`, for a model whose weights are overwritten: copies by load and noise are left out."""
    widen = replace(config.experts.widen, loads=None, noise=0.0)
    return source_model(replace(config, experts=replace(config.experts, widen=widen)))


def check_widening_inputs(config: Config, model_config: Any | None) -> None:
    """Checks what `source_model` needs, without weights. Arguments as for `widening_factor`; None: not known yet.

    Raises:
        ConfigError: it would fail.
    """
    if config.experts.init is ExpertInit.widen:
        if model_config is not None:
            widening_factor(config, model_config)
        if config.experts.widen.loads is not None:
            read_loads(Path(config.experts.widen.loads), _LOADS)


def widening_factor(config: Config, model_config: Any) -> int:
    """How many times as many experts `experts.num_routed` asks for.

    Args:
        model_config: of transformers, of the model before.

    Raises:
        ConfigError: there are no experts, or this is no multiple of them.
    """
    text = text_config_of(model_config)
    found = [value for name in NUM_EXPERTS if isinstance(value := getattr(text, name, None), int) and value > 1]
    if not found:
        rule = f"copies the experts of a model that is MoE already, and {config.model.name} has none by its config"
        raise ConfigError("experts.init", "widen", rule, "Use experts.init=copy, which makes experts of dense FFNs")
    factor, rest = divmod(config.experts.num_routed, found[0])
    if rest or factor < 2:
        rule = f"must be a multiple of the model's {found[0]} experts, and more, with experts.init=widen"
        fix = f"Use {2 * found[0]} or {3 * found[0]}"
        raise ConfigError("experts.num_routed", config.experts.num_routed, rule, fix)
    return factor
