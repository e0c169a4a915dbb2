"""Checks that a plan fits a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moecompile.errors import PlanError
from moecompile.plan.layers import LayerPlan
from moecompile.plan.sites import ExpertsSite, PlannedSite


def check_sites(layers: Iterable[LayerPlan], sites: Iterable[PlannedSite]) -> None:
    """Checks that the sites of a model match those that the layers were planned for.

    Raises:
        PlanError: a site is missing or has other sizes or another form.
    """
    by_fqn = {site.fqn: site for site in sites}
    for layer in layers:
        _check_site(layer.site, by_fqn)


def _check_site(site: PlannedSite, sites: Mapping[str, PlannedSite]) -> None:
    actual = sites.get(site.fqn)
    if actual is None:
        what = "experts" if isinstance(site, ExpertsSite) else "FFN"
        raise PlanError(
            "plan.layers", site.fqn, f"the model has no {what} there", f"Plan again; it has {list(sites)[:3]}"
        )
    if _form(site) != _form(actual):
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}]",
            _form(site),
            f"the model has {_form(actual)} there",
            "Plan again for this model",
        )
    if site.swiglu and not actual.swiglu:
        raise PlanError(
            f"plan.layers[{site.fqn or 'the graph'}].site.swiglu", True,
            f"the model computes {actual.activation} there", "Plan again for this model",
        )  # fmt: skip


def _form(site: PlannedSite) -> str:
    """What a plan relies on: `gated 64x128`, `up_down 64x256 with bias_up, bias_down`, `8 experts 64x128 top-2`."""
    biases = [name for name in ("bias_up", "bias_down") if getattr(site, name)]
    kind, routing = site.kind, ""
    if isinstance(site, ExpertsSite):
        kind, routing = f"{site.num_experts} {site.form} {site.kind}", f" top-{site.top_k}"
        if site.groups > 1:
            routing += f" in {site.top_groups} of {site.groups} groups"
    return f"{kind} {site.d_model}x{site.d_ff}{routing}" + (f" with {', '.join(biases)}" if biases else "")
