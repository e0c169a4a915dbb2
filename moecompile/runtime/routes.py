"""Records the routes of a training run, or replays those of another one, on any mesh.

    routes.yaml   format, steps, sequences (of a global batch), tokens (of a row), layers: path, num_experts, top_k;
                  data: what decides which tokens come in which order (format 1 has none)
    ids.npy       (steps, sequences, tokens, layers, top_k), uint8 or uint16: `numpy.load("ids.npy", mmap_mode="r")`

Entry [s, i, t, l] has the experts of token t of sequence i in the global batch of optimizer step s + 1. The largest
number of the type means that nothing was recorded: padding, steps that did not run, and slots beyond a layer's top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from moecompile.checkpoint.fingerprint import data_settings, differences
from moecompile.errors import ConfigError, MoecompileError
from moecompile.nn.replay import ReplayLayer, Routes, record_routes, replay_layers, replay_routes
from moecompile.rundir import output_dir
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.schema import Config

FORMAT, _WITHOUT_DATA = 2, 1
_HEAD, _IDS = "routes.yaml", "ids.npy"


@dataclass(frozen=True, kw_only=True)
class RoutesFile:
    """An open folder. head: the shape of what is stored. ids: mapped into memory; all ranks share its pages."""

    head: dict[str, Any]
    layers: tuple[ReplayLayer, ...]
    ids: np.memmap[Any, Any]

    @property
    def unknown(self) -> int:
        """The number that stands for no record."""
        return int(np.iinfo(self.ids.dtype).max)


def create(
    folder: Path, layers: Sequence[ReplayLayer], data: Mapping[str, Any], *, steps: int, sequences: int, tokens: int,
    is_first_rank: bool = True,
) -> bool:  # fmt: skip
    """Writes a folder without records, or leaves one of the same shape and data as it is. All ranks call it, so that
    all of them refuse. Returns whether this rank has written it.

    Args:
        data: what decides which tokens come in which order, as plain values. is_first_rank: whether this rank writes.

    Raises:
        ConfigError: the folder has routes of another shape, or of other data.
    """
    head = _head(layers, steps, sequences, tokens)
    if (folder / _HEAD).exists():
        before = _read_head(folder)
        known = before.pop("data", data)
        if before | {"format": FORMAT} != head or [*differences(known, data)]:
            raise ConfigError(
                "routing.replay",
                "record",
                f"{folder} has routes of another run",
                "Move it away, or use another run_dir",
            )
        return False
    if not is_first_rank:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    width = max(layer.top_k for layer in layers)
    dtype = np.uint8 if max(layer.num_experts for layer in layers) < np.iinfo(np.uint8).max else np.uint16
    shape = (steps, sequences, tokens, len(layers), width)
    ids: Any = np.lib.format.open_memmap(folder / _IDS, mode="w+", dtype=dtype, shape=shape)
    for step in range(steps):
        ids[step] = np.iinfo(dtype).max
    ids.flush()
    text = yaml.safe_dump({**head, "data": dict(data)}, sort_keys=False)
    (folder / _HEAD).write_text(text, encoding="utf-8")  # last: the folder is whole
    return True


def open_routes(folder: Path, *, writable: bool = False) -> RoutesFile:
    """Opens a folder.

    Raises:
        ConfigError: it has no routes, or they are damaged.
    """
    head = _read_head(folder)
    layers = tuple(ReplayLayer(**layer) for layer in head["layers"])
    try:
        ids = np.load(folder / _IDS, mmap_mode="r+" if writable else "r")
    except (OSError, ValueError) as error:
        raise ConfigError("routing.replay", str(folder), f"{_IDS} cannot be read: {error}", _RECORD) from error
    wanted = (head["steps"], head["sequences"], head["tokens"], len(layers), max(layer.top_k for layer in layers))
    if ids.shape != wanted:
        rule = f"{_IDS} has the shape {ids.shape}, {_HEAD} says {wanted}"
        raise ConfigError("routing.replay", str(folder), rule, _RECORD)
    return RoutesFile(head=head, layers=layers, ids=ids)


_RECORD = "Record it again with routing.replay=record"


def check_fits(
    routes: RoutesFile, folder: Path, layers: Sequence[ReplayLayer], *, steps: int, sequences: int, tokens: int
) -> None:
    """Checks that recorded routes fit a run.

    Raises:
        ConfigError: they have other layers, fewer steps, or another batch.
    """
    known, wanted = routes.head, _head(layers, steps, sequences, tokens)
    for i, (have, need) in enumerate(zip(known["layers"], wanted["layers"], strict=False)):
        if have != need:
            rule = f"layer {i} of the routes is {_said(have)}, of the model {_said(need)}"
            raise ConfigError("routing.replay", str(folder), rule, "Use the model whose routes were recorded")
    for path, name in (("model", "layers"), ("data.global_batch_size", "sequences"), ("data.seq_len", "tokens")):
        have, need = known[name], wanted[name]
        if have != need:
            counted = (len(have), len(need)) if name == "layers" else (have, need)
            rule = f"has routes for {counted[0]} {name}, {path} has {counted[1]}"
            raise ConfigError("routing.replay", str(folder), rule, "Use the config with which they were recorded")
    if known["steps"] < steps:
        rule = f"has routes of {known['steps']} steps, trainer.max_steps={steps}"
        raise ConfigError("routing.replay", str(folder), rule, "Train fewer steps, or record more")


def check_data(routes: RoutesFile, folder: Path, data: Mapping[str, Any]) -> bool:
    """Checks that routes were recorded with the same data in the same order; False: they do not say (format 1).

    Raises:
        ConfigError: they were not.
    """
    if "data" not in routes.head:
        return False
    changes = differences(routes.head["data"], data)
    changed = [f"{name}: {before} in the record, {now} here" for name, before, now in changes]
    if changed:
        rule = f"has routes of other tokens ({'; '.join(changed)})"
        raise ConfigError("routing.replay", str(folder), rule, "Use the config with which they were recorded")
    return True


def _said(layer: dict[str, Any]) -> str:
    return f"{layer['path']} (top {layer['top_k']} of {layer['num_experts']})"


def _head(layers: Sequence[ReplayLayer], steps: int, sequences: int, tokens: int) -> dict[str, Any]:
    return {
        "format": FORMAT, "steps": steps, "sequences": sequences, "tokens": tokens,
        "layers": [asdict(layer) for layer in layers],
    }  # fmt: skip


def _read_head(folder: Path) -> dict[str, Any]:
    path = folder / _HEAD
    try:
        head = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("routing.replay", str(folder), f"{_HEAD} cannot be read: {error}", _RECORD) from error
    keys = {"format", "steps", "sequences", "tokens", "layers"}
    is_known = isinstance(head, dict) and (
        (set(head) == keys and head["format"] == _WITHOUT_DATA)
        or (set(head) == {*keys, "data"} and head["format"] == FORMAT)
    )
    if not isinstance(head, dict) or not is_known or not head["layers"]:
        raise ConfigError("routing.replay", str(folder), f"{_HEAD} is not of format 1 or 2", _RECORD)
    return head


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
    is_first, is_new = dist.get_rank() == 0, False
    if wanted == RECORD:
        folder = (run_dir if (run_dir / FOLDER).is_dir() else output_dir(run_dir)) / FOLDER
        is_new = create(folder, layers, order, **size, is_first_rank=is_first)
        dist.barrier()
    else:
        folder = _folder(Path(wanted))
    routes = open_routes(folder, writable=wanted == RECORD)
    check_fits(routes, folder, layers, **size)
    if not check_data(routes, folder, order) and is_first:
        print(f"{folder} is of an earlier version: not compared: the data of these routes, and their order", flush=True)
    where = _Place(rank * accumulate * data.micro_batch_size, data.micro_batch_size, accumulate, first_step)
    return _Recorder(routes, where, forgets=is_first and not is_new) if wanted == RECORD else _Replayer(routes, where)


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
    """Writes this rank's part after each step.

    Args:
        forgets: whether this rank removes what a run before has left of this run's steps, before any rank writes.
    """

    def __init__(self, routes: RoutesFile, place: _Place, *, forgets: bool) -> None:
        self.routes, self.place, self._forgets = routes, place, forgets
        self._has_begun = False
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
        self._begin()
        for where, ids in self._unwritten:
            self.routes.ids[where] = ids
        self._unwritten.clear()

    def ended(self, module: LanguageModule) -> None:
        """Everything is on disk; a callback may have ended the run before a step."""
        self._begin()
        self.routes.ids.flush()

    def _begin(self) -> None:
        """Steps that this run may not reach have no routes of another one."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._forgets:
            for step in range(self.place.first_step, len(self.routes.ids)):
                self.routes.ids[step] = self.routes.unknown
            self.routes.ids.flush()
        dist.barrier()

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
