"""Rules of `experts`, which are also checked for plans, as these may be edited by hand."""

from __future__ import annotations

from typing import Any

from moecompile.errors import ConfigError
from moecompile.schema.config import Config, ExpertsConfig
from moecompile.schema.enums import AdapterKind, ExpertInit, SiteKind, WidenTopK
from moecompile.schema.slices import site_slice


def check_experts(experts: ExpertsConfig) -> None:
    """Checks the rules that need only this group.

    Raises:
        ConfigError: the first rule that is broken.
    """
    site_slice(experts.layers)
    check_slices(experts.init, experts.granularity, experts.num_shared)
    check_latent(experts.latent_size, experts.latent_norm)


def check_widening(config: Config) -> None:
    """Checks what init=widen, which makes a larger model before anything is planned, does not go together with.

    Raises:
        ConfigError: the first rule that is broken.
    """
    experts, widen = config.experts, config.experts.widen
    if experts.init is not ExpertInit.widen:
        if given := next((key for key in config.given if key.startswith("experts.widen.")), None):
            value = getattr(widen, given.rpartition(".")[2], None)
            rule = f"has no effect with experts.init={experts.init.value}"
            raise ConfigError(given, getattr(value, "value", value), rule, "Use experts.init=widen, or leave it out")
        return
    if experts.sites in (SiteKind.dense, SiteKind.both):
        raise ConfigError(
            "experts.sites", experts.sites.value, "are dense FFNs, and experts.init=widen copies experts",
            "Use experts.sites=auto, or experts.init=copy",
        )  # fmt: skip
    if widen.top_k is WidenTopK.kept and not widen.noise:
        raise ConfigError(
            "experts.widen.noise", widen.noise, "leaves copies alike, and with experts.widen.top_k=kept rounding alone "
            "would decide which copy a token gets", "Use 0.01, or experts.widen.top_k=scaled",
        )  # fmt: skip
    for key, value, broken, what in (
        ("plan", config.plan, config.plan is not None, "is a plan of the model after it"),
        ("adapters.kind", config.adapters.kind.value, config.adapters.kind is not AdapterKind.none, "are for weights "
         "that are in a folder"),
    ):  # fmt: skip
        if broken:
            rule = f"{what}, and experts.init=widen makes a new model at each start"
            fix = "Save the larger model first (moecompile.widen_experts), and give its folder as model.pretrained"
            raise ConfigError(key, value, rule, fix)


def is_sliced(init: str, granularity: int) -> bool:
    """Whether routed experts are slices of the dense FFN, not full copies of it or randomly initialized."""
    return init == "virtual_group" or (init == "drop" and granularity > 1)


def virtual_group(init: str, granularity: int, num_shared: int) -> int:
    """How many routed experts together are one copy of the dense FFN's routed slices (1 without slices)."""
    return granularity - num_shared if is_sliced(init, granularity) else 1


def check_slices(init: str, granularity: int, num_shared: int) -> None:
    """Checks that the number of slices fits the initialization.

    Raises:
        ConfigError: init=copy with slices, or no slice is left for the routed experts.
    """
    if init == "copy" and granularity != 1:
        raise ConfigError(
            "experts.init", "copy", f"copies whole FFNs but experts.granularity={granularity}",
            "Use experts.init=virtual_group, or experts.granularity=1",
        )  # fmt: skip
    if is_sliced(init, granularity) and num_shared >= granularity:
        raise ConfigError(
            "experts.num_shared", num_shared,
            f"must leave a slice for the routed experts, experts.granularity={granularity}",
            "Lower it or raise experts.granularity",
        )  # fmt: skip


def check_latent(latent_size: int | None, latent_norm: bool) -> None:
    """Checks that a norm in the latent width has one.

    Raises:
        ConfigError: there is no latent width.
    """
    if latent_norm and latent_size is None:
        raise ConfigError(
            "experts.latent_norm", True, "is a norm in the latent width, but experts.latent_size=null",
            "Give experts.latent_size, or use experts.latent_norm=false",
        )  # fmt: skip


def check_shared(experts: Any, routing: Any) -> None:
    """Checks what a shared expert that the router weighs needs. Pass both values from a config, or both from a plan.

    Raises:
        ConfigError: the first rule that is broken.
    """
    if not experts.shared_routed:
        return
    for path, value, broken, rule, fix in (
        ("experts.num_shared", experts.num_shared, not experts.num_shared, "leaves no shared expert to weigh", "Use 1"),
        ("experts.shared_gate", True, experts.shared_gate, "is another weight of the shared expert", "Use false"),
        ("routing.score", routing.score, routing.score != "sigmoid", "has no score for a shared expert", "Use sigmoid"),
        ("routing.normalize", False, not routing.normalize, "leaves no sum to share", "Use true"),
        ("routing.choice", routing.choice, routing.choice == "expert", "gives a token no sum to share", "Use token"),
    ):
        if broken:
            value = getattr(value, "value", value)
            why = "and experts.shared_routed=true makes the router weigh it beside the chosen experts"
            raise ConfigError(path, value, f"{rule}, {why}", f"{fix}, or experts.shared_routed=false")


def check_placement(num_routed: int, ep: int) -> None:
    """Checks that every EP rank gets the same number of experts.

    Raises:
        ConfigError: ep does not divide the number of experts.
    """
    if num_routed % ep:
        below = num_routed // ep * ep
        valid = [n for n in (below, below + ep) if n]
        raise ConfigError(
            "experts.num_routed", num_routed, f"must be a multiple of mesh.ep={ep}",
            f"Use {' or '.join(map(str, valid))}",
        )  # fmt: skip
