"""What a config asks of the router that a model has already: auxiliary losses, a bias rule, a capacity.

Losses and the bias rule are planned wherever the router allows them. A capacity drops tokens, so that step 0 is no
longer the model's: it is planned only if the caller sets it, and that of a recipe or preset is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moecompile.plan import BalancePlan, ExpertsSite, RoutingPlan, own_routing
from moecompile.schema import BalanceRule, Config, LayerSettings

_OF_SCORES = ("micro_batch", "sequence", "global_batch")
_OF_CHOICES = ("micro_batch", "global_batch")
_CAPACITY = "routing.capacity_factor"


@dataclass(frozen=True)
class Misfit:
    """A value of the config that the model's own router cannot comply with. key: without `per_layer.NAME`."""

    key: str
    value: Any
    rule: str
    fix: str


def balance_misfits(site: ExpertsSite, settings: LayerSettings) -> Iterator[Misfit]:
    """Losses and a bias rule that the model's own router does not allow."""
    for name, value in vars(settings.balance.losses).items():
        if value and (reason := _why_no_loss(site, name)):
            rule = f"the router of {site.fqn} is the model's own, and {reason}"
            fix = "Use 0; the model's own auxiliary loss, if it has one, is kept"
            yield Misfit(f"balance.losses.{name}", value, rule, fix)
    if settings.balance.rule is BalanceRule.quantile:
        yield Misfit(
            "balance.rule", "quantile",
            f"the router of {site.fqn} is the model's own, and only routers that are made here solve for their bias",
            "Use balance.rule=bias" if site.correction_bias else "Use balance.rule=none",
        )  # fmt: skip
    if settings.balance.rule is BalanceRule.bias and not site.correction_bias:
        yield Misfit(
            "balance.rule", "bias",
            f"the router of {site.fqn} is the model's own and has no buffer e_score_correction_bias to update",
            "Use balance.rule=none",
        )  # fmt: skip


def _why_no_loss(site: ExpertsSite, name: str) -> str | None:
    if site.score == "unknown":
        return "no module beside its experts returns its logits"
    if site.score == "other" and name in _OF_SCORES:
        return "it makes something else of its logits than a softmax or a sigmoid over its experts"
    if site.own_capacity and name in _OF_CHOICES:
        return "it drops tokens itself, so what it chose before is not known"
    if name == "sequence" and not site.has_sequences:
        return "it is not called with sequences"
    return None


def capacity_misfits(site: ExpertsSite, settings: LayerSettings, config: Config) -> Iterator[Misfit]:
    """A capacity that is not the caller's, or that the model's own router does not allow."""
    factor = settings.routing.capacity_factor
    if factor is None:
        return
    where = f"the router of {site.fqn} is the model's own"
    if site.own_capacity:
        rule = f"{where} and has a capacity of its own"
        yield Misfit(_CAPACITY, factor, rule, "Use null, and set the model's own in model.config")
    elif not is_given(config, settings.path_of(_CAPACITY)):
        yield Misfit(_CAPACITY, factor, f"{where}, and you did not ask to drop its tokens", "Use null")


def planned_routing(site: ExpertsSite, settings: LayerSettings, config: Config) -> RoutingPlan:
    """The model's own routing, with the capacity that the caller sets."""
    factor = settings.routing.capacity_factor
    if factor is None or any(capacity_misfits(site, settings, config)):
        return own_routing(site)
    return own_routing(site, factor, settings.routing.drop.value)


def planned_balance(site: ExpertsSite, settings: LayerSettings) -> BalancePlan:
    """The balance without what the router does not allow, which has been refused or is ignored."""
    balance = settings.balance
    updated = balance.rule is BalanceRule.bias and site.correction_bias
    losses = {name: 0.0 if _why_no_loss(site, name) else value for name, value in vars(balance.losses).items()}
    return BalancePlan(
        rule="bias" if updated else "none", rate=balance.rate if updated else 0.0, update=balance.update.value,
        recenter=balance.recenter and updated, **losses,
    )  # fmt: skip


def is_given(config: Config, path: str) -> bool:
    """Whether the caller set the key at a dotted path, or the group or `per_layer` that contains it."""
    return any(path == key or path.startswith(f"{key}.") for key in config.given)
