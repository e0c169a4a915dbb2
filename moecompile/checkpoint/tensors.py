"""Weights and optimizer state as a folder of shards, through torch DCP.

    model.NAME                 a parameter or buffer of the model's state dict
    optimizer.NAME.exp_avg     what the optimizer keeps for the parameter NAME

Every entry is a tensor with its global shape: experts are stacked in the order of their global ids, whatever rank holds
them, so that a reader of any mesh finds its own part. Nothing is pickled but DCP's index, and that is read with a list
of the classes that may occur in it: a checkpoint cannot run code.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from moecompile.errors import ConfigError

INDEX = ".metadata"

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath"),
}  # fmt: skip


def tensors_of(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, Tensor]:
    """The entries of a checkpoint, as views: what is read into them is in the model and its optimizers.

    Calling it gives an optimizer that has not made a step yet its state. All ranks call it.
    """
    found = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for optimizer in optimizers:
        for name, value in get_optimizer_state_dict(model, optimizer, options=options).items():
            if isinstance(value, Tensor) and name.startswith("state."):
                found[f"optimizer.{name.removeprefix('state.')}"] = value
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def forget_unused(
    model: nn.Module, optimizers: Iterable[Optimizer], tensors: dict[str, Tensor], found: Iterable[str]
) -> dict[str, Tensor]:
    """`tensors` without the state of weights that had none: no gradient had reached them. Their state is removed.

    Args:
        tensors: from `tensors_of`, which makes state for all. found: names of a checkpoint's entries.
    """
    kept = {name.removeprefix("optimizer.").rpartition(".")[0] for name in found if name.startswith("optimizer.")}
    if not kept:  # a checkpoint without an optimizer: it is refused
        return tensors
    unused = {name: parameter for name, parameter in model.named_parameters() if name not in kept}
    for optimizer in optimizers:
        for parameter in unused.values():
            optimizer.state.pop(parameter, None)
    gone = tuple(f"optimizer.{name}." for name in unused)
    return {name: tensor for name, tensor in tensors.items() if not gone or not name.startswith(gone)}


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, which training does not change any more."""
    return {name: value.detach().clone() if value.is_cpu else value.detach().cpu() for name, value in tensors.items()}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes this rank's shards; all ranks call it, and when it returns on one, all files of all ranks are complete.

    Raises:
        CheckpointException: a rank could not write; every rank raises it.
    """
    dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place with the entries of their names; all ranks of whatever mesh call it, or one process.

    Raises:
        ConfigError: the folder is not a checkpoint of ours, a shard is broken or gone, or an entry is missing or has
            another shape (`fit.check_entries` says that better).
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
            dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=_TensorsAlone())
    except CheckpointException as error:  # no Exception, for torch
        rank, cause = failed_rank(error)
        raise ConfigError(
            "trainer.resume", folder, f"it cannot be read on rank {rank} ({cause})", "Use another checkpoint"
        ) from error


def failed_rank(error: CheckpointException) -> tuple[int, str]:
    """The first rank that failed, and the first line of what it said."""
    rank, (cause, _) = min(error.failures.items())
    return rank, (str(cause).splitlines() or [type(cause).__name__])[0]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The global shape of every entry.

    Raises:
        ConfigError: the folder is not a checkpoint of ours.
    """
    entries = read_index(folder).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_index(folder: Path) -> Metadata:
    """DCP's index, from classes that are known.

    Raises:
        ConfigError: there is none, it is broken, or it holds anything else.
    """
    try:
        with (folder / INDEX).open("rb") as file:
            index = _IndexReader(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
        fix = "Use a checkpoint that moecompile wrote"
        raise ConfigError("trainer.resume", folder, f"its index {INDEX} cannot be read ({error})", fix) from error
    return index


class _IndexReader(pickle.Unpickler):
    """Knows the classes of DCP's index and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        if name in _INDEX_CLASSES.get(module, ()) or isinstance(value, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


class _Writer(FileSystemWriter):
    """DCP's writer. On a full disk torch's file format complains of itself, and only this rank knows why."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


class _Reader(FileSystemReader):
    """DCP's reader with our way to read the index; tensors are read with weights_only by DCP itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class _TensorsAlone(DefaultLoadPlanner):
    """DCP would unpickle an entry that is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.storage_index.fqn} is no tensor")
