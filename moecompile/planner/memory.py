"""Memory of the fullest rank, bytes.

P_d, P_e, P_r: dense, expert and router parameters of the model, and P_r those of the model's own whose dtype is not
that of most (transformers keeps some routers in fp32); b: bytes of a stored weight; a: bytes per element of a
weight in compute, an activation and a row (2 with trainer.precision=bf16_params); T: tokens per micro-batch; D, F, E, K
as in params.py; S: width of the shared expert; n: projections before the activation, 2 for gated, 1 for up_down; V:
vocabulary.

1. Parameters that a rank stores.
       own = P_d / (dp_shard cp) + P_e / (ep edp_shard) + P_r                 routers are replicated -> `_own_params`
   More of P_e if no dim of a stack of experts is a multiple of edp_shard, and of P_d where the rows of weights are not.
                                                                                                   -> shards.py
   With tp, those of P_d that the tp_plan splits and the shared experts are divided by tp too.
2. Parameters that FSDP gathers. It frees a layer before it gathers the next, but keeps the root (embeddings, head,
   norm):
       unsharded = root + max over layers of (dense part of the layer + E / ep experts)        -> `_Whole`
                   with gather=step: all of them, P_d + P_e / ep                                  -> `whole_params`
   On one rank, without trainer.precision=bf16_params, nothing is gathered or reduced.             -> `_has_fsdp`
   Gradients, without those of routers: held in all of a step, and those of its fullest micro-batch   -> `Gradients`
       held     from the first micro-batch to the step. With gradient accumulation and
                reduce=last   those of all weights in fp32, reduced once, after the last micro-batch: P_d + P_e / ep;
                              in fp32 a layer's experts' are made beside them, a q below
                reduce=each   4 own, in fp32 or wider
       The others layer by layer, from the last to the first, as FSDP2 gathers, frees and reduces. A layer has p dense
       parameters, in shards of r ranks, and q of its experts, in shards of s:                         -> `_Walk`
       layer    it has its backward: a (head + p + q), as the head's wait for the root's, of p first those of an FFN;
                and 4 (p + q) of the layer before, the fp32 buffer in which it was reduced. Whole are its weights, and
                of the next one's the buffer in which they come, if r, s > 1
       experts  they are reduced first, and their weights are free: a (head + p) + 4 q, beside which are a q until they
                are copied to that buffer, then (4 + b) q / s, what they are summed to
       dense    so is the rest: a head + 4 (p + q), beside which are a p, then (4 + b) p / r
       then     b (p / r + q / s) stay, where fp32 is not added to `held` at once, and with replicas what these have
                summed, 4 (p / r + q / s), unless it is the same; with reduce=last, 4 (p + q) of what is held are free.
                With gather=step the weights of each layer are freed by the last backward alone
       root     a root beside the last layer's buffer; when it is reduced, 4 root, and a root or what it is summed to
       weights = b own + a unsharded,  grads = held + the most of these,  optimizer: optimizer.py
   Router weights and adapters are always fp32. Of spread embedding tables a rank has its own rows, their gradients and
   moments, and with accumulation the gradients of this micro-batch besides (lookups.py). Frozen weights have no
   gradients and no moments: for these two, `own` counts trained parameters only (adapters, if there are any), and their
   number also limits the unsharded gradients.                                               -> `trained_params`
3. Activations that one forward saves for backward, and what a layer's backward needs: A1 to A3.
4. Exchange buffers, allocated in one layer at a time: rows sent and rows received.
       dispatch = max over layers of 2 T copies D a
   Slots for borrowed experts are counted here too.                                               -> lending.py

5. These moments of a micro-batch are compared, each with the whole weights that are there and with activations of the
   layers whose backward is still to come:                                                           -> `together`
       forward   held + kept + forward + dispatch         attention's scores; a layer and the buffer that it came in
       loss      held + kept + loss                       no whole layer, but the buffer of the last
       layer     held + kept + layer + layers + dispatch  of that layer; then without its FFN, and with all gradients
       reduced   held + kept + experts, dense, root
Routing is balanced, except for the total with the load that is to be expected (cost_model/forecast.py). The process
itself (PyTorch, CUDA context, allocator fragmentation) is not counted. benchmarks/memory.py compares this with what
ranks use.

A1. One layer, without its input.
       dense FFN      = a T 2 n d_ff                                 into and out of the activation
       MoE, unfused   = b T (K (2 D + 2 n F) + 2 n S) + a T 2 E      rows in and out, hidden rows; router logits, scores
       MoE, fused     = b K T 2 F + a T 2 n S + T (4 E + 36 K + 12)  what precedes the activation; fp32 scores; ids,
                        + x                                          sources, order and weights of the assignments
       latent width   + a T L (1 + [fused, without exchanges])       input of the projection up; rows of the experts
                      + 2 * 4 T L [norm]                             fp32: its input, and that over its norm
   L: latent width, which is that of rows, D above. b: bytes per element in the experts (2 under autocast). Padding rows
   of bf16 on some CPUs, 1/64 to 1/16, are left out. x: copies of the input. Our router reads it in fp32, which is a
   copy if the input is narrower (4 T D); under autocast, experts read it in bf16 (2 T D), and bf16 copies of their
   weights are kept (2 * 3 D F E / ep). With exchanges, the received rows are kept in the dtype that experts read: b T D
   copies.                                                                                       -> `moe_bytes`
A2. All layers. What one keeps outside of its MoE layer, and makes for a while beside it, per token and (of attention
   that makes a matrix of scores for each head) per pair of positions, is counted by running its own code: `LayerKept`,
   pipeline/kept.py. Where that cannot run it is a Llama's in fp32 with as many heads for keys: 12 D and the dense FFN.
   T tokens have T S pairs in sequences of S; with tp, pairs are divided by it if heads are.          -> `layer_bytes`
       c           = what is kept outside of FFNs
   Two moments are compared: the loss, and the backward of a layer.
       activations = kept + max(loss, layers)                                                   -> `Activations`
       loss        = 3 f T V              f: 4, or a where it is more; log-softmax, its gradient, that of the logits
       layers      = max over layers of again + max over layers of (backward, made)
       forward     = max over layers of made
       kept        = sum over layers of (c + FFN);                                              again = 0
       with checkpointing
       kept        = sum over layers of (input + exchanged), again = c + FFN                    computed again
       forward     = max over layers of (scores + made)
       exchanged   = 2 copies D of an MoE layer with keep_exchanges: rows received in dispatch and combine; else 0
   With checkpointing this is at most what it is without. -> `activations`
   In a pipeline, what a layer keeps is there for as many micro-batches as its stage has in flight (stages.py).
   With checkpointing=budget each layer has its own (budget.py):                                     -> `LayerBytes`
       all of it is computed again    kept = input + exchanged, again as above
       some of its parts are          kept = what the others keep, and the inputs of all; of an FFN that is: exchanged.
                                      again = the largest part that is computed again
       Exchanges that are sent again are not kept.
A3. Backward of one MoE layer: the gradients of rows, in and out, of its input and output, and of hidden rows.
       backward = b T rows + a T 2 D                                                            -> `backward_bytes`
       rows     = K (2 D + F)
       on a GPU, fused and in bf16, where one product computes all experts, with v rows that reach the op, which has one
       for each of its assignments (1 without exchanges):
       rows     = max(v D + K (D + 4 F), 2 v D + K (D + 2 F))        of what precedes the activation; of the rows
   Where exchanges are in flight, weight gradients are computed after those of the rows
   (passes/delay_gradients.py). What they need is kept until then, one layer at a time:
       + b T (K F + copies D)                    fused: gradients of the hidden rows and of the partial sums
       + a T K (n F + D)                         unfused: of the rows into and out of the activation  -> `left_bytes`
A rank gets K T rows with balanced routing; otherwise K stands for K times the rows of the rank over their mean, which a
capacity limits; experts that choose tokens all get the mean. With tp, an MoE layer has T / tp tokens; activations
between split linears are counted whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import NamedTuple

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import (
    ATTENTION,
    BUDGET,
    EXPERTS,
    FFN,
    LAYER,
    NORMS,
    FFNSite,
    LayerPlan,
    MemoryEstimate,
    Recomputed,
)
from moecompile.planner.lending import lending
from moecompile.planner.lookups import kept_bytes, numbers_here, row_buffers, state_of_rows
from moecompile.planner.optimizer import kept_of, muon_params, state_bytes
from moecompile.planner.params import (
    BF16_BYTES,
    FP32_BYTES,
    LayerKept,
    ModelFacts,
    ModelParams,
    RunFacts,
    computed_per_token,
    layer_params,
    model_params,
    trained_params,
)
from moecompile.planner.shards import expert_share, padded_experts, padding
from moecompile.planner.traffic import copies_per_token, rows_brought
from moecompile.schema import Bf16Weights, Precision, resolved

LOGITS_COPIES = 3  # losses upcast logits that are narrower than fp32
ASSIGNMENT_BYTES = 36  # ids, sources and order int64, sources again int32, weights in both orders fp32
SEVERAL = 3  # micro-batches, of which one is neither the first nor the last
TOKEN_BYTES = 12  # saved by the normalization of the weights
_NOT_RUN = ": their code could not be run ("


def memory_of_fullest_rank(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> MemoryEstimate:
    """The estimate in the module docstring."""
    weights, grads, optimizer = model_state_bytes(layers, mesh, facts, run)
    made, buffers = activations(layers, mesh, facts, run), buffer_bytes(layers, mesh, run)
    return MemoryEstimate(
        weights=weights,
        grads=grads.peak,
        optimizer=optimizer,
        activations=made.peak,
        dispatch=buffers,
        apart=grads.peak + made.peak + buffers - together(grads, made, buffers),
    )


def largest_in_words(
    memory: MemoryEstimate, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> str:
    """What the largest part of the memory is."""
    is_one = mesh.world_size == 1
    whole = "all weights, whole over a step" if run.gather == "step" else "layers that are whole one at a time"
    return {
        "weights": "not sharded" if is_one else f"this rank's shards, and {whole}",
        "grads": _grads_in_words(mesh, facts, run),
        "optimizer": _optimizer_in_words(facts, run),
        "activations": _activations_in_words(activations(layers, mesh, facts, run), layers, mesh, facts, run),
        "dispatch": "rows that a rank sends and receives in one layer",
    }[memory.largest] + _not_known(facts)


def _not_known(facts: ModelFacts) -> str:
    if facts.kept is None or not facts.kept.reason:
        return ""
    scores = ", without the scores of eager attention" * facts.kept.makes_scores
    return f". What its layers keep is taken as Llama's{scores}{_NOT_RUN}{facts.kept.reason})"


def reason_not_counted(largest: str) -> str:
    """Why what layers keep is not counted by their code, of `largest_in_words`; empty: it is."""
    return largest.partition(_NOT_RUN)[2].removesuffix(")")


def _dtype(bytes_: int) -> str:
    return {2: "bf16", 4: "fp32", 8: "fp64"}.get(bytes_, f"numbers of {bytes_} bytes")


def _optimizer_in_words(facts: ModelFacts, run: RunFacts) -> str:
    config, number = run.optimizer, trained_bytes(facts)
    has_master = config.bf16_weights is Bf16Weights.master and number == BF16_BYTES
    kind = resolved(config.state, FP32_BYTES * 8 if has_master else number * 8)
    name = _dtype(number) if kind is None else kind.value
    return f"{config.kind.value} in {name}{', and fp32 weights' * has_master}, for this rank's shards"


def _grads_in_words(mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> str:
    is_one = mesh.world_size == 1
    if run.accumulation > 1 and run.reduce == "each" and not is_one:
        return f"fp32, this rank's shards over {run.accumulation} micro-batches, and those of a whole layer"
    is_wide = run.compute_bytes == FP32_BYTES or facts.adapters is not None or (run.accumulation > 1 and not is_one)
    over = f"over {run.accumulation} micro-batches" if run.accumulation > 1 else "until they are reduced"
    return f"{'fp32' if is_wide else 'bf16'}, not sharded{'' if is_one else f', {over}'}"


def _activations_in_words(
    made: Activations, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> str:
    tokens, number = f"{run.tokens_per_rank:,} tokens", max(facts.num_layers, len(layers))
    has_scores = (of := facts.kept) is not None and of.makes_scores
    if of is not None and has_scores and (made.layers + made.forward) / 2 > max(made.kept, made.loss):
        anywhere = mesh.device != "cpu" and not mesh.axes(Part.SEQUENCE)
        instead = [name for name in of.instead if anywhere or name == "sdpa"]
        none = f"; model.attention={' or '.join(instead)} makes none" * bool(instead)
        return f"attention makes scores of all pairs of {tokens} for each head{none}"
    if made.kept >= max(made.loss, made.layers):
        needed = "what backward needs"
        what = {"none": needed, BUDGET: needed, "full": "inputs", "keep_exchanges": "inputs and received rows"}
        return f"{what[run.checkpointing]} of {tokens}, kept for {number} layer{'s' * (number > 1)}"
    if made.loss > made.layers:
        dtype = _dtype(max(FP32_BYTES, run.compute_bytes))
        return f"logits of {tokens} over {facts.vocab_size:,} words, {LOGITS_COPIES} times in {dtype}"
    return f"one layer's forward and backward with {tokens}"


class Moment(NamedTuple):
    """Bytes at a moment at which activations are kept for `rest` of all layers: gradients, and whole weights beyond
    those that are counted as weights (less than 0: below them). place: of the layer that has its backward, -1: any;
    is_late: when that of its FFN is over.
    """

    rest: float
    grads: float
    weights: float = 0
    place: int = -1
    is_late: bool = False

    @property
    def bytes(self) -> float:
        """Of both."""
        return self.grads + self.weights

    def share(self, made: Activations) -> float:
        """Of what layers keep; that of other micro-batches in flight stays."""
        return 1 - (1 - self.rest) / max(1.0, made.in_flight)

    def beside(self, made: Activations) -> float:
        """With the activations that are there."""
        return self.bytes + made.stays + (made.kept - made.stays) * self.share(made)


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Bytes of gradients at the moments of a micro-batch (step 2). held: at all of them. most: at one of them."""

    held: int = 0
    most: int = 0
    forward: tuple[Moment, ...] = (Moment(1, 0),)
    loss: float = 0
    layers: tuple[Moment, ...] = (Moment(1, 0),)
    reduced: tuple[Moment, ...] = ()
    _of_kinds: dict[tuple[int, ...], list[Moment]] = field(default_factory=dict, init=False, compare=False)

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.held + self.most

    def of_kinds(self, kinds: tuple[int, ...]) -> list[Moment]:
        """The moments of layers that can be the fullest, with the kind of the layer as their place.

        Args:
            kinds: of each layer; those of one kind need as much beside gradients and weights. Empty: all are of one.
        """
        if kinds not in self._of_kinds:
            found: dict[tuple[int, bool], list[Moment]] = {}
            for at in self.layers:
                kind = kinds[at.place] if 0 <= at.place < len(kinds) else -1
                found.setdefault((kind, at.is_late), []).append(at._replace(place=kind))
            self._of_kinds[kinds] = [at for some in found.values() for at in _fullest(some)]
        return self._of_kinds[kinds]


def together(grads: Gradients, made: Activations, buffers: int = 0) -> int:
    """Bytes of gradients, activations and buffers of exchanges at their fullest moment (step 5)."""
    return round(grads.held + max(at.beside(made) + more for at, more in _moments(grads, made, buffers)))


def most_kept(grads: Gradients, made: Activations, limit: float, buffers: int = 0) -> float:
    """Bytes that layers may keep for backward so that `together` is at most `limit`; negative: none may."""
    if together(grads, replace(made, kept=made.stays), buffers) > limit:
        return -1.0
    rest, moments = limit - grads.held - made.stays, _moments(grads, made, buffers)
    return made.stays + min((rest - at.bytes - more) / share for at, more in moments if (share := at.share(made)))


def _moments(grads: Gradients, made: Activations, buffers: int) -> list[tuple[Moment, float]]:
    """Each with what is beside gradients, weights and what is kept."""
    moments = [(Moment(1, 0, grads.loss), made.loss), *((at, 0.0) for at in grads.reduced)]
    moments += [(at, made.forward + buffers) for at in grads.forward]
    return moments + [(at, made.at(at) + buffers * (not at.is_late)) for at in grads.of_kinds(made.kinds)]


def model_state_bytes(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> tuple[int, Gradients, int]:
    """Bytes of weights, gradients and optimizer (steps 1 and 2); of `run`, tokens do not matter."""
    params, trained = model_params(layers, facts), trained_params(layers, facts)
    muon = muon_params(layers, mesh, facts, run.optimizer, trained)
    share = expert_share(layers, mesh)
    trained_share = share if facts.adapters is None else expert_share(layers, mesh, adapters_only=True)
    own = own_params(layers, mesh, facts, share, trained=False)
    own_trained = own_params(layers, mesh, facts, trained_share, trained=True)
    whole = _whole(layers, mesh, facts)
    gathered = _gathered_params(whole, layers, mesh, facts, run)
    number, stored = trained_bytes(facts), own * facts.bytes_per_param + _whole_bytes(params, facts)
    tables = numbers_here(facts, mesh)
    stored += sum(here * fact.number_bytes for fact, here in tables.items())
    trained_here = {fact: tables[fact] for fact in facts.trained_tables}
    own_tables = sum(here for fact, here in trained_here.items() if not fact.lookup.by_rows)
    if facts.adapters is not None:
        stored += own_trained * (number - facts.bytes_per_param) + trained.router * FP32_BYTES
    return (
        stored + gathered * run.compute_bytes,
        _with_tables(_grads(own_trained, trained, whole, gathered, mesh, facts, run), own_tables * number, run),
        state_bytes(
            own_trained + own_tables,
            _whole_bytes(trained, facts),
            muon,
            mesh,
            trained_share,
            ceil(trained.experts * trained_share),
            kept_of(layers, mesh, facts, run.optimizer, number),
        )
        + state_of_rows(facts, mesh),
    )


def _with_tables(grads: Gradients, bytes_: int, run: RunFacts) -> Gradients:
    """With those of spread rows: of this micro-batch, and with accumulation of all before, to which they are added."""
    held = bytes_ if run.accumulation > 1 else 0
    layers, reduced = (
        tuple(at._replace(grads=at.grads + bytes_ * (1 - at.rest)) for at in of) for of in (grads.layers, grads.reduced)
    )
    return replace(grads, held=grads.held + held, most=grads.most + bytes_, layers=layers, reduced=reduced)


class Known:
    """Bytes of the layers of a micro-batch, computed once; those of MoE layers once for those that are alike
    (`LayerPlan.alike`).

    Of one mesh, and of runs that differ alone in what is computed again, in what a pipeline keeps, and in when
    gradients are reduced and weights gathered.
    """

    def __init__(self) -> None:
        self._rows: dict[Hashable, float] = {}
        self._most: dict[int, tuple[Sequence[LayerPlan], float]] = {}
        self._layers: dict[tuple[int, int], tuple[Sequence[LayerPlan], ModelFacts, _AllLayers]] = {}

    def rows(self, layers: Sequence[LayerPlan], mesh: MeshSpec, run: RunFacts) -> float:
        """`_exchanged_rows` of the layer that has the most; 0 without any."""
        if id(layers) not in self._most:  # which keeps the layers, whose id must not become another's
            for layer in layers:
                if layer.alike not in self._rows:
                    self._rows[layer.alike] = _exchanged_rows(layer, mesh, run)
            self._most[id(layers)] = layers, max((self._rows[layer.alike] for layer in layers), default=0)
        return self._most[id(layers)][1]

    def layers(self, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> _AllLayers:
        """What these layers, which are those of `facts`, can keep for backward."""
        key = id(layers), id(facts)
        if key not in self._layers:
            self._layers[key] = layers, facts, _AllLayers(layer_bytes(layers, mesh, facts, run))
        return self._layers[key][-1]


def buffer_bytes(layers: Sequence[LayerPlan], mesh: MeshSpec, run: RunFacts, known: Known | None = None) -> int:
    """Bytes of buffers of an exchange (step 4)."""
    rows = (known or Known()).rows(layers, mesh, run)
    lent = lending(layers, run)
    return round(tokens_of_a_rank(mesh, run) * run.compute_bytes * rows) + (0 if lent is None else lent.slot_bytes)


def own_params(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, share: Fraction, *, trained: bool
) -> int:
    """Sharded parameters that one rank stores (step 1), or those of them that are trained; without routers, which are
    replicated. share: of experts.
    """
    every = model_params(layers, facts)
    params = trained_params(layers, facts) if trained else every
    split = params.split_root + params.split_layers + params.shared if mesh.axes(Part.WEIGHTS) else 0
    split = min(params.dense, split)
    dense = mesh.share(params.dense - split, Part.STORED) + mesh.share(split, Part.STORED, Part.WEIGHTS)
    added = padding(layers, mesh, facts)
    padded = mesh.share(added.layers + added.root, Part.STORED)
    if trained:
        padded = padded * params.dense // max(1, every.dense) if facts.adapters is None else 0
    return dense + padded + ceil(params.experts * share)


def trained_bytes(facts: ModelFacts) -> int:
    """Bytes of a stored number that is trained."""
    return facts.bytes_per_param if facts.adapters is None else max(FP32_BYTES, facts.bytes_per_param)


def _whole_bytes(params: ModelParams, facts: ModelFacts) -> int:
    """Bytes of those that every rank has whole."""
    return params.router * FP32_BYTES + params.apart * facts.apart_bytes


def _has_fsdp(mesh: MeshSpec, run: RunFacts) -> bool:
    """Whether FSDP gathers weights and reduces gradients: on one rank, where layers compute in another dtype."""
    return mesh.world_size > 1 or run.precision.startswith(Precision.bf16_params.value)


@dataclass(frozen=True, kw_only=True)
class _Whole:
    """Parameters of what FSDP gathers as a whole (step 2): root, and layers, in order: each without experts, and of
    them. ffns: of the former, those whose backward comes first: of shared experts, or where no experts are, all.
    """

    root: int
    layers: tuple[tuple[int, int], ...]
    ffns: tuple[int, ...]

    @property
    def largest(self) -> tuple[int, int]:
        """Of the layers."""
        return max(self.layers, key=sum)

    @property
    def at_once(self) -> int:
        """What is unsharded at the same time."""
        return self.root + sum(self.largest)


def _whole(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> _Whole:
    """What no planned site has is spread over layers as the model's own parameters are; evenly, where those are
    unknown.
    """
    counts, params = [layer_params(layer) for layer in layers], model_params(layers, facts)
    in_layers = params.dense - facts.params_embedding - sum(c.shared for c in counts)
    in_layers -= params.split_layers - mesh.share(params.split_layers, Part.WEIGHTS)
    in_layers += padding(layers, mesh, facts).layers
    own = {fact.path: fact.params for fact in facts.layers}
    made = dict.fromkeys(own, (0, 0))
    for i, (layer, of) in enumerate(zip(layers, counts, strict=True)):
        path = owner_of(layer, own) or f"#{i}"
        shared, experts = made.get(path, (0, 0))
        made[path] = shared + of.shared, max(experts, padded_experts(layer, mesh))
        own[path] = own.get(path, 0) - of.dense
    for table in facts.spread:
        path = next((path for path in own if table.lookup.weight.startswith(f"{path}.")), "")
        own[path] = own.get(path, 0) - table.lookup.numbers
    made |= {f"#{i}": (0, 0) for i in range(len(made), max(1, facts.num_layers))}
    parts = {path: max(0, own.get(path, 0)) for path in made}
    if not any(parts.values()):
        parts = dict.fromkeys(made, 1)
    total = sum(parts.values())
    sizes = [(-(-in_layers * parts[path] // total) + shared, experts) for path, (shared, experts) in made.items()]
    ffns = (shared if experts else dense for (dense, experts), (shared, _) in zip(sizes, made.values(), strict=True))
    return _Whole(root=whole_params(layers, mesh, facts)[1], layers=tuple(sizes), ffns=tuple(ffns))


def whole_params(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> tuple[int, int]:
    """Parameters of all layers, and of the root, on a rank that has gathered them (step 2)."""
    params, added = model_params(layers, facts), padding(layers, mesh, facts)
    root = facts.params_embedding - params.split_root + mesh.share(params.split_root, Part.WEIGHTS) + added.root
    in_layers = params.dense - facts.params_embedding
    in_layers -= params.split_layers - mesh.share(params.split_layers, Part.WEIGHTS) - added.layers
    return in_layers + sum(padded_experts(layer, mesh) for layer in layers), root


def _gathered_params(
    whole: _Whole, layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> int:  # fmt: skip
    """Parameters that are whole at the same time."""
    if _has_fsdp(mesh, run):
        return sum(whole_params(layers, mesh, facts)) if run.gather == "step" else whole.at_once
    return 0


def _grads(
    own: int, trained: ModelParams, whole: _Whole, gathered: int, mesh: MeshSpec, facts: ModelFacts, run: RunFacts
) -> Gradients:
    """Step 2, with those of whole weights; `own`: trained parameters that the rank stores; gathered: those that are
    whole.
    """
    split = min(trained.dense, trained.split_root + trained.split_layers)
    all_grads = trained.dense - split + mesh.share(split, Part.WEIGHTS) + mesh.share(trained.experts, Part.EXPERTS)
    number, router, is_summed = trained_bytes(facts), _whole_bytes(trained, facts), run.accumulation > 1
    if not _has_fsdp(mesh, run):
        every = own * number + router
        if not is_summed:
            return Gradients(most=every, layers=(Moment(1, 0), Moment(0, every)))
        experts = min(all_grads, max(experts for _, experts in whole.layers))  # made before they are added
        return Gradients(held=every, layers=(Moment(1, run.compute_bytes * experts),))
    walk = _Walk(whole, gathered, mesh, facts, run, own, all_grads, 0 if is_summed else router)
    layers, reduced = walk.backward()
    held = (own * walk.wide + router) * is_summed
    if run.keeps_whole_grads:
        held = max(own * number, all_grads * FP32_BYTES) + router
    return Gradients(
        held=held, forward=_fullest(walk.forward()), loss=walk.at_loss, layers=tuple(layers), reduced=_fullest(reduced),
        most=0 if run.keeps_whole_grads else round(max(at.grads for at in layers + reduced)),
    )  # fmt: skip


def _fullest(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Those that can be the fullest, whatever layers keep: what they keep is proportional to `rest`, so these are the
    corners of the upper hull of (rest, bytes).
    """
    found = list[Moment]()
    for each in sorted(moments, key=lambda at: (-at.rest, -at.bytes)):
        if found and each.bytes <= found[-1].bytes:
            continue
        while len(found) > 1 and _is_below(found[-1], found[-2], each):
            found.pop()
        found.append(each)
    return tuple(found)


def _is_below(at: Moment, before: Moment, after: Moment) -> bool:
    """Whether a moment between two others is not above the line through them."""
    rise = (after.bytes - before.bytes) * (before.rest - at.rest)
    return (at.bytes - before.bytes) * (before.rest - after.rest) <= rise + 1e-6


class _Walk:
    """Forward and backward of a micro-batch through layers that FSDP gathers, frees and reduces one by one (step 2).

    Args:
        gathered: parameters that are whole at one time. own, all_grads: trained ones, of the rank's shards and whole.
        replicated: bytes of gradients that are not in shards.
    """

    def __init__(
        self, whole: _Whole, gathered: int, mesh: MeshSpec, facts: ModelFacts, run: RunFacts, own: int, all_grads: int,
        replicated: int,
    ) -> None:  # fmt: skip
        self.weight, self.gathered, self.replicated = run.compute_bytes, gathered, replicated
        number, self.all_grads = trained_bytes(facts), all_grads
        self.root = min(all_grads, whole.root) if facts.adapters is None else 0
        self.head = min(self.root, facts.vocab_size * facts.d_model or self.root) if facts.has_head else 0
        self.made = run.compute_bytes if facts.adapters is None else FP32_BYTES
        self.wide = max(FP32_BYTES, number)
        self.cast = number if number < self.wide else 0  # of what is reduced
        self.is_added, self.of_step = run.keeps_whole_grads, run.gather == "step"
        self.kept = number if run.accumulation == 1 or self.cast or self.is_added else 0  # else added to what is held
        # What replicas sum FSDP2 has until the end of a backward, beside what it is cast to.
        self.summed = self.wide * bool(self.cast and mesh.dp_replicate > 1 and (run.accumulation == 1 or self.is_added))
        self.accumulation, self.is_beside = run.accumulation, run.layers_at_once != 1
        self.frees = not self.of_step or run.accumulation < SEVERAL or self.is_added
        self.ffns = whole.ffns
        self.layers, self.largest, self.total = whole.layers, sum(whole.largest), sum(map(sum, whole.layers))
        self.ranks = mesh.size(Part.STORED), mesh.edp_shard
        self.flat = [[part if n > 1 else 0 for part, n in zip(of, self.ranks, strict=True)] for of in self.layers]
        shards = [sum(part / n for part, n in zip(of, self.ranks, strict=True)) for of in self.layers]
        self.own_root = min(own, self.root // self.ranks[0])
        self.own = [(own - self.own_root) * of / max(1, sum(shards)) for of in shards]

    def _grads(self, params: int) -> int:
        return min(self.all_grads, params)

    @property
    def at_loss(self) -> int:
        """Weights at the loss: the last layer's are on their way."""
        return 0 if self.of_step else self.weight * (sum(self.flat[-1]) - self.largest)

    def forward(self) -> Iterator[Moment]:
        """Each layer is gathered into a buffer, from which its weights are copied."""
        count, below = len(self.layers), 0
        for i, ((dense, experts), (flat, flat_experts)) in enumerate(zip(self.layers, self.flat, strict=True)):
            here = dense + flat_experts + max(flat, experts) + (below - self.total if self.of_step else -self.largest)
            stay = self.of_step and self.accumulation > 1  # beside what is held
            yield Moment((i + 1) / count, 0, self.weight * (0 if stay else here))
            below += dense + experts

    def backward(self) -> tuple[list[Moment], list[Moment]]:
        """Of each layer: while it is computed, and when it is reduced, experts first; then of the root."""
        layers, reduced, count = list[Moment](), list[Moment](), len(self.layers)
        (dense_ranks, expert_ranks), wide, out, size = self.ranks, self.wide, self.wide + self.cast, self._grads
        is_in_place = self.is_added and self.made == FP32_BYTES
        made = 0 if is_in_place else self.made  # of what is not reduced yet
        copied, freed = (0, FP32_BYTES) if self.is_added else (self.made, 0)  # by the copy into the buffer
        shards, above, last = 0.0, 0, 0
        for i in reversed(range(count)):
            dense, experts = self.layers[i]
            both, of_experts, rest = size(dense + experts), size(experts), (i + 1) / count
            here = self.made * (of_experts if is_in_place else size(self.head + dense + experts))
            coming = sum(self.flat[i - 1]) if i else 0
            whole = -above * self.frees if self.of_step else dense + experts + coming - self.largest
            first = here if is_in_place else self.made * size(self.head + self.ffns[i] + experts)
            times = [(shards + last, self.weight * whole)]
            if self.is_added and (i == 0 or self.accumulation >= SEVERAL):  # of a micro-batch before
                times.append((0.0, 0 if self.of_step else self.weight * whole))
            for beside, weights in times:
                layers += [
                    Moment(rest, beside + first, weights, i),
                    Moment(rest, beside + here, weights, i, is_late=True),
                ]
            whole, rest = whole - experts * self.frees, i / count
            grads = shards + made * size(self.head + dense) + wide * of_experts
            grads += max(copied * of_experts, out * of_experts / expert_ranks - freed * of_experts)
            reduced.append(Moment(rest, grads, self.weight * whole))
            whole -= dense * self.frees
            kept = (self.kept + self.summed) / expert_ranks - freed
            grads = shards + made * self.head + wide * both + kept * of_experts
            grads += max(copied * size(dense), out * size(dense) / dense_ranks - freed * size(dense))
            reduced.append(Moment(rest, grads, self.weight * whole))
            shards += (self.kept + self.summed) * self.own[i] - freed * both + self.replicated / count
            above, last = above + dense + experts, wide * both * self.is_beside
        # The root, whose weights are whole until it is reduced.
        whole = -self.weight * (self.total if self.of_step else self.largest) * self.frees
        here = self.made * (self.head or self.root if is_in_place else self.root)
        reduced.append(Moment(0, shards + here + last, whole))
        if not self.is_added:
            grads = shards + wide * self.root + max(here, out * self.root / dense_ranks)
            reduced.append(Moment(0, grads, -self.weight * self.gathered * self.frees))
        return layers, reduced


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes (A2). kept: from forward until a layer's backward, of in_flight micro-batches, but for the part that stays
    in all of backward. loss, layers, forward: more than that, at a moment. kinds: of each layer, if known. each: of a
    kind, `layers`, and what is left of it when the backward of its FFN is over.
    """

    kept: float
    loss: float
    layers: float
    forward: float = 0.0
    in_flight: float = 1.0
    stays: float = 0.0
    kinds: tuple[int, ...] = ()
    each: tuple[tuple[float, float], ...] = ()

    def at(self, moment: Moment) -> float:
        """What the backward of a layer needs, whose kind is the place of a moment."""
        return self.each[moment.place][moment.is_late] if moment.place >= 0 else self.layers

    @property
    def peak(self) -> int:
        """At the fullest one of the moments."""
        return round(self.kept + max(self.loss, self.layers, self.forward))


def activations(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, known: Known | None = None
) -> Activations:  # fmt: skip
    """Step A2, with what lookups in spread tables keep."""
    made = _of_layers(layers, mesh, facts, run, known or Known())
    stays = kept_bytes(facts, run)
    return replace(made, kept=made.kept + stays, in_flight=run.in_flight, stays=stays)


def _of_layers(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, known: Known
) -> Activations:  # fmt: skip
    of = known.layers(layers, mesh, facts, run)
    buffers = row_buffers(facts, mesh, run.tokens_per_rank, run.compute_bytes)
    backward = max(of.backward, buffers)
    loss = LOGITS_COPIES * facts.vocab_size * max(FP32_BYTES, run.compute_bytes) * run.tokens_per_rank
    found = Activations(
        kept=of.kept(None, run), loss=loss, layers=backward, forward=of.made, kinds=of.kinds,
        each=of.each(buffers, again=False),
    )  # fmt: skip
    if run.checkpointing == "none":
        return found
    if run.checkpointing == BUDGET:
        chosen = {path: each for each in run.recomputed for path in each.layers}
        of_path = [(path, chosen.get(path), of) for path, of in layer_bytes(layers, mesh, facts, run).items()]
        at_once = max((of.again(what.parts) for _, what, of in of_path if what is not None), default=0.0)
        times = dict(run.in_flight_of)
        kept = sum(times.get(path, 1) * of.kept(what) for path, what, of in of_path)
        return Activations(kept=kept, loss=loss, layers=at_once + backward, forward=of.forward)
    again = Recomputed(layers=(), parts=(LAYER,), modules=("",), sends=run.checkpointing == "full")
    repeated = Activations(
        kept=of.kept(again, run), loss=loss, layers=of.again + backward, forward=of.forward, kinds=of.kinds,
        each=of.each(buffers, again=True),
    )  # fmt: skip
    return min(found, repeated, key=lambda each: each.peak)


def ffn_numbers(layers: Sequence[LayerPlan]) -> int:
    """What the widest site keeps as a dense FFN, per token (A1)."""
    return max((2 * layer.site.num_in_projections * layer.site.d_ff for layer in layers), default=0)


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """What a layer of the model can keep for backward (A2), bytes: `LayerKept` of all tokens, with scores in attention
    and in made, and of MoE layers that are planned in it. exchanged: rows that exchanges of forward bring. backward:
    what it makes for a while (A3).
    """

    width: float
    rest: float
    norms: float
    attention: float
    ffn: float
    made: float
    scores: float
    exchanged: float
    backward: float

    def kept(self, again: Recomputed | None) -> float:
        """With these parts computed again."""
        parts = () if again is None else again.parts
        exchanged = 0.0 if again is None or again.sends else self.exchanged
        if LAYER in parts:
            return self.width + exchanged
        ffn = exchanged if EXPERTS in parts or FFN in parts else self.ffn
        norms, attention = (0.0 if part in parts else of for part, of in self._others)
        return self.rest + norms + attention + ffn

    def again(self, parts: Sequence[str]) -> float:
        """What backward computes again at a time."""
        of = {LAYER: self.kept(None), EXPERTS: self.ffn, FFN: self.ffn, **dict(self._others)}
        return max(of[part] for part in parts)

    @property
    def _others(self) -> tuple[tuple[str, float], ...]:
        return (NORMS, self.norms), (ATTENTION, self.attention)


class _AllLayers:
    """`LayerBytes` of all layers of a rank, of one micro-batch.

    Attributes:
        kinds: of each layer, its place among those that differ. made: the most that forward makes in one of them, and
            forward: in one that is computed again; backward: the most of what backward makes. again: the most that
            backward computes again at a time, if it does whole layers.
    """

    def __init__(self, layers: Mapping[str, LayerBytes]) -> None:
        self._layers = list(Counter(layers.values()).items())
        kinds = {of: kind for kind, (of, _) in enumerate(self._layers)}
        self._kinds = {path: kinds[of] for path, of in layers.items()}
        self.kinds = tuple(self._kinds.values())
        self.made = max((of.made for of, _ in self._layers), default=0.0)
        self.backward = max((of.backward for of, _ in self._layers), default=0.0)
        self._needs: dict[tuple[float, bool], tuple[tuple[float, float], ...]] = {}

    def each(self, buffers: float, *, again: bool) -> tuple[tuple[float, float], ...]:
        """What the backward of a layer of each kind needs beside what is kept, then without its FFN, of which nothing
        is kept any more. again: with what it computes again.
        """
        key = buffers, again
        if key not in self._needs:
            found = list[tuple[float, float]]()
            for of, _ in self._layers:
                computed = of.again((LAYER,)) if again else 0.0
                found.append((max(of.backward, buffers) + computed, max(of.made, buffers) + computed - of.ffn))
            self._needs[key] = tuple(found)
        return self._needs[key]

    @cached_property
    def forward(self) -> float:
        return max((of.scores + of.made for of, _ in self._layers), default=0.0)

    @cached_property
    def again(self) -> float:
        return max((of.again((LAYER,)) for of, _ in self._layers), default=0.0)

    def kept(self, again: Recomputed | None, run: RunFacts) -> float:
        """What all keep, of the micro-batches in flight. again: what each computes again."""
        each = [of.kept(again) for of, _ in self._layers]
        if run.in_flight_of:
            return sum(each[self._kinds[path]] * times for path, times in run.in_flight_of)
        return run.in_flight * sum(of * number for of, (_, number) in zip(each, self._layers, strict=True))


def layer_bytes(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts) -> dict[str, LayerBytes]:
    """Path of each layer of the model -> what it can keep; layers that are in no list have a number."""
    tokens = run.tokens_per_rank
    seq_len = tokens * mesh.size(Part.SEQUENCE) // run.micro_batch_size
    kept = {} if facts.kept is None else facts.kept(run.compute_bytes, seq_len, run.micro_batch_size, run.is_mixed)
    is_split = facts.kept is not None and facts.kept.is_split
    pairs = tokens * seq_len / (mesh.size(Part.WEIGHTS) if is_split else 1)
    others = _as_llama(layers, facts, run)
    inside_of: dict[str, list[LayerPlan]] = {fact.path: [] for fact in facts.layers}
    for i, layer in enumerate(layers):
        inside_of.setdefault(owner_of(layer, inside_of) or f"#{i}", []).append(layer)
    for i in range(len(inside_of), facts.num_layers):
        inside_of[f"#{i}"] = []
    can_split = {fact.path for fact in facts.layers if any(part == FFN for part, _ in fact.parts)}
    found, known = dict[str, LayerBytes](), dict[Hashable, LayerBytes]()
    for path, inside in inside_of.items():
        of = kept.get(path, others) if path in can_split or not inside else others
        key = id(of), *(layer.alike for layer in inside)
        if key not in known:
            scores, made = of.scores * pairs, of.made * tokens + of.scores_made * pairs
            known[key] = LayerBytes(
                width=of.width * tokens, rest=of.rest * tokens, norms=of.norms * tokens,
                attention=of.attention * tokens + scores, made=made, scores=scores,
                ffn=sum(moe_bytes(layer, mesh, run) for layer in inside) if inside else of.ffn * tokens,
                exchanged=sum(_exchanged_rows(layer, mesh, run) for layer in inside)
                * run.compute_bytes * tokens_of_a_rank(mesh, run),
                backward=max(made, *(backward_bytes(layer, mesh, run) for layer in inside)) if inside else made,
            )  # fmt: skip
        found[path] = known[key]
    return found


def _as_llama(layers: Sequence[LayerPlan], facts: ModelFacts, run: RunFacts) -> LayerKept:
    """What a layer keeps whose own code cannot say it: in fp32 that of Llama, with as many heads for keys (A2)."""
    number = run.compute_bytes
    # Existing experts in a latent width have it as their d_model.
    width = max((facts.d_model, *(layer.site.d_model for layer in layers))) * number
    ffn = (facts.ffn_numbers or ffn_numbers(layers)) * number
    return LayerKept(width=width, rest=4 * width, norms=2 * width, attention=6 * width, ffn=ffn)


def sends_again(layer: LayerPlan, run: RunFacts) -> bool:
    """Whether backward sends what an MoE layer sent in forward once more."""
    if run.checkpointing != BUDGET:
        return run.checkpointing == "full"
    again = {path: each for each in run.recomputed for path in each.layers}
    what = again.get(owner_of(layer, again) or "")
    return what is not None and what.sends


def owner_of(layer: LayerPlan, paths: Collection[str]) -> str | None:
    """Path of the layer of the model that an MoE layer is in; None: it is outside of them."""
    parts = layer.site.fqn.split(".")
    return next((path for end in range(len(parts), 0, -1) if (path := ".".join(parts[:end])) in paths), None)


def tokens_of_a_rank(mesh: MeshSpec, run: RunFacts) -> int:
    """Tokens of a micro-batch that one rank has inside MoE layers."""
    return mesh.share(run.tokens_per_rank, Part.TOKENS)


def moe_bytes(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Step A1, for an MoE layer."""
    site, experts, top_k = layer.row_site, layer.experts, rows_per_token(layer, run)
    tokens = tokens_of_a_rank(mesh, run)
    hidden, latent = 2 * site.num_in_projections, _latent_bytes(layer, run) * tokens
    narrow = BF16_BYTES if run.is_mixed else run.compute_bytes
    copies = BF16_BYTES * 3 * site.d_model * experts.d_expert * layer.placement.experts_per_rank if run.is_mixed else 0
    if not layer.fused:
        routed = top_k * (2 * site.d_model + hidden * experts.d_expert) + hidden * experts.d_shared
        return tokens * (narrow * routed + run.compute_bytes * 2 * experts.num_routed) + latent + copies
    saved = latent + copies + narrow * top_k * tokens * 2 * experts.d_expert
    saved += run.compute_bytes * tokens * hidden * experts.d_shared
    saved += tokens * (FP32_BYTES * experts.num_routed + ASSIGNMENT_BYTES * layer.routing.top_k + TOKEN_BYTES)
    if isinstance(site, FFNSite) and run.compute_bytes < FP32_BYTES:
        saved += FP32_BYTES * tokens * layer.site.d_model
    if layer.dispatch.exchanges:
        return saved + narrow * tokens * exchanged(layer, mesh) / 2 * row_load(layer, run)
    return saved + (narrow * tokens * site.d_model if run.is_mixed else 0)


def _latent_bytes(layer: LayerPlan, run: RunFacts) -> float:
    """What the projections of a latent width keep of a token."""
    if layer.experts.latent_size is None:
        return 0
    kept = run.compute_bytes * (1 + (layer.fused and not layer.dispatch.exchanges))
    kept += 2 * FP32_BYTES * layer.experts.latent_norm
    return kept * layer.experts.latent_size


def backward_bytes(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Step A3."""
    top_k, experts = rows_per_token(layer, run), layer.experts
    narrow, model, hidden = BF16_BYTES if run.is_mixed else run.compute_bytes, layer.row_site.d_model, experts.d_expert
    numbers = top_k * (2 * model + hidden)
    if layer.fused and mesh.device != "cpu" and narrow == BF16_BYTES:
        given = model * _computed_from(layer, mesh, run)
        numbers = max(given + top_k * (model + 4 * hidden), 2 * given + top_k * (model + 2 * hidden))
    of_token = narrow * numbers + run.compute_bytes * 2 * model
    return of_token * tokens_of_a_rank(mesh, run) + left_bytes(layer, mesh, run)


def _computed_from(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Rows per token of a rank that the fullest rank's experts are given."""
    if not layer.dispatch.exchanges:
        return 1.0
    return rows_brought(layer.dispatch.kind, layer.placement, layer.routing, mesh) * row_load(layer, run)


def left_bytes(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """Step A3, what is kept where exchanges are in flight."""
    if not layer.dispatch.in_flight:
        return 0
    top_k, d_expert = rows_per_token(layer, run), layer.experts.d_expert
    number = tokens_of_a_rank(mesh, run) * (BF16_BYTES if run.is_mixed else run.compute_bytes)
    if layer.fused:
        return number * (top_k * d_expert + exchanged(layer, mesh) / 2 * row_load(layer, run))
    return number * top_k * (layer.site.num_in_projections * d_expert + layer.row_site.d_model)


def rows_per_token(layer: LayerPlan, run: RunFacts) -> float:
    """Rows of the fullest rank's experts per token of a rank."""
    return computed_per_token(layer) * row_load(layer, run)


def row_load(layer: LayerPlan, run: RunFacts) -> float:
    """Rows of the fullest rank over their mean, at most those of all ranks, or what the capacity lets through."""
    if layer.is_even:
        return 1.0
    most = layer.experts.num_routed / layer.placement.experts_per_rank
    return max(1.0, min(run.row_load, most, layer.routing.capacity_factor or most))


def _exchanged_rows(layer: LayerPlan, mesh: MeshSpec, run: RunFacts) -> float:
    """`exchanged` of the fullest rank: what it receives follows the load, what it sends does not."""
    return exchanged(layer, mesh) * (1 + row_load(layer, run)) / 2


def exchanged(layer: LayerPlan, mesh: MeshSpec) -> float:
    """Elements per token that the exchanges of one layer move in dispatch and combine."""
    if not layer.dispatch.exchanges:
        return 0
    copies = copies_per_token(layer.dispatch.kind, layer.placement, layer.routing, mesh)
    return 2 * (copies.own + copies.intra_node + copies.inter_node) * layer.row_site.d_model
