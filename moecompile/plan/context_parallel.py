"""What attention exchanges over `cp`."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.plan.checks import at_least, plan_errors


@dataclass(frozen=True, kw_only=True)
class ExchangedAttention:
    """Attention of layers that is alike: positions are exchanged for heads before, and back after it.

    modules: their path, with `*` for a number. layers: their number. query_heads, key_heads: of a rank before the
    exchange, a part of the model's where tp splits them. key_copies: how often each head of keys and values is sent, so
    that every rank gets equally many. d_key, d_value: of a head.
    """

    modules: str
    layers: int
    query_heads: int
    key_heads: int
    key_copies: int
    d_key: int
    d_value: int

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if name != "modules"}
        with plan_errors():
            at_least(1, f"context_parallel.{self.modules}", **numbers)

    @property
    def numbers(self) -> int:
        """Numbers per token of all layers in q, k, v and the output."""
        keys = self.key_heads * self.key_copies * (self.d_key + self.d_value)
        return self.layers * (self.query_heads * (self.d_key + self.d_value) + keys)


def check_context(mesh: MeshSpec, exchanged: tuple[ExchangedAttention, ...]) -> None:
    """Raises ConfigError if attention is not split into equal parts over `cp`, or is split without it."""
    cp = mesh.cp
    if cp == 1 and exchanged:
        raise ConfigError(
            "context_parallel", exchanged[0].modules, "is exchanged, but mesh.cp=1", "Leave it out, or raise mesh.cp"
        )
    if cp > 1 and not exchanged:
        raise ConfigError("context_parallel", "[]", f"mesh.cp={cp} needs attention to exchange", "Plan again")
    for each in exchanged:
        for name, heads in (("query_heads", each.query_heads), ("key_heads", each.key_heads * each.key_copies)):
            if heads % cp:
                path, rule = f"context_parallel.{each.modules}.{name}", f"must be a multiple of mesh.cp={cp}"
                raise ConfigError(path, heads, rule, "Plan again for this mesh")
