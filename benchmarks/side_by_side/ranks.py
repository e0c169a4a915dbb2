"""One rank of several, the experts spread over all of them, everybody in turn."""

from __future__ import annotations

import json
import os
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layer import HIDDEN
from torch import Tensor

from side_by_side import agreement
from side_by_side.common import Layer, Place, Size, Weights
from side_by_side.launch import NAMESPACE
from side_by_side.one_rank import WARM_UP, Times, step, summary
from side_by_side.registry import LIMIT, OURS, TWO_NODES, Entry
from side_by_side.wire import Counter


def run_rank(job: dict[str, Any], folder: Path) -> None:
    """All sizes; rank 0 writes `found.json`. Does not return."""
    dist.init_process_group("gloo")
    entries = {name: TWO_NODES[name] for name in job["names"]}
    counter = Counter()
    place = Place(dist.get_rank(), dist.get_world_size(), job["nodes"])
    rows = [row for size in job["sizes"] for row in _measure(entries, Size.parse(size), job["rounds"], counter, place)]
    counter_x = counter.check(job["nodes"])
    if dist.get_rank() == 0:
        found = {"namespace": os.environ.get(NAMESPACE), "counter_x": counter_x, "rows": rows}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _measure(
    entries: dict[str, Entry], size: Size, rounds: int, counter: Counter, place: Place
) -> list[dict[str, Any]]:
    weights = Weights.random(size)
    layers = {name: entry.build(size, weights, place) for name, entry in entries.items()}
    reference = agreement.Reference(size, weights, place)
    errors = {name: reference.errors(layer) for name, layer in layers.items() if name != LIMIT}
    for name, found in errors.items():
        agreement.require(name, found)
    times, sent = _interleaved(layers, size, rounds, counter)
    everywhere: list[Any] = [None] * place.ranks
    dist.all_gather_object(everywhere, (times, errors))
    merged = {
        name: {
            i: (
                statistics.mean(theirs[name][i][0] for theirs, _ in everywhere),
                max(theirs[name][i][1] for theirs, _ in everywhere),
            )
            for i in found
        }
        for name, found in times.items()
    }
    return [
        {
            "size": str(size), "layer": name, **row,
            # Barriers vary by some bytes. The ranks of a node share an interface.
            "sent_mib": max(0.0, statistics.median(sent[name])) * place.nodes / place.ranks / 2**20,
            "errors": _worst([theirs[name] for _, theirs in everywhere]) if name != LIMIT else None,
        }
        for name, row in summary(merged, f"{OURS} auto").items()
    ]  # fmt: skip


def _worst(errors: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(found[name] for found in errors) for name in errors[0]}


def _interleaved(
    layers: dict[str, Layer], size: Size, rounds: int, counter: Counter
) -> tuple[Times, dict[str, list[float]]]:
    """This rank's times, and the bytes that its interface sent, of each round."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())

    def draw() -> Tensor:
        return torch.randn(1, size.tokens, HIDDEN, generator=generator).bfloat16()

    times: Times = {name: {} for name in layers}
    sent: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for i in range(WARM_UP + rounds):
        x, direction = draw(), draw()
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            taken, bytes_ = counter.sent_by(partial(step, layers[name], x, direction))
            if i >= WARM_UP:
                times[name][i] = taken
                sent[name].append(bytes_)
    return times, sent
