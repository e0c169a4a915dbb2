"""Reads a model's weights out of a checkpoint in one process, whatever mesh wrote it: names and expert ids are global.

A checkpoint is a folder of torch DCP, as a run writes it, or one of safetensors files, as `task=export` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecompile.checkpoint.folders import checkpoints_of, latest
from moecompile.checkpoint.sums import check
from moecompile.checkpoint.tensors import INDEX, read_tensors, shapes
from moecompile.errors import ConfigError


def latest_checkpoint(run: Path) -> Path:
    """The latest checkpoint of a run directory; a native export is its own.

    Raises:
        ConfigError: the run has none.
    """
    if any(run.glob("*.safetensors")):
        return run
    found = latest(checkpoints_of(run))
    if found is None:
        raise ConfigError("export.run", run, "holds no checkpoint", "Train with trainer.save_checkpoint=true")
    return found


@torch.no_grad()
def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Fills `weights` (name -> tensor) in place.

    Raises:
        ConfigError: no checkpoint, or a weight that it lacks or holds in another shape.
    """
    if (folder / INDEX).is_file():
        _load_dcp(folder, weights)
    elif files := sorted(folder.glob("*.safetensors")):
        _load_safetensors(folder, files, weights)
    else:
        raise ConfigError(
            "export.checkpoint", folder, "holds neither a DCP checkpoint nor safetensors", "Name a folder that does"
        )


def _load_dcp(folder: Path, weights: Mapping[str, Tensor]) -> None:
    stored = shapes(folder)
    prefix = _prefix(stored, list(weights))
    _check(folder, weights, {name.removeprefix(prefix): shape for name, shape in stored.items()})
    read_tensors(folder, {prefix + name: tensor for name, tensor in weights.items()})


def _prefix(stored: Iterable[str], names: list[str]) -> str:
    """What stands before every name: a Lightning module keeps its model under an attribute's name."""
    found = set(stored)
    ends = (name.removesuffix(names[0]) for name in sorted(found) if name.endswith(names[0]))
    prefixes = [prefix for prefix in ends if not prefix or prefix.endswith(".")]
    return max(prefixes, key=lambda prefix: sum(prefix + name in found for name in names), default="")


def _load_safetensors(folder: Path, files: list[Path], weights: Mapping[str, Tensor]) -> None:
    check(folder, [path.name for path in files], key="export.checkpoint")
    try:
        opened = [safe_open(path, framework="pt") for path in files]
        where: dict[str, Any] = {}
        for path, file in zip(files, opened, strict=True):
            for name in file.keys():  # noqa: SIM118  (no dict)
                if name in where or name not in weights:
                    what = f"{path.name} holds {name}, " + (
                        "as another file does" if name in where else "which is none of it"
                    )
                    raise ConfigError("export.checkpoint", folder, what, "Use a folder as it was exported")
                where[name] = file
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
        _check(folder, weights, shapes)
        for name, tensor in weights.items():
            tensor.copy_(where[name].get_tensor(name))
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
