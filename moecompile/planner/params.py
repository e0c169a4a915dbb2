"""Parameter counts before and after rewriting.

    ffn(D, F)  = n (D F + F [bias_up]) + F D + D [bias_down]         n: 2 for gated, 1 for up_down  -> `ffn_params`
    layer      = E ffn(D, d_expert) + ffn(D, d_shared) + D [gate]    experts, shared expert,
                 + E D + E [bias]                                    router                         -> `LayerParams`
    total      = model - sum of ffn(D, d_ff) + sum of layer          over the planned layers        -> `ModelParams`
    active     = the same with K instead of E experts
    trained    = total - frozen ones that stay - experts and shared experts made of frozen ones  -> `trained_params`

Experts that the model has already are in its count: they replace E ffn(D, d_ff) by the same, and their router stays.

Legend: D model dim, F hidden dim, E routed experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moecompile.plan import ExpertsSite, LayerPlan, PlannedSite

BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the planner must know of the dense model.

    params_total: all parameters before rewriting, tied ones once. params_embedding: those outside the layers
    (embeddings, output head, final norm). num_layers, vocab_size: of the model; where they are 0 (a bare graph), only
    the planned layers are counted. bytes_per_param: of weights as they are stored (4: fp32). causal:
    whether a token must not see later ones (None: unknown). frozen: module path ("": the model) -> parameters inside
    that are not trained, and all that are inside; empty where all are trained.
    """

    params_total: int
    params_embedding: int = 0
    num_layers: int = 0
    vocab_size: int = 0
    bytes_per_param: int = 4
    causal: bool | None = None
    frozen: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the planner must know of the run.

    tokens_per_rank: tokens of a micro-batch. compute_bytes: of a weight in use, an activation and a row. accumulation:
    micro-batches per rank and optimizer step. checkpointing: none, full or keep_exchanges. is_mixed: whether products
    run in bf16 under autocast. micro_batch_size: sequences of a micro-batch. precision, hardware: by their names.
    """

    tokens_per_rank: int
    micro_batch_size: int = 1
    precision: str = "fp32"
    hardware: str = ""
    compute_bytes: int = 4
    accumulation: int = 1
    checkpointing: str = "none"
    is_mixed: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerParams:
    """Parameters of one rewritten site; `dense` is what it replaces, `expert` one routed expert."""

    dense: int
    expert: int
    experts: int
    shared: int
    router: int


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """Parameters of the rewritten model by how they are placed.

    dense: everything but routed experts and routers. active: parameters that one token uses.
    """

    dense: int
    experts: int
    router: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + self.router


def ffn_params(site: PlannedSite, d_hidden: int) -> int:
    """Parameters of an FFN like `site` with hidden width `d_hidden`; none at width 0."""
    if d_hidden == 0:
        return 0
    up = site.num_in_projections * (site.d_model + site.bias_up) * d_hidden
    return up + (d_hidden + site.bias_down) * site.d_model


def layer_params(layer: LayerPlan) -> LayerParams:
    """Parameters before and after one site is rewritten."""
    expert = ffn_params(layer.site, layer.experts.d_expert)
    if isinstance(layer.site, ExpertsSite):
        stack = layer.experts.num_routed * expert
        return LayerParams(dense=stack, expert=expert, experts=stack, shared=0, router=0)
    return LayerParams(
        dense=ffn_params(layer.site, layer.site.d_ff),
        expert=expert,
        experts=layer.experts.num_routed * expert,
        shared=ffn_params(layer.site, layer.experts.d_shared) + layer.experts.shared_gate * layer.site.d_model,
        router=layer.experts.num_routed * (layer.site.d_model + layer.routing.bias),
    )


def model_params(layers: Sequence[LayerPlan], facts: ModelFacts) -> ModelParams:
    """Parameters of the rewritten model."""
    counts = [layer_params(layer) for layer in layers]
    dense = facts.params_total + sum(c.shared - c.dense for c in counts)
    router = sum(c.router for c in counts)
    used = sum(layer.routing.top_k * c.expert for layer, c in zip(layers, counts, strict=True))
    return ModelParams(dense=dense, experts=sum(c.experts for c in counts), router=router, active=dense + router + used)


def trained_params(layers: Sequence[LayerPlan], facts: ModelFacts) -> ModelParams:
    """Those of `model_params` that have gradients; `active` is the model's.

    What is made of frozen weights is frozen, a new router and what is drawn anew is trained. What is made of a module
    of which some weights are frozen counts as trained, so the numbers are upper bounds.
    """
    params, (stays, _) = model_params(layers, facts), facts.frozen.get("", (0, 0))
    dense, experts = params.dense, params.experts
    for layer in layers:
        counts = layer_params(layer)
        frozen, inside = facts.frozen.get(layer.site.fqn, (counts.dense, 0))  # a path that is no module's: unknown
        stays -= min(frozen, counts.dense)  # replaced
        if frozen == inside and layer.experts.init not in ("random", "drop"):
            experts -= counts.experts
            dense -= counts.shared - layer.experts.shared_gate * layer.site.d_model
    return replace(params, dense=dense - max(stays, 0), experts=experts)
