"""The load of every expert at every logged step: training writes it, reports read it. Needs only numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moecompile.atomic import replacing

LOAD_HISTORY = "load.npz"
"""Name of the file in the run directory."""
NO_EXPERT = -1
"""Load of an expert that a layer does not have, if another layer has more experts."""


@dataclass
class LoadHistory:
    """layers: names in model order. steps: optimizer steps. loads: one (layers, experts) int64 array per step."""

    layers: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    loads: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, step: int, load: Mapping[str, Sequence[int]]) -> None:
        """Adds a step. load: layer -> tokens per expert; every step has the same layers.

        Raises:
            ValueError: the layers differ from those of earlier steps.
        """
        if self.steps and self.layers != list(load):
            raise ValueError(f"step {step} has the layers {list(load)}, earlier steps have {self.layers}")
        rows = np.full((len(load), max(map(len, load.values()))), NO_EXPERT, dtype=np.int64)
        for row, counts in zip(rows, load.values(), strict=True):
            row[: len(counts)] = counts
        self.layers = list(load)
        self.steps.append(step)
        self.loads.append(rows)

    def until(self, step: int) -> LoadHistory:
        """The history up to and including an optimizer step."""
        count = sum(1 for logged in self.steps if logged <= step)
        return LoadHistory(self.layers if count else [], self.steps[:count], self.loads[:count])

    def save(self, path: Path) -> None:
        """Writes `path` atomically: `steps` (R,), `layers` (L,) and `load` (R, L, E)."""
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, steps=np.array(self.steps), layers=np.array(self.layers), load=np.stack(self.loads)
            )

    @classmethod
    def read(cls, path: Path) -> LoadHistory:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is cut off, or none.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return cls(layers=file["layers"].tolist(), steps=file["steps"].tolist(), loads=list(file["load"]))
        except (EOFError, BadZipFile) as error:
            raise ValueError(f"{path} is cut off: {error}") from error
