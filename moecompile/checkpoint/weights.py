"""Reads a model's weights from a checkpoint of any mesh in one process: names and expert ids are global.

A checkpoint is a torch DCP folder, from a run, or a folder of safetensors files, from `task=export`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecompile.checkpoint.folders import checkpoints_of, latest
from moecompile.checkpoint.placed import BY_ID
from moecompile.checkpoint.sums import check
from moecompile.checkpoint.tensors import INDEX, read_tensors, shapes
from moecompile.errors import ConfigError


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
