"""What a file of another system says, key by key, and what becomes of each key here.

Setting   a key of the file, its value as text, and its line
Row       one line of the report: taken, assumed, no equal here, without effect here, or unknown
Settings  all settings of a file; whoever reads one says what it becomes, so that no key can be dropped silently
Draft     what was taken: the values of our groups, from which a recipe is written (recipe.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moecompile.errors import ConfigError
from moecompile.schema import OptimizerConfig, TrainerConfig

TAKEN, ASSUMED, NO_EQUAL, NO_EFFECT, UNKNOWN = "taken", "assumed", "no equal here", "no effect here", "unknown"
KINDS = (TAKEN, ASSUMED, NO_EQUAL, UNKNOWN, NO_EFFECT)
"""Kinds of a row, in the order of the report."""
Value = TypeVar("Value")
_OFF = ("false", "no", "off", "none", "null", "")
ON = ("true", "yes", "on")
"""Words in lower case."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A key of a file. value: as text; `true` for a flag without one. missing: names without a value within it.
    source: the file that says it, if it is one that the given file names. is_default: of a table of defaults, which
    is not listed where nothing is made of it. given: `set.NAME` of the command line, which must be known. before: what
    the file says of the same key before it, which does not count.
    """

    key: str
    value: str
    line: int | None = None
    missing: tuple[str, ...] = ()
    source: str | None = None
    is_default: bool = False
    given: str | None = None
    before: Setting | None = None

    @property
    def place(self) -> str:
        """Where it is said, for messages."""
        return f" (line {self.line})" if self.line else f" (in {self.source})" if self.source else ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the report. text: what the key becomes here, or why it does not."""

    kind: str
    key: str
    value: str
    text: str
    line: int | None = None


@dataclass(kw_only=True)
class Settings:
    """The settings of a file, each with the fate that its reader gives it.

    Args:
        path: of the file, for messages. found: key -> setting. fates: key -> (kind, text) of keys that nobody reads.
        spelled: how a key is written in the file.
    """

    path: str
    found: Mapping[str, Setting]
    fates: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    spelled: Callable[[str], str] = str
    rows: list[Row] = field(default_factory=list)
    _read: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the file sets a key, to something else than false or nothing; this does not read it."""
        return key in self.found and self.found[key].value.lower() not in _OFF

    def on(self, key: str, becomes: str, kind: str = TAKEN) -> bool:
        """Whether a flag is set; if the file has it, this is what it becomes."""
        if key not in self.found:
            return False
        value = self._text(key)
        if value.lower() not in (*_OFF, *ON):
            raise self.error(key, "must be true or false", "Correct the file")
        self.say(key, becomes, kind)
        return value.lower() in ON

    def whole(self, key: str, becomes: str, kind: str = TAKEN, *, least: int = 1) -> int | None:
        """A whole number, or None without the key."""
        value = self._number(key, becomes, kind, lambda text: int(text.replace("_", "")), "a whole number")
        if value is not None and value < least:
            raise self.error(key, f"must be at least {least}", "Correct the file")
        return value

    def real(self, key: str, becomes: str, kind: str = TAKEN) -> float | None:
        """A number, or None without the key."""
        return self._number(key, becomes, kind, float, "a number")

    def real_or(self, key: str, becomes: str, default: float, whose: str) -> float:
        """A number, or the other system's default, which the report says: ours is another one."""
        value = self.real(key, becomes)
        if value is None:
            value = default
            self.assume(self.spelled(key), value, f"{whose}'s default")
        return value

    def word(self, key: str, becomes: str, known: Mapping[str, Any] | None = None, kind: str = TAKEN) -> str | None:
        """A text, or None without the key.

        Args:
            known: the words that are known; another one is an error.
        """
        if not self.has(key):
            self.say(key, "is off", NO_EFFECT)
            return None
        value = self._text(key)
        if known is not None and value not in known:
            raise self.error(key, "is not known", f"Known are {', '.join(known)}")
        self.say(key, becomes, kind)
        return value

    def assume(self, key: str, value: object, text: str) -> None:
        """Says what is assumed where the file says nothing."""
        self.rows.append(Row(kind=ASSUMED, key=key, value=str(value), text=text))

    def take(self, key: str, value: object, text: str, line: int | None = None) -> None:
        """Says what becomes of something that is no key: a variable, or a flag of another program."""
        self.rows.append(Row(kind=TAKEN, key=key, value=str(value), text=text, line=line))

    def say(self, key: str, text: str, kind: str = TAKEN) -> None:
        """Says what becomes of a key of the file."""
        if key in self._read or key not in self.found:
            return
        self._read.add(key)
        setting = self.found[key]
        if setting.is_default and not self.has(key):
            return
        if kind == NO_EQUAL and not self.has(key):
            kind, text = NO_EFFECT, "is off"
        text += f" ({setting.source})" if setting.source else ""
        spelled, value = self.spelled(key), _shown(setting.value)
        self.rows.append(Row(kind=kind, key=spelled, value=value, text=text, line=setting.line))

    def finish(self) -> list[Row]:
        """All rows: those of keys that nobody has read follow `fates`, and the rest is unknown.

        Raises:
            ConfigError: the command line gives a key that is unknown.
        """
        for key, setting in self.found.items():
            kind, text = self.fates.get(key, (UNKNOWN, "not known here, so nothing was made of it"))
            if kind == UNKNOWN and key not in self._read and setting.given is not None:
                raise unknown_name(setting.given, setting.value)
            if not setting.is_default:
                self.say(key, text, kind)
            if (before := setting.before) is not None:
                text = f"given twice, before as {_shown(before.value)}{before.place}: the last one counts"
                row = Row(
                    kind=ASSUMED, key=self.spelled(key), value=_shown(setting.value), text=text, line=setting.line
                )
                self.rows.append(row)
        order = {kind: i for i, kind in enumerate(KINDS)}
        return sorted(self.rows, key=lambda row: (order[row.kind], row.line is None, row.line or 0))

    def error(self, key: str, rule: str, fix: str) -> ConfigError:
        """The error about a key of the file, with its line."""
        setting = self.found.get(key)
        place, value = ("", None) if setting is None else (setting.place, setting.value)
        return ConfigError(f"{self.path}{place}: {self.spelled(key)}", value, rule, fix)

    def refuse_missing(self, keys: Iterable[str]) -> None:
        """Refuses the file if a name without a value is within one of these keys, and says all such names.

        Raises:
            ConfigError: there are such names.
        """
        bad = [self.found[key] for key in keys if key in self.found and self.found[key].missing]
        if not bad:
            return
        names = list(dict.fromkeys(name for setting in bad for name in setting.missing))
        where = ", ".join(f"{self.spelled(each.key)}{each.place}" for each in bad)
        given = [name for name in names if name.replace("_", "").isalnum() and not name.isdigit()]
        fix = f"Give {' '.join(f'set.{name}=VALUE' for name in given)}" if given else "Write the value into a copy"
        if len(given) < len(names):
            fix += "; what a command would print is not run: give the flag itself, for example set.num_layers=32"
        raise ConfigError("file", self.path, f"has no value for {', '.join(names)}, which {where} needs", fix)

    def _text(self, key: str) -> str:
        self.refuse_missing([key])
        return self.found[key].value.strip()

    def _number(self, key: str, becomes: str, kind: str, convert: Callable[[str], Value], what: str) -> Value | None:
        if not self.has(key):
            self.say(key, "is off", NO_EFFECT)
            return None
        text = self._text(key)
        try:
            number = convert(text)
        except ValueError:
            raise self.error(key, f"must be {what}", "Correct the file") from None
        self.say(key, becomes, kind)
        return number


def unknown_name(name: str, value: str) -> ConfigError:
    """The error about `set.NAME` that nothing uses."""
    rule = "is no name that the file leaves open, and no key that is known here"
    return ConfigError(f"set.{name}", value, rule, "Correct the name, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """What the command line says beside the file.

    names: name -> value. conf: folder of the shipped groups. ranks: nodes and ranks per node. hardware: its option.
    None: not said. says_model: whether it says the model.
    """

    names: Mapping[str, str]
    conf: Path
    ranks: tuple[int, int] | None = None
    hardware: str | None = None
    says_model: bool = False


_MACHINES = ("gb300", "gb200", "b300", "b200", "h200", "h800", "h100", "a100", "mi300x", "mi325x", "mi355x")


def warmup_of(settings: Settings, key: str, warmup: int, steps: int | None) -> dict[str, int]:
    """`optimizer.warmup_steps`, at most the steps of the run. Where the file does not say those, the run has as many as
    our runs have, and a longer warm-up is left out, which the report says.
    """
    if steps is not None:
        return {"warmup_steps": min(warmup, steps)}
    ours = TrainerConfig().max_steps
    if warmup <= ours:
        return {"warmup_steps": warmup}
    text = f"the file does not say its steps, and a run has {ours} here: give trainer.max_steps with it"
    settings.assume("optimizer.warmup_steps", OptimizerConfig().warmup_steps, f"{key} is {warmup}, and {text}")
    return {}


def machine_of(settings: Settings, caller: Caller) -> str:
    """The option of `hardware`: the caller's, else the one in the file's name, else h100."""
    if caller.hardware is not None:
        settings.assume("hardware", caller.hardware, "your command line says it")
        return caller.hardware
    named = next((name for name in _MACHINES if name in settings.path.lower()), None)
    why = "it is in the file's path" if named else "the file does not say; hardware=... on the command line does"
    settings.assume("hardware", named or "h100", why)
    return named or "h100"


@dataclass(kw_only=True)
class Draft:
    """What was taken from a file: values of our groups.

    model: an option of the group, or the whole content of one; None: the command line says it. mesh: nodes and ranks
    per node. hardware: its option. ep: 1 without. workload, stack: content of an option, or a shipped one. values: of
    other groups.
    """

    name: str
    model: str | dict[str, Any] | None
    hardware: str
    mesh: tuple[int, int]
    ep: int
    workload: dict[str, Any]
    stack: str | dict[str, Any]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def _shown(value: str) -> str:
    text = " ".join(value.split())
    return text if len(text) <= 40 else f"{text[:37]}..."
