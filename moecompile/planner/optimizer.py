"""What the optimizer needs: its state, and with Muon the bytes that bring whole matrices together.

P: parameters of matrices that Muon steps; n: ranks over which FSDP cuts them (dp_shard cp); t: tp.

1. Muon's matrices are those of the model's hidden layers (moecompile.nn.matrices), without those of FFNs that become
   experts and those of routers, and with those of experts and shared experts; with adapters, these alone.
                                                                                              -> `muon_params`
2. State: one momentum for a matrix, two moments for everything else, in what `optimizer.state` says: by default in the
   dtype of the stored weight, as torch makes it. Routers and adapters are fp32. Codes of 8 bits have a fp32 scale for
   each block of a row, and some weights stay in fp32 beside them (moecompile.schema.moments): the mean over dense
   weights, over those of Muon and over experts counts. With `bf16_weights=master`, 4 bytes
   more for each number that is stored in bf16.                                     -> `kept_of`, `state_bytes`
3. A matrix that is cut goes to one of the n ranks and its result returns. Mean over the ranks of what one sends:
       2 P (n - 1) / n^2                                     and for matrices that tp cuts too
       2 P (n - 1) / (n^2 t) + 2 P (t - 1) / (n t^2)
   Nothing is sent for stacks that are cut between experts. Of those that are cut within experts (plan/experts.py) it is
   as much as for others over edp_shard ranks, and so for matrices of experts below each other in one weight (DBRX).
                                                                                              -> `step_traffic`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor, prod

from moecompile.mesh import MeshSpec, Part
from moecompile.plan import ExpertsSite, LayerPlan, Traffic, cut_dim
from moecompile.planner.params import BF16_BYTES, FP32_BYTES, ModelFacts, ModelParams
from moecompile.planner.shards import expert_stacks
from moecompile.routing import is_of_router
from moecompile.schema import (
    LEAST_NUMBERS,
    MOMENTS,
    Bf16Weights,
    OptimizerConfig,
    OptimizerKind,
    bytes_in_blocks,
    group_of,
    resolved,
)

_ADAMW_MOMENTS = 2
_SPLIT = ("colwise", "rowwise")  # styles of a tp_plan that cut a weight start with one of these


@dataclass(frozen=True, kw_only=True)
class MuonParams:
    """Parameters that Muon steps. dense: cut by FSDP alone; split: by tp too; summed: over tp as over FSDP's ranks;
    experts: all of them; cut: those of experts whose matrices several ranks have parts of.
    """

    dense: int = 0
    split: int = 0
    summed: int = 0
    experts: int = 0
    cut: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.split + self.summed + self.experts


def muon_params(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, config: OptimizerConfig, trained: ModelParams
) -> MuonParams:
    """Step 1; zero without `optimizer=muon`. Patterns of `optimizer.groups` are followed as far as names are known."""
    if config.kind is not OptimizerKind.muon:
        return MuonParams()
    if facts.adapters is not None:
        stacks = [shape for layer in layers for shape in expert_stacks(layer, mesh)[1]]
        within = sum(mesh.ep * prod(shape) for shape in stacks if cut_dim(shape, mesh.edp_shard))
        return MuonParams(dense=facts.adapters[0], experts=trained.experts, cut=within)
    kept, replaced, joined = _dense(layers, facts)
    kept = {name: shape for name, shape in kept.items() if _is_muons(name, config)}
    styles = {f"{fact.path}.weight": fact.style for fact in facts.split} if mesh.axes(Part.WEIGHTS) else {}
    sizes = Counter[str]()
    for name, (rows, columns) in kept.items():
        style = styles.get(name, "")
        kind = "split" if style.startswith(_SPLIT) else "summed" if style.startswith("replicated") else "dense"
        sizes[kind] += rows * columns
    of_experts, of_shared = _new(layers)
    shared = sum(size for name, size in of_shared if _is_muons(name, config))
    experts, cut = 0, joined
    for name, shape in of_experts:
        size = prod(shape) * _is_muons(name, config)
        experts += size
        cut += size if cut_dim((shape[0] // mesh.ep, *shape[1:]), mesh.edp_shard) else 0
    shared = min(shared, trained.dense)
    sizes["summed" if mesh.axes(Part.TOKENS) else "dense"] += shared
    return MuonParams(
        dense=max(0, sizes["dense"] - replaced), split=sizes["split"], summed=sizes["summed"],
        experts=min(experts, trained.experts), cut=min(cut, experts, trained.experts),
    )  # fmt: skip


def _is_muons(name: str, config: OptimizerConfig) -> bool:
    index = group_of(name, config.groups)
    return index is None or config.groups[index].kind is not OptimizerKind.adamw


def _dense(layers: Sequence[LayerPlan], facts: ModelFacts) -> tuple[Mapping[str, tuple[int, int]], int, int]:
    """Matrices outside of what becomes experts, parameters among them that do, and those of joined experts."""
    kept, replaced, joined = dict(facts.matrices), 0, 0
    for site, num_experts in ((layer.site, layer.experts.num_routed) for layer in layers):
        inside = {name for name in kept if name.startswith(f"{site.fqn}." if site.fqn else "")}
        size = sum(kept[name][0] * kept[name][1] for name in inside)
        if isinstance(site, ExpertsSite):
            block = site.fqn.rpartition(".")[0]
            if site.form == "stacked":  # stacked biases have a row per expert
                joined += sum(kept[n][0] * kept[n][1] for n in inside if kept[n][0] != num_experts)
            of_block = [n for n, (rows, _) in kept.items() if n.startswith(f"{block}.") and rows == num_experts]
            source = facts.routers.get(site.fqn)
            inside |= {n for n in of_block if source is None or is_of_router(n.rpartition(".")[0], source)}
        elif size != (ffn := (site.num_in_projections + 1) * site.d_model * site.d_ff):
            inside, replaced = set(), replaced + ffn  # the site is a part of the module at its path
        kept = {name: shape for name, shape in kept.items() if name not in inside}
    return kept, replaced, joined


def _new(layers: Sequence[LayerPlan]) -> tuple[list[tuple[str, tuple[int, ...]]], list[tuple[str, int]]]:
    """(name, shape) of stacks of experts; (name, parameters) of the matrices of shared experts and a latent width."""
    experts: list[tuple[str, tuple[int, ...]]] = []
    shared: list[tuple[str, int]] = []
    for site, plan in ((layer.site, layer.experts) for layer in layers):
        prefix = site.fqn if isinstance(site, ExpertsSite) else f"{site.fqn}.experts".lstrip(".")
        row, width = plan.latent_size or site.d_model, plan.d_expert
        up = "gate_up_proj" if site.num_in_projections > 1 else "up_proj"
        experts.append((f"{prefix}.{up}", (plan.num_routed, site.num_in_projections * width, row)))
        experts.append((f"{prefix}.down_proj", (plan.num_routed, row, width)))
        one = site.d_model * plan.d_shared
        names = ("gate_proj", "up_proj", "down_proj")[2 - site.num_in_projections :]
        shared += [(f"{site.fqn}.shared_experts.{name}.weight".lstrip("."), one) for name in names if one]
        if plan.latent_size is not None:
            size = site.d_model * plan.latent_size
            shared += [(f"{site.fqn}.latent_{name}.weight".lstrip("."), size) for name in ("down", "up")]
    return experts, shared


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that a number of a moment takes, on average: of dense weights, of experts, and of either's matrices that
    Muon steps. master: of a weight's fp32 copy.
    """

    dense: Fraction
    experts: Fraction
    of_muon: Fraction
    master: int = 0


def kept_of(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, config: OptimizerConfig, number: int
) -> Kept:
    """Step 2. number: bytes of a stored number that is trained."""
    master = FP32_BYTES if config.bf16_weights is Bf16Weights.master and number == BF16_BYTES else 0
    kind = resolved(config.state, 8 * (master or number))
    if kind is None:
        return Kept(dense=Fraction(number), experts=Fraction(number), of_muon=Fraction(number))
    row = MOMENTS[kind]
    if not row.in_blocks:
        each = Fraction(row.bits, 8)
        return Kept(dense=each, experts=each, of_muon=each, master=master)
    dense, experts = _mean(_dense_weights(layers, mesh, facts)), _mean(_expert_weights(layers, mesh))
    of_muon = _mean(_muon_weights(layers, mesh, facts, config))
    return Kept(dense=dense, experts=experts, of_muon=of_muon, master=master)


_Weight = tuple[tuple[int, ...], int, int]
"""Shape, or one of as many numbers; numbers of a row on a rank; numbers of all weights like it."""


def _mean(weights: Iterable[_Weight]) -> Fraction:
    """Bytes of a number; of no weights, those in the longest blocks."""
    numbers, bytes_ = 0, Fraction(0)
    for shape, width, params in weights:
        numbers, bytes_ = numbers + params, bytes_ + params * bytes_in_blocks(shape, width)
    return bytes_ / numbers if numbers else bytes_in_blocks((LEAST_NUMBERS, LEAST_NUMBERS), LEAST_NUMBERS)


def _dense_weights(layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts) -> Iterator[_Weight]:
    """The model's own that are left, and those of shared experts and a latent width."""
    planned, parts = {layer.site.fqn for layer in layers}, mesh.size(Part.WEIGHTS)
    for fact in facts.weights:
        if fact.site not in planned and fact.is_trained:
            cut = parts if fact.split == "columns" else 1
            yield (LEAST_NUMBERS if fact.width else 1, max(1, fact.width)), fact.width // cut, fact.params
    for shape in (each for layer in layers for each in _made(layer)):
        yield shape, shape[-1], prod(shape)


def _muon_weights(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, config: OptimizerConfig
) -> Iterator[_Weight]:
    """The matrices of step 1 that are no experts."""
    cut = {f"{fact.path}.weight" for fact in facts.split if fact.size_name == "in_features"}
    for name, shape in _dense(layers, facts)[0].items():
        if _is_muons(name, config):
            yield shape, shape[1] // (mesh.size(Part.WEIGHTS) if name in cut else 1), prod(shape)
    for shape in (each for layer in layers for each in _made(layer) if len(each) == 2 and min(each) > 1):
        yield shape, shape[1], prod(shape)


def _made(layer: LayerPlan) -> Iterator[tuple[int, ...]]:
    """Shapes of the dense weights that a layer gets."""
    site, experts = layer.site, layer.experts
    if isinstance(site, ExpertsSite):
        return
    number, shared, latent = site.num_in_projections, experts.d_shared, experts.latent_size
    if shared:
        yield from [(shared, site.d_model)] * number
        yield site.d_model, shared
        yield from [(shared,)] * number * site.bias_up + [(site.d_model,)] * site.bias_down
    if experts.shared_gate:
        yield 1, site.d_model
    if latent is not None:
        yield from [(latent, site.d_model), (site.d_model, latent), *[(latent,)] * experts.latent_norm]


def _expert_weights(layers: Sequence[LayerPlan], mesh: MeshSpec) -> Iterator[_Weight]:
    for layer in layers:
        for shape in (each for stacks in expert_stacks(layer, mesh) for each in stacks):
            yield (shape[0] * mesh.ep, *shape[1:]), shape[-1], prod(shape)


def state_bytes(
    own: int, whole: int, muon: MuonParams, mesh: MeshSpec, share: Fraction, experts: int, kept: Kept
) -> int:
    """Step 2.

    Args:
        own: trained parameters of the fullest rank without those that every rank has whole, such as routers.
        whole: bytes of these. share: of experts, and `experts` those of the rank, a part of `own`.
    """
    dense_muon = muon.dense // mesh.size(Part.STORED)
    dense_muon += (muon.split + muon.summed) // mesh.size(Part.STORED, Part.WEIGHTS)
    dense_muon, expert_muon = min(dense_muon, own - experts), min(floor(muon.experts * share), experts)
    moments = (own - experts) * _ADAMW_MOMENTS * kept.dense - dense_muon * kept.of_muon
    moments += (experts * _ADAMW_MOMENTS - expert_muon) * kept.experts
    return ceil(moments) + own * kept.master + whole * _ADAMW_MOMENTS


def step_traffic(muon: MuonParams, mesh: MeshSpec, number: int) -> Traffic:
    """Step 3, bytes. number: bytes of a number on the wire."""
    parts = [
        (muon.dense, (Part.STORED,)),
        (muon.split / mesh.size(Part.WEIGHTS), (Part.STORED,)),
        (muon.split / mesh.size(Part.STORED), (Part.WEIGHTS,)),
        (muon.summed, (Part.STORED, Part.WEIGHTS)),
        (muon.cut / mesh.size(Part.EXPERTS), (Part.STORED_EXPERTS,)),
    ]
    sent = Traffic(intra_node=0.0, inter_node=0.0)
    for params, over in parts:
        ranks = mesh.size(*over)
        bytes_ = 2 * params * (ranks - 1) / ranks**2 * number
        of_node = near(mesh, over)
        sent = replace(
            sent, intra_node=sent.intra_node + of_node * bytes_, inter_node=sent.inter_node + (1 - of_node) * bytes_
        )
    return sent


def near(mesh: MeshSpec, over: Sequence[Part]) -> float:
    """The fraction of pairs of different ranks of a group over these parts that are on one node."""
    group = mesh.group(*over)
    nodes, pairs = Counter(map(mesh.node_of, group)), len(group) * (len(group) - 1)
    return sum(n * (n - 1) for n in nodes.values()) / pairs if pairs else 1.0
