"""Rules of `experts`. A plan that was edited by hand is held to the same ones."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.schema.config import ExpertsConfig
from moecompile.schema.slices import site_slice


def check_experts(experts: ExpertsConfig) -> None:
    """The rules that need this group alone.

    Raises:
        ConfigError: the first rule that is broken.
    """
    site_slice(experts.layers)
    check_slices(experts.init, experts.granularity, experts.num_shared)


def is_sliced(init: str, granularity: int) -> bool:
    """Whether routed experts are slices of the dense FFN, else they are copies of it or have nothing of it."""
    return init == "virtual_group" or (init == "drop" and granularity > 1)


def virtual_group(init: str, granularity: int, num_shared: int) -> int:
    """Routed experts that together are one copy of the dense FFN's routed slices (1 without slices)."""
    return granularity - num_shared if is_sliced(init, granularity) else 1


def check_slices(init: str, granularity: int, num_shared: int) -> None:
    """Whether the slices of a dense FFN fit where the experts' weights come from.

    Raises:
        ConfigError: copies of slices, or no slice for the routed experts.
    """
    if init == "copy" and granularity != 1:
        raise ConfigError(
            "experts.init", "copy", f"copies whole FFNs but experts.granularity={granularity}",
            "Use experts.init=virtual_group, or experts.granularity=1",
        )  # fmt: skip
    if is_sliced(init, granularity) and num_shared >= granularity:
        raise ConfigError(
            "experts.num_shared", num_shared,
            f"must leave a slice to the routed experts, experts.granularity={granularity}",
            "Lower it or raise experts.granularity",
        )  # fmt: skip


def check_placement(num_routed: int, ep: int) -> None:
    """Whether every EP rank holds as many experts.

    Raises:
        ConfigError: it does not.
    """
    if num_routed % ep:
        below = num_routed // ep * ep
        valid = [n for n in (below, below + ep) if n]
        raise ConfigError(
            "experts.num_routed", num_routed, f"must be a multiple of mesh.ep={ep}",
            f"Use {' or '.join(map(str, valid))}",
        )  # fmt: skip
