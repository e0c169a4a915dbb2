"""YAML as keys, values as text, and lines; no tag but YAML's own is known, so nothing is built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from moecompile.errors import ConfigError

Leaf = tuple[str, str, int]
"""Dotted key, value as text, line. The values of a list are separated by blanks."""


def mapping_of(path: Path, text: str) -> yaml.MappingNode:
    """The mapping in a YAML file.

    Raises:
        ConfigError: it is no valid YAML, or no mapping.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError("file", path, f"is not valid YAML: {' '.join(str(error).split())}", "Correct it") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("file", path, "is no mapping of keys to values", "Give a config")
    return node


def leaves(node: yaml.MappingNode, prefix: str = "") -> Iterator[Leaf]:
    """All values of a mapping, but those that are null."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from leaves(value, f"{name}.")
        elif value.tag != "tag:yaml.org,2002:null":
            yield name, _text(value), key.start_mark.line + 1


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return " ".join(_text(each) for each in node.value)
    if isinstance(node, yaml.MappingNode):
        return ", ".join(f"{key.value}: {_text(value)}" for key, value in node.value)
    return str(node.value)
