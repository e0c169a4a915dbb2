"""The settings of public configs (megatron.yaml) in the forms in which their files are written."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moecompile.compose import conf_dir
from moecompile.imports import Caller, Draft, read_draft

HERE = Path(__file__).parent


def _configs() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.load((HERE / "megatron.yaml").read_text(), yaml.BaseLoader)["configs"]
    for config in found:
        config["flags"] = {**config["flags"].pop("<<", {}), **config["flags"]}
    return found


MEGATRON = _configs()
"""Every value as text, as a file has it."""


def of(name: str) -> dict[str, Any]:
    """One of the configs."""
    return next(each for each in MEGATRON if each["name"] == name)


def write(config: Mapping[str, Any], folder: Path, **changed: str | None) -> Path:
    """Writes a config in its form, with changed flags (`_` for `-`; None: without), and returns the file."""
    flags = dict(config["flags"])
    for key, value in changed.items():
        flags.pop(key.replace("_", "-"), None)
        if value is not None:
            flags[key.replace("_", "-")] = value
    text = {"yaml": _yaml, "array": _array, "string": _string, "list": _list}[config["form"]](flags, config)
    path = folder / f"{config['name']}.{'yaml' if config['form'] == 'yaml' else 'sh'}"
    path.write_text(text)
    return path


def draft(config: Mapping[str, Any], folder: Path, **changed: str | None) -> Draft:
    """What is read of a config."""
    ranks = config.get("ranks")
    caller = Caller(
        names=config.get("set", {}), conf=conf_dir(), ranks=None if ranks is None else tuple(map(int, ranks.split("x")))
    )
    return read_draft("megatron", str(write(config, folder, **changed)), caller)


def _yaml(flags: Mapping[str, str], config: Mapping[str, Any]) -> str:
    lines = [f"  --{key}: {value}" for key, value in flags.items()]
    return "\n".join(["ENV_VARS:", "  CUDA_DEVICE_MAX_CONNECTIONS: 1", "MODEL_ARGS:", "  # all of them", *lines, ""])


def _words(flags: Mapping[str, str]) -> list[str]:
    """`--flag value`; several values are several words, and `$NAME` stays as it is."""
    return [
        f"--{key}" if value == "true" else f"--{key} {value if '$' in value or ' ' in value else shlex.quote(value)}"
        for key, value in flags.items()
        if value != "false"
    ]


def _array(flags: Mapping[str, str], config: Mapping[str, Any]) -> str:
    words = _words(flags)
    model, rest = "\n    ".join(words[:20]), "\n    ".join(words[20:])
    return f"""#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
CHECKPOINT=$1  # a path
MODEL_ARGS=(
    {model}
    # --not-there 1
)
REST=(
    {rest}
)
if [ -n "${{WANDB_API_KEY}}" ]; then
    REST+=(--wandb-project ${{WANDB_PROJECT:-"x"}})
fi
torchrun pretrain_gpt.py \\
    ${{MODEL_ARGS[@]}} \\
    ${{REST[@]}} \\
    --load $CHECKPOINT
"""


def _string(flags: Mapping[str, str], config: Mapping[str, Any]) -> str:
    head = "".join(f"#SBATCH --{key}={value}\n" for key, value in config.get("launch", {}).items())
    words = " \\\n    ".join(_words(flags))
    return f'#!/bin/bash\n{head}\nif [ -z ${{HF_MODEL_CKPT}} ]; then\n    TOKENIZER=Qwen/Qwen3-30B-A3B\nfi\n\nMODEL_ARGS=" \\\n    {words} \\\n"\n'


def _list(flags: Mapping[str, str], config: Mapping[str, Any]) -> str:
    return "MODEL_ARGS=(\n   " + "\n   ".join(_words(flags)) + "\n)\n"
