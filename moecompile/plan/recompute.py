"""What backward computes again of which layers, where `trainer.checkpointing=budget` decides it for each of them."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import PlanError

BUDGET = "budget"
"""`trainer.checkpointing` with which this is chosen."""
LAYER, ATTENTION, NORMS, EXPERTS, FFN = "layer", "attention", "norms", "experts", "ffn"
RECOMPUTED_PARTS = (LAYER, ATTENTION, NORMS, EXPERTS, FFN)


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Layers of which backward computes the same parts again.

    Attributes:
        parts: the whole `layer`, or some of `attention`, `norms`, and `experts` (of a dense layer `ffn`).
        sends: whether exchanges of these parts are sent again; otherwise what they brought is kept.
        modules: of these parts, by their paths in a layer; "" is the layer itself.
        layers: paths of the layers.

    Raises:
        PlanError: it names no part, an unknown one, or the whole layer beside a part of it.
    """

    parts: tuple[str, ...]
    sends: bool
    modules: tuple[str, ...]
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in RECOMPUTED_PARTS]
        whole = LAYER in self.parts
        if unknown or not self.parts or not self.modules or (whole and (len(self.parts), self.modules) != (1, ("",))):
            raise PlanError(
                "recomputed.parts", list(self.parts),
                f"must be [{LAYER}] with the module '', or some of {', '.join(RECOMPUTED_PARTS[1:])} with theirs",
                "Plan again with trainer.checkpointing=budget",
            )  # fmt: skip
