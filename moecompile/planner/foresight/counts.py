"""Counts per GPU of one micro-batch and of one step. There is no fitted constant here.

1. Layers are spread over the pp stages; `body` is what an average stage does with them in a micro-batch, `head` is the
   whole output head, which is on the last stage alone.                                             -> work.py
2. Wire: rows of dispatch and combine, tensor and context parallelism, activations between stages, what a step reduces
   and gathers.                                                                                     -> links.py
3. Bubble: micro-batches for which a stage is idle: (pp - 1) / vpp of 1F1B; of DualPipe (pp / 2 - 1) (F&B + B - 3 W)
   with forward F, backward B = 2 F, weight gradients W = F, and 3 F a micro-batch (DeepSeek-V3 report, table 2).
                                                                                                    -> `_bubble`
"""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.planner.foresight.layout import Layout, Machine, Software
from moecompile.planner.foresight.links import Parallel, Step, Wire, dispatch_bytes, parallel_bytes, step_bytes
from moecompile.planner.foresight.shapes import ModelShape
from moecompile.planner.foresight.work import Work, head_work, layer_work


@dataclass(frozen=True, kw_only=True)
class Counts:
    """body: layers of an average stage. head: the output head. wire: exchanges of an average stage. parallel: bytes of
    tensor, context and pipeline parallelism and of gathered weights. step: bytes once per step. num_micro:
    micro-batches of a step. bubble: idle ones. stages, layers: over which the body was averaged.
    """

    body: Work
    head: Work
    wire: Wire
    parallel: Parallel
    step: Step
    num_micro: int
    bubble: float
    stages: int
    layers: int


def count(model: ModelShape, layout: Layout, machine: Machine, software: Software) -> Counts:
    """The counts of one GPU."""
    body, wire = Work(), Wire()
    for layer in model.layers:
        share = layer.count / layout.pp
        body.add(layer_work(layer, model.hidden, layout, software), share)
        if layer.ffn is not None and layer.ffn.experts:
            wire = wire + dispatch_bytes(layer.ffn, model.hidden, layout, machine, software).times(share)
    heads = 1 + sum(layer.count for layer in model.layers if layer.mtp)
    return Counts(
        body=body,
        head=head_work(model.hidden, model.vocab, layout, heads),
        wire=wire,
        parallel=parallel_bytes(model, layout, machine, software),
        step=step_bytes(model, layout, machine),
        num_micro=layout.num_micro,
        bubble=_bubble(layout, software),
        stages=layout.pp,
        layers=sum(layer.count for layer in model.layers),
    )


def _bubble(layout: Layout, software: Software) -> float:
    if layout.pp == 1:
        return 0.0
    if software.schedule == "dualpipe":
        return (layout.pp / 2 - 1) * (3 + 2 - 3) / 3
    return (layout.pp - 1) / layout.vpp
