"""What a model computes, as numbers: parameters and operations per token. No constant is fitted here.

A layer has a mixer (attention or a scan), a feed-forward part (dense or experts), or both. Per token and forward:

1. A product with a weight of n numbers      2 n operations
2. Attention                                 2 h (d_qk + d_v) keys, where keys is the mean number that a query sees:
                                             (s + 1) / 2 in a causal sequence of s, fewer with a window w:
                                             w - w (w - 1) / (2 s)                                  -> `mean_keys`
3. A scan (Mamba-2, chunks of c)             within a chunk 2 (c / 2) (G N + H P), across chunks 4 H P N
4. Backward                                  twice forward, as published counts have it      -> `training_flops`

The embedding is a look-up and counts nothing; norms and biases are left out of operations and of parameters (below 0.1%
of the models here).

Legend: h heads, H scan heads of P numbers, G groups, N state, s sequence length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moecompile.plan import ATTENTION, EXPERTS, FFN, LAYER, NORMS, Recomputed
from moecompile.stages import Pipeline

TRAINING = 3  # forward and backward, in forwards


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention with `heads` queries and `kv_heads` keys of d_qk and values of d_v numbers.

    window: keys that a query sees at most (None: all before it). q_rank, kv_rank, d_rope: of latent attention
    (DeepSeek); kv_rank = 0 for ordinary attention.
    """

    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    window: int | None = None
    q_rank: int = 0
    kv_rank: int = 0
    d_rope: int = 0

    def weights(self, hidden: int) -> int:
        """Numbers of all projections."""
        return self.down_weights(hidden) + self.up_weights(hidden) + self.heads * self.d_v * hidden

    def down_weights(self, hidden: int) -> int:
        """Projections into latents, which tensor parallelism does not split."""
        return hidden * (self.q_rank + self.kv_rank + self.d_rope) if self.kv_rank else 0

    def up_weights(self, hidden: int) -> int:
        """Projections to queries, keys and values."""
        query = (self.q_rank or hidden) * self.heads * self.d_qk
        if self.kv_rank:
            return query + self.kv_rank * self.heads * (self.d_qk - self.d_rope + self.d_v)
        return query + hidden * self.kv_heads * (self.d_qk + self.d_v)

    def mean_keys(self, seq: int) -> float:
        """Keys that a query sees on average in a causal sequence."""
        window = min(self.window or seq, seq)
        return window - window * (window - 1) / (2 * seq)

    def core_flops(self, seq: int) -> float:
        """Forward operations per token, without projections."""
        return 2 * self.heads * (self.d_qk + self.d_v) * self.mean_keys(seq)

    @property
    def width(self) -> int:
        """Numbers per token of queries, keys, values and outputs."""
        kv = self.heads if self.kv_rank else self.kv_heads
        return self.heads * (self.d_qk + self.d_v) + kv * (self.d_qk + self.d_v)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A Mamba-2 mixer: `heads` of `d_head` numbers, `groups` of `state` numbers, a convolution over `conv` tokens."""

    heads: int
    d_head: int
    groups: int
    state: int
    conv: int = 4
    chunk: int = 128

    @property
    def inner(self) -> int:
        """Numbers per token inside."""
        return self.heads * self.d_head

    def weights(self, hidden: int) -> int:
        """Numbers of all projections and of the convolution."""
        mixed = self.inner + 2 * self.groups * self.state
        return hidden * (self.inner + mixed + self.heads) + self.inner * hidden + self.conv * mixed

    def core_flops(self, seq: int) -> float:
        """Forward operations per token of the scan."""
        del seq
        return self.chunk * (self.groups * self.state + self.inner) + 4 * self.inner * self.state

    @property
    def width(self) -> int:
        """Numbers per token of what the scan reads and writes."""
        return 3 * self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A feed-forward part; a dense one has experts = top_k = 0 and the width d_shared.

    num_in: input projections (2: gated). d_shared: width that every token uses. latent: width of a row of a routed
    expert (None: the model's), with a projection down and up. groups, top_groups, even_groups: of its router.
    always: numbers of further products that every token uses. shared_in_experts: whether tokens of what all use
    are cut over tp with those of routed experts, as of shared experts that a plan makes.
    """

    experts: int = 0
    top_k: int = 0
    d_expert: int = 0
    d_shared: int = 0
    num_in: int = 2
    activation: str = "swiglu"
    latent: int | None = None
    groups: int = 1
    top_groups: int = 1
    even_groups: bool = False
    always: int = 0
    shared_in_experts: bool = False

    def row(self, hidden: int) -> int:
        """Numbers of a row that is dispatched."""
        return self.latent or hidden

    def expert_weights(self, hidden: int) -> int:
        """Numbers of one routed expert."""
        return (self.num_in + 1) * self.row(hidden) * self.d_expert

    def shared_weights(self, hidden: int) -> int:
        """Numbers of what every token uses, without the router."""
        latent = 2 * hidden * self.latent if self.latent else 0
        return (self.num_in + 1) * hidden * self.d_shared + latent + self.always

    def router_weights(self, hidden: int) -> int:
        """Numbers of the router."""
        return self.experts * hidden


@dataclass(frozen=True, kw_only=True)
class Layer:
    """`count` equal layers. mtp: of the multi-token prediction module, which also has a projection and a head.
    recompute: what backward computes again of them; None: what the software does everywhere.
    """

    mixer: Attention | Scan | None
    ffn: Experts | None
    count: int = 1
    mtp: bool = False
    recompute: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A language model: its layers, embedding and head. places: path of each layer of the model, and its place in
    `layers`; empty if they are not known. weight_bytes: of a number of most weights, as they are stored.
    """

    name: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool = False
    places: tuple[tuple[str, int], ...] = ()
    weight_bytes: int = 2

    def main_layers(self) -> Iterator[Layer]:
        """The layers without multi-token prediction."""
        return (layer for layer in self.layers if not layer.mtp)

    @property
    def num_layers(self) -> int:
        """Layers, without multi-token prediction."""
        return sum(layer.count for layer in self.main_layers())

    @property
    def head_weights(self) -> int:
        """Numbers of the output head, which is also that of the embedding."""
        return self.hidden * self.vocab

    @cached_property
    def stored(self) -> tuple[int, int]:
        """All parameters but those of routed experts, and these; with multi-token prediction."""
        experts = ((layer.count, layer.ffn) for layer in self.layers if layer.ffn)
        routed = sum(count * ffn.experts * ffn.expert_weights(self.hidden) for count, ffn in experts)
        return self.params_total(mtp=True) - routed, routed

    def params_total(self, *, mtp: bool = False) -> int:
        """All parameters; `mtp`: also those of multi-token prediction."""
        chosen = self.layers if mtp else tuple(self.main_layers())
        return sum(layer.count * layer_params(layer, self.hidden)[0] for layer in chosen) + self.head_weights * (
            1 if self.tied else 2
        )

    def params_active(self, *, mtp: bool = False) -> int:
        """Parameters that a token multiplies with: without the embedding."""
        chosen = self.layers if mtp else tuple(self.main_layers())
        heads = 1 + sum(layer.count for layer in chosen if layer.mtp)
        return sum(layer.count * layer_params(layer, self.hidden)[1] for layer in chosen) + self.head_weights * heads


def with_recomputed(
    shape: ModelShape, recomputed: Sequence[Recomputed], pipeline: Pipeline | None = None
) -> ModelShape:  # fmt: skip
    """The shape whose layers say what of them is repeated. Of stages those of the rank that repeats the most set the
    pace, so all layers are taken to repeat what its layers do.
    """
    if not recomputed:
        return shape
    chosen = {path: each for each in recomputed for path in each.layers}
    counts = Counter((place, repeated(chosen.get(path))) for path, place in shape.places)
    if pipeline is not None:
        counts = _of_the_slowest(shape, counts, [_counts_of(shape, chosen, pipeline, i) for i in range(pipeline.ranks)])
    layers = [replace(shape.layers[place], count=count, recompute=words) for (place, words), count in counts.items()]
    known = {place for _, place in shape.places}
    others = [layer for place, layer in enumerate(shape.layers) if place not in known]
    return replace(shape, layers=(*layers, *others), places=())


def with_share(shape: ModelShape, share: float) -> ModelShape:
    """The shape in which what the software repeats is repeated in a share of the layers; the others repeat nothing."""
    layers, others, seen, done = list(shape.layers), list[Layer](), 0, 0
    for place, layer in enumerate(shape.layers):
        if layer.recompute is not None:
            continue
        seen += layer.count
        whole = min(layer.count, round((1 - share) * seen) - done)
        done += whole
        if whole == layer.count:
            layers[place] = replace(layer, recompute=())
        elif whole:
            layers[place] = replace(layer, count=layer.count - whole)
            others.append(replace(layer, count=whole, recompute=()))
    return replace(shape, layers=(*layers, *others))  # at the end: `places` are of those before


_Counts = Counter[tuple[int, tuple[str, ...]]]
"""Place of a layer in the shape, and what is repeated of it -> how many."""


def _counts_of(shape: ModelShape, chosen: Mapping[str, Recomputed], pipeline: Pipeline, index: int) -> _Counts:
    """Of the layers of the ranks at a place along pp."""
    own = {unit.path for i in pipeline.stages_of(index) for unit in pipeline.stages[i].units}
    return Counter((place, repeated(chosen.get(path))) for path, place in shape.places if path in own)


def _of_the_slowest(shape: ModelShape, every: _Counts, ranks: Sequence[_Counts]) -> _Counts:
    """As many layers of each kind as there are, which repeat what those of this kind do on the rank that repeats most,
    by parameters that a token uses.
    """

    def weight(place: int, word: str) -> int:
        layer = shape.layers[place]
        mixer = layer.mixer.weights(shape.hidden) if layer.mixer else 0
        whole = layer_params(layer, shape.hidden)[1]
        return {
            "attention": mixer, "layernorm": 0, **dict.fromkeys(("mlp", "moe", "experts"), whole - mixer),
            **dict.fromkeys(("full", "all_but_exchanges"), whole),
        }[word]  # fmt: skip

    def repeats(counts: _Counts) -> int:
        return sum(number * weight(place, word) for (place, words), number in counts.items() for word in words)

    most, found = max(ranks, key=repeats), _Counts()
    for kind in {place for place, _ in every}:
        total = sum(number for (place, _), number in every.items() if place == kind)
        own = {key: number for key, number in most.items() if key[0] == kind}
        of, shares = sum(own.values()), own or {key: number for key, number in every.items() if key[0] == kind}
        done = before = 0
        for key, number in sorted(shares.items()):
            done += number
            found[key] = round(total * done / (of or total)) - before
            before += found[key]
    return +found


def repeated(what: Recomputed | None) -> tuple[str, ...]:
    """What backward repeats of a layer, in the words of `Software.recompute`."""
    if what is None:
        return ()
    if LAYER in what.parts:
        return ("full",) if what.sends else ("all_but_exchanges",)
    words = {ATTENTION: "attention", NORMS: "layernorm", FFN: "mlp", EXPERTS: "moe" if what.sends else "experts"}
    return tuple(words[part] for part in what.parts)


def layer_params(layer: Layer, hidden: int) -> tuple[int, int]:
    """Parameters of one layer: all, and those that a token uses."""
    mixer = layer.mixer.weights(hidden) if layer.mixer else 0
    joint = 2 * hidden * hidden if layer.mtp else 0
    ffn = layer.ffn
    if ffn is None:
        return mixer + joint, mixer + joint
    always = mixer + joint + ffn.shared_weights(hidden) + ffn.router_weights(hidden)
    expert = ffn.expert_weights(hidden)
    return always + ffn.experts * expert, always + ffn.top_k * expert


def training_flops(model: ModelShape, seq: int, *, mtp: bool = True) -> float:
    """Operations per token, forward and backward; `mtp`: with the multi-token prediction that the model has.

    Recomputation is not counted, nor what frameworks do in addition: these are model FLOPs.
    """
    layers = model.layers if mtp else tuple(model.main_layers())
    core = sum(layer.count * layer.mixer.core_flops(seq) for layer in layers if layer.mixer)
    return TRAINING * (2 * model.params_active(mtp=mtp) + core)
