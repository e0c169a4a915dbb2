"""What a training run knows to be wrong with itself: shown at its end, in its verdict and in a sweep's table.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from moecompile.plan import ExpertsSite, LayerPlan, Plan
from moecompile.report.text import plural
from moecompile.routing import AUTO_LOSSES, LOAD_LOSSES
from moecompile.schema import Config, is_open

COLLAPSED = 0.8
"""Share of the largest possible MaxVio from which on a layer's routing counts as collapsed."""
DIVERGED = 0.1
"""Nats per token, and share of the first loss, by which the last one is above it when a run has diverged."""
ROSE = 0.01
"""Share of the first validation loss by which the last one is above it when that is told."""
RISEN, TWICE = 1.0, 2.0
"""MaxVio of the worst layer in the last row over the lowest of a row: by how much, and how many times, that is told."""
SKIPPED, MOSTLY_SKIPPED = 0.01, 0.5
"""Shares of the steps that were skipped, above which that is told, and a run has diverged."""
_SHOWN = 3  # layers that are named


def status_of(fields: Mapping[str, Any]) -> str:
    """`ok`, or `diverged`: the training loss has risen, a loss is no number, or most steps were skipped.

    Args:
        fields: of result.json of a training run; `loss_first` and `loss_last` are None if no step was counted.
    """
    first, last, val = (fields[name] for name in ("loss_first", "loss_last", "val_loss"))
    if any(loss is not None and not isfinite(loss) for loss in (last, val)) or _skipped(fields) > MOSTLY_SKIPPED:
        return "diverged"
    risen = None not in (first, last) and last - first > max(DIVERGED, DIVERGED * abs(first))
    return "diverged" if risen else "ok"


def _skipped(fields: Mapping[str, Any]) -> float:
    """The share of the steps that `trainer.on_nan=skip` has skipped."""
    return float(fields["steps_skipped"] / max(1, fields["steps"]))


def early_warnings(plan: Plan, config: Config) -> list[str]:
    """What is known before the first step."""
    rate = config.optimizer.lr
    said = [f"optimizer.lr={rate:g}: no weight will change. Set a rate, such as optimizer.lr=3e-4"] if rate == 0 else []
    is_trained = config.model.pretrained is not None or config.model.package is not None
    return [*said, *_of_slices(plan)] if is_trained else said


def _of_slices(plan: Plan) -> Iterator[str]:
    """That a token of a pretrained model may lose slices of its FFN, and what keeps them."""
    apart = [layer for layer in plan.layers if _may_lose_slices(layer)]
    if not apart:
        return
    layer = apart[0]
    where = f" in {plural(len(apart), 'layer')}" if len(apart) < len(plan.layers) else ""
    excluded = (
        (layer.routing.choice != "token", f"routing.choice={layer.routing.choice}"),
        (layer.routing.top_groups < layer.routing.groups, "a limit of groups or nodes"),
        (layer.balance.rule == "quantile", "balance.rule=quantile"),
        (layer.experts.num_identity > 0, "experts.num_identity"),
    )
    there = [what for is_there, what in excluded if is_there]
    rule = "a trained router may give a token two copies of one slice of its FFN and none of another"
    fix = "a pretrained model loses much by that: try routing.even_groups=true, which keeps one of each"
    cost = "that is exported with export.format=native alone: no model of transformers has it"
    limit = f", and does not go with {' and '.join(there)}" if there else ""
    yield f"experts.init={layer.experts.init}{where}: {rule}, and {fix}{limit}; {cost}"


def _may_lose_slices(layer: LayerPlan) -> bool:
    experts, routing = layer.experts, layer.routing
    has_all = routing.choice == "token" and routing.top_k == experts.num_routed
    return 1 < experts.virtual_group < experts.num_routed and not (routing.even_groups or has_all)


def run_warnings(fields: Mapping[str, Any], plan: Plan, config: Config) -> list[str]:
    """What is known at the end of a training run.

    Args:
        fields: of result.json.
    """
    if status_of(fields) == "diverged":
        went = f"{_nats(fields['loss_first'])} -> {_nats(fields['loss_last'])}"
        rate, warmup = config.optimizer.lr, config.optimizer.warmup_steps
        fix = f"Try optimizer.lr={rate / 10:g} (now {rate:g}), or more optimizer.warmup_steps (now {warmup})"
        return [f"the loss diverged: {went}. {fix}", *_of_skipped(fields)]
    return [*early_warnings(plan, config), *_of_skipped(fields), *_losses(fields), *_routing(fields, plan, config)]


def _of_skipped(fields: Mapping[str, Any]) -> Iterator[str]:
    if _skipped(fields) > SKIPPED:
        count = f"{fields['steps_skipped']:,} of {plural(fields['steps'], 'step')}"
        fix = "With trainer.on_nan=stop the first one ends the run and says where it began"
        yield f"{count} changed no weight: a loss or a gradient was not finite (trainer.on_nan=skip). {fix}"


def _losses(fields: Mapping[str, Any]) -> Iterator[str]:
    first, last = fields["loss_first"], fields["loss_last"]
    before, after = fields["val_loss_first"], fields["val_loss"]
    if before is not None and after > before * (1 + ROSE):
        trained = f"while the training loss went {_nats(first)} -> {_nats(last)}"
        fix = "Train for fewer steps or on more data, lower optimizer.lr, or validate on text of the same kind"
        yield f"validation rose: {_nats(before)} -> {_nats(after)}, {trained}. {fix}"


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _routing(fields: Mapping[str, Any], plan: Plan, config: Config) -> Iterator[str]:
    if config.routing.replay is not None or any(layer.routing.workload != "none" for layer in plan.layers):
        return  # the load was asked for
    share, dead, said = fields["max_violation_share_last"], fields["dead_experts"], []
    if share is not None and share >= COLLAPSED:
        mean, most = fields["max_violation_mean_last"], fields["max_violation_bound_mean_last"]
        said.append(
            f"a few experts got nearly all tokens (MaxVio {mean:.2f} of at most {most:.2f}, worst layer {share:.0%})"
        )
    if dead:
        named = [f"{layer}: {', '.join(map(str, experts))}" for layer, experts in list(dead.items())[:_SHOWN]]
        more = f"; and {plural(len(dead) - _SHOWN, 'more layer')}" if len(dead) > _SHOWN else ""
        count = plural(sum(map(len, dead.values())), "expert")
        said.append(f"{count} got no token ({'; '.join(named)}{more})")
    if said:
        yield f"in the last tenth of the steps {' and '.join(said)}. {_remedy(plan, config)}".rstrip()
        return
    least, last = fields.get("max_violation_least"), fields.get("max_violation_last")
    if least is not None and last is not None and last - least >= RISEN and last >= TWICE * least:
        went = f"MaxVio rose from {least:.2f} to {last:.2f} within the run (worst layer of a row)"
        yield f"{went}: the load becomes less even. {_remedy(plan, config)}".rstrip()


def _remedy(plan: Plan, config: Config) -> str:
    """What evens the load of this plan's routers; empty where no token chooses by its scores."""
    if plan.adapters is not None and not plan.adapters.train_router:
        return "The routers are frozen: add adapters.train_router=true balance=aux"
    layer = next((each for each in plan.layers if each.routing.choice == "token"), None)
    if layer is None:
        return ""
    site, balance = layer.site, layer.balance
    if balance.has_bias and balance.rate:
        return _twice("balance.rate", balance.rate)
    for name in LOAD_LOSSES:
        value = getattr(balance, name)
        is_models = isinstance(site, ExpertsSite) and is_open(config.balance, name)
        if value and not (is_models and value < AUTO_LOSSES["micro_batch"]):  # else balance=aux is stronger
            return _twice(f"balance.losses.{name}", value)
    has_bias = not balance.has_bias and (not isinstance(site, ExpertsSite) or site.correction_bias)
    return "Add balance=aux or balance=bias" if has_bias else "Add balance=aux"


def _twice(key: str, value: float) -> str:
    return f"Try {key}={2 * value:g} (now {value:g})"
