"""One process: CPU and wall time of forward and backward, everybody in turn on the same new input."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from layer import HIDDEN
from torch import Tensor

from side_by_side import agreement, memory
from side_by_side.common import Layer, Place, Size, Weights, open_process_group
from side_by_side.registry import LIMIT, OURS, Entry

WARM_UP = 3
Times = dict[str, dict[int, tuple[float, float]]]  # layer -> round -> (CPU, wall) seconds


def step(layer: Layer, x: Tensor, direction: Tensor) -> tuple[float, float]:
    """(CPU, wall) seconds of one forward and backward; gradients are made anew, as after zero_grad."""
    layer.module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    wall, cpu = time.perf_counter(), time.process_time()
    layer(x).backward(direction)
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(entries: dict[str, Entry], size: Size, rounds: int) -> list[dict[str, Any]]:
    """One row a layer: medians of its times and ratios, memory, errors.

    Raises:
        SystemExit: a layer does not compute what transformers' plain loop computes.
    """
    bytes_by_name = {name: memory.measure(entry.build, size) for name, entry in entries.items()}
    open_process_group()
    weights, place = Weights.random(size), Place()
    layers = {name: entry.build(size, weights, place) for name, entry in entries.items()}
    reference = agreement.Reference(size, weights, place)
    errors = {name: reference.errors(layer) for name, layer in layers.items() if name != LIMIT}
    for name, found in errors.items():
        agreement.require(name, found)
    times = _interleaved(entries, layers, size, rounds)
    return [
        {"size": str(size), "layer": name, **row, **bytes_by_name[name], "errors": errors.get(name)}
        for name, row in summary(times, OURS).items()
    ]


def summary(times: Times, ours: str) -> dict[str, dict[str, Any]]:
    """name -> medians in milliseconds, and of the ratios within a round: to the limit, and of `ours` to this layer."""
    return {
        name: {
            "cpu_ms": 1e3 * statistics.median(cpu for cpu, _ in found.values()),
            "wall_ms": 1e3 * statistics.median(wall for _, wall in found.values()),
            "x_limit": statistics.median(cpu / times[LIMIT][i][0] for i, (cpu, _) in found.items()),
            "ours_x": statistics.median(times[ours][i][0] / cpu for i, (cpu, _) in found.items())
            if ours in times
            else None,
            "rounds": len(found),
        }
        for name, found in times.items()
    }


def _interleaved(entries: dict[str, Entry], layers: dict[str, Layer], size: Size, rounds: int) -> Times:
    """The order rotates; slow layers leave after their rounds."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(1, size.tokens, HIDDEN, generator=generator).bfloat16()

    times: Times = {name: {} for name in layers}
    names = list(layers)
    for i in range(WARM_UP + rounds):
        x, direction = draw(), draw()
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            most = entries[name].most_rounds
            if most is not None and not WARM_UP - 1 <= i < WARM_UP + most:
                continue
            taken = step(layers[name], x, direction)
            if i >= WARM_UP:
                times[name][i] = taken
    return times
