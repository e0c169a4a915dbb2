"""Records the routes of a training run, or replays those of another one, on any mesh."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.checkpoint.fingerprint import data_settings
from moecompile.errors import ConfigError, MoecompileError
from moecompile.nn.replay import ReplayLayer, Routes, record_routes, replay_layers, replay_routes
from moecompile.rundir import place
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.routes_file import RoutesFile, check_data, check_fits, create, open_routes
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.schema import Config

RECORD = "record"
FOLDER = "routes"


def routes_observer(
    model: nn.Module, config: Config, run_dir: Path, known: Mapping[str, Any], *, rank: int, accumulate: int,
    first_step: int,
) -> StepObserver | None:  # fmt: skip
    """What `routing.replay` asks for; None: nothing. All ranks call it.

    Args:
        known: fingerprint of model and data. rank: position of this rank's sequences in the global batch.
        accumulate: micro-batches of a step on a rank. first_step: optimizer steps before this run.

    Raises:
        ConfigError: a layer cannot be recorded or replayed, or the recorded routes do not fit the run.
    """
    wanted, data = config.routing.replay, config.data
    if wanted is None:
        return None
    try:
        layers = replay_layers(model)
    except MoecompileError as error:
        raise ConfigError("routing.replay", wanted, str(error), "Use routing.replay=null") from error
    if not layers:
        raise ConfigError("routing.replay", wanted, "the model has no router", "Use routing.replay=null")
    size = {"steps": config.trainer.max_steps, "sequences": data.global_batch_size, "tokens": data.seq_len}
    order = data_settings(config, known)
    if wanted == RECORD:
        folder = (run_dir if (run_dir / FOLDER).is_dir() else place(run_dir)) / FOLDER
        create(folder, layers, order, **size, is_first_rank=dist.get_rank() == 0)
        dist.barrier()
    else:
        folder = _folder(Path(wanted))
    routes = open_routes(folder, writable=wanted == RECORD)
    check_fits(routes, folder, layers, **size)
    if not check_data(routes, folder, order) and dist.get_rank() == 0:
        print(f"{folder} is of an earlier version: not compared: the data of these routes, and their order", flush=True)
    where = _Place(rank * accumulate * data.micro_batch_size, data.micro_batch_size, accumulate, first_step)
    return _Recorder(routes, where) if wanted == RECORD else _Replayer(routes, where)


def _folder(path: Path) -> Path:
    """The folder with routes: `path`, or `routes` in the run directory `path`."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


class _Place:
    """Where a micro-batch of this rank is in the file."""

    def __init__(self, first: int, size: int, accumulate: int, first_step: int) -> None:
        self.first, self.size, self.accumulate, self.first_step = first, size, accumulate, first_step

    def of(self, number: int) -> tuple[int, slice]:
        """(step, sequences) of this rank's micro-batch `number`."""
        step, place = divmod(number, self.accumulate)
        start = self.first + place * self.size
        return self.first_step + step, slice(start, start + self.size)


class _Recorder(StepObserver):
    """Writes this rank's part after each step. A step that is run again overwrites its routes."""

    def __init__(self, routes: RoutesFile, place: _Place) -> None:
        self.routes, self.place = routes, place
        self._stack = ExitStack()
        self._recorded: Routes | None = None
        self._unwritten: list[tuple[tuple[Any, ...], np.ndarray]] = []

    def micro_batch_started(self, module: LanguageModule, number: int) -> None:
        """Starts to record."""
        self._stack.close()
        self._recorded = self._stack.enter_context(record_routes(module.model))

    def micro_batch_ended(self, module: LanguageModule, number: int) -> None:
        """Keeps what the forward chose."""
        assert self._recorded is not None
        self._stack.close()
        step, rows = self.place.of(number)
        for i, layer in enumerate(self.routes.layers):
            ids = self._recorded.ids[layer.path][0].view(self.place.size, -1, layer.top_k)
            self._unwritten.append(((step, rows, slice(ids.shape[1]), i, slice(layer.top_k)), self._stored(ids)))

    def step_ended(self, module: LanguageModule, strategy: ExpertParallelStrategy) -> None:
        """Writes the step: before the first one has ended, the folder may be that of a run before."""
        for where, ids in self._unwritten:
            self.routes.ids[where] = ids
        self._unwritten.clear()

    def ended(self, module: LanguageModule) -> None:
        """Everything is on disk."""
        self.routes.ids.flush()

    def _stored(self, ids: Tensor) -> np.ndarray:
        return ids.masked_fill(ids < 0, self.routes.unknown).cpu().numpy().astype(self.routes.ids.dtype)


class _Replayer(StepObserver):
    """Makes the forwards of every micro-batch choose what was recorded."""

    def __init__(self, routes: RoutesFile, place: _Place) -> None:
        self.routes, self.place = routes, place
        self._stack = ExitStack()

    def micro_batch_started(self, module: LanguageModule, number: int) -> None:
        """Sets the choices until the backward is over."""
        self._stack.close()
        step, rows = self.place.of(number)
        stored = torch.from_numpy(self.routes.ids[step, rows].astype(np.int64)).to(module.device)
        self._stack.enter_context(replay_routes(module.model, self._by_layer(stored)))

    def _by_layer(self, ids: Tensor) -> dict[str, Tensor]:
        def of(i: int, layer: ReplayLayer) -> Tensor:
            return ids[:, :, i, : layer.top_k]

        return {layer.path: of(i, layer) for i, layer in enumerate(self.routes.layers)}

    def micro_batch_ended(self, module: LanguageModule, number: int) -> None:
        """Routers choose for themselves again, in validation."""
        self._stack.close()
