"""Weights and optimizer state as a folder of shards, through torch DCP.

    model.NAME                 a parameter or buffer of the model's state dict
    optimizer.NAME.exp_avg     optimizer state of the parameter NAME

Every entry is a tensor with its global shape: experts are stacked in the order of their global ids, whichever rank has
them, so that a reader on any mesh finds its own part. Only DCP's index is pickled, and only allowed classes are
unpickled from it, so a checkpoint cannot run code.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from moecompile.checkpoint import folders
from moecompile.checkpoint.folders import INDEX, check, checkpoints_of, latest
from moecompile.checkpoint.placed import BY_ID, LoadById, Orders, SaveById
from moecompile.errors import ConfigError
from moecompile.nn.stages import tied_names

_SHARD = ".distcp"
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


def tensors_of(model: nn.Module, optimizers: Iterable[Optimizer] = (), *, to_read: bool = False) -> dict[str, Tensor]:
    """The entries of a checkpoint, as views: reading into them changes the model and its optimizers.

    An optimizer that has not made a step yet has no state, and no entries.

    Args:
        to_read: state is made for such an optimizer by a step with zeros, which counts as one: all of it must be read,
            or forgotten (`forget_unused`). All ranks call it.
    """
    tensors = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    options, tied = StateDictOptions(flatten_optimizer_state_dict=True), tied_names(model)
    for optimizer in (each for each in optimizers if each.state or to_read):  # torch makes what is missing
        for name, value in get_optimizer_state_dict(model, optimizer, options=options).items():
            if isinstance(value, Tensor) and name.startswith("state."):
                weight, _, kind = name.removeprefix("state.").rpartition(".")
                tensors[f"optimizer.{tied.get(weight, weight)}.{kind}"] = value
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def written(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that this rank writes: state of a weight that two stages share is written by the first one."""
    twice = tuple(f"optimizer.{name}." for name in tied_names(model).values())
    return {name: tensor for name, tensor in tensors.items() if not twice or not name.startswith(twice)}


def forget_unused(
    model: nn.Module, optimizers: Iterable[Optimizer], tensors: dict[str, Tensor], saved: Iterable[str],
    *, had_steps: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Removes optimizer state that was not saved, of weights that no step had changed, also from `tensors`.

    Args:
        tensors: from `tensors_of`, which makes state for all. saved: names of a checkpoint's entries.
        had_steps: whether there were steps; then a checkpoint without any state is not of these optimizers, nothing is
            removed, and it is refused later.
    """
    with_state = {name.removeprefix("optimizer.").rpartition(".")[0] for name in saved if name.startswith("optimizer.")}
    if had_steps and not with_state:
        return tensors
    tied = tied_names(model)
    named = {tied.get(name, name): parameter for name, parameter in model.named_parameters()}
    unused = {name: parameter for name, parameter in named.items() if name not in with_state}
    for optimizer in optimizers:
        for parameter in unused.values():
            optimizer.state.pop(parameter, None)
    prefixes = tuple(f"optimizer.{name}." for name in unused)
    return {name: tensor for name, tensor in tensors.items() if not prefixes or not name.startswith(prefixes)}


def shapes_of(tensors: Mapping[str, Tensor], stages: dist.ProcessGroup | None) -> dict[str, tuple[int, ...]]:
    """The global shape of every entry of the whole model. stages: ranks with its other stages, which all call it."""
    own = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if stages is None:
        return own
    gathered: list[Any] = [None] * dist.get_world_size(stages)
    dist.all_gather_object(gathered, own, group=stages)
    return {name: shape for part in gathered for name, shape in part.items()}


def staged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory, which training does not change."""
    return {name: value.detach().clone() if value.is_cpu else value.detach().cpu() for name, value in tensors.items()}


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None, *, orders: Orders
) -> None:
    """Writes the shards and their checksums. All ranks call it; when it returns, all files are complete.

    Args:
        orders: from `orders_of`: the expert at each position of entries that are not in the order of ids. It has no
            default, because rows would be written for other experts silently.

    Raises:
        CheckpointException: a rank could not write; raised on every rank.
    """
    dcp.save(dict(tensors), storage_writer=_Writer(folder), planner=SaveById(orders), process_group=group)
    rank = dist.get_rank(group)
    gathered: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    local_sums = {path.name: folders.file_sum(path) for path in folder.glob(f"__{rank}_*{_SHARD}")}
    dist.gather_object(local_sums, gathered, group=group, group_dst=0)
    if gathered is not None:
        folders.seal(folder, {name: value for part in gathered for name, value in part.items()})
    dist.barrier(group)


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], *, orders: Orders) -> None:
    """Fills `tensors` in place from the entries with their names. All ranks of any mesh call it, or a single process.

    Args:
        orders: from `orders_of`, as for `write_tensors`.

    Raises:
        ConfigError: the folder is not our checkpoint, a shard is broken or missing, or an entry is missing or has
            another shape (`fit.check_entries` gives a better message).
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
            dcp.load(dict(tensors), storage_reader=_Reader(folder), planner=_TensorsOnly(orders))
    except CheckpointException as error:  # a BaseException in torch
        rank, cause = failed_rank(error)
        if isinstance(damaged := error.failures[rank][0], ConfigError):
            raise damaged from error
        raise ConfigError(
            "trainer.resume", folder, f"it cannot be read on rank {rank} ({cause})", "Use another checkpoint"
        ) from error


def failed_rank(error: CheckpointException) -> tuple[int, str]:
    """The first rank that failed, and the first line of its error."""
    rank, (cause, _) = min(error.failures.items())
    return rank, (str(cause).splitlines() or [type(cause).__name__])[0]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The global shape of every entry.

    Raises:
        ConfigError: the folder is not our checkpoint.
    """
    entries = read_index(folder).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


Entry = tuple[tuple[int, ...], torch.dtype]
"""Global shape and dtype."""


def entries_of(folder: Path) -> dict[str, Entry]:
    """Shape and dtype of every entry.

    Raises:
        ConfigError: the folder is not our checkpoint.
    """
    entries = read_index(folder).state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in tensors.items()}


def read_index(folder: Path) -> Metadata:
    """DCP's index, unpickled with allowed classes only.

    Raises:
        ConfigError: it is missing or broken, or contains other classes.
    """
    folders.check(folder, [INDEX])
    try:
        with (folder / INDEX).open("rb") as file:
            index = _IndexReader(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        fix = "Use a checkpoint that moecompile wrote"
        raise ConfigError("trainer.resume", folder, f"its index {INDEX} cannot be read ({error})", fix) from error
    return index


class _IndexReader(pickle.Unpickler):
    """Allows only the classes of DCP's index."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # where Python 3.13 has its classes
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write a member of an Enum
            return _member
        value = getattr(torch, name, None) if module == "torch" else None
        if name in _INDEX_CLASSES.get(module, ()) or isinstance(value, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")


def _member(owner: Any, name: Any) -> Enum:
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError("builtins.getattr is not allowed in it")
    return owner[name]


class _Writer(FileSystemWriter):
    """DCP's writer, which raises the OSError behind an error: on a full disk torch reports a broken file format."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


class _Reader(FileSystemReader):
    """DCP's reader with our index reader; DCP itself reads tensors with weights_only.

    Every rank checks the files that it will read before any rank reads one.
    """

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        folders.check(Path(self.path), {self.storage_data[item.storage_index].relative_path for item in plan.items})
        return plan

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class _TensorsOnly(LoadById):
    """Refuses entries that are not tensors, which DCP would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise pickle.UnpicklingError(f"{read_item.storage_index.fqn} is not a tensor")


# -- a model's weights from a checkpoint of any mesh in one process: names and expert ids are global ----------------
#
# A checkpoint is a torch DCP folder, from a run, or a folder of safetensors files, from `task=export`.


def latest_checkpoint(run: Path) -> Path:
    """The latest checkpoint of a run directory; for a native export, the folder itself.

    Raises:
        ConfigError: the run has none.
    """
    if any(run.glob("*.safetensors")):
        return run
    checkpoint = latest(checkpoints_of(run))
    if checkpoint is None:
        raise ConfigError("export.run", run, "holds no checkpoint", "Train with trainer.save_checkpoint=true")
    return checkpoint


@torch.no_grad()
def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Fills `weights` (name -> tensor) in place.

    Raises:
        ConfigError: there is no checkpoint, or a weight is missing or has another shape.
    """
    if (folder / INDEX).is_file():
        _load_dcp(folder, weights)
    elif files := sorted(folder.glob("*.safetensors")):
        _load_safetensors(folder, files, weights)
    else:
        raise ConfigError(
            "export.checkpoint", folder, "holds neither a DCP checkpoint nor safetensors", "Name a folder that does"
        )


@torch.no_grad()
def load_mean(folders: Sequence[Path], weights: Mapping[str, Tensor]) -> None:
    """Fills `weights` in place with the mean of checkpoints of one run, in fp32 at least; it needs memory for one more
    model. What has no fractions (counts, ids) is that of the last one.

    Raises:
        ConfigError: as `load_weights`.
    """
    if len(folders) == 1:
        return load_weights(folders[0], weights)
    sums = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
        if weight.is_floating_point()
    }
    for folder in folders:
        load_weights(folder, weights)
        for name, total in sums.items():
            total += weights[name]
    for name, total in sums.items():
        weights[name].copy_(total.div_(len(folders)))
    return None


def _load_dcp(folder: Path, weights: Mapping[str, Tensor]) -> None:
    stored = shapes(folder)
    prefix = _prefix(stored, list(weights))
    _check(folder, weights, {name.removeprefix(prefix): shape for name, shape in stored.items()})
    read_tensors(folder, {prefix + name: tensor for name, tensor in weights.items()}, orders=BY_ID)


def _prefix(stored: Iterable[str], names: list[str]) -> str:
    """The common prefix of all stored names: a Lightning module has its model in an attribute."""
    all_stored = set(stored)
    starts = (name.removesuffix(names[0]) for name in sorted(all_stored) if name.endswith(names[0]))
    prefixes = [prefix for prefix in starts if not prefix or prefix.endswith(".")]
    return max(prefixes, key=lambda prefix: sum(prefix + name in all_stored for name in names), default="")


def _load_safetensors(folder: Path, files: list[Path], weights: Mapping[str, Tensor]) -> None:
    check(folder, [path.name for path in files], key="export.checkpoint")
    try:
        opened = [safe_open(path, framework="pt") for path in files]
        file_of: dict[str, Any] = {}
        for path, file in zip(files, opened, strict=True):
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in file_of or name not in weights:
                    reason = "another file holds too" if name in file_of else "the model does not have"
                    rule = f"{path.name} holds {name}, which {reason}"
                    raise ConfigError("export.checkpoint", folder, rule, "Use a folder as it was exported")
                file_of[name] = file
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in file_of.items()}
        _check(folder, weights, shapes)
        for name, tensor in weights.items():
            tensor.copy_(file_of[name].get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ConfigError("export.checkpoint", folder, f"cannot be read: {error}", "Export it again") from error


def _check(folder: Path, weights: Mapping[str, Tensor], stored: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in weights.items():
        if name not in stored:
            raise ConfigError("export.checkpoint", folder, f"lacks {name}", "Use a checkpoint of this run")
        if stored[name] != tuple(tensor.shape):
            raise ConfigError(
                "export.checkpoint", folder, f"{name} is {list(stored[name])}, the plan says {list(tensor.shape)}",
                "Use a checkpoint of this run",
            )  # fmt: skip
