"""A folder of safetensors files: which tensor is in which file, and partial reads of tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moecompile.errors import ConfigError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """File and shape of one tensor."""

    file: Path
    shape: tuple[int, ...]


class Stored:
    """The tensors of a folder. Headers are read in the constructor, values on request.

    Raises:
        ConfigError: there are no files, one cannot be read, or a tensor is in two files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files():
            for name, shape in self._header(file).items():
                if name in self.tensors:
                    first = self.tensors[name].file.name
                    raise self.error(f"{name} is in {first} and in {file.name}", "Remove one of them")
                self.tensors[name] = StoredTensor(file, shape)

    def read(self, name: str, start: int = 0, stop: int | None = None, within: tuple[slice, ...] = ()) -> Tensor:
        """Reads only rows start .. stop of a tensor's first dim, and what is `within` its others; or a scalar."""
        stored = self.tensors[name]
        opened = self._open[stored.file]
        try:
            part = slice(start, stop), *within
            out: Tensor = opened.get_slice(name)[part] if stored.shape else opened.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self.error(f"{stored.file.name} cannot be read: {error}", "Copy it again") from error
        return out

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor."""
        kinds = (self.read(name, 0, 0).dtype for name, stored in self.tensors.items() if stored.shape)
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    def error(self, rule: str, fix: str) -> ConfigError:
        """An error about this folder."""
        return ConfigError("model.pretrained", self.folder, rule, fix)

    def _files(self) -> list[Path]:
        """`model.safetensors` alone, as transformers reads it, for save_pretrained leaves an older index beside it;
        else the files in the index, or all if there is no index.
        """
        if (self.folder / _WHOLE).is_file():
            return [self.folder / _WHOLE]
        if not (self.folder / _INDEX).is_file():
            if files := sorted(self.folder.glob("*.safetensors")):
                return files
            raise self.error("holds no safetensors", "Save the model with save_pretrained")
        try:
            names = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            files = [self.folder / name for name in sorted(set(names))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self.error(f"{_INDEX} cannot be read: {reason}", "Copy it again") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise self.error(f"{_INDEX} names {missing[0]}, which is not there", "Copy it too")
        return files

    def _header(self, file: Path) -> dict[str, tuple[int, ...]]:
        try:
            opened = safe_open(file, framework="pt")
            self._open[file] = opened
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise self.error(f"{file.name} cannot be read: {error}", "Copy it again") from error
