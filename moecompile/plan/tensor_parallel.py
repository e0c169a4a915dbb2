"""Which modules outside of the MoE layers are split over `tp`, and how."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan.checks import plan_errors
from moecompile.ranges import check_word

HEADS_STYLE = "replicated_with_grad_allreduce"
STYLES = (
    "colwise", "rowwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep",
    "embedding_rowwise", "mla_kv_a_proj", HEADS_STYLE,
)  # fmt: skip
"""The styles of transformers' `tp_plan` that are carried (moecompile.nn.split)."""


@dataclass(frozen=True, kw_only=True)
class SplitModules:
    """Modules that are split over `tp` alike.

    modules: their path, with `*` for a number. style: of `STYLES`.
    """

    modules: str
    style: str

    def __post_init__(self) -> None:
        with plan_errors():
            check_word(STYLES, f"tensor_parallel.{self.modules}", self.style)


def check_split(mesh: MeshSpec, split: tuple[SplitModules, ...]) -> None:
    """Raises ConfigError if modules are split without an axis."""
    if mesh.tp == 1 and split:
        raise ConfigError(
            "tensor_parallel", split[0].modules, "is split, but mesh.tp=1", "Leave it out, or raise mesh.tp"
        )
