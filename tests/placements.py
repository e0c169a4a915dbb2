"""Random placements of a plan's layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from moecompile.plan import LayerPlan
from moecompile.planner.placement import PlacedLayer, write_placement


def random_placement(layers: Sequence[LayerPlan], path: Path, seed: int, ep: int | None = None) -> str:
    """A placement of its own for each layer, which keeps the groups of a limited router on one node; its path."""
    draw, placed = random.Random(seed), []
    for layer in layers:
        number, nodes = layer.experts.num_routed, layer.placement.nodes
        ranks = ep or layer.placement.ep
        limited = layer.routing.top_groups < layer.routing.groups and nodes > 1
        size = number // layer.routing.groups if limited else 1
        groups = [list(range(first, first + size)) for first in range(0, number, size)]
        draw.shuffle(groups)
        order = [expert for group in groups for expert in group]
        if limited:
            on_node = number // nodes
            parts = [order[first : first + on_node] for first in range(0, number, on_node)]
            order = [expert for part in parts for expert in draw.sample(part, on_node)]
        held = tuple(tuple(order[r * (number // ranks) : (r + 1) * (number // ranks)]) for r in range(ranks))
        placed.append(PlacedLayer(site=layer.site.fqn, ranks=held, load=tuple(range(1, number + 1))))
    write_placement(path, placed)
    return f"mesh.placement={path}"
