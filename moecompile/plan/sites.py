"""Sites: where the model has dense FFNs, or experts already."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import PlanError

OWN_SCORES = ("softmax", "sigmoid", "other", "unknown")


@dataclass(frozen=True, kw_only=True)
class FFNSite:
    """A dense FFN: x -> linear(s) -> pointwise activation (and product) -> linear, of equal width in and out.

    fqn: module path of the region that contains the FFN ("" for a graph from the user). kind: `gated` (two linears
    before the activation) or `up_down` (one). d_model, d_ff: widths. bias_up, bias_down: which linears have biases.
    activation: the pointwise operations, for display only. index: position among the matched sites. swiglu: whether
    the FFN is down(silu(gate) * up) without biases.
    """

    fqn: str
    kind: str
    d_model: int
    d_ff: int
    bias_up: bool
    bias_down: bool
    activation: str
    index: int
    swiglu: bool = False

    def __post_init__(self) -> None:
        if self.swiglu and (self.kind != "gated" or self.bias_up or self.bias_down):
            raise PlanError(f"{self.fqn}.swiglu", True, "is only for gated FFNs without biases", "Match the model")
        if self.kind not in ("gated", "up_down"):
            raise PlanError(f"{self.fqn}.kind", self.kind, "must be gated or up_down", "Use one of these")
        for name in ("d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise PlanError(f"{self.fqn}.{name}", getattr(self, name), "must be at least 1", "Match the model")

    @property
    def num_in_projections(self) -> int:
        """Linears between x and the activation."""
        return 2 if self.kind == "gated" else 1


@dataclass(frozen=True, kw_only=True)
class ExpertsSite:
    """Experts that the model has already, called with hidden states (T, D), expert ids (T, K) and weights (T, K).

    fqn: module path of the experts. kind: `experts`. form: `stacked` weights, which keep their names, or `modules`, one
    per expert, which are stacked. d_model, d_ff: widths of one expert. num_experts, top_k: read from the model, as are
    num_identity (experts behind these that return their input), groups and top_groups (1: no limit) of its router, and
    whether it has a correction bias. num_in_projections: linears before the activation. bias_up, bias_down: which
    linears have biases. activation: for display only. index: position among the experts of the model. swiglu: whether
    one expert is down(silu(gate) * up) without biases, and its output is not changed further.

    Of the model's own router: score: what it makes of its logits, `softmax`, `sigmoid` or `other`; `unknown`: its
    logits were not found, so there are no losses of them. has_sequences: whether it is known which tokens are one
    sequence. own_capacity: whether it drops assignments itself.
    """

    fqn: str
    kind: str = "experts"
    form: str = "stacked"
    d_model: int
    d_ff: int
    num_experts: int
    top_k: int
    num_identity: int = 0
    groups: int = 1
    top_groups: int = 1
    correction_bias: bool = False
    score: str = "unknown"
    has_sequences: bool = False
    own_capacity: bool = False
    num_in_projections: int = 2
    bias_up: bool = False
    bias_down: bool = False
    activation: str
    index: int
    swiglu: bool = False

    def __post_init__(self) -> None:
        if self.kind != "experts":
            raise PlanError(f"{self.fqn}.kind", self.kind, "must be experts", "Use experts")
        if self.form not in ("stacked", "modules"):
            raise PlanError(f"{self.fqn}.form", self.form, "must be stacked or modules", "Match the model")
        if self.score not in OWN_SCORES:
            raise PlanError(f"{self.fqn}.score", self.score, f"must be one of {list(OWN_SCORES)}", "Match the model")
        for name in ("d_model", "d_ff", "num_experts", "top_k", "groups", "top_groups", "num_in_projections"):
            if getattr(self, name) < 1:
                raise PlanError(f"{self.fqn}.{name}", getattr(self, name), "must be at least 1", "Match the model")


PlannedSite = FFNSite | ExpertsSite
