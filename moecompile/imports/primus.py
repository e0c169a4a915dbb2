"""An experiment of Primus, AMD's front end of Megatron-Core: a YAML file that names others, as flags of Megatron-Core.

Algorithm:
  1. The trainer of the experiment: `modules.NAME` with `framework`, `config`, `model` and `overrides`.
  2. The folder `primus/configs` of the clone that the file lies in, or of `set.PRIMUS_PATH`.         -> `_configs`
  3. The values of `config`, then of `model`, then `overrides`. A file comes after those that it extends, a later value
     wins, and `null` takes one away. `${NAME:default}` is what the caller gives, else the default.   -> `_read`
Primus's tables of defaults name every argument of Megatron-Core. What nothing is made of is not listed of these.

Source: primus/core/launcher/parser.py and primus/core/config/yaml_loader.py of AMD-AGI/Primus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from moecompile.errors import ConfigError
from moecompile.imports.settings import Setting
from moecompile.imports.yaml_file import is_null, mapping_of, pairs, text_of

_NAMES = re.compile(r"\$\{([^:{}]+)(?::([^}]*))?\}")
_FRAMEWORKS = ("megatron", "light-megatron")
_DEFAULTS = ("language_model.yaml", "primus_megatron_model.yaml")
_SAYS = ("framework", "config", "model")
_BEFORE = ("extends", "includes")
FLAGS = {"fp8": "fp8-format", "fp4": "fp4-format"}
"""Keys in YAML -> the flags of these values, where they have another name."""
Values = dict[str, Setting]


def is_primus(node: yaml.MappingNode) -> bool:
    """Whether a YAML file is an experiment of Primus."""
    return "modules" in pairs(node)


def spelled(flag: str) -> str:
    """How an experiment writes a flag."""
    return next((name for name, of in FLAGS.items() if of == flag), flag.replace("-", "_"))


def of_primus(path: Path, node: yaml.MappingNode, given: Mapping[str, str]) -> Values:
    """The arguments of an experiment, by their flags.

    Raises:
        ConfigError: it trains nothing or with another framework, or a file that it names is not there.
    """
    modules = pairs(node)["modules"]
    named = pairs(modules) if isinstance(modules, yaml.MappingNode) else {}
    trainers = {name: each for name, each in named.items() if isinstance(each, yaml.MappingNode) and "trainer" in name}
    if len(trainers) != 1:
        raise ConfigError(
            "file", path, f"has {len(trainers) or 'no'} trainers in `modules`, and one is read",
            "Give an experiment of Primus with one, such as modules.pre_trainer",
        )  # fmt: skip
    (name, trainer), values = trainers.popitem(), Values()
    says = {key: _name(each, given, path) for key, each in pairs(trainer).items() if key in _SAYS and not is_null(each)}
    framework = says.get("framework")
    if framework not in _FRAMEWORKS:
        raise ConfigError(
            "file", path, f"has modules.{name}.framework={framework}", f"Known is {_FRAMEWORKS[0]}: Megatron-Core"
        )
    for key, folder in (("config", "modules"), ("model", "models")):
        if not says.get(key):
            raise ConfigError("file", path, f"has no modules.{name}.{key}", "Give the name of one of Primus's files")
        _read(values, _configs(path, given) / folder / "megatron" / says[key], given, path)
    overrides = pairs(trainer).get("overrides")
    if isinstance(overrides, yaml.MappingNode):
        _overlay(values, overrides, given, Setting(key="", value=""))
    return values


def _configs(path: Path, given: Mapping[str, str]) -> Path:
    """The folder of Primus's own files."""
    said = given.get("PRIMUS_PATH")
    clones = path.resolve().parents if said is None else [Path(said)]
    found = next((clone / "primus" / "configs" for clone in clones if (clone / "primus" / "configs").is_dir()), None)
    if found is None and said is not None:
        raise ConfigError(
            "set.PRIMUS_PATH", said, "has no folder primus/configs", "Give the folder of a clone of Primus"
        )
    if found is None:
        raise ConfigError(
            "file", path, "names files of Primus, whose folder primus/configs is not above it",
            "Give the path of the file within a clone of Primus, or set.PRIMUS_PATH=CLONE",
        )  # fmt: skip
    return found


def _read(values: Values, path: Path, given: Mapping[str, str], by: Path, within: tuple[Path, ...] = ()) -> None:
    """Puts what a file says, after the files that it extends, over what was said before."""
    path = path.resolve()
    if not path.is_file():
        raise ConfigError("file", by, f"names {path}, which is not there", "Give a clone of Primus that has it")
    if path in within:
        raise ConfigError("file", path, "extends itself", "Correct it")
    try:
        node = mapping_of(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("file", path, f"cannot be read: {error}", "Give a text file") from None
    before = pairs(node)
    if "bases" in before:
        rule = "has `bases`, which some versions of Primus follow and others leave out"
        raise ConfigError("file", path, rule, "Write `extends` in its place, or delete it, as your version reads it")
    for each in (before[key] for key in _BEFORE if key in before):
        if not isinstance(each, yaml.SequenceNode):
            raise ConfigError("file", path, f"extends {text_of(each)}, which is no list", "Correct it")
        for other in each.value:
            _read(values, path.parent / _name(other, given, path), given, path, (*within, path))
    is_default = path.name in _DEFAULTS or "modules" in (path.parent.name, path.parents[1].name)
    _overlay(values, node, given, Setting(key="", value="", source=path.name, is_default=is_default))


def _name(node: yaml.Node, given: Mapping[str, str], path: Path) -> str:
    """The name of a file, or of a framework."""
    text, missing = _expanded(text_of(node), given)
    if missing:
        fix = f"Give {' '.join(f'set.{name}=VALUE' for name in missing)}"
        raise ConfigError("file", path, f"names {text}, which has no value for {', '.join(missing)}", fix)
    return text


def _overlay(values: Values, node: yaml.MappingNode, given: Mapping[str, str], like: Setting) -> None:
    """Puts what a mapping says over what was said before."""
    for name, each in pairs(node).items():
        key = FLAGS.get(name, name.replace("_", "-"))
        text, missing = _expanded(text_of(each), given)
        values.pop(key, None)
        if name not in _BEFORE and text != "null":
            line = each.start_mark.line + 1 if like.source is None else None
            values[key] = replace(like, key=key, value=text, line=line, missing=missing)


def _expanded(text: str, given: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A value with names replaced, and those without a value."""

    def value(match: re.Match[str]) -> str:
        return str(given.get(match[1], match[0] if match[2] is None else match[2]))

    text = _NAMES.sub(value, text)
    return text, tuple(match[1] for match in _NAMES.finditer(text))
