"""Parameter counts before and after rewriting.

    ffn(D, F)  = n (D F + F [bias_up]) + F D + D [bias_down]         n: 2 for gated, 1 for up_down  -> `ffn_params`
    layer      = E ffn(L, d_expert) + ffn(D, d_shared) + D [gate]    experts, shared expert,
                 + E D + E [bias] + E [expert scale] + D [norm]      router,
                 + num_shared D [weights of the shared expert]
                 + (2 L D + L [latent norm])                         projections of a latent width  -> `LayerParams`
    total      = model - sum of ffn(D, d_ff) + sum of layer          over the planned layers        -> `ModelParams`
    active     = the same with K instead of E experts, or K E / (E + Z) with Z identity experts
    adapters   = sum of r (d_in + d_out)                             linears; times E for the weights of experts
    trained    = total - frozen and kept - experts and shared experts made from frozen weights   -> `trained_params`
                 with adapters: these, and the routers if they are trained

Existing experts are part of the model's count: they replace E ffn(D, d_ff) with the same, and their router is kept.
Rows that a model has for identity experts are removed (nn/existing.py).

Legend: D model dim, L width of a row (the latent width, else D), F hidden dim, E routed experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from moecompile.plan import ExpertsSite, LayerPlan, Lookup, Plan, PlannedSite, Recomputed
from moecompile.schema import Config, OptimizerConfig
from moecompile.stages import Stage

BF16_BYTES, FP32_BYTES = 2, 4
AUTO = "auto"
CHECKPOINTING = ("keep_exchanges", "full")
"""What `trainer.checkpointing=auto` tries, in this order."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model before rewriting, as far as the planner needs it.

    params_total: all parameters before rewriting, tied ones once. params_embedding: those outside the layers
    (embeddings, output head, final norm). num_layers, vocab_size: of the model; if they are 0 (a bare graph), only the
    planned layers are counted. has_head: whether it has its output head, as not every stage has. bytes_per_param: of
    stored weights (4: fp32). causal: whether a token must not see later tokens (None: unknown). frozen: module path
    ("": the model) -> its number of frozen parameters, and of all its parameters; empty if none is frozen.
    has_padding_mask: whether the example has one. unmasked: sites whose tokens are not those of the mask. linears:
    module path -> (d_in, d_out) of its linears, without output heads; idle: those that do not run. adapters:
    (parameters of the adapters of linears, whether routers are trained), once they are planned; None: there are no
    adapters. split: what the model's tp_plan names; no_split: why it cannot be used, empty if it can. matrices: name ->
    shape of trained two-dimensional weights of hidden layers. heads: numbers of heads, by their name in the model's
    config. attention: of each layer, where mesh.cp asks for it; no_context: why positions cannot be split, empty if
    they can. d_model: width of the residual stream, by the model's config (0: unknown). kept: what its layers keep for
    backward; None: unknown. ffn_numbers: where that is unknown, what a dense FFN keeps, numbers per token (0: as the
    widest of the planned sites, of which a stage may have none). widened: what was done to make it of a model with
    fewer experts, empty for other models. own_losses: coefficients of the losses of its own routers, by their names in
    the model's config. no_adapters: site -> why the weights of its experts cannot have adapters. routers: site -> path
    of the module that returns the logits of its router, where it or a module in it or around it has a row per expert;
    router_params: those of that one. apart, apart_frozen: trained and frozen parameters of another dtype than most of
    these, which FSDP leaves whole on every rank; apart_bytes: per element of them. weights: all others, added up by
    their dim 0, along which FSDP cuts them; empty if they are unknown. layers: what backward can compute again of each
    layer; empty for a bare graph. cut: how it can be cut into stages, where mesh.pp asks for it. tables: embedding
    tables; spread: those whose rows are spread over ranks, which nothing else here counts, once they are planned.
    """

    params_total: int
    params_embedding: int = 0
    num_layers: int = 0
    vocab_size: int = 0
    has_head: bool = True
    bytes_per_param: int = 4
    causal: bool | None = None
    frozen: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    has_padding_mask: bool = False
    unmasked: frozenset[str] = frozenset()
    linears: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    adapters: tuple[int, bool] | None = None
    split: tuple[SplitFact, ...] = ()
    matrices: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    no_split: str = "the model has no tp_plan, which says how its weights are split"
    heads: Mapping[str, int] = field(default_factory=dict)
    d_model: int = 0
    kept: Kept | None = field(default=None, compare=False, repr=False)
    ffn_numbers: int = 0
    attention: tuple[AttentionFact, ...] = ()
    no_context: str = "the plan is made of a graph, which does not say what its attention is"
    widened: str = ""
    own_losses: Mapping[str, float] = field(default_factory=dict)
    no_adapters: Mapping[str, str] = field(default_factory=dict)
    routers: Mapping[str, str] = field(default_factory=dict)
    router_params: Mapping[str, int] = field(default_factory=dict)
    apart: int = 0
    apart_frozen: int = 0
    apart_bytes: int = FP32_BYTES
    weights: tuple[WeightFact, ...] = ()
    layers: tuple[LayerFact, ...] = ()
    cut: CutFacts | None = field(default=None, compare=False, repr=False)
    tables: tuple[TableFact, ...] = ()
    spread: tuple[TableFact, ...] = ()

    @property
    def trained_tables(self) -> tuple[TableFact, ...]:
        """Of those whose rows are spread; with adapters the weights of the model are frozen."""
        return tuple(fact for fact in self.spread if fact.is_trained) if self.adapters is None else ()


@dataclass(frozen=True, kw_only=True)
class CutFacts:
    """How a model can be cut into stages of a pipeline.

    refused: why it cannot; empty: it can. layers: their paths, in the order of calls. units: what belongs to one stage
    as a whole -> its parameters, 0 of an embedding. tied: names of weights of the first and the last unit, which have
    tied_numbers. stages: the stages that begin with these layers (all but the first one); ValueError: why not. facts:
    those of the part of the model that has these units, and the head or not.
    """

    refused: str
    layers: tuple[str, ...]
    units: Mapping[str, int]
    tied: tuple[tuple[str, str], ...]
    stages: Callable[[tuple[str, ...]], tuple[Stage, ...]]
    facts: Callable[[tuple[str, ...], bool], ModelFacts]
    tied_numbers: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerFact:
    """A layer: its path, and for each part of it (moecompile.plan.recompute) the paths of its modules in the layer. No
    parts: only the whole layer can be computed again. kind: equal for layers that are alike. params: its parameters.
    """

    path: str
    kind: int = 0
    params: int = 0
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightFact:
    """Weights whose dim 0 has `rows` rows, with `params` parameters together.

    site: path of the site that they are a part of. is_root: whether they are outside the layers. split: which dim of
    them the model's tp_plan splits: `rows`, `columns`, or neither, ``. width: numbers of a row, of a matrix or stack
    that is large enough for moments in blocks (moecompile.schema.moments); 0: of others. is_trained: whether they are.
    """

    rows: int
    params: int
    site: str | None = None
    is_root: bool = False
    split: str = ""
    width: int = 0
    is_trained: bool = True


@dataclass(frozen=True, kw_only=True)
class TableFact:
    """An embedding table.

    lookup: its entry in a plan. is_root: whether it is outside the layers. is_trained: whether it is. number_bytes: of
    a stored number. is_apart: whether its dtype is not that of most. refused: why its rows cannot be spread; empty:
    they can.
    """

    lookup: Lookup
    is_root: bool = False
    is_trained: bool = True
    number_bytes: int = FP32_BYTES
    is_apart: bool = False
    refused: str = ""


UNNAMED = "unnamed"
"""Style of a module that a tp_plan would have to name and does not."""


@dataclass(frozen=True, kw_only=True)
class SplitFact:
    """A module or parameter that the model's tp_plan names, or a norm of heads that it leaves out.

    pattern: its entry there, with `*` for a number. kind: `linear`, `embedding`, or its class. size: of the dim that is
    split; size_name: what it is. params: of the parameters that are split, tied ones counted once. site: path of the
    site that it is a part of. width: of its output.
    """

    path: str
    pattern: str
    style: str
    kind: str
    size: int
    size_name: str
    params: int
    site: str | None
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerKept:
    """Bytes of a layer of the model for each token, without MoE layers that are planned in it.

    width: its input. norms, attention, ffn: kept for backward inside of these parts; of norms, what need not be kept if
    they are computed again. rest: kept outside of them, with what they are given. made: the most beside that at a time.
    scores, scores_made: further bytes, kept in attention and made, for each pair of a query and a key position.
    """

    width: float
    rest: float
    norms: float
    attention: float
    ffn: float
    made: float = 0.0
    scores: float = 0.0
    scores_made: float = 0.0


class Kept(Protocol):
    """What the layers of a model keep, by their path, for (bytes of a number in compute, positions of a sequence,
    sequences of a micro-batch, whether matmuls run in bf16 under autocast).

    makes_scores: whether attention makes matrices of scores. instead: implementations that the model has and that make
    none. is_split: whether the model's tp_plan splits its heads. reason: why the answer was empty; empty: it was not.
    """

    makes_scores: bool
    instead: tuple[str, ...]
    is_split: bool
    reason: str

    def __call__(
        self, compute_bytes: int, seq_len: int, micro_batch_size: int, is_mixed: bool
    ) -> Mapping[str, LayerKept]:  # fmt: skip
        """Empty if it is unknown."""


@dataclass(frozen=True, kw_only=True)
class AttentionFact:
    """One attention module: its path, heads of queries and of keys and values, and their widths."""

    path: str
    query_heads: int
    key_heads: int
    d_key: int
    d_value: int


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The training run, as far as the planner needs it.

    tokens_per_rank: tokens of a micro-batch. compute_bytes: bytes per element of a weight in compute, an activation and
    a row. accumulation: micro-batches per rank and optimizer step. checkpointing: none, full, keep_exchanges or budget.
    reduce, gather: when gradients are reduced and weights gathered (schedule.py). These three are `auto` until it is
    chosen. recomputed: with checkpointing=budget, what backward computes again (budget.py). is_mixed: whether matmuls
    run in bf16 under autocast. micro_batch_size: sequences of a micro-batch. precision, hardware: names. optimizer: its
    settings. row_load: rows of the fullest rank over their mean. in_flight: micro-batches of a pipeline that are kept
    for backward at a time, a mean over layers; in_flight_of: those of each layer, by its path. layers_at_once: of the
    largest stage, whose layers have their backward together; 0: all layers have.
    """

    tokens_per_rank: int
    micro_batch_size: int = 1
    precision: str = "fp32"
    hardware: str = ""
    compute_bytes: int = 4
    accumulation: int = 1
    checkpointing: str = "none"
    recomputed: tuple[Recomputed, ...] = ()
    reduce: str = "last"
    gather: str = "layer"
    is_mixed: bool = False
    row_load: float = 1.0
    in_flight: float = 1.0
    in_flight_of: tuple[tuple[str, int], ...] = ()
    layers_at_once: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    @property
    def keeps_whole_grads(self) -> bool:
        """Whether gradients of whole layers are kept from micro-batch to micro-batch."""
        return self.accumulation > 1 and self.reduce == "last"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The load that is to be expected: rows of the fullest rank over their mean, and why (cost_model/forecast.py)."""

    load: float = 1.0
    source: str = "even"


BALANCED = Expected()


@dataclass(frozen=True, kw_only=True)
class LayerParams:
    """Parameter counts of one rewritten site.

    dense: of what it replaces. expert: of one routed expert. latent: of the projections of a latent width, which are a
    part of `shared`, as they are used by every token. adapters: of one routed expert's adapters.
    """

    dense: int
    expert: int
    experts: int
    shared: int
    router: int
    latent: int = 0
    adapters: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """Parameter counts of the rewritten model, by placement.

    dense: everything except routed experts, routers and `apart`. active: parameters that one token uses. split_root,
    split_layers: those of `dense` that the model's tp_plan splits, outside and inside the layers. shared: those of
    shared experts, whose gradient is summed over tp, so that FSDP shards them over it. apart: those of another dtype
    than most, which every rank has whole, as it has routers. spread: those of embedding tables whose rows are spread
    over ranks.
    """

    dense: int
    experts: int
    router: int
    active: int
    split_root: int = 0
    split_layers: int = 0
    shared: int = 0
    apart: int = 0
    spread: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts + self.router + self.apart + self.spread


def ffn_params(site: PlannedSite, d_hidden: int) -> int:
    """Parameters of an FFN like `site` with hidden width `d_hidden`; none at width 0."""
    if d_hidden == 0:
        return 0
    up = site.num_in_projections * (site.d_model + site.bias_up) * d_hidden
    return up + (d_hidden + site.bias_down) * site.d_model


def latent_params(layer: LayerPlan) -> int:
    """Parameters of the projections of a latent width; none without one."""
    latent = layer.experts.latent_size or 0
    return latent * (2 * layer.site.d_model + layer.experts.latent_norm)


def _unused(layer: LayerPlan) -> int:
    """Parameters of the rows that transformers keeps for one identity expert, and that are removed."""
    return layer.site.num_in_projections * layer.site.d_model * layer.site.d_ff


def layer_params(layer: LayerPlan) -> LayerParams:
    """Parameters before and after one site is rewritten."""
    expert = ffn_params(layer.row_site, layer.experts.d_expert)
    latent = latent_params(layer)
    if isinstance(layer.site, ExpertsSite):
        stack = layer.experts.num_routed * expert
        rows = layer.experts.num_identity * _unused(layer)
        return LayerParams(
            dense=stack + rows, expert=expert, experts=stack, shared=0, router=0, adapters=_expert_adapters(layer)
        )
    return LayerParams(
        dense=ffn_params(layer.site, layer.site.d_ff),
        expert=expert,
        experts=layer.experts.num_routed * expert,
        shared=ffn_params(layer.site, layer.experts.d_shared) + latent + layer.experts.shared_gate * layer.site.d_model,
        latent=latent,
        router=_router_params(layer),
    )


def _router_params(layer: LayerPlan) -> int:
    routing, d_model = layer.routing, layer.site.d_model
    scored = layer.experts.num_routed + layer.experts.num_identity
    weighed = layer.experts.num_shared * layer.experts.shared_routed
    return scored * (d_model + routing.bias + routing.expert_scale) + (weighed + routing.norm) * d_model


def _expert_adapters(layer: LayerPlan) -> int:
    if layer.adapters is None:
        return 0
    site = layer.site
    widths = {"down_proj": site.d_ff + site.d_model}
    up = site.d_model + site.num_in_projections * site.d_ff  # gate and up are one weight
    return sum(layer.adapters.rank * widths.get(name, up) for name in layer.adapters.weights)


def computed_per_token(layer: LayerPlan) -> float:
    """Experts with weights per token, on average, of the top_k that the router chooses."""
    return layer.routing.top_k * layer.placement.share_computed


def routed(layer: LayerPlan) -> tuple[int, int, int, bool]:
    """Experts with weights per token, rounded; groups of experts; those that a token may use; as many of each."""
    routing = layer.routing
    return round(computed_per_token(layer)), routing.groups, routing.top_groups, routing.even_groups


def model_params(layers: Sequence[LayerPlan], facts: ModelFacts) -> ModelParams:
    """Parameters of the rewritten model."""
    counts = [layer_params(layer) for layer in layers]
    dense = facts.params_total + sum(c.shared - c.dense for c in counts) + (facts.adapters or (0,))[0]
    router = sum(c.router for c in counts)
    used = sum(computed_per_token(layer) * (c.expert + c.adapters) for layer, c in zip(layers, counts, strict=True))
    planned = {layer.site.fqn for layer in layers}
    split = [fact for fact in facts.split if fact.site not in planned]
    apart = min(dense, facts.apart + facts.apart_frozen)
    return ModelParams(
        dense=dense - apart,
        apart=apart,
        experts=sum(c.experts for c in counts) + _all_adapters(layers),
        router=router,
        active=round(dense + router + used + sum(f.lookup.ids_per_token * f.lookup.width for f in facts.spread)),
        split_root=sum(fact.params for fact in split if "*" not in fact.pattern),
        split_layers=sum(fact.params for fact in split if "*" in fact.pattern),
        shared=sum(c.shared for c in counts),
        spread=sum(fact.lookup.numbers for fact in facts.spread),
    )


def _all_adapters(layers: Sequence[LayerPlan]) -> int:
    """Parameters of the adapters of all experts."""
    return sum(layer.experts.num_routed * layer_params(layer).adapters for layer in layers)


def trained_params(layers: Sequence[LayerPlan], facts: ModelFacts) -> ModelParams:
    """Those of `model_params` that are trained; `active` is unchanged.

    Weights made from frozen weights are frozen; a new router and randomly initialized weights are trained. Weights made
    from a partly frozen module count as trained, so the numbers are upper bounds.
    """
    if facts.adapters is not None:
        linears, has_routers = facts.adapters
        sites = [(layer.site.fqn, layer.experts.num_routed * layer.site.d_model) for layer in layers]
        routers = sum(facts.router_params.get(fqn, a_row_each) for fqn, a_row_each in sites) * has_routers
        active = model_params(layers, facts).active
        return ModelParams(dense=linears + routers, experts=_all_adapters(layers), router=0, active=active)
    params, (kept, _) = model_params(layers, facts), facts.frozen.get("", (0, 0))
    dense, experts, apart = params.dense, params.experts, min(params.apart, facts.apart)
    kept -= params.apart - apart
    for layer in layers:
        counts = layer_params(layer)
        frozen, inside = facts.frozen.get(layer.site.fqn, (counts.dense, 0))  # unknown if the path has no module
        kept -= min(frozen, counts.dense)  # replaced
        if frozen == inside and layer.experts.init not in ("random", "drop"):
            experts -= counts.experts
            dense -= counts.shared - counts.latent - layer.experts.shared_gate * layer.site.d_model
    spread = sum(fact.lookup.numbers for fact in facts.trained_tables)
    return replace(params, dense=dense - max(kept, 0), experts=experts, apart=apart, spread=spread)


def checkpointing_of(config: Config, plan: Plan) -> str:
    """What backward computes again: as the config says; `auto` is what the plan's estimate has chosen."""
    given = config.trainer.checkpointing.value
    if given != AUTO:
        return given
    return CHECKPOINTING[0] if plan.estimate is None else plan.estimate.checkpointing
