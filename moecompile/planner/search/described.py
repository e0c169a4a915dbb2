"""Layouts that are described, not run: tensor, pipeline, context and expert-tensor parallelism, ZeRO.

Algorithm:
  1. All combinations of the axes. Those whose sizes do not divide, or whose stages would be empty, are rejected before
     anything is counted.
  2. Memory of the fullest GPU.                                                                      -> `memory_of`
  3. Seconds of those that fit, with the dispatch that is fastest for them: memory does not depend on it.
                                                                                           (cost_model/forecast.py)

Memory of a layout that this package runs is the plan's (planner/memory.py). That of a described one is of the software
that `stack` describes: mixed precision with fp32 gradients and fp32 master weights, and what each part of a layer keeps
for backward. There is no fitted constant in it.
a. States. A weight takes 2 bytes (4 in fp32), its gradient 4 or 2, its optimizer 4 for the master weight (none in fp32,
   where the weight is it) and two moments of 4, 2 or 1. ZeRO 1 shards the optimizer over replicas, ZeRO 3 all three,
   and then two layers are whole at a time. DualPipe keeps two stages per GPU.                        -> `_states`
b. A token of one layer keeps, in numbers of 16 bits, or of 8 where a product in 8 bits reads them:
       mixer     inputs of norm and projections 2 D; latents; queries, keys, values, outputs (1 / tp); a scan's width
       dense     inputs of norm and projections 2 D; hidden numbers before and after the activation (n + 1) F / tp
       experts   2 D; K rows as they arrive, and their hidden numbers before and after the activation, K (n + 1) F;
                 router scores in fp32
   What is recomputed is not kept (an activation's input is then kept in the numbers of the product). `full` keeps the
   layer's input alone, `all_but_exchanges` also the rows; so does `experts`, where `moe` sends them again. With
   `stack.recompute_share` the other layers keep all.
                                                                                                   -> `_kept`
c. Micro-batches in flight on the first stage: pp of 1F1B, pp + (pp - 1) / vpp interleaved, pp + 1 of DualPipe; on the
   last stage one, with its logits (bf16) and their fp32 softmax and gradient. The larger one counts; with recomputation
   one layer is whole.                                                                           -> `_activations`
d. Rows that one layer sends and receives.                                                         -> `_rows`
K rows are those of the mean rank. A fuller one has `load` times as many received rows, and numbers of experts.
The process itself (CUDA context, workspaces, fragmentation) is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from moecompile.mesh import divisors
from moecompile.planner.cost_model.counts import BF16, FP32, dispatch_bytes, of_layer, padding, stage_params
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import Inputs, Layout, Software
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape, Scan, layer_params
from moecompile.planner.search.axes import MOST_STAGES, STAGES_PER_RANK
from moecompile.planner.search.found import Rejected

MOST_CONTEXT = 16
_LOGIT_BYTES = BF16 + 2 * FP32


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched sizes. kinds: of dispatch. recompute: name -> what is recomputed. batch: sequences of a
    step. vpp: virtual stages; empty: those that fit. ran: tensor and pipeline parallel sizes of layouts that run, which
    are searched elsewhere, with ran_cp, the context parallel one.
    """

    ep: Sequence[int]
    tp: Sequence[int]
    pp: Sequence[int]
    cp: Sequence[int]
    micro_batch: Sequence[int]
    zero: Sequence[int]
    kinds: Sequence[str]
    recompute: dict[str, tuple[str, ...]]
    batch: int
    ran: Collection[tuple[int, int]] = ()
    ran_cp: int = 1
    vpp: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Described:
    """A described layout that fits. recompute: its name. memory: bytes of the fullest GPU."""

    layout: Layout
    software: Software
    recompute: str
    memory: int
    seconds: float


def space_of(inputs: Inputs, batch: int) -> Space:
    """The sizes that fit a model and its machine, with the dispatch and the recomputation that are given."""
    gpus = inputs.layout.gpus
    experts = max((layer.ffn.experts for layer in inputs.model.layers if layer.ffn), default=1) or 1
    return Space(
        ep=[n for n in divisors(experts) if not gpus % n],
        tp=[n for n in (1, 2, 4, 8) if n <= min(8, inputs.machine.domain) and not gpus % n],
        pp=[n for n in divisors(gpus) if n <= MOST_STAGES],
        cp=[n for n in divisors(gpus) if n <= MOST_CONTEXT],
        micro_batch=(1, 2, 4, 8),
        zero=(1, 3),
        kinds=(inputs.software.dispatcher,),
        recompute={"": inputs.software.recompute},
        batch=batch,
    )


def described(inputs: Inputs, space: Space, limit: float, rejected: Rejected) -> Iterator[Described]:
    """The described layouts that fit into `limit` bytes; the others are counted in `rejected`."""
    recomputed = {name: replace(inputs.software, recompute=parts) for name, parts in space.recompute.items()}
    sent = {name: [replace(each, dispatcher=kind) for kind in space.kinds] for name, each in recomputed.items()}
    for layout in layouts(inputs, space, rejected):
        for name, software in recomputed.items():
            needed = round(sum(memory_of(replace(inputs, layout=layout, software=software)).values()))  # Step 2
            if needed > limit:
                rejected.too_large(needed, limit)
                continue
            fastest = _fastest(inputs, layout, sent[name])  # Step 3
            seconds = sum(step_of(replace(inputs, layout=layout, software=fastest)).values())
            yield Described(layout=layout, software=fastest, recompute=name, memory=needed, seconds=seconds)


def layouts(inputs: Inputs, space: Space, rejected: Rejected) -> Iterator[Layout]:
    """Step 1."""
    given, count = inputs.layout, max(1, len(space.recompute))
    for tp, pp, cp, ep in product(space.tp, space.pp, space.cp, space.ep):
        for etp, zero, micro_batch in product(sorted({1, tp}), space.zero, space.micro_batch):
            runs = (tp, pp) in space.ran and cp == space.ran_cp
            if runs and etp == 1 and zero == 3 and inputs.software.schedule != "dualpipe":
                continue
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "zero": zero, "micro_batch": micro_batch}
            stages = space.vpp or _virtual(inputs, pp)
            if rule := _broken(inputs, sizes, space.batch):
                rejected.add(rule, settings_text(sizes), count * max(1, len(stages)))
                continue
            for vpp in stages:
                yield replace(
                    given, vpp=vpp, replicas=1, global_batch=space.batch, reduce="each", gather="layer", split=None,
                    over_tp=None, **sizes,
                )  # fmt: skip


def settings_of(layout: Layout) -> dict[str, object]:
    """The keys that describe a layout."""
    axes = {f"workload.{name}": getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "etp", "zero")}
    return {"mesh.ep": layout.ep, **axes, "data.micro_batch_size": layout.micro_batch}


def settings_text(sizes: dict[str, int]) -> str:
    """Sizes for display."""
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def _virtual(inputs: Inputs, pp: int) -> list[int]:
    """Virtual stages that a stage's layers can be cut into: equal ones, or powers of two if there are none."""
    layers = sum(layer.count for layer in inputs.model.main_layers())
    if pp == 1 or inputs.software.schedule == "dualpipe":
        return [1]
    return [n for n in STAGES_PER_RANK if n * pp <= layers or n == 1] if layers % pp else divisors(layers // pp)


def _broken(inputs: Inputs, sizes: dict[str, int], batch: int) -> str | None:
    """The first rule that sizes break."""
    gpus, seq = inputs.layout.gpus, inputs.layout.seq
    tp, pp, cp, ep = (sizes[name] for name in ("tp", "pp", "cp", "ep"))
    layers = inputs.model.layers
    replicas = gpus // (tp * pp * cp) * sizes["micro_batch"]
    rules: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("tp * pp * cp must divide the ranks", lambda: gpus % (tp * pp * cp) > 0),
        ("pp * ep * etp must divide the ranks", lambda: gpus % (pp * ep * sizes["etp"]) > 0),
        ("ep must divide the experts", lambda: any(each.ffn is not None and each.ffn.experts % ep for each in layers)),
        ("a stage of the pipeline would have no layer", lambda: pp > sum(each.count for each in layers)),
        ("DualPipe needs an even number of stages", lambda: inputs.software.schedule == "dualpipe" and pp % 2 > 0),
        ("cp must divide half of the sequence, which is cut into 2 cp parts", lambda: seq % (2 * cp) > 0),
        ("tp must divide the heads", lambda: any(_heads(each.mixer) % tp for each in layers)),
        ("the global batch must be a whole number of micro-batches on every replica", lambda: batch % replicas > 0),
    )
    return next((rule for rule, is_broken in rules if is_broken()), None)


def _heads(mixer: Attention | Scan | None) -> int:
    return 0 if mixer is None else mixer.heads


def _fastest(inputs: Inputs, layout: Layout, ways: Sequence[Software]) -> Software:
    """The one whose exchanges take the least time."""
    if layout.ep == 1 or len(ways) == 1:
        return ways[0]
    ffn = next(layer.ffn for layer in inputs.model.layers if layer.ffn is not None and layer.ffn.experts)

    def seconds(software: Software) -> float:
        wire = dispatch_bytes(ffn, inputs.model.hidden, layout, inputs.machine, software)
        return inputs.machine.links.seconds(wire.intra, wire.inter)

    return min(ways, key=seconds)


def memory_of(inputs: Inputs, load: float = 1.0) -> dict[str, float]:
    """Bytes of the fullest GPU, which add up: weights, grads, optimizer, activations, rows.

    Args:
        load: rows of its experts over the mean.
    """
    model, layout, software = inputs.model, inputs.layout, inputs.software
    weights, grads, optimizer = _states(model, layout, software)
    return {
        "weights": weights,
        "grads": grads,
        "optimizer": optimizer,
        "activations": _activations(model, layout, software, load),
        "rows": max((_rows(layer.ffn, model.hidden, layout, load) for layer in model.layers if layer.ffn), default=0.0),
    }


def _states(model: ModelShape, layout: Layout, software: Software) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer (step a)."""
    dense, experts = stage_params(model, layout)
    twice = 2 if software.schedule == "dualpipe" and layout.pp > 1 else 1
    number = FP32 if software.bits > 16 else BF16
    grad, moments = software.grad_bits / 8, 2 * software.moment_bits / 8 + (0 if number == FP32 else FP32)
    shards_dense, shards_experts = (max(1, n // layout.replicas) for n in (layout.dp * layout.cp, layout.edp))
    held = (dense + experts) * twice
    owned = (dense / shards_dense + experts * padding(model, layout) / shards_experts) * twice
    if layout.zero < 3:
        return held * number, held * grad, (owned if layout.zero else held) * moments
    whole = 2 * max(_layer_params(layer, model.hidden, layout) for layer in model.layers) * (owned < held)
    return (owned + whole) * number, (owned + whole) * grad, owned * moments


def _layer_params(layer: Layer, hidden: int, layout: Layout) -> float:
    """Parameters of one layer on a GPU, before ZeRO."""
    everything, _ = layer_params(layer, hidden)
    routed = layer.ffn.experts * layer.ffn.expert_weights(hidden) if layer.ffn else 0
    return (everything - routed) / layout.tp + routed / (layout.ep * layout.etp)


def _activations(model: ModelShape, layout: Layout, software: Software, load: float) -> float:
    """Step c."""
    own = layout.tokens / layout.tp
    by_layer = [(layer, of_layer(layer, software)) for layer in model.layers]
    kept = sum(layer.count * _kept(layer, model.hidden, of, load) for layer, of in by_layer) * own / layout.pp
    layers = sum(layer.count for layer in model.layers)
    kept *= ceil(layers / layout.pp) * layout.pp / layers  # the fullest stage has whole layers
    whole = Software(bits=software.bits, dispatcher=software.dispatcher)
    repeated = (layer for layer, of in by_layer if of.repeats("full", "all_but_exchanges"))
    again = max((_kept(layer, model.hidden, whole, load) for layer in repeated), default=0.0) * own
    logits = _LOGIT_BYTES * model.vocab * own
    return max(kept * in_flight(layout, software), kept + logits) + again


def in_flight(layout: Layout, software: Software) -> float:
    """Micro-batches whose activations the first stage keeps (step c)."""
    if layout.pp == 1:
        return 1.0
    if software.schedule == "dualpipe":
        return min(layout.num_micro, layout.pp + 1)
    return min(layout.num_micro, layout.pp + (layout.pp - 1) / layout.vpp * (layout.vpp > 1))


def _kept(layer: Layer, hidden: int, software: Software, load: float) -> float:
    """Bytes that a layer keeps of each token of a GPU (step b)."""
    if software.repeats("full"):
        return hidden * BF16
    if software.repeats("all_but_exchanges"):
        sent = layer.ffn.top_k * layer.ffn.row(hidden) if layer.ffn else 0
        return (hidden + (1 + load) * sent) * BF16
    return _kept_of_mixer(layer, hidden, software) + _kept_of_ffn(layer.ffn, hidden, software, load)


def _kept_of_mixer(layer: Layer, hidden: int, software: Software) -> float:
    mixer = layer.mixer
    if mixer is None:
        return 0.0
    normed = 0 if software.repeats("layernorm") else hidden
    if software.repeats("attention"):
        return hidden * BF16
    wide = mixer.width
    latents = 0
    if isinstance(mixer, Attention):
        latents = mixer.q_rank + mixer.kv_rank + mixer.d_rope
        if software.repeats("mla_up_proj"):
            wide = mixer.heads * mixer.d_v
    return (hidden + latents + wide) * _number(software) + normed * _read(software)


def _kept_of_ffn(ffn: Experts | None, hidden: int, software: Software, load: float) -> float:
    if ffn is None:
        return 0.0
    normed = 0 if software.repeats("layernorm") else hidden
    number, read, moe = _number(software), _read(software), software.repeats("moe", "experts")
    if software.repeats("mlp") and not ffn.experts:
        return hidden * number
    always = 0.0 if moe else ffn.d_shared * (ffn.num_in * number + read)
    kept = hidden * number + normed * read + always
    if not ffn.experts or moe:
        rows = (1 + load) * ffn.top_k * ffn.row(hidden) if ffn.experts and software.repeats("experts") else 0
        return kept + rows * BF16
    hidden_row = ffn.num_in * read if software.repeats("moe_act") else ffn.num_in * number + read
    per_row = ffn.row(hidden) * read + ffn.d_expert * hidden_row
    return kept + load * ffn.top_k * per_row + 2 * ffn.experts * FP32


def _rows(ffn: Experts, hidden: int, layout: Layout, load: float) -> float:
    if layout.ep * layout.etp == 1:
        return 0.0
    return (1 + load) * layout.tokens / layout.tp * ffn.top_k * ffn.row(hidden) * BF16


def _number(software: Software) -> int:
    """Bytes of a kept number."""
    return FP32 if software.bits > 16 else BF16


def _read(software: Software) -> float:
    """Bytes of a kept number that only a product reads."""
    return max(8, software.bits) / 8
