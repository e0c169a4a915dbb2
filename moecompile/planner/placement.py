"""placement.yaml: which EP rank has which experts, layer by layer. `task=place` writes it, `mesh.placement` names it.

    format: 1
    ep: 4                         EP ranks
    layers:
    - site: model.layers.1.mlp    as in plan.yaml
      ranks: [[0, 5], [1, 4], ...]     ids of the experts on each rank
      load: [310, 12, ...]        rows of each expert, from which the placement was made

A file of another model or another number of ranks is refused. Needs no torch.

Which rank gets which expert: such that the fullest rank computes as few rows as possible.

Every rank gets equally many experts. With groups (node-limited routing), the experts of a group stay on one node.

Algorithm:
  1. Groups go to nodes. If there are few ways, all are tried, those with the lightest fullest node first, until no way
     left can be better; else they are packed as experts are.
  2. On each node, the heaviest expert that is left goes to the lightest rank with room, as EPLB packs them
     (https://github.com/deepseek-ai/EPLB).
  3. The fullest rank and another one share their experts anew, as evenly as they can be shared, as long as that makes
     the fullest rank lighter. So the result is never worse than that of step 2.
  4. Few experts are packed from other starts too, drawn at random but always the same, unless no rank could be
     lighter.
  5. Where the fullest rank is no lighter than in the order of ids, that stays; so it does with even groups that ranks
     hold whole, which have equally many rows at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moecompile.atomic import write_text
from moecompile.errors import ConfigError, PlanError
from moecompile.plan import ExpertPlacement, LayerPlan, Plan
from moecompile.schema import Config

FILE, KEY, FORMAT = "placement.yaml", "mesh.placement", 1
_AGAIN = "Make it again with task=place"
_WAYS = 1000  # ways from groups to nodes that are tried
_EXACT = 16  # experts of two ranks that are shared by trying all halves
_STARTS, _CLOSE, _NONE = 30, 1e-3, 1e-6
_FEW = 32  # items that are packed from other starts too
_Bins = list[list[int]]
_Weights = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PlacedLayer:
    """The experts of each rank, and their rows."""

    site: str
    ranks: tuple[tuple[int, ...], ...]
    load: tuple[float, ...]

    @property
    def before(self) -> float:
        """Rows of the fullest rank over the mean, with experts in the order of their ids."""
        ids = np.arange(len(self.load)).reshape(len(self.ranks), -1)
        return self._over_mean(ids.tolist())

    @property
    def after(self) -> float:
        """The same with this placement."""
        return self._over_mean(self.ranks)

    def _over_mean(self, bins: Sequence[Sequence[int]]) -> float:
        weights = np.asarray(self.load, dtype=np.float64)
        return fullest_of(weights, bins) * len(bins) / float(weights.sum()) if weights.any() else 1.0

    @property
    def order(self) -> tuple[int, ...]:
        """The expert at each position, by ascending id on a rank; empty if that is the order of ids."""
        order = tuple(expert for held in self.ranks for expert in sorted(held))
        return () if order == tuple(range(len(order))) else order


def make_placement(plan: Plan, loads: Sequence[Sequence[float]], ep: int, nodes: int) -> list[PlacedLayer]:
    """A placement of a plan's layers on `ep` ranks of `nodes` nodes, from the rows of each expert.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    placed = []
    for layer, load in zip(plan.layers, loads, strict=True):
        if layer.experts.num_routed % ep:
            rule = f"must divide the {layer.experts.num_routed} experts of {layer.site.fqn}"
            raise ConfigError("mesh.ep", ep, rule, "Use a divisor")
        limited = layer.routing.top_groups < layer.routing.groups
        by_id = ExpertPlacement(num_experts=layer.experts.num_routed, ep=ep)
        if layer.routing.even_groups and by_id.has_whole(layer.routing.groups):
            order = tuple(range(layer.experts.num_routed))
        else:
            order = place_experts(load, ep, nodes, layer.routing.groups if limited else 1)
        ranks = np.array(order).reshape(ep, -1).tolist()
        placed.append(PlacedLayer(site=layer.site.fqn, ranks=tuple(map(tuple, ranks)), load=tuple(load)))
    return placed


def write_placement(path: Path, layers: Sequence[PlacedLayer]) -> None:
    """Writes `path` atomically."""
    body = {
        "format": FORMAT,
        "ep": len(layers[0].ranks),
        "layers": [
            {"site": layer.site, "ranks": [list(held) for held in layer.ranks], "load": list(layer.load)}
            for layer in layers
        ],
    }
    write_text(path, yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=120))


def read_placement(path: Path) -> list[PlacedLayer]:
    """Reads `path`.

    Raises:
        ConfigError: it cannot be read, or does not place every expert of a layer once, equally many on each rank.
    """
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {body['format']}, not {FORMAT}")
        ep, layers = int(body["ep"]), [_layer(each) for each in body["layers"]]
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(KEY, path, f"is not a placement: {error!r:.200}", "Give a file of task=place") from error
    for layer in layers:
        held = sorted(expert for rank in layer.ranks for expert in rank)
        sizes = {len(rank) for rank in layer.ranks}
        if len(layer.ranks) != ep or len(sizes) != 1 or held != list(range(len(layer.load))):
            rule = f"must place the {len(layer.load)} experts of {layer.site} once, equally many on each of {ep} ranks"
            raise ConfigError(KEY, path, rule, _AGAIN)
    return layers


def _layer(body: Mapping[str, Any]) -> PlacedLayer:
    ranks = tuple(tuple(map(int, rank)) for rank in body["ranks"])
    return PlacedLayer(site=str(body["site"]), ranks=ranks, load=tuple(map(float, body["load"])))


def with_placement(config: Config) -> Config:
    """The config with the absolute path of its placement.

    Raises:
        ConfigError: there is no such file, or the task decides on its own where experts are.
    """
    name = config.mesh.placement
    if name is None:
        return config
    if config.task.name.value in ("search", "place"):
        rule = f"task={config.task.name.value} looks for another one"
        raise ConfigError(KEY, name, rule, "Leave it out")
    return replace(config, mesh=replace(config.mesh, placement=str(_file(name))))


def _file(name: str) -> Path:
    path = Path(name).absolute()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(KEY, name, f"is neither a {FILE} nor a run directory with one", "Give the path of one")
    return path


def placed(layers: Sequence[LayerPlan], config: Config) -> tuple[LayerPlan, ...]:
    """The layers with their experts where `mesh.placement` says; unchanged without one.

    Raises:
        ConfigError: the file is of another model or mesh, or splits a group over nodes that the router keeps on one.
    """
    if config.mesh.placement is None or not layers:
        return tuple(layers)
    path = _file(config.mesh.placement)
    found, ep = {layer.site: layer for layer in read_placement(path)}, layers[0].placement.ep
    shapes = {site: len(layer.load) for site, layer in found.items()}
    planned = {layer.site.fqn: layer.experts.num_routed for layer in layers}
    if shapes != planned:
        site = next(site for site in (*planned, *shapes) if planned.get(site) != shapes.get(site))
        has = [f"{number} experts" if number else "none" for number in (shapes.get(site), planned.get(site))]
        rule = f"is of another model: it has {has[0]} at {site}, the plan has {has[1]}"
        raise ConfigError(KEY, path, rule, "Give a placement of this model")
    ranks = len(next(iter(found.values())).ranks)
    if ranks != ep:
        raise ConfigError(KEY, path, f"is for mesh.ep={ranks}, this mesh has ep={ep}", _AGAIN)
    return tuple(_placed(layer, found[layer.site.fqn], path) for layer in layers)


def _placed(layer: LayerPlan, where: PlacedLayer, path: Path) -> LayerPlan:
    try:
        return replace(layer, placement=replace(layer.placement, order=where.order))
    except PlanError as error:
        raise ConfigError(KEY, path, f"{layer.site.fqn}: {error.rule}", _AGAIN) from None


def place_experts(loads: Sequence[float], ep: int, nodes: int = 1, groups: int = 1) -> tuple[int, ...]:
    """The expert at each position: rank r has the r-th equal part, by ascending id.

    Args:
        loads: rows of each expert, of which ranks compute equally many. ep: ranks, which `nodes` divides.
        groups: of consecutive experts that must stay on one node each; if nodes cannot share them evenly, or there is
            one node, they do not matter.
    """
    weights = np.asarray(loads, dtype=np.float64)
    if nodes == 1 or groups == 1 or groups % nodes:
        nodes = groups = 1
    size, ranks = len(weights) // groups, ep // nodes
    totals = weights.reshape(groups, size).sum(1)

    @cache
    def on_a_node(chosen: tuple[int, ...]) -> tuple[_Bins, float]:
        """The experts of some groups on the ranks of a node, and the rows of the fullest one."""
        experts = np.concatenate([np.arange(group * size, (group + 1) * size) for group in chosen])
        bins = [[int(experts[i]) for i in held] for held in pack(weights[experts], ranks)]
        return bins, fullest_of(weights, bins)

    best: _Bins = []
    least = np.inf
    for way in _ways(totals, nodes):  # Step 1
        if max(totals[chosen].sum() for chosen in way) / ranks >= least:
            break
        heaviest_first = sorted(way, key=lambda chosen: -totals[chosen].sum())
        if all(on_a_node(tuple(chosen))[1] < least for chosen in heaviest_first):
            best = [held for chosen in way for held in on_a_node(tuple(chosen))[0]]
            least = max(on_a_node(tuple(chosen))[1] for chosen in way)
    ids = np.arange(len(weights)).reshape(ep, -1).tolist()
    if least >= fullest_of(weights, ids) * (1 - _NONE):  # Step 5
        best = ids
    return tuple(expert for held in best for expert in sorted(held))


def pack(weights: _Weights, num_bins: int) -> _Bins:
    """Equally many items for each bin, the fullest one as light as steps 2 to 4 make it."""
    room, generator = len(weights) // num_bins, np.random.default_rng(0)
    heaviest = weights.max() + np.sort(weights)[: room - 1].sum()
    least = max(weights.sum() / num_bins, heaviest) * (1 + _CLOSE)  # no packing is lighter
    bins = _greedy(weights, num_bins)
    best = _improved(weights, bins)
    for _ in range(_STARTS if num_bins > 2 and room > 1 and len(weights) <= _FEW else 0):  # Step 4
        if fullest_of(weights, best) <= least:
            break
        start = generator.permutation(len(weights)).reshape(num_bins, room).tolist()
        best = min(best, _improved(weights, start), key=lambda bins: fullest_of(weights, bins))
    return best


def _improved(weights: _Weights, bins: _Bins) -> _Bins:
    """Step 3, as often as it helps."""
    while _shared_anew(weights, bins):
        pass
    return bins


def fullest_of(weights: _Weights, bins: Sequence[Sequence[int]]) -> float:
    """The weight of the fullest bin."""
    return float(max(weights[list(held)].sum() for held in bins))


def _ways(totals: _Weights, nodes: int) -> list[_Bins]:
    """Ways to give each node equally many groups, the one with the lightest fullest node first."""
    ways: list[_Bins] = []
    for way in _divisions(tuple(range(len(totals))), nodes):
        ways.append(way)
        if len(ways) > _WAYS:
            ways = [pack(totals, nodes), _greedy(totals, nodes)]
            break
    return sorted(ways, key=lambda way: fullest_of(totals, way))


def _divisions(items: tuple[int, ...], parts: int) -> Iterator[_Bins]:
    """Every division into equal parts, regardless of their order."""
    if parts == 1:
        yield [list(items)]
        return
    first, *rest = items
    for others in combinations(rest, len(items) // parts - 1):
        left = tuple(item for item in rest if item not in others)
        for division in _divisions(left, parts - 1):
            yield [[first, *others], *division]


def _greedy(weights: _Weights, num_bins: int) -> _Bins:
    """Step 2."""
    room, bins = len(weights) // num_bins, [list[int]() for _ in range(num_bins)]
    loads = [0.0] * num_bins
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((i for i in range(num_bins) if len(bins[i]) < room), key=loads.__getitem__)
        bins[lightest].append(int(item))
        loads[lightest] += float(weights[item])
    return bins


def _shared_anew(weights: _Weights, bins: _Bins) -> bool:
    """Step 3, once: whether the fullest bin got lighter, in place."""
    loads = [float(weights[held].sum()) for held in bins]
    fullest, *others = sorted(range(len(bins)), key=lambda i: -loads[i])
    for other in reversed(others):
        halves = _halves(weights, bins[fullest], bins[other])
        if max(weights[half].sum() for half in halves) < loads[fullest] * (1 - 1e-12):
            bins[fullest], bins[other] = halves
            return True
    return False


def _halves(weights: _Weights, first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """The experts of two bins in two halves of equal number, as even as trying all of them or swaps can make them."""
    items = [*first, *second]
    if len(items) <= _EXACT:
        ways = _of_half(len(items))
        sums = weights[np.array(items)[ways]].sum(1)
        chosen = set(ways[np.abs(2 * sums - weights[items].sum()).argmin()].tolist())
        return [items[i] for i in sorted(chosen)], [item for i, item in enumerate(items) if i not in chosen]
    a, b = list(first), list(second)
    while True:
        gap = weights[a].sum() - weights[b].sum()
        after = np.abs(gap - 2 * (weights[a][:, None] - weights[b][None, :]))
        i, j = np.unravel_index(after.argmin(), after.shape)
        if after[i, j] >= abs(gap) * (1 - 1e-12):
            return a, b
        a[i], b[j] = b[j], a[i]


@cache
def _of_half(count: int) -> NDArray[np.int64]:
    """The halves of `count` items that have the first one, (ways, count / 2)."""
    halves = [(0, *others) for others in combinations(range(1, count), count // 2 - 1)]
    return np.array(halves, dtype=np.int64)
