"""How uneven the load of ranks is: rows of the fullest EP rank over the mean.

1. Synthetic. Each of `_DRAWS` layers draws which experts are popular, then expected rows per expert:
       balanced   the same for all
       zipf       Gumbel top-k with weights 1 / (i + 1) ** skew, drawn for `_TOKENS` tokens
       hot        every other token takes one expert, the rest is uniform              (ops/workload.py has both)
   The fullest rank over the mean of each draw -> median and 99th percentile.                       -> `synthetic`
2. Measured: of every layer at every logged step of `load.npz`, rows per expert summed over each rank's experts. A
   `metrics.csv` alone has the fullest expert of each layer, which is an upper bound for a rank.     -> `measured`
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecompile.errors import ConfigError
from moecompile.load_history import LOAD_HISTORY
from moecompile.planner.loads import read_loads

_DRAWS, _TOKENS = 200, 256
_PATH = "workload.load"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Rows of the fullest rank over the mean: the median and the 99th percentile over layers (and steps)."""

    name: str
    p50: float
    p99: float


def synthetic(kind: str, experts: int, ep: int, top_k: int, skew: float = 1.0) -> Load:
    """The imbalance of a synthetic workload (step 1); `kind` is balanced, zipf or hot."""
    if kind == "balanced" or ep == 1:
        return Load(name=kind, p50=1.0, p99=1.0)
    generator = np.random.default_rng(0)
    rows = _zipf(generator, experts, top_k, skew) if kind == "zipf" else _hot(experts, top_k)
    draws = [_fullest(generator.permutation(rows), ep) for _ in range(_DRAWS)]
    return _load(kind, draws)


def measured(
    path: Path, experts: Sequence[int], ep: int, identity: Sequence[int] = (), orders: Sequence[Sequence[int]] = ()
) -> Load:
    """The imbalance of a run (step 2).

    Args:
        path: `metrics.csv` of a run directory, or a `load.npz`. experts: routed experts of the planned layers.
        identity: experts behind these that no rank computes; empty: none. orders: the expert at each position, by
            layer; empty: in the order of ids.

    Raises:
        ConfigError: there is no such file, or it is of another model.
    """
    if not path.is_file():
        raise ConfigError(_PATH, str(path), "is not a file", "Give the metrics.csv or load.npz of a run")
    beside = path.with_name(LOAD_HISTORY)
    if path.suffix == ".npz" or beside.is_file():
        found = path if path.suffix == ".npz" else beside
        rows = _rows(found, experts, identity or [0] * len(experts), orders or [()] * len(experts))
        return _load(found.name, [_fullest(row, ep) for row in rows])
    values = list(_violations(path, len(experts)))
    if not values:
        raise ConfigError(_PATH, str(path), "has no columns max_violation/LAYER", "Give the metrics.csv of an MoE run")
    return _load(f"{path.name} (fullest expert)", [min(1 + value, float(ep)) for value in values])


def _load(name: str, ratios: Sequence[float]) -> Load:
    p50, p99 = np.percentile(ratios, [50, 99])
    return Load(name=name, p50=float(p50), p99=float(p99))


def _fullest(rows: NDArray[np.float64], ep: int) -> float:
    per_rank = rows.reshape(ep, -1).sum(1)
    return float(per_rank.max() / per_rank.mean())


def _zipf(generator: np.random.Generator, experts: int, top_k: int, skew: float) -> NDArray[np.float64]:
    scores = generator.gumbel(size=(_TOKENS, experts)) - skew * np.log(np.arange(experts) + 1)
    chosen = np.argsort(-scores, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=experts).astype(np.float64)


def _hot(experts: int, top_k: int) -> NDArray[np.float64]:
    others = (top_k - 0.5) / (experts - 1) if experts > 1 else 0.0
    rows = np.full(experts, others)
    rows[0] = 0.5
    return rows


def _rows(
    path: Path, experts: Sequence[int], identity: Sequence[int], orders: Sequence[Sequence[int]]
) -> Iterator[NDArray[np.float64]]:
    """Rows by position, of every layer at every logged step."""
    layers = list(read_loads(path, _PATH).values())
    if len(layers) == len(identity):
        layers = [
            [row[: max(0, len(row) - last)] for row in steps] for steps, last in zip(layers, identity, strict=True)
        ]
    if (held := [len(steps[0]) if steps else 0 for steps in layers]) != list(experts):
        rule = f"is of another model: experts per layer are {_short(held)}, not {_short(experts)}"
        raise ConfigError(_PATH, str(path), rule, "Give the loads of a run of this model")
    for steps, order in zip(layers, orders, strict=True):
        yield from (row[list(order)] if order else row for row in steps if row.sum() > 0)


def _violations(path: Path, layers: int) -> Iterator[float]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name.startswith("max_violation/")]
        if names and len(names) != layers:
            rule = f"is of another model: it has {len(names)} MoE layers, the plan has {layers}"
            raise ConfigError(_PATH, str(path), rule, "Give the metrics of a run of this model")
        for row in reader:
            yield from (float(row[name]) for name in names if row[name])


def _short(numbers: Sequence[int]) -> str:
    different = sorted(set(numbers))
    return f"{len(numbers)} x {different[0]}" if len(different) == 1 else str(list(numbers))
