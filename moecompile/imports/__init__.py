"""Reads training configs of other systems, as data: what they say becomes a recipe, line by line (docs/use/import.md).

settings.py    what a file says, and the fate of each key
shell.py       shell scripts, without running them
models.py      models by their widths or their published names
megatron.py    Megatron-Core: shell scripts and YAML
primus.py      Primus: YAML that names other files, as flags of Megatron-Core
axolotl.py     axolotl: YAML
torchtitan.py  torchtitan: TOML, and Python that is parsed
yaml_file.py   YAML with lines
recipe.py      the recipe, in the layout of conf/
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moecompile.errors import ConfigError
from moecompile.imports.axolotl import read_axolotl
from moecompile.imports.megatron import read_megatron
from moecompile.imports.recipe import write_recipe, write_runnable
from moecompile.imports.settings import KINDS, Caller, Draft, Row
from moecompile.imports.torchtitan import read_torchtitan

__all__ = ["KINDS", "SUFFIXES", "Caller", "Draft", "Row", "read_draft", "write_recipe", "write_runnable"]

SUFFIXES = {
    "megatron": (".sh", ".bash", ".slurm", ".sbatch", ".yaml", ".yml"),
    "torchtitan": (".toml", ".py"),
    "axolotl": (".yaml", ".yml"),
}
"""Names of systems -> the endings of their files."""
_READERS: dict[str, Callable[[Path, str, Caller], Draft]] = {
    "megatron": read_megatron,
    "torchtitan": read_torchtitan,
    "axolotl": read_axolotl,
}


def read_draft(source: str, file: str, caller: Caller) -> Draft:
    """What a file of another system says.

    Raises:
        ConfigError: there is no such file, it is one of another kind, or it does not say what is needed.
    """
    path, endings = Path(file), SUFFIXES[source]
    if not path.is_file():
        raise ConfigError("file", file, "there is no such file", "Give the path of one; nothing is downloaded")
    if path.suffix not in endings:
        others = [f"from={name}" for name, suffixes in SUFFIXES.items() if path.suffix in suffixes]
        fix = f"Use {' or '.join(others)}" if others else f"Give a file that ends in {', '.join(endings)}"
        raise ConfigError("file", file, f"is no file of {source}: these end in {', '.join(endings)}", fix)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file", file, f"cannot be read: {error}", "Give a text file") from None
    return _READERS[source](path, text, caller)
