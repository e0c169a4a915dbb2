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


def pairs(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    """The keys of a mapping and their values; of a key that is there twice the last one."""
    return {str(key.value): value for key, value in node.value}


def leaves(node: yaml.MappingNode, prefix: str = "") -> Iterator[Leaf]:
    """All values of a mapping, but those that are null."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from leaves(value, f"{name}.")
        elif not is_null(value):
            yield name, text_of(value), key.start_mark.line + 1


def is_null(node: yaml.Node) -> bool:
    """Whether a value is none."""
    return bool(node.tag == "tag:yaml.org,2002:null")


def text_of(node: yaml.Node) -> str:
    """A value as text; `null` is that word, however it is written."""
    if isinstance(node, yaml.SequenceNode):
        return " ".join(text_of(each) for each in node.value)
    if isinstance(node, yaml.MappingNode):
        return ", ".join(f"{key.value}: {text_of(value)}" for key, value in node.value)
    return "null" if is_null(node) else str(node.value)
