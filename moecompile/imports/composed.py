"""The config of task=import: that of the recipe which the file becomes, with what the command line says on top.

Algorithm:
  1. The file becomes a draft, with the ranks, the machine and the names that the command line says.
  2. The draft is written as a recipe into a temporary folder.
  3. The recipe is composed, and then the words of the command line, so that these win.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from moecompile.compose import compose_config, conf_dir, own_folders
from moecompile.errors import ConfigError
from moecompile.imports import Caller, Draft, read_draft
from moecompile.imports.recipe import write_recipe
from moecompile.schema import SOURCES, Config, ImportSource

_MODELS = tuple(f"model.{source}" for source in SOURCES)
_RANKS = ("mesh.num_nodes", "mesh.ranks_per_node")


def with_import(config: Config, words: Sequence[str]) -> Config:
    """The config that is planned.

    Args:
        config: what the command line says alone. words: its overrides.

    Raises:
        ConfigError: the file is missing, of another kind, does not say what is needed, or contradicts itself.
    """
    if recipe := next((word for word in words if word.startswith("recipe=")), None):
        raise ConfigError("recipe", recipe.partition("=")[2], "has no effect with task=import", "Leave it out")
    draft = draft_of(config)  # Step 1
    with TemporaryDirectory() as folder:
        write_recipe(draft, Path(folder), file_of(config))  # Step 2
        composed = compose_config([f"recipe={draft.name}", *words], [Path(folder), *own_folders()])  # Step 3
    composed.given = config.given
    return composed


def draft_of(config: Config) -> Draft:
    """What the file says.

    Raises:
        ConfigError: as `with_import`.
    """
    imported = config.imported
    if imported.source is None:
        known = " or ".join(f"from={each.value}" for each in ImportSource)
        raise ConfigError("from", None, "task=import needs the system whose config it reads", f"Give {known}")
    mesh, given = config.mesh, config.given
    says_ranks = "mesh" in given or all(key in given for key in _RANKS)
    says_machine = "mesh" in given or "hardware" in given
    caller = Caller(
        names={name: str(value) for name, value in imported.set.items()},
        conf=conf_dir(),
        ranks=(mesh.num_nodes, mesh.ranks_per_node) if says_ranks else None,
        hardware=config.hardware.name if says_machine else None,
        says_model=any(key == "model" or key in _MODELS for key in given),
    )
    return read_draft(imported.source.value, file_of(config), caller)


def file_of(config: Config) -> str:
    """The path of the file.

    Raises:
        ConfigError: none is given.
    """
    if config.imported.file is None:
        raise ConfigError("file", None, "task=import needs a file", "Give file=PATH")
    return config.imported.file
