"""placement.yaml: which EP rank has which experts, layer by layer. `task=place` writes it, `mesh.placement` names it.

    format: 1
    ep: 4                         EP ranks
    layers:
    - site: model.layers.1.mlp    as in plan.yaml
      ranks: [[0, 5], [1, 4], ...]     ids of the experts on each rank
      load: [310, 12, ...]        rows of each expert, from which the placement was made

A file of another model or another number of ranks is refused. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moecompile.atomic import write_text
from moecompile.errors import ConfigError, PlanError
from moecompile.plan import LayerPlan, Plan
from moecompile.planner.packing import fullest_of, place_experts
from moecompile.schema import Config

FILE, KEY, FORMAT = "placement.yaml", "mesh.placement", 1
_AGAIN = "Make it again with task=place"


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
