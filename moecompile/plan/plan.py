"""The Plan: frozen, without tensors, the same on every rank. All ranks must have the same hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from moecompile.errors import PlanError
from moecompile.mesh import MeshSpec, Part, axes_that_split, dense_axes, expert_axes
from moecompile.plan.adapters import AdaptersPlan
from moecompile.plan.checks import plan_errors
from moecompile.plan.context_parallel import ExchangedAttention, check_context
from moecompile.plan.dispatch import DispatchPlan, can_fuse
from moecompile.plan.layers import LayerPlan
from moecompile.plan.lookups import Lookup
from moecompile.plan.recompute import Recomputed
from moecompile.plan.tensor_parallel import SplitModules, check_split
from moecompile.stages import Pipeline, stage_of


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How the gradients of one class of parameters are summed.

    parameters: `dense`, `router`, `experts`, and with `tp` the classes that it treats differently. replicated_over,
    sharded_over: mesh axes of the weights. sum_over: axes whose ranks each have a part of the gradient, summed by
    FSDP's reduce-scatter or an all-reduce; the EP axis of experts is not among them, because the backward all-to-all
    sums over it.
    """

    parameters: str
    replicated_over: tuple[str, ...]
    sharded_over: tuple[str, ...]
    sum_over: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest rank. apart: bytes of these parts that never coexist; less than 0: bytes that are beside
    them for a moment, of weights that come early and of gradients that are summed.
    """

    weights: int
    grads: int
    optimizer: int
    activations: int
    dispatch: int
    apart: int = 0

    @property
    def total(self) -> int:
        """Bytes at the fullest moment: the sum of all parts, without what is apart."""
        return self.weights + self.grads + self.optimizer + self.activations + self.dispatch - self.apart

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        return max(("weights", "grads", "optimizer", "activations", "dispatch"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes per token and MoE layer that leave a rank in forward (dispatch, combine, metadata), by link class."""

    intra_node: float
    inter_node: float

    def times(self, factor: float) -> Traffic:
        """All of it `factor` times."""
        return Traffic(intra_node=self.intra_node * factor, inter_node=self.inter_node * factor)


@dataclass(frozen=True, kw_only=True)
class Lending:
    """What lending costs a rank at most, over the layers that lend.

    expert_bytes: of the largest expert, which travels in forward; its gradient, as many, travels back. bytes_received:
    of one micro-batch and layer in forward, with every slot in use. slot_bytes: memory of the slots of all layers, and
    of their gradients in one layer.
    """

    expert_bytes: int
    bytes_received: int
    slot_bytes: int


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """The experts of all layers on ranks that share them, bytes of a rank.

    ranks: that hold the same experts and cut each stack of them. stored: shards of the fullest. gathered: received in
    one gather of all layers. reduced: sent in one reduction of gradients. times_even: numbers on the fullest rank over
    its even share: 1, or more where a stack has no dim that the ranks divide.
    """

    ranks: int
    stored: int
    gathered: int
    reduced: int
    times_even: float


@dataclass(frozen=True, kw_only=True)
class WeightTraffic:
    """What FSDP sends of weights, bytes that a rank receives in an optimizer step: weights that it gathers, gradients
    that it reduces, and their sums over replicas. Validation gathers more.
    """

    gathered: int
    reduced: int
    replicas: int


@dataclass(frozen=True, kw_only=True)
class LookupTraffic:
    """What lookups in spread tables cost. stored: bytes of the rows of a rank, of stages one of that with the most.
    forward, backward: bytes that a rank sends in a micro-batch, of ids and rows, and of gradients, a mean over stages.
    share: of the rows that tokens read, those that are sent because they are different.
    """

    stored: int
    forward: int
    backward: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The assumptions of an estimate.

    hardware, memory_bytes: of one rank. tokens_per_rank: tokens of a micro-batch, in sequences of `seq_len`.
    accumulation: micro-batches per rank and optimizer step. precision: of weights and arithmetic, for people.
    number_bytes: of a number of a row that is sent as it is computed.
    """

    hardware: str
    memory_bytes: int
    tokens_per_rank: int
    seq_len: int
    accumulation: int
    precision: str
    number_bytes: int
    optimizer: str


FITS, IF_EVEN, TOO_LARGE = "yes", "if even", "no"
"""Whether a layout fits: at the load to be expected, only if every rank gets the mean rows, or not even then."""


def fit_of(even: float, expected: float, limit: float) -> str:
    """One of the three words, from the bytes of a rank with an even and with the expected load."""
    return FITS if expected <= limit else IF_EVEN if even <= limit else TOO_LARGE


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of the config, as it was planned: bytes of the fullest rank with an even and with the expected load,
    seconds of a step, and whether it fits (as in `Estimate`).
    """

    change: str
    total: int
    uneven: int
    seconds: float
    fits: str


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """What a budget chose for layers that are alike, and what it costs.

    site: path of the first of them. parts: that backward computes again; none: nothing. sends: whether their exchanges
    are sent again. layers: how many. kept, kept_uneven: bytes that one of them keeps for backward, of all micro-batches
    in flight, with an even and with the expected load. seconds: that a step of its rank takes longer for all of them.
    """

    site: str
    parts: tuple[str, ...]
    sends: bool
    layers: int
    kept: int
    kept_uneven: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the planner predicts.

    params_active: parameters that one token uses. params_trained: those that are not frozen. checkpointing: what
    backward recomputes; `resent_...`: what it sends again for that, in addition to the forward's bytes.
    tp_bytes_per_token: what leaves a rank over `tp` in the forward of the whole model: all-reduces after split linears,
    and the joins of MoE layers. cp_bytes_per_token: the same over `cp`: the exchanges of attention. params_muon:
    parameters of matrices that Muon steps; optimizer_bytes_per_step: what a rank sends for them in an optimizer step,
    as a mean over ranks. expected_load: rows of the fullest rank over their mean that are to be expected, and
    expected_from: why; memory_bytes_uneven: of such a rank, in total. fits: `yes` with these rows, `if even`: only
    with the mean, or `no`. largest: the largest part of the memory, in words. remedies: what to change if it is not
    `yes`, and tried: what was put through the planner to find them. lending: None if no layer lends experts.
    expert_shards: None if every rank has experts of its own. weight_traffic: None on one rank. recomputation: with
    checkpointing=budget, what was chosen. stage_bytes_per_step: what the rank of a pipeline that sends the most sends
    to other stages in an optimizer step. lookup_bytes: None if no rows of embedding tables are spread.
    """

    params_total: int
    params_active: int
    params_trained: int
    memory_bytes_per_rank: MemoryEstimate
    fits: str
    bytes_per_token_per_layer: Traffic
    checkpointing: str
    resent_bytes_per_token_per_layer: Traffic
    tp_bytes_per_token: Traffic = Traffic(intra_node=0.0, inter_node=0.0)
    cp_bytes_per_token: Traffic = Traffic(intra_node=0.0, inter_node=0.0)
    params_muon: int = 0
    optimizer_bytes_per_step: Traffic = Traffic(intra_node=0.0, inter_node=0.0)
    memory_bytes_uneven: int = 0
    expected_load: float = 1.0
    expected_from: str = ""
    largest: str = ""
    assumes: Assumptions | None = None
    remedies: tuple[Remedy, ...] = ()
    tried: str = ""
    lending: Lending | None = None
    expert_shards: ExpertShards | None = None
    weight_traffic: WeightTraffic | None = None
    recomputation: tuple[Recomputation, ...] = ()
    stage_bytes_per_step: int = 0
    lookup_bytes: LookupTraffic | None = None

    @property
    def bytes_over(self) -> dict[str, Traffic]:
        """Axis -> what leaves a rank over it per token, in the forward of the whole model."""
        end = "_bytes_per_token"
        return {name.removesuffix(end): sent for name, sent in vars(self).items() if name.endswith(end)}


REDUCE, GATHER = ("each", "last"), ("layer", "step")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The reviewable result of planning, and the lock file `plan.yaml`.

    Attributes:
        mesh: the ranks and their axes.
        layers: one for each FFN or stack of experts that is rewritten.
        reductions: over which axes gradients are summed, for each class of weights.
        adapters: what is trained in place of the model's weights; None: the weights themselves.
        tensor_parallel: modules outside of the MoE layers that are split over `tp`.
        context_parallel: attention that exchanges positions for heads over `cp`.
        reduce: when gradients of sharded weights are reduced: after `each` micro-batch, or the `last` one of a step.
        gather: when sharded weights are gathered: each `layer` twice in a micro-batch, or all of them once in a `step`.
        recomputed: what backward computes again, where it is chosen for each layer; other layers keep all they need.
        pipeline: the stages of the model over `pp`; None: every rank has all layers.
        lookups: embedding tables whose rows are spread over ranks.
        estimate: memory and bytes, which `hash` leaves out.

    Raises:
        PlanError: two layers have the same site, a layer is placed on another mesh, or computed again in two ways.
    """

    mesh: MeshSpec
    layers: tuple[LayerPlan, ...]
    reductions: tuple[Reduction, ...]
    adapters: AdaptersPlan | None = None
    tensor_parallel: tuple[SplitModules, ...] = ()
    context_parallel: tuple[ExchangedAttention, ...] = ()
    reduce: str = "last"
    gather: str = "layer"
    recomputed: tuple[Recomputed, ...] = ()
    pipeline: Pipeline | None = None
    lookups: tuple[Lookup, ...] = ()
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        for name, words in (("reduce", REDUCE), ("gather", GATHER)):
            if getattr(self, name) not in words:
                raise PlanError(name, getattr(self, name), f"must be {' or '.join(words)}", "Use one of these")
        with plan_errors():
            check_split(self.mesh, self.tensor_parallel)
            check_context(self.mesh, self.context_parallel)
        again = [path for each in self.recomputed for path in each.layers]
        if twice := sorted({path for path in again if again.count(path) > 1}):
            raise PlanError("recomputed", twice[0], "is listed twice", "Remove one of the entries")
        if (ranks := 1 if self.pipeline is None else self.pipeline.ranks) != self.mesh.pp:
            raise PlanError("pipeline.ranks", ranks, f"must be mesh.pp={self.mesh.pp}", "Plan again for this mesh")
        seen: set[str] = set()
        for i, layer in enumerate(self.layers):
            if layer.site.fqn in seen:
                raise PlanError(f"layers[{i}].site.fqn", layer.site.fqn, "is planned twice", "Remove one of the layers")
            seen.add(layer.site.fqn)
            if layer.placement.ep != self.mesh.ep:
                raise PlanError(
                    f"layers[{i}].placement.ep", layer.placement.ep, f"must be mesh.ep={self.mesh.ep}",
                    "Plan again for this mesh",
                )  # fmt: skip
            if layer.cut_over != self.mesh.axes(Part.TOKENS):
                cut_over, rule = f"[{', '.join(layer.cut_over)}]", f"does not fit {self.mesh.setting(Part.TOKENS)}"
                fix = f"Use [{', '.join(axes_that_split(Part.TOKENS))}] if and only if it is more than 1"
                raise PlanError(f"layers[{i}].cut_over", cut_over, rule, fix)
            if layer.dispatch.on_two_levels and layer.placement.nodes != self.mesh.nodes_per_ep_group:
                raise PlanError(
                    f"layers[{i}].placement.nodes", layer.placement.nodes,
                    f"an EP group of this mesh spans {self.mesh.nodes_per_ep_group}", "Plan again for this mesh",
                )  # fmt: skip

    @cached_property
    def hash(self) -> str:
        """16 hex digits over everything but the estimate."""
        body = asdict(replace(self, estimate=None))
        if self.pipeline is None:  # as before there were pipelines
            del body["pipeline"], body["mesh"]["pp"]
        if not self.lookups:  # as before rows were spread
            del body["lookups"]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]

    def is_counted(self, rank: int) -> bool:
        """Whether global `rank` is the one of those with the same tokens that counts them, in sums over all ranks.

        Of stages the last one, which has the loss.
        """
        place = 0 if self.pipeline is None else self.pipeline.rank_with_loss
        return self.mesh.counts_in_stage(rank) and self.mesh.index(rank, Part.LAYERS) == place

    def ranks_of(self, layer: LayerPlan) -> list[int]:
        """The global ranks that have a layer: those of its stage."""
        ranks = range(self.mesh.world_size)
        if self.pipeline is None:
            return list(ranks)
        stage = stage_of(self.pipeline, layer.site.fqn)
        assert stage is not None
        place = self.pipeline.rank_of(stage)
        return [rank for rank in ranks if self.mesh.index(rank, Part.LAYERS) == place]

    def layer(self, fqn: str) -> LayerPlan:
        """The layer planned for the region `fqn`.

        Raises:
            KeyError: no layer is planned there.
        """
        for layer in self.layers:
            if layer.site.fqn == fqn:
                return layer
        raise KeyError(fqn)

    def __str__(self) -> str:
        axes = ", ".join(f"{axis}={self.mesh.size(axis)}" for axis in ("ep", *self.mesh.sharing))
        lines = [f"Plan {self.hash}: {len(self.layers)} MoE layers on {self.mesh.world_size} ranks, {axes}"]
        for layer in self.layers:
            e, r = layer.experts, layer.routing
            limit = f", {r.top_groups} of {r.groups} groups" if r.top_groups < r.groups else ""
            limit = f", {r.top_k // r.groups} of each of {r.groups} groups" if r.even_groups else limit
            shared = f" + shared {e.d_shared}" if e.d_shared else ""
            shared += f" in latent {e.latent_size}" if e.latent_size else ""
            lines.append(
                f"  {layer.site.fqn or '<graph>'}: {layer.site.kind} {layer.site.d_model}x{layer.site.d_ff} -> "
                f"{e.num_routed} experts of {e.d_expert}{shared}, {r.score} top-{r.top_k}{limit}, {layer.dispatch.kind}"
            )
        return "\n".join(lines)


# -- over which mesh axes gradients are summed ----------------------------------------------------------------------
#
# The rule, for every class of weights:
#
#     sum over the axes on which tokens are split at that weight, minus the axes that own it
#
# A rank's loss is a sum over its own tokens, so the gradient of a weight is the sum over all ranks whose tokens used
# it. Along an axis that *owns* a weight (its ranks have different parts of it), the forward brings the tokens to the
# weight, and the backward brings their gradients back, so nothing is left to sum there. Along an axis on which tokens
# are *not* split, every rank computes the whole gradient.
#
# Along `cp` tokens are split everywhere: its ranks have different positions of the same sequences. Attention brings all
# positions together, and its backward takes each gradient back to where its position is.
#
# At the norms of single heads, heads are split over `tp` instead of tokens: each rank's gradient is from its own heads,
# a part of the whole one too.


@dataclass(frozen=True, kw_only=True)
class WeightClass:
    """A class of weights on the mesh. Parts stand for the axes that split them.

    split: where tokens (or heads) are split at it. owned: where ranks own different parts of it. stored: over what it
    is stored in parts besides. experts: which factorization of the ranks places it. only_with: it is `dense` on a mesh
    that does not split this.
    """

    name: str
    split: tuple[Part, ...] = (Part.BATCH, Part.SEQUENCE)
    owned: tuple[Part, ...] = (Part.LAYERS,)
    stored: tuple[Part, ...] = ()
    experts: bool = False
    only_with: Part | None = None


DENSE, ROUTER, EXPERTS, TABLES = "dense", "router", "experts", "embedding tables"
SPLIT, HEADS, INSIDE = f"dense, split over {axes_that_split(Part.WEIGHTS)[0]}", "norms of heads", "inside MoE layers"

_TOKENS = (Part.BATCH, Part.SEQUENCE)
_CLASSES = (
    WeightClass(name=DENSE, stored=(Part.STORED,)),
    WeightClass(name=SPLIT, owned=(Part.LAYERS, Part.WEIGHTS), stored=(Part.STORED,), only_with=Part.WEIGHTS),
    WeightClass(
        name=HEADS, split=(*_TOKENS, Part.HEADS), stored=(Part.STORED, Part.HEADS), only_with=Part.WEIGHTS
    ),
    WeightClass(  # shared experts, norms: tokens are cut
        name=INSIDE, split=(*_TOKENS, Part.TOKENS), stored=(Part.STORED, Part.TOKENS), only_with=Part.TOKENS
    ),
    WeightClass(name=ROUTER),
    WeightClass(
        name=EXPERTS, split=(*_TOKENS, Part.STORED_EXPERTS), owned=(Part.LAYERS, Part.EXPERTS),
        stored=(Part.STORED_EXPERTS,), experts=True,
    ),
)  # fmt: skip
_TABLES = WeightClass(name=TABLES, owned=(Part.LAYERS, Part.ROWS))


def reductions(mesh: MeshSpec, *, tables: bool = False) -> tuple[Reduction, ...]:
    """The reductions of all classes of weights on `mesh`; axes of one rank are left out.

    tables: whether rows of embedding tables are spread.
    """
    classes = (*_CLASSES, *((_TABLES,) if tables else ()))
    return tuple(_reduction(each, mesh) for each in classes if each.only_with is None or mesh.axes(each.only_with))


def _reduction(kind: WeightClass, mesh: MeshSpec) -> Reduction:
    axes = mesh.axes(*(expert_axes() if kind.experts else dense_axes()))
    owned, sharded = mesh.axes(*kind.owned), mesh.axes(*kind.owned, *kind.stored)
    return Reduction(
        parameters=kind.name,
        replicated_over=tuple(axis for axis in axes if axis not in sharded),
        sharded_over=tuple(axis for axis in axes if axis in sharded),
        sum_over=tuple(axis for axis in axes if axis in mesh.axes(*kind.split) and axis not in owned),
    )


# -- the plan of the same model on one process ----------------------------------------------------------------------


def on_one_process(plan: Plan) -> Plan:
    """The same model without a mesh: experts and routers stay the same, and all experts are on one rank."""
    mesh = MeshSpec(device=plan.mesh.device)
    layers = tuple(map(on_one_rank, plan.layers))
    return Plan(mesh=mesh, layers=layers, reductions=reductions(mesh), adapters=plan.adapters)  # tables whole


def on_one_rank(layer: LayerPlan) -> LayerPlan:
    """One layer with all of its experts on one rank, fused unless the plan could have fused them and did not.

    Without back ends: it is what they are compared with.
    """
    placement = dataclasses.replace(layer.placement, ep=1, nodes=1, order=())
    dispatch = DispatchPlan(kind="local")
    fusable = can_fuse(layer.site, dispatch) and layer.adapters is None
    fused = fusable and (layer.fused or not can_fuse(layer.site, layer.dispatch))
    experts = dataclasses.replace(layer.experts, backend="")
    return dataclasses.replace(layer, experts=experts, placement=placement, dispatch=dispatch, fused=fused, cut_over=())
