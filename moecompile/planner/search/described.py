"""Layouts that are described, not run: tensor, pipeline, context and expert-tensor parallelism, ZeRO.

Algorithm:
  1. All combinations of the axes. Those whose sizes do not divide, or whose stages would be empty, are rejected before
     anything is counted.
  2. Memory of the fullest GPU                                                  (cost_model/memory.py)
  3. Seconds of those that fit, with the dispatch that is fastest for them: memory does not depend on it.
                                                                                (cost_model/forecast.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from moecompile.mesh import divisors
from moecompile.planner.cost_model.counts import dispatch_bytes
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import Inputs, Layout, Software
from moecompile.planner.cost_model.memory import memory_of
from moecompile.planner.cost_model.shapes import Attention, Scan
from moecompile.planner.search.found import Rejected

MOST_STAGES, MOST_CONTEXT = 64, 16
_POWERS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched sizes. kinds: of dispatch. recompute: name -> what is recomputed. batch: sequences of a
    step. ran: tensor parallel sizes of layouts that run, which are searched elsewhere.
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
    ran: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Described:
    """A described layout that fits. recompute: its name. memory: bytes of the fullest GPU."""

    layout: Layout
    software: Software
    recompute: str
    memory: int
    seconds: float


def space_of(inputs: Inputs, batch: int) -> Space:
    """The sizes that fit a inputs, with its own dispatch and recomputation."""
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
    for layout in layouts(inputs, space, rejected):
        for name, recompute in space.recompute.items():
            software = replace(inputs.software, recompute=recompute)
            needed = round(memory_of(inputs.model, layout, software).total)  # Step 2
            if needed > limit:
                rejected.too_large(needed, limit)
                continue
            fastest = replace(software, dispatcher=_fastest(inputs, layout, software, space.kinds))  # Step 3
            seconds = sum(step_of(replace(inputs, layout=layout, software=fastest)).values())
            yield Described(layout=layout, software=fastest, recompute=name, memory=needed, seconds=seconds)


def layouts(inputs: Inputs, space: Space, rejected: Rejected) -> Iterator[Layout]:
    """Step 1."""
    given, count = inputs.layout, max(1, len(space.recompute))
    for tp, pp, cp, ep in product(space.tp, space.pp, space.cp, space.ep):
        for etp, zero, micro_batch in product(sorted({1, tp}), space.zero, space.micro_batch):
            if pp == cp == etp == 1 and zero == 3 and tp in space.ran:
                continue
            sizes = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "etp": etp, "zero": zero, "micro_batch": micro_batch}
            stages = _virtual(inputs, pp)
            if rule := _broken(inputs, sizes, space.batch):
                rejected.add(rule, settings_text(sizes), count * max(1, len(stages)))
                continue
            for vpp in stages:
                yield replace(given, vpp=vpp, replicas=1, global_batch=space.batch, **sizes)


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
    return [n for n in _POWERS if n * pp <= layers or n == 1] if layers % pp else divisors(layers // pp)


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


def _fastest(inputs: Inputs, layout: Layout, software: Software, kinds: Sequence[str]) -> str:
    if layout.ep == 1 or len(kinds) == 1:
        return kinds[0]
    ffn = next(layer.ffn for layer in inputs.model.layers if layer.ffn is not None and layer.ffn.experts)

    def seconds(kind: str) -> float:
        wire = dispatch_bytes(ffn, inputs.model.hidden, layout, inputs.machine, replace(software, dispatcher=kind))
        return inputs.machine.links.seconds(wire.intra, wire.inter)

    return min(kinds, key=seconds)
