"""Plans low-rank adapters: which linears and which weights of experts get them. Everything else is frozen.

Algorithm:
  1. Refuse what adapters do not support: dense FFNs that become experts, and experts that are modules.
  2. Weights of experts whose path matches `adapters.experts`. Such a layer is not fused: the fused op has no adapters.
  3. Linears whose path matches `adapters.dense`, but no routers.
  4. A pattern that matches nothing is an error. So is a correction bias that follows the load of a frozen router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec, Part
from moecompile.plan import AdaptersPlan, ExpertAdapters, ExpertsSite, LayerPlan
from moecompile.planner.params import ModelFacts
from moecompile.schema import AdapterKind, Config, check_adapters

Layers = tuple[LayerPlan, ...]


def plan_adapters(
    layers: Layers, mesh: MeshSpec, config: Config, facts: ModelFacts
) -> tuple[Layers, AdaptersPlan | None, ModelFacts]:
    """The layers with adapters of their experts, the adapters of the model, and facts that count the latter.

    Raises:
        ConfigError: the adapters do not fit the model.
    """
    check_adapters(config)
    chosen = config.adapters
    if chosen.kind is AdapterKind.none:
        return layers, None, facts
    for axis in mesh.axes(Part.WEIGHTS):
        rule, fix = f"adapters are not split over {axis}", f"Use mesh.{axis}=1, or adapters=none"
        raise ConfigError(f"mesh.{axis}", mesh.size(axis), rule, fix)
    _check_sites(layers)  # Step 1
    adapted = tuple(_with_adapters(layer, config) for layer in layers)  # Step 2
    known = [f"{layer.site.fqn}.{name}" for layer in layers for name in _weights(layer)]
    if chosen.experts is not None and not any(layer.adapters for layer in adapted):
        raise _no_match("adapters.experts", chosen.experts, "weights of experts", known)
    linears = {path: sizes for path, sizes in facts.linears.items() if not _is_router(path, sizes, layers)}
    matched = [path for path in linears if chosen.dense is not None and fnmatchcase(path, chosen.dense)]  # Step 3
    if chosen.dense is not None and not matched:
        raise _no_match("adapters.dense", chosen.dense, "linears", list(linears))
    _check_balance(layers, config)  # Step 4
    plan = AdaptersPlan(
        rank=chosen.rank, alpha=float(chosen.alpha), dropout=float(chosen.dropout), linears=tuple(matched),
        train_router=chosen.train_router,
    )  # fmt: skip
    if chosen.dropout and plan.as_parameters:
        raise ConfigError(
            "adapters.dropout", chosen.dropout,
            f"is not possible in peft for linears with the names of experts ({plan.as_parameters[0]})",
            "Use 0, or leave them out of adapters.dense",
        )  # fmt: skip
    dense = sum(chosen.rank * sum(linears[path]) for path in matched)
    return adapted, plan, replace(facts, adapters=(dense, chosen.train_router))


def _check_sites(layers: Sequence[LayerPlan]) -> None:
    for site in (layer.site for layer in layers):
        if not isinstance(site, ExpertsSite):
            raise ConfigError(
                "adapters.kind", "lora", f"{site.fqn or 'the graph'} is a dense FFN that becomes experts, and adapters "
                "are for experts that the model has already", "Use adapters=none, or experts.sites=existing",
            )  # fmt: skip
        if site.form == "modules":
            raise ConfigError(
                "adapters.kind", "lora", f"{site.fqn} has one module per expert, and adapters are for stacked weights",
                "Use adapters=none, or leave this site out (experts.match)",
            )  # fmt: skip


def _weights(layer: LayerPlan) -> Iterator[str]:
    """Names of the matrices of a layer's experts."""
    assert isinstance(layer.site, ExpertsSite)
    yield "gate_up_proj" if layer.site.num_in_projections == 2 else "up_proj"
    yield "down_proj"


def _with_adapters(layer: LayerPlan, config: Config) -> LayerPlan:
    chosen = config.adapters
    pattern = chosen.experts
    names = [n for n in _weights(layer) if pattern is not None and fnmatchcase(f"{layer.site.fqn}.{n}", pattern)]
    if not names:
        return layer
    adapters = ExpertAdapters(rank=chosen.rank, alpha=float(chosen.alpha), weights=tuple(names))
    return replace(layer, adapters=adapters, fused=False)


def _is_router(path: str, sizes: tuple[int, int], layers: Sequence[LayerPlan]) -> bool:
    """Whether a linear is in the block of some experts and has one output per expert."""
    return any(
        path.startswith(f"{layer.site.fqn.rpartition('.')[0]}.") and sizes[1] == layer.experts.num_routed
        for layer in layers
    )


def _check_balance(layers: Sequence[LayerPlan], config: Config) -> None:
    for layer in layers:
        if layer.balance.has_bias and not config.adapters.train_router:
            raise ConfigError(
                "balance.rule", layer.balance.rule,
                f"moves the correction bias of the router of {layer.site.fqn}, which is frozen "
                "(adapters.train_router=false)", "Use balance.rule=none, or adapters.train_router=true",
            )  # fmt: skip


def _no_match(path: str, pattern: str, what: str, known: Sequence[str]) -> ConfigError:
    shown = f" ({', '.join(known[:3])}, ...)" if known else ""
    return ConfigError(path, pattern, f"matches none of the {len(known)} {what}{shown}", "Change the pattern, or null")
