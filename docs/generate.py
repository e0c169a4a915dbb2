"""Generates parts of the pages from the code: the configuration reference, messages, pictures, graphs.

    python docs/generate.py

`tests/test_docs.py` and `tests/test_site.py` fail when one of them is out of date.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from moecompile.compose import compose_config, conf_dir
from moecompile.ranges import Words
from moecompile.schema import Config, FigureConfig, PerLayerConfig

DOCS = Path(__file__).parent
REGION = "model.layers.1.mlp"
STAGES = ("captured", "rewritten", "lowered")

_HEAD = """<!-- Written by docs/generate.py: change the schema, not this page. -->

# Configuration reference

Every key of the config with its default, which recipes and the command line override. `group=option` selects one of a
group's files; `group.key=value` sets one key. Keys that are not listed are errors. [Command line and
configs](../use/command-line.md) explains how these compose.
"""


def configuration() -> str:
    """The page `reference/configuration.md`."""
    defaults = compose_config()
    top = [field.name for field in fields(Config) if not is_dataclass(getattr(defaults, field.name))]
    parts = [_HEAD, "## Top level\n", _description(Config), _table(Config, defaults, top)]
    for field in fields(Config):
        value = getattr(defaults, field.name)
        if is_dataclass(value):
            parts += [f"## {field.name}\n", _description(type(value)), _options(field.name)]
            parts += _tables(type(value), value)
    parts += ["## per_layer\n", _description(PerLayerConfig), *_tables(PerLayerConfig, PerLayerConfig())]
    parts += ["## recipe\n", "A complete choice of the groups above. Recipes live in `recipes/`.\n", _options("recipe")]
    return "\n".join(part for part in parts if part)


def graphs(folder: Path) -> None:
    """The files of `assets`: `ffn.<stage>.txt`, the picture `ffn.svg`, and the rules of types."""
    from moecompile.models.build import build_model, example_inputs
    from moecompile.passes.types import table
    from moecompile.pipeline import compile_with_report
    from moecompile.report.graphs import listing, write_before_after

    config = compose_config(["recipe=deepseek_ep"])
    model = build_model(config.model, config.seed)
    compiled = compile_with_report(model, config, example=example_inputs(model, 16))
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        (folder / f"ffn.{stage}.txt").write_text(listing(compiled.graphs[stage][REGION]) + "\n", encoding="utf-8")
    (folder / "types.md").write_text(table(), encoding="utf-8")
    before, after = (compiled.graphs[stage][REGION] for stage in ("captured", "lowered"))
    write_before_after(before, after, folder / "ffn.svg")


def field_docs(kind: type) -> dict[str, str]:
    """Field of a dataclass -> the string under it; fields without one are left out."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: inspect.cleandoc(under.value.value).replace("\n", " ")
        for field, under in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(under, ast.Expr) and isinstance(under.value, ast.Constant) and isinstance(under.value.value, str)
    }


def _description(kind: type) -> str:
    """The docstring of a group, without the name at its start."""
    prose = re.sub(r"^`[\w.]+`: ", "", inspect.cleandoc(kind.__doc__ or "").replace("\n\n", " ").replace("\n", " "))
    return prose[:1].upper() + prose[1:] + "\n"


def _tables(kind: type, defaults: Any) -> list[str]:
    """The keys of a group, then those of the mappings inside it."""
    values = {field.name: getattr(defaults, field.name) for field in fields(kind)}
    inner = [name for name, value in values.items() if is_dataclass(value) and not isinstance(value, FigureConfig)]
    parts = [_table(kind, defaults, [field.name for field in fields(kind) if field.name not in inner])]
    listed = [get_args(hint)[0] for hint in get_type_hints(kind).values() if _lists_mappings(hint)]
    parts += [text for each in listed for text in (_description(each), *_tables(each, each()))]
    for name in inner:
        value = getattr(defaults, name)
        parts += [_description(type(value)), _table(type(value), value, [f"{f.name}" for f in fields(value)])]
    return parts


def _lists_mappings(hint: Any) -> bool:
    return get_origin(hint) is list and is_dataclass(get_args(hint)[0])


def _table(kind: type, defaults: Any, names: list[str]) -> str:
    hints, docs, rows = get_type_hints(kind), field_docs(kind), []
    ranges = {each.name: each.metadata["range"] for each in fields(kind) if "range" in each.metadata}
    for name in names:
        allowed = ranges.get(name)
        takes = str(allowed) if isinstance(allowed, Words) else _type(hints[name]) + (f"; {allowed}" if allowed else "")
        cells = (f"`{name}`", _value(getattr(defaults, name)), takes, docs[name])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["| key | default | takes | what it is |", "|---|---|---|---|", *rows, ""])


def _options(group: str) -> str:
    """The shipped files of a group, each with the first sentence of its comment."""
    comments = {path.stem: _comment(path) for path in sorted((conf_dir() / group).glob("*.yaml"))}
    if not comments:
        return ""
    if not any(comments.values()):
        return f"Options: {', '.join(f'`{group}={name}`' for name in comments)}.\n"
    rows = [f"| `{group}={name}` | {text} |" for name, text in comments.items()]
    return "\n".join(["| option | what it is |", "|---|---|", *rows, ""])


def _comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = " ".join(line for line in lines if line and not line.startswith("@"))
    return re.split(r"(?<=\.) ", text)[0]


def _type(hint: Any) -> str:
    words: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    words[FigureConfig] = "`value`: number, `source`: text"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    if {*get_args(hint)} == {int, str}:
        return "whole number or `auto`"
    if get_origin(hint) is list:
        kinds = {(str,): "list of texts"}
        return "list of mappings" if _lists_mappings(hint) else kinds.get(get_args(hint), "list of numbers")
    if get_origin(hint) is dict:
        return "mapping"
    if get_args(hint):
        return " or ".join(_type(part) for part in get_args(hint))
    return words[hint]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "of the selected option" if value else "none"
    if isinstance(value, Enum | FigureConfig):
        value = value.value
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


if __name__ == "__main__":
    import draw  # docs/draw.py
    import messages  # docs/messages.py

    draw.draw(DOCS / "assets" / "concepts")
    (DOCS / "reference" / "messages.md").write_text(messages.page(), encoding="utf-8")
    (DOCS / "reference" / "configuration.md").write_text(configuration(), encoding="utf-8")
    graphs(DOCS / "assets")
