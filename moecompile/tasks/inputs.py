"""Checks that the inputs of a config exist and fit, before ranks are started and before anything is written.

Algorithm: the cheap checks first, each with an error that says what to change.
  0. Packages that the config needs.
  1. The text: a file of a supported kind, long enough. Small texts are tokenized.
  2. The device: as many GPUs as local ranks, if the config requires GPUs.
  3. The model: an installed package, complete files, a config that can be built.
  4. Model and text: positions, vocabulary.
  5. Loggers and callbacks of training.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.models.packages import check_package
from moecompile.runtime.ranks import started_ranks
from moecompile.runtime.records import find_files
from moecompile.runtime.text import check_text
from moecompile.schema import (
    AdapterKind,
    Config,
    DataConfig,
    DataKind,
    ExpertInit,
    LoggerKind,
    TaskName,
    TokenizerSource,
    TrainerConfig,
    mesh_spec,
    of_the_job,
)

_WHOLE, _INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
_SMALL = 2**18  # bytes of a text that is tokenized in no time
_LOGGER_PACKAGES = {LoggerKind.wandb: "wandb", LoggerKind.mlflow: "mlflow"}
_BYTES_PER_ENTRY, _BYTES_PER_TOKEN = 100, 8  # texts with fewer may be too short for the vocabulary, or for a sequence


def check_inputs(config: Config) -> None:
    """Runs all checks for the config's task.

    Raises:
        ConfigError: an input is missing or does not fit (the first one).
    """
    is_elsewhere = config.task.name is TaskName.submit  # the GPUs are those of other machines
    config = of_the_job(config)
    task = config.task.name
    if task in (TaskName.export, TaskName.place, TaskName.chat):
        return
    if not is_elsewhere:
        check_packages(config)  # Step 0
    if task.is_launched or task is TaskName.data or (task is TaskName.plan and config.data.path is not None):
        _check_text(config)  # Step 1
    if task is TaskName.data:  # needs no model but its tokenizer
        return
    if task.is_launched and task is not TaskName.verify and not is_elsewhere:  # verify runs on CPUs
        _check_gpus(config)  # Step 2
    folder = Path(config.model.pretrained) if config.model.pretrained else None  # Step 3
    if config.model.package:
        folder = check_package(config.model.package)
    if folder is not None:
        check_folder(folder)
    _check_model(config, _num_ids(folder, config) if folder is not None and task.is_launched else None)
    if not is_elsewhere and task is not TaskName.rehearse:  # which makes models without values
        from moecompile.models.room import check_room

        check_room(config, _processes(config))
    default = TrainerConfig()
    if task is TaskName.train and (config.trainer.loggers, config.trainer.callbacks) != (default.loggers, {}):
        from moecompile.runtime.loggers import make_callbacks  # imports Lightning

        make_callbacks(config.trainer)  # Step 5: whether they can be made


def check_packages(config: Config) -> None:
    """Checks what a missing package decides, before any file is read.

    Raises:
        ConfigError: one is missing.
    """
    adapters, task = config.adapters, config.task.name
    is_made = task.is_launched or task in (TaskName.compile, TaskName.rehearse)
    if is_made and adapters.kind is AdapterKind.lora and adapters.dense and importlib.util.find_spec("peft") is None:
        rule = "adapters of linears need the package peft"
        raise ConfigError("adapters.kind", "lora", rule, "pip install 'moecompile[lora]'")
    for kind in config.trainer.loggers if task is TaskName.train else ():
        package = _LOGGER_PACKAGES.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                "trainer.loggers", kind.value, f"needs the package {package}", f"pip install 'moecompile[{package}]'"
            )


def _processes(config: Config) -> int:
    """How many processes of this machine make the model: verify has at least one with all of it."""
    if config.task.name not in (TaskName.train, TaskName.bench):
        return 1
    ranks = started_ranks()
    return mesh_spec(config.mesh).world_size if ranks is None else ranks.local_world_size


def _num_ids(folder: Path, config: Config) -> int | None:
    """The largest id of the model's own tokenizer plus one; None: another is used, or it is not made yet (GGUF)."""
    if config.data.kind is DataKind.sft:
        from moecompile.models.chat import load_chat_template
        from moecompile.runtime.data import num_ids

        return num_ids(load_chat_template(folder).tokenizer)
    if config.data.tokenizer is not TokenizerSource.model:
        return None
    if not (folder / TOKENIZER).is_file():
        path = "model.package" if config.model.package else "model.pretrained"
        rule, fix = f"has no {TOKENIZER}, and data.tokenizer=model", "Save the model's tokenizer there"
        raise ConfigError(path, folder, rule, f"{fix}{_new_tokenizer(config)}")
    from moecompile.runtime.data.tokens import num_ids, plain_tokenizer

    return num_ids(plain_tokenizer(folder / TOKENIZER))


def _new_tokenizer(config: Config) -> str:
    """The end of an advice: how a new tokenizer is trained for this model, or why none is."""
    from moecompile.models.build import config_of
    from moecompile.runtime.objective import LEAST_VOCABULARY

    made: Any = config_of(config.model)
    text = made.get_text_config() if hasattr(made, "get_text_config") else made
    size, default = getattr(text, "vocab_size", None), DataConfig().vocab_size or 0
    if not isinstance(size, int) or size >= default:
        return ", or train a new one: data=moby_dick"
    if size < LEAST_VOCABULARY:
        return f" (a new one has at least {LEAST_VOCABULARY} tokens, and the model has embeddings for {size})"
    return f", or train a new one: data=moby_dick data.vocab_size={size}"


def _check_text(config: Config) -> None:
    data = config.data
    if data.kind is not DataKind.text:
        find_files(data)
        return
    size, shorter = check_text(data)
    doubtful = size < (data.vocab_size or 0) * _BYTES_PER_ENTRY or shorter < data.seq_len * _BYTES_PER_TOKEN
    if (size < _SMALL or doubtful) and data.tokenizer is TokenizerSource.train:
        from moecompile.runtime.data import check_tokens

        check_tokens(data)


def check_folder(folder: Path) -> None:
    """Checks that a folder has a config and complete safetensors files; of these, only headers are read.

    Raises:
        ConfigError: a file is missing or truncated.
    """
    path = folder / "config.json"
    if not path.is_file():
        fix = "Give a folder that save_pretrained wrote; nothing is downloaded"
        raise _folder_error(folder, "is not a folder with a config.json", fix)
    _json(folder, path)
    index = folder / _INDEX
    files = sorted(folder.glob("*.safetensors"))
    if (folder / _WHOLE).is_file():  # transformers reads it alone, whatever is beside it
        files = [folder / _WHOLE]
    elif index.is_file():
        named = _json(folder, index).get("weight_map")
        if not isinstance(named, dict):
            raise _folder_error(folder, f"{_INDEX} has no weight_map", "Copy it again")
        files = [folder / name for name in sorted(set(map(str, named.values())))]
    if not files:
        raise _folder_error(folder, "holds no safetensors", "Save the model with save_pretrained")
    for file in files:
        if not file.is_file():
            raise _folder_error(folder, f"{_INDEX} names {file.name}, which is not there", "Copy it too")
        _check_safetensors(folder, file)


def _check_safetensors(folder: Path, file: Path) -> None:
    """Checks a file: 8 bytes with the header's length, the header in JSON, and the bytes that it describes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > size - 8:
                raise _folder_error(folder, f"{file.name} is cut off after {size:,} bytes", "Copy it again")
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _folder_error(folder, f"{file.name} is not a safetensors file", "Copy it again") from None
    except OSError as error:
        raise _folder_error(folder, f"{file.name} cannot be read: {error.strerror}", "Change that") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "is cut off" if size < expected else "is too long"
        raise _folder_error(folder, f"{file.name} {what}: {size:,} bytes of {expected:,}", "Copy it again")


def _json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _folder_error(folder, f"{path.name} cannot be read: {error}", "Copy it again") from None
    if not isinstance(body, dict):
        raise _folder_error(folder, f"{path.name} holds no object", "Copy it again")
    return body


def _folder_error(folder: Path, rule: str, fix: str) -> ConfigError:
    return ConfigError("model.pretrained", folder, rule, fix)


def _check_gpus(config: Config) -> None:
    attention = config.model.attention
    if config.mesh.device != "cuda" and not attention.is_on_a_gpu:
        return
    import torch

    if config.mesh.device != "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "model.attention", attention.value, "has no backward on a CPU, and no GPU is found here",
                "Use model.attention=auto",
            )  # fmt: skip
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "mesh.device", "cuda", f"torch {torch.__version__} finds no GPU here",
            "Use a mesh of CPU ranks (mesh=cpu_1x4), or run it where the GPUs are; task=plan needs none",
        )  # fmt: skip
    ranks, num_gpus = started_ranks(), torch.cuda.device_count()
    needed = mesh_spec(config.mesh).world_size if ranks is None else ranks.local_world_size
    if num_gpus < needed:
        raise ConfigError(
            "mesh.ranks_per_node", config.mesh.ranks_per_node,
            f"{needed} ranks would start on this machine, which has {num_gpus} GPU{'s' * (num_gpus != 1)}",
            "Use a smaller mesh, or start one command per node with torchrun or srun",
        )  # fmt: skip


def _check_model(config: Config, num_ids: int | None) -> None:
    """Steps 3 and 4, from the transformers config of the model: no weights are created or read.

    Args:
        num_ids: of the model's own tokenizer, if it is used.
    """
    from moecompile.models.build import check_buildable, config_of

    model_config = config_of(config.model)
    if config.experts.init is ExpertInit.widen:
        from moecompile.models.source import check_widening_inputs

        check_widening_inputs(config, model_config)
    if model_config is None:  # a factory, or a file that must be converted first
        return
    if config.task.name.is_launched and config.model.architecture:  # other tasks build it immediately
        check_buildable(config.model)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < config.data.seq_len:
        raise ConfigError(
            "data.seq_len", config.data.seq_len, f"the model {config.model.name} has positions for {positions} tokens",
            f"Use at most {positions}, or a model with more (max_position_embeddings)",
        )  # fmt: skip
    vocab_size, entries = getattr(text, "vocab_size", None), config.data.vocab_size
    from moecompile.runtime.objective import at_most, check_vocabulary

    if config.task.name.is_launched and entries and isinstance(vocab_size, int) and vocab_size < entries:
        raise ConfigError(
            "data.vocab_size", entries, f"the model {config.model.name} has embeddings for {vocab_size} tokens",
            at_most(vocab_size),
        )  # fmt: skip
    if num_ids is not None and isinstance(vocab_size, int):
        check_vocabulary(vocab_size, num_ids, config)
