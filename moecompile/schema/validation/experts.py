"""Rules of `experts`, which are also checked for plans, as these may be edited by hand."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.schema.config import ExpertsConfig
from moecompile.schema.slices import site_slice


def check_experts(experts: ExpertsConfig) -> None:
    """Checks the rules that need only this group.

    Raises:
        ConfigError: the first rule that is broken.
    """
    site_slice(experts.layers)
    check_slices(experts.init, experts.granularity, experts.num_shared)


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
