"""Converts what OmegaConf has composed to the typed schema, writes and reads it as YAML, and explains what is wrong.

Errors of Hydra, OmegaConf and YAML are recognized by their attributes, and the few without attributes by their text.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, _utils
from omegaconf.basecontainer import BaseContainer
from omegaconf.resolvers import oc

from moecompile.atomic import write_text
from moecompile.errors import ConfigError, UserError
from moecompile.libyaml import by_libyaml
from moecompile.named_code import KEYS, Named, named_in, override, refuse_unnamed, without
from moecompile.schema import SEARCHED, Config, with_implied

GIVEN_GROUPS = ("per_layer", "model", "mesh", "hardware", "dispatch", "balance")
"""Words without a dot that `Config.given` keeps."""


_SPELLED = (("from=", "imported.source="), ("file=", "imported.file="), ("set.", "++imported.set."))


def spelled(word: str) -> str:
    """An override as the schema has it: `from=` is a word of Python, so it is no field, and stands for a longer key."""
    return next((new + word.removeprefix(old) for old, new in _SPELLED if word.startswith(old)), word)


def conf_dir() -> Path:
    """The shipped config groups: `moecompile/conf` in an installed package, `conf` beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _started(what: str, default: int) -> int:
    """`${moecompile.started:nodes,1}`: the number of `nodes`, or of `ranks_per_node`, that torchrun started."""
    return int(os.environ.get(_TORCHRUN[what], default))


def _ep_of(ep: int, own: str, ranks: str) -> int | str:
    """`${moecompile.ep_of:16,2x8,${mesh.num_nodes}x${mesh.ranks_per_node}}`: a preset's EP size, on its own ranks."""
    return ep if ranks == own else SEARCHED


_TORCHRUN = {"nodes": "GROUP_WORLD_SIZE", "ranks_per_node": "LOCAL_WORLD_SIZE"}
OmegaConf.register_new_resolver("moecompile.add", lambda *numbers: sum(numbers), replace=True)  # ${moecompile.add:a,b}
OmegaConf.register_new_resolver("moecompile.started", _started, replace=True)
OmegaConf.register_new_resolver("moecompile.ep_of", _ep_of, replace=True)


def to_config(cfg: DictConfig, overrides: Sequence[str]) -> Config:
    """The typed config. `overrides` are the caller's, and only they may name code to run.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, or code that a file names.
    """
    with explained(overrides), no_environment(overrides):
        config = _typed(cfg)
    if "_target_" in _keys(config.model.config):
        raise ConfigError(
            "model.config", "_target_", "a config never chooses code to run", "Remove the key, or use model.factory"
        )
    for key, value in named_in(config).items():
        if key not in _typed_keys(overrides):
            raise ConfigError(
                key, value, "a config file may not choose code to run",
                f"Give {override(key, value)} on the command line or in Python, if you trust it",
            )  # fmt: skip
    if config.given:
        raise ConfigError("given", config.given, "is filled in by the program", "Leave it out")
    keys = list(_set_keys(overrides))
    groups = [key for key in keys if "." not in key]
    config.given = [key for key in keys if "." in key or key in GIVEN_GROUPS]
    lists = {key: value for key, value in Given(overrides).items() if value.startswith("[")}
    if (error := _no_option(lists)) is not None:  # Hydra merges the options of a list
        raise error
    return with_implied(config, groups)


def save_resolved(config: Config, path: Path) -> None:
    """Writes `config` as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(_structured(asdict(config))))


def load_resolved(
    path: Path,
    *,
    named: Named = MappingProxyType({}),
    runs: Collection[str] = KEYS,
    given_as: tuple[str, Any] | None = None,
) -> Config:
    """Reads a file that `save_resolved` wrote. Of code that it names, it keeps what the caller names too.

    Args:
        named: what the caller names. runs: the keys whose code is going to be run; others are left out of the config.
        given_as: the key that led to the file, and its value, for messages.

    Raises:
        UserError: an unknown key, a value of the wrong type, or code in `runs` that only the file names.
    """
    with explained(()), no_environment(()), read_by_libyaml():
        saved = OmegaConf.load(path)
        for group, _, name in (key.rpartition(".") for key in MOVED):  # a run of version 0.2.0 has both keys
            (OmegaConf.select(saved, group) or {}).pop(name, None)
        config = _typed(saved)
    found = named_in(config)
    run = {key: value for key, value in found.items() if key.endswith(tuple(runs))}
    refuse_unnamed(run, named, *(given_as or (path.name, path)))
    kept: Config = without(config, [key for key in KEYS if key not in runs])
    return kept


@contextmanager
def explained(overrides: Sequence[str]) -> Iterator[None]:
    """Turns errors about the config into UserErrors; all others are defects and pass through."""
    try:
        yield
    except Exception as error:
        explanation = explain(error, overrides)
        if explanation is None:
            raise
        raise explanation from error


_OMEGACONFS_LOADER = _utils.get_yaml_loader


@cache
def _loader() -> Any:
    return by_libyaml(_OMEGACONFS_LOADER())


@contextmanager
def read_by_libyaml() -> Iterator[None]:
    """OmegaConf reads YAML by libyaml."""
    _utils.get_yaml_loader = _loader
    try:
        yield
    finally:
        _utils.get_yaml_loader = _OMEGACONFS_LOADER


@contextmanager
def no_environment(overrides: Iterable[str]) -> Iterator[None]:
    """Allows `${oc.env:...}` only in the caller's overrides: a config file must not read the environment.

    Hydra's own node repeats these overrides; `moecompile.compose.hydra_state` has checked it.
    """
    allowed = {item.lstrip("+").partition("=")[0] for item in overrides if "oc.env" in item}

    def environment(key: str, *default: Any, _node_: Any) -> Any:
        path = str(_node_._get_full_key(None))
        if not path.startswith("hydra.") and not any(
            path == name or path.startswith((f"{name}.", f"{name}[")) for name in allowed
        ):
            raise ConfigError(
                path, f"${{oc.env:{key}}}", "a config file may not read the environment",
                f"Write the value there, or give {path}=... on the command line",
            )  # fmt: skip
        return oc.env(key, *default)

    saved = BaseContainer._resolvers["oc.env"]
    OmegaConf.register_new_resolver("oc.env", environment, replace=True)
    try:
        yield
    finally:
        BaseContainer._resolvers["oc.env"] = saved


def unresolved(overrides: Any) -> list[str]:
    """The overrides without interpolation, because one may refer to a key that does not exist."""
    words: Any = OmegaConf.to_container(overrides, resolve=False)
    return [str(word) for word in words]


def plain(node: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(node, resolve=False)
    return dict(values)


def _typed_keys(overrides: Sequence[str]) -> dict[str, None]:
    """The dotted keys whose values the caller has typed, also those within a mapping (`per_layer.first={...}`)."""
    found = dict[str, None]()
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        found |= dict.fromkeys(_leaves(each.key_or_group, None if each.is_delete() else each.value()))
    return found


def _set_keys(overrides: Sequence[str]) -> Iterator[str]:
    """The key of each override; of one that sets a mapping (`optimizer.muon={lr: 0.1}`), those in it."""
    for item in overrides:
        if match := re.match(r"\+{0,2}(\w+(?:\.\w+)*)=(\{?)", item):
            yield from _typed_keys([item]) if match[2] else [match[1]]


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(f"{key}.{name}", each)
    else:
        yield key


def _keys(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from _keys(value)


@cache
def _schema() -> tuple[bytes, dict[Any, Any]]:
    """The schema with its defaults, pickled (to copy it takes three times as long, to build it more), and as values."""
    schema: DictConfig = OmegaConf.structured(Config)
    defaults: Any = OmegaConf.to_container(schema)
    return pickle.dumps(schema), defaults


def _typed(cfg: Any) -> Config:
    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config = OmegaConf.to_object(_structured(values))
    assert isinstance(config, Config)
    return config


def _structured(values: Any) -> Any:
    """The schema with these values, which are of its types."""
    schema, defaults = _schema()
    return OmegaConf.unsafe_merge(pickle.loads(schema), _differing(values, defaults))


def _differing(values: Any, defaults: Mapping[Any, Any]) -> Any:
    """What is not the schema's default already: to set a value takes OmegaConf much longer than to compare it."""
    if not isinstance(values, dict):
        return values
    found = {}
    for key, value in values.items():
        default = defaults.get(key, ...)
        if isinstance(value, dict) and isinstance(default, dict):
            if below := _differing(value, default):
                found[key] = below
        elif _types(value) != _types(default) or value != default:
            found[key] = value
    return found


def _types(value: Any) -> Any:
    """Numbers are equal to others of another type, also in a list."""
    return [type(each) for each in value] if isinstance(value, list) else type(value)


class Given(dict[str, str]):
    """The caller's overrides, key -> value. words: as they are typed."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(item.lstrip("+~").split("=", 1) for item in words if "=" in item)
        self.words = list(words)


def explain(error: BaseException, overrides: Sequence[str]) -> UserError | None:
    """One message for an error raised while a config is composed from `overrides`; None if it is not about the config.

    Algorithm:
        1. list the error and its causes, from outside in;
        2. apply the first rule that matches one of them, from the most to the least specific;
        3. else go by the text.
    """
    causes = list(_causes(error))  # Step 1
    given = Given(overrides)
    for kind, rule in _RULES:  # Step 2
        for cause in causes:
            if isinstance(cause, kind) if isinstance(kind, type) else getattr(cause, kind, None):
                return rule(cause, str(error), given)
    if type(error).__module__.startswith("hydra.") or isinstance(error, ValueError):  # Step 3
        return _by_text(str(error), given)
    return _no_option(given) if isinstance(error, TypeError) else None


def _no_such_option(error: Any, text: str, given: Given) -> UserError:
    """`mesh=foo`: Hydra looked for `mesh/foo`."""
    path = str(error.missing_cfg_file)
    group, _, option = path.rpartition("/")
    group = next((key for key in given if path == f"{key}/{given[key]}"), group)
    option, options = path.removeprefix(f"{group}/"), list(error.options or ())
    if group in given and ("/" in option or Path(option).exists()):
        return ConfigError(group, option, "takes the name of an option, not a path", _for_a_path(group, option))
    rule = "there is no such option" + (" (a config file asks for it)" if group and group not in given else "")
    fix = f"{_guess(option, options)}Use one of {', '.join(options)}" if options else "--help lists what there is"
    return ConfigError(group or "--config-name", option, rule, fix)


def _unreadable(error: Any, text: str, given: Given) -> UserError:
    """`mesh.ep=[1,`: the override does not parse."""
    key, equals, value = error.override.partition("=")
    if not equals:
        return UserError(_bare(key, given.words))
    reason = next(line for line in text.splitlines() if not line.startswith("Error parsing"))
    return ConfigError(key, value, f"cannot be read ({reason})", f"Quote special characters: \"{key}='...'\"")


def _for_a_path(group: str, path: str) -> str:
    """What to write for a group's option that is a path."""
    if group == "model":
        return f"Write model.pretrained={path}, if save_pretrained wrote this folder; nothing is downloaded"
    if group == "data":
        return f"Write data.path={path}, after data=corpus or data=sft if it is more than one text"
    name = Path(path).stem
    return f"Write --config-dir FOLDER {group}={name}, where the file is FOLDER/{group}/{name}.yaml"


def _bare(word: str, words: Sequence[str]) -> str:
    """The message for a word that is no override: spaces around `=`, a task's name, or that of a group's option."""
    at = list(words).index(word) if word in words else len(words)
    before, after = words[at - 1] if at else "", [*words[at + 1 :], "", ""]
    if before.endswith("=") and before != "=":
        return f"{before} {word}: an override has no spaces. Write {before}{word}."
    if after[0].startswith("="):
        rest = after[:2] if after[0] == "=" else after[:1]
        return f"{' '.join([word, *rest])}: an override has no spaces. Write {word}{''.join(rest)}."
    found = [group for group in ("task", "recipe", "model", "mesh") if (conf_dir() / group / f"{word}.yaml").is_file()]
    return f"{word}: not an override. Write {f'{found[0]}={word}' if found else 'key=value'}; --help lists the groups."


def written_as_flag(words: Sequence[str]) -> UserError | None:
    """The error for a key of the config that is written as a flag, `--recipe x`; None: there is none."""
    for at, word in enumerate(words):
        found = re.fullmatch(r"-+([A-Za-z_][\w.]*)(?:=(.*))?", word)
        if found and (found[1] == "recipe" or _schema_type(found[1]) is not None):
            value = found[2] or next((each for each in words[at + 1 : at + 2] if "=" not in each), "...")
            return UserError(f"{word}: keys of the config are no flags. Write {found[1]}={value}.")
    return None


def _bad_key_or_value(error: Any, text: str, given: Given) -> UserError:
    """`mesh.epp=3`, `mesh.num_nodes=two`: a key that the schema does not have, or a value that it does not accept."""
    path = error.full_key
    if isinstance(error, (AttributeError, KeyError)):
        return _no_such_key(path, text, given, _siblings(error))
    if "nterpolation" in str(error):
        return UserError(f"{path}: {_one_line(str(error))}. Refer to a key that exists and has the right type.")
    value = given.get(path, error.value)
    hint = _schema_type(re.sub(r"\[\d+\]$", "", path))
    if path.endswith("]") and get_origin(hint) is list:
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        names = list(get_type_hints(hint))
        return ConfigError(
            path, value, f"is a group of keys: {', '.join(names)}", f"Set them one by one, such as {path}.{names[0]}"
        )
    expected = _in_words(hint)
    if expected is None:
        return ConfigError(path, value, _one_line(str(error)), "Change the value")
    choices = expected.removeprefix("one of ").split(", ") if expected.startswith("one of ") else []
    rule = "there is no such choice" if choices else "has the wrong type"
    return ConfigError(path, value, f"{rule}{_where(text)}", f"{_guess(str(value), choices)}Give {expected}")


def _no_such_key(path: str, text: str, given: Given, siblings: Sequence[str]) -> UserError:
    if path.partition(".")[0] == "recipe" and (file := re.match(r"In '(recipe/[^']+)'", text)):
        return UserError(
            f"{file[1]}.yaml: its keys go below `recipe`, where there are none. "
            "Begin the file with the line '# @package _global_'."
        )
    if new := next((new for old, new in MOVED.items() if f"{path}.".startswith(f"{old}.")), None):
        path, value = next(((key, given[key]) for key in given if key.startswith(path)), (path, None))
        return _error(path, value, f"there is no such key{_where(text)}: it was the same as {new}", f"Set {new}")
    parent, _, key = path.rpartition(".")
    owner = _schema_type(parent) if parent else Config
    rule = f"there is no such key{_where(text)}"
    typed = next((key for key in given if key.startswith(f"{path}.")), path)  # it may be further in
    fix = f"{_guess(key, siblings)}Write +{typed}=... to add a key"
    if is_dataclass(owner):
        names = [*get_type_hints(owner), *([] if parent else ["recipe"])]
        guess = _guess(key, names)
        elsewhere = [] if guess else [each for each in _dotted(Config) if each.endswith(f".{key}")]
        guess = f"Did you mean {' or '.join(elsewhere)}? " if 0 < len(elsewhere) <= 3 else guess
        fix = f"{guess}{parent or 'The config'} has {', '.join(names)}"
    return _error(path, given.get(path), rule, fix)


def _siblings(error: Any) -> list[str]:
    """The existing keys next to the missing one, from OmegaConf's error."""
    keys = getattr(getattr(error, "parent_node", None), "keys", None)
    try:
        return [str(key) for key in keys()] if callable(keys) else []
    except Exception:  # a node without content
        return []


def _by_text(text: str, given: Given) -> UserError:
    for pattern, path, rule, fix in _TEXTS:
        if match := re.search(pattern, text):
            groups = match.groupdict()
            path = path or groups["path"]
            value = groups.get("value", given.get(path))
            or_list = f", or write {path}=[{value}] for a list" if "." in path else ""
            return _error(path, value, f"{rule}{_where(text)}", fix.format(path=path, value=value, or_list=or_list))
    return _no_option(given) or UserError(_one_line(text))


def _no_option(given: Mapping[str, str]) -> UserError | None:
    """`mesh=3`, `mesh=[1]`, `mesh=[cpu_1,cpu_1x2]`."""
    for path, value in given.items():
        if (path in ("", "recipe") or is_dataclass(_schema_type(path))) and not isinstance(yaml.safe_load(value), str):
            return ConfigError(path, value, "a group takes the name of one option", "--help lists them")
    return None


def _error(path: str, value: str | None, rule: str, fix: str) -> UserError:
    """A ConfigError if the value is known; a value from a file may not be."""
    return UserError(f"{path}: {rule}. {fix}.") if value is None else ConfigError(path, value, rule, fix)


def _schema_type(path: str) -> Any:
    """The annotation at a dotted path; None if the schema has none (`model.config.*`, `hydra.*`, a typo)."""
    hint: Any = Config
    for key in path.split("."):
        entry = get_args(hint)[1] if get_origin(hint) is dict else None  # `per_layer.NAME`
        hint = get_type_hints(hint).get(key) if is_dataclass(hint) else entry
    return hint


def _dotted(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, dotted."""
    for name, hint in get_type_hints(kind).items():
        yield f"{prefix}{name}"
        if is_dataclass(hint):
            yield from _dotted(hint, f"{prefix}{name}.")


def _in_words(hint: Any) -> str | None:
    """An annotation in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if hint == Union[int, str]:  # noqa: UP007
        return "a whole number or auto"
    if get_origin(hint) is Union:
        return " or ".join(filter(None, map(_in_words, get_args(hint))))
    if get_origin(hint) is dict:
        return "keys with their values: {key: value}"
    if get_origin(hint) is list:
        (entry,) = get_args(hint)
        return f"a list, each {_in_words(entry)}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    return words.get(hint)


def _guess(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.7)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _where(text: str) -> str:
    """The config file that Hydra names, if any."""
    file = re.match(r"In '([^']+)'", text)
    return f" (in {file[1]}.yaml)" if file and file[1] != "config" else ""


def _one_line(text: str) -> str:
    noise = r"(full_key|reference_type|object_type)[:=].*|\w+ raised while composing config:|See https.*"
    return " ".join(re.sub(noise, "", text).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_RULES: tuple[tuple[type | str, Callable[[Any, str, Given], UserError]], ...] = (
    (UserError, lambda error, text, given: error),
    (yaml.YAMLError, lambda error, text, given: UserError(f"not valid YAML: {_one_line(str(error))}.")),
    ("missing_cfg_file", _no_such_option),
    ("override", _unreadable),
    ("full_key", _bad_key_or_value),
)
"""How to recognize an error (its class, or an attribute), and the function that explains it."""

MOVED = {
    "hardware.figures.memory_gib": "hardware.memory_gib",
    **{f"hardware.figures.{link}{kind}_gb_s": f"hardware.{link}_gb_s"
       for link in ("intra_node", "inter_node") for kind in ("", "_effective")},
}  # fmt: skip
"""Keys of version 0.2.0 that said what another key says -> that one."""

_SWEEP = ("several values are a sweep", "Add -m for one job a value{or_list}")
_TWICE = ("the group has an option already", "Write {path}={value}, without +")
_TEXTS = (
    (r"config directory '(?P<value>.+)' not found", "--config-dir", "there is no such folder", "Create it"),
    (r"Ambiguous value for argument '(?P<path>[^=]+)=(?P<value>.*)'", None, *_SWEEP),
    (r"Sweep parameters '(?P<path>[^=]+)=(?P<value>.*)' requires", None, *_SWEEP),
    (r"(?P<path>\S+) appears more than once in the final defaults list", None, *_TWICE),
    (r"Multiple values for (?P<path>\S+)\. To override", None, *_TWICE),
    (r"Could not override '(?P<path>\S+)'\. No match", None, "there is no such group", "--help lists the groups"),
)
"""Text of an error, its path if that is always the same, the rule and what to change."""
