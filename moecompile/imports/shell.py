"""Shell scripts as data: variables, arrays and the flags of the command that trains. Nothing is ever run.

Algorithm:
  1. `shfmt` parses the script.                                                                            -> `_parsed`
  2. Its commands, in order. An assignment sets a variable; one that the caller gives is not changed. A branch is taken
     if its test compares plain values, so are the items of a `case`, and so is what follows a test after `&&` or `||`.
     Where this is not decided, and in loops and functions, nothing is read: names that are assigned there have no value
     from then on, and flags are said.                                                                     -> `_Reader`
  3. The flags are those of the command with the most of them; without such a command, those of all lists.
                                                                                                      -> `read_script`

A name without a value, or what a command prints, stays within a value as a hole: who needs the value refuses it.
"""

from __future__ import annotations

import codecs
import fnmatch
import json
import operator
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.imports.settings import Setting

Node = dict[str, Any]
"""A node of the syntax tree (mvdan.cc/sh, package syntax)."""
_TIMEOUT_S = 60
_SBATCH = re.compile(r"#SBATCH\s+(--[\w-]+)(?:[= ]\s*(\S+))?")
_NAMES = re.compile(r"\$\{(\w+)(?:(:?[-=+])([^${}]*))?\}|\$(\w+)")
_TOKEN = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+""", re.DOTALL)
_MOST_NESTED = 20
_OUTPUT = "a command's output"
_ASKS = ("grep", "egrep", "fgrep", "command", "which", "type", "hash", "cmp", "diff")
"""Commands that are asked something: whether they succeed is not known. Others do."""
_SETS = ("read", "mapfile", "readarray", "unset")
"""Commands after which the names that are their words have no known value."""


@dataclass(kw_only=True)
class Script:
    """What a script says. settings: flag without dashes -> its setting. launch: flags of what launches the program.
    variables: name -> value. unread: (line, flags, why) of what was not decided.
    """

    settings: dict[str, Setting]
    launch: dict[str, Setting] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    unread: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """A word, or a part of a value. missing: names without a value in it; they stand in the text as `$NAME`."""

    text: str
    line: int
    missing: tuple[str, ...] = ()

    @classmethod
    def hole(cls, name: str, line: int) -> Piece:
        """A name without a value, or what a command prints."""
        return cls("$(...)" if name == _OUTPUT else f"${name}", line, (name,))


Value = list[Piece]


def read_script(text: str, given: Mapping[str, str], path: str) -> Script:
    """The settings of a script.

    Args:
        given: variables that the caller gives.

    Raises:
        ConfigError: it is no shell script, two commands train, or shfmt is not installed.
    """
    reader = _Reader(given)
    try:
        reader.run(_parsed(text.replace("\r\n", "\n"), path))
        return _script(reader, text, path)
    except ValueError as error:
        raise _unreadable(path, error) from None


def _parsed(text: str, path: str) -> list[Node]:
    """Step 1: the statements of a script."""
    beside = Path(sys.executable).parent / "shfmt"
    program = str(beside) if beside.is_file() else shutil.which("shfmt")
    if program is None:
        fix = "pip install shfmt-py, which moecompile needs, or apt install shfmt"
        raise ConfigError("file", path, "is read with shfmt, which is not installed", fix)
    command = [program, "--to-json", "-ln", "bash"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        line, _, what = done.stderr.decode().strip().partition(":")
        raise _unreadable(path, f"line {line}: {what.partition(':')[2].strip()}")
    statements: list[Node] = json.loads(done.stdout).get("Stmts", [])
    return statements


def _unreadable(path: str, what: object) -> ConfigError:
    return ConfigError("file", path, f"is no shell script that can be read: {what}", "Correct the file")


def _script(reader: _Reader, text: str, path: str) -> Script:
    """Step 3."""
    commands = [flags for flags in map(_flags, reader.commands) if len(flags) > 1 and "num-layers" in flags]
    said = [{key: each.value for key, each in flags.items()} for flags in commands]
    if any(each != said[0] for each in said[1:]):
        lines = ", ".join(str(min(each.line or 0 for each in flags.values())) for flags in commands)
        raise ConfigError("file", path, f"has several commands that train (lines {lines})", "Keep one of them")
    variables = reader.plain_variables()
    script = Script(settings={}, variables=variables, unread=reader.unread)
    if commands:
        script.settings = commands[0]
    else:
        for words in (*reader.arrays.values(), *reader.lists()):
            for key, each in _flags(words).items():
                script.settings[key] = replace(each, before=each.before or script.settings.get(key))
    for words in reader.commands:
        script.launch |= {key: each for key, each in _flags(words).items() if key in _LAUNCH}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _SBATCH.match(line):
            key = match[1].lstrip("-")
            value, missing = expanded(match[2] or "true", variables)
            script.launch.setdefault(key, Setting(key=key, value=value, line=number, missing=missing))
    script.settings = {key: each for key, each in script.settings.items() if key not in _LAUNCH}
    return script


_LAUNCH = (
    "nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "rdzv-id", "rdzv-backend", "rdzv-endpoint",
    "nodes", "ntasks-per-node", "gpus-per-node", "gres", "max-restarts", "tee", "log-dir", "redirects", "standalone",
)  # fmt: skip
"""Flags of torchrun, srun and sbatch."""


# -- step 2: commands ----------------------------------------------------------------------------------------------


class _Reader:
    """Assigns variables in the order of the script, and collects its commands."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self.variables: dict[str, Value] = {name: [Piece(value, 0)] for name, value in given.items()}
        self.arrays: dict[str, list[Piece]] = {}
        self.functions: dict[str, Node] = {}
        self.undecided: set[str] = set()
        self.commands: list[list[Piece]] = []
        self.unread: list[tuple[int, str, str]] = []

    def run(self, statements: Iterable[Node]) -> bool | None:
        """Whether the last one succeeds; None: not known."""
        holds: bool | None = True
        for statement in statements:
            holds = self._statement(statement)
        return holds

    def _statement(self, statement: Node) -> bool | None:
        command: Node = statement.get("Cmd") or {"Type": "Block"}
        read = getattr(self, f"_read_{command['Type']}", None)
        holds: bool | None = None
        if read is not None:
            holds = read(command)
        else:
            self._skip(command, f"within `{_word_of(command)}`, which is not run")
        return holds if holds is None or not statement.get("Negated") else not holds

    def _read_Block(self, node: Node) -> bool | None:
        return self.run(node.get("Stmts", ()))

    _read_Subshell = _read_Block

    def _read_TimeClause(self, node: Node) -> bool | None:
        return self.run([node["Stmt"]] if "Stmt" in node else [])

    def _read_FuncDecl(self, node: Node) -> bool | None:
        self.functions[node["Name"]["Value"]] = node
        self._say(node, "within a function, which is not run")
        return True

    def _read_DeclClause(self, node: Node) -> bool | None:
        for each in node.get("Args", ()):
            self._assign(each)
        return True

    def _read_CallExpr(self, node: Node) -> bool | None:
        for each in node.get("Assigns", ()):
            self._assign(each)
        words: list[Piece] = []
        for word in node.get("Args", ()):
            script = bool(words) and words[-1].text in ("-c", "eval")
            words += self._words(word, script=script)
        if not words:
            return True
        self.commands.append(words)
        name = words[0].text
        if name in ("[", "test"):
            return self._bracketed([self._value(word) for word in node["Args"][1:]], closed=name == "[")
        if name in self.functions:
            self._forget(self.functions[name])
        for word in words if name in _SETS else ():
            if word.text.isidentifier():
                self._hole(word.text, word.line)
        return None if name in _ASKS else name != "false"

    def _read_BinaryCmd(self, node: Node) -> bool | None:
        holds = self._statement(node["X"])
        if node["Op"] not in ("&&", "||"):
            return self._statement(node["Y"])
        if holds is None:
            self._skip(node["Y"], "after a test that is not decided")
            return None
        return self._statement(node["Y"]) if holds == (node["Op"] == "&&") else holds

    def _read_IfClause(self, node: Node) -> bool | None:
        arm: Node | None = node
        while arm is not None:
            holds = self.run(arm["Cond"]) if "Cond" in arm else True
            if holds is None or ("Cond" in arm and not _is_test(arm["Cond"][-1])):
                self._skip(arm, "within `if`, whose condition is not decided")
                return None
            if holds:
                return self.run(arm.get("Then", ()))
            arm = arm.get("Else")
        return True

    def _read_CaseClause(self, node: Node) -> bool | None:
        value = self._known(self._value(node["Word"]))
        for item in node.get("Items", ()):
            patterns = [self._pattern(each) for each in item["Patterns"]]
            if value is None or None in patterns or item.get("Op", ";;") != ";;":
                self._skip(node, "within `case`, whose value is not decided")
                return None
            if any(fnmatch.fnmatchcase(value, str(pattern)) for pattern in patterns):
                return self.run(item.get("Stmts", ()))
        return True

    def _read_TestClause(self, node: Node) -> bool | None:
        return self._tested(node["X"])

    def _read_ArithmCmd(self, node: Node) -> bool | None:
        try:
            return self._number(node["X"]) != 0
        except _NotKnown:
            for name in _changed(node["X"]):
                self._hole(name, _line(node))
            return None

    # -- what is not read

    def _skip(self, node: Node, why: str) -> None:
        self._forget(node)
        self._say(node, why)

    def _say(self, node: Node, why: str) -> None:
        flags = [flag for text in _literals(node) for flag in re.findall(r"(?:^|(?<=\s))--[\w-]+", text)]
        if flags:
            self.unread.append((_line(node), " ".join(flags), why))

    def _forget(self, node: Node) -> None:
        """Names that a node assigns have no value from here on, but lists of flags, whose own are said to be left."""
        for each in _assigned(node):
            name = each["Name"]["Value"]
            before = self.arrays.get(name) or self.variables.get(name) or []
            elements = each.get("Array", {}).get("Elems", ())
            flags = any(text.startswith("--") for element in elements for text in _literals(element))
            if not (flags or (before and before[0].text.lstrip().startswith("--"))):
                self._hole(name, _line(each))

    def _hole(self, name: str, line: int) -> None:
        if name not in self.given:
            self.undecided.add(name)
            self.arrays.pop(name, None)
            self.variables[name] = [Piece.hole(name, line)]

    # -- assignments and values

    def _assign(self, node: Node) -> None:
        name = node.get("Name", {}).get("Value")
        if name is None or name in self.given or node.get("Naked") or "Index" in node:
            return
        adds = node.get("Append", False)
        if "Array" in node:
            words = [piece for each in node["Array"].get("Elems", ()) for piece in self._words(each["Value"])]
            self.arrays[name] = [*(self.arrays.get(name, []) if adds else []), *words]
            return
        value = self._value(node["Value"]) if "Value" in node else [Piece("", _line(node))]
        if adds and name in self.arrays:
            self.arrays[name] += _split(value)
            return
        if not adds:
            self.undecided.discard(name)
            self.arrays.pop(name, None)
        self.variables[name] = [*(self.variables.get(name, []) if adds else []), *value]

    def _words(self, word: Node, *, script: bool = False) -> list[Piece]:
        """The words of a word: those of a list if it is nothing but a name, and of a text over several lines."""
        parts = word.get("Parts", [])
        inner = parts[0].get("Parts", []) if len(parts) == 1 and parts[0]["Type"] == "DblQuoted" else parts
        alone = len(inner) == 1 and inner[0]["Type"] == "ParamExp"
        plain = alone and not any(key in inner[0] for key in (*_CHANGES, "Exp")) and _is_all(inner[0])
        if plain and inner[0]["Param"]["Value"] in self.arrays:
            return self.arrays[inner[0]["Param"]["Value"]]
        value = self._value(word)
        if script or alone or len({piece.line for piece in value if piece.line >= _line(word)}) > 1:
            return _split(value)
        return [_joined(value, _line(word))]

    def _value(self, word: Node, *, quoted: bool = False) -> Value:
        return [piece for part in word.get("Parts", ()) for piece in self._part(part, quoted)]

    def _part(self, part: Node, quoted: bool) -> Value:
        kind, line = part["Type"], _line(part)
        if kind == "Lit":
            escaped = r'\\([$`"\\])' if quoted else r"\\(.)"
            return _lines(re.sub(escaped, r"\1", part["Value"], flags=re.DOTALL), line)
        if kind == "SglQuoted":
            text = part.get("Value", "")
            return _lines(codecs.decode(text, "unicode_escape") if part.get("Dollar") else text, line)
        if kind in ("DblQuoted", "ParamExp"):
            return self._value(part, quoted=True) if kind == "DblQuoted" else self._parameter(part)
        return self._computed(part) if kind == "ArithmExp" else [Piece.hole(_OUTPUT, line)]

    def _computed(self, node: Node) -> Value:
        try:
            return [Piece(str(self._number(node["X"])), _line(node))]
        except _NotKnown as error:
            return [Piece.hole(name, _line(node)) for name in error.names or (_OUTPUT,)]

    def _parameter(self, node: Node) -> Value:
        name, line = node["Param"]["Value"], _line(node)
        value: Value | None = self.variables.get(name)
        if name in self.arrays:
            words = self.arrays[name]
            value = [each for at, word in enumerate(words) for each in (Piece(" ", word.line), word)[not at :]]
        if node.get("Length") and name in self.arrays:
            return [Piece(str(len(self.arrays[name])), line)]
        if any(node.get(key) for key in _CHANGES) or not _is_all(node):
            return [Piece.hole(_OUTPUT, line)]
        return self._default(node, name, value) if "Exp" in node else value or self._nothing(name, line)

    def _nothing(self, name: str, line: int) -> Value:
        return [] if name in self.variables or name in self.arrays else [Piece.hole(name, line)]

    def _default(self, node: Node, name: str, value: Value | None) -> Value:
        """`${A:-B}` and its like."""
        sign, other = node["Exp"]["Op"], self._value(node["Exp"].get("Word", {}))
        empty = value is None or (sign.startswith(":") and not "".join(piece.text for piece in value))
        if sign in ("+", ":+"):
            return [] if empty else other
        if sign in ("-", ":-", "=", ":="):
            if empty and sign.endswith("=") and name not in self.given:
                self.variables[name] = other
            return other if empty else value or []
        if sign in ("?", ":?"):
            return [Piece.hole(name, _line(node))] if empty else value or []
        return [Piece.hole(_OUTPUT, _line(node))]

    def _pattern(self, word: Node) -> str | None:
        """A pattern of `fnmatch`; None: not known."""
        found = ""
        for part in word.get("Parts", ()):
            text = self._known(self._part(part, quoted=False))
            if text is None or part["Type"] == "ExtGlob":
                return None
            found += text if part["Type"] == "Lit" else re.sub(r"([*?[])", r"[\1]", text)
        return found

    def _known(self, value: Value) -> str | None:
        """A text in which a name without a value is empty, as in a shell; None: not known."""
        text = ""
        for piece in value:
            if piece.missing and (piece.text != f"${piece.missing[0]}" or piece.missing[0] in self.undecided):
                return None
            text += "" if piece.missing else piece.text
        return text

    # -- tests

    def _bracketed(self, values: list[Value], *, closed: bool) -> bool | None:
        texts = [self._known(value) for value in values[: len(values) - closed]]
        denied = texts[:1] == ["!"]
        holds = self._compared(texts[denied:])
        return None if holds is None else holds != denied

    def _compared(self, texts: list[str | None]) -> bool | None:
        known = [text for text in texts if text is not None]
        if len(known) < len(texts) or len(texts) not in (1, 2, 3):
            return None
        if len(known) == 1:
            return bool(known[0])
        if len(known) == 2:
            return bool(known[1]) == (known[0] == "-n") if known[0] in ("-n", "-z") else None
        left, sign, right = known
        if sign in ("=", "==", "!="):
            return (left == right) == (sign != "!=")
        whole = re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right)
        return _NUMBERS[sign](int(left), int(right)) if sign in _NUMBERS and whole else None

    def _tested(self, node: Node) -> bool | None:
        """The expression of `[[ ... ]]`."""
        kind, sign = node["Type"], node.get("Op", "")
        if kind == "ParenTest" or sign == "!":
            holds = self._tested(node["X"])
            return holds if holds is None or kind == "ParenTest" else not holds
        if sign in ("&&", "||"):
            both = [self._tested(node["X"]), self._tested(node["Y"])]
            decides = sign == "||"
            return decides if decides in both else None if None in both else not decides
        words = [node] if kind == "Word" else [node["X"], *([node["Y"]] if "Y" in node else [])]
        texts = [self._known(self._value(word)) for word in words]
        if sign in ("=", "==", "!="):
            pattern = self._pattern(words[1])
            fits = texts[0] is not None and pattern is not None and fnmatch.fnmatchcase(texts[0], pattern)
            return None if None in texts or pattern is None else fits == (sign != "!=")
        return self._compared([texts[0], sign, texts[1]] if len(texts) == 2 else [sign] * bool(sign) + texts)

    def _number(self, node: Node) -> int:
        """An arithmetic expression of whole numbers and names.

        Raises:
            _NotKnown: it has other things, or names without a value.
        """
        kind, sign = node["Type"], node.get("Op", "")
        if kind == "ParenArithm":
            return self._number(node["X"])
        if kind == "UnaryArithm" and sign in ("-", "+", "!") and not node.get("Post"):
            number = self._number(node["X"])
            return {"-": -number, "+": number}.get(sign, int(not number))
        if kind == "BinaryArithm" and sign in _OPERATORS:
            left, right = self._number(node["X"]), self._number(node["Y"])
            if not right and sign in ("/", "%"):
                raise _NotKnown(())
            return int(_OPERATORS[sign](left, right))
        if kind != "Word":
            raise _NotKnown(())
        value = self._value(node)
        text = "".join(piece.text for piece in value)
        if re.fullmatch(r"[A-Za-z_]\w*", text) and not value[0].missing:  # a name without `$`
            value = self.variables.get(text) or self._nothing(text, 0)
            text = "".join(piece.text for piece in value) or "0"
        missing = [name for piece in value for name in piece.missing if name != _OUTPUT]
        found = _whole_number(text.strip())
        if found is None:
            raise _NotKnown(missing)
        return found

    # -- what is found

    def lists(self) -> Iterator[list[Piece]]:
        """The variables that are lists of flags."""
        for value in self.variables.values():
            if value and "".join(piece.text for piece in value).lstrip().startswith("--"):
                yield _split(value)

    def plain_variables(self) -> dict[str, str]:
        """Name -> value, of those whose value is known."""
        return {
            name: "".join(piece.text for piece in value)
            for name, value in self.variables.items()
            if not any(piece.missing for piece in value)
        }


class _NotKnown(Exception):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names


def _whole_number(text: str) -> int | None:
    """A constant of arithmetic: `0x` is hexadecimal, a 0 before digits octal, `2#101` of that base; None: none."""
    match = re.fullmatch(r"(-?)(0[xX]|(\d+)#)?([0-9A-Za-z]+)", text)
    if match is None:
        return None
    sign, prefix, base, digits = match.groups()
    try:
        number = int(digits, int(base) if base else 16 if prefix else 8 if digits.startswith("0") else 10)
    except ValueError:
        return None
    return -number if sign else number


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_OPERATORS: dict[str, Callable[[int, int], int | bool]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _quotient, "**": operator.pow,
    "%": lambda a, b: a - b * _quotient(a, b), "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "&&": lambda a, b: bool(a and b),
    "||": lambda a, b: bool(a or b),
}  # fmt: skip
_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-gt": operator.gt, "-ge": operator.ge, "-lt": operator.lt,
    "-le": operator.le,
}  # fmt: skip


# -- nodes and pieces ----------------------------------------------------------------------------------------------


def _line(node: Node) -> int:
    line: int = node["Pos"]["Line"]
    return line


def _nodes(node: Any) -> Iterator[Node]:
    """A node and all in it."""
    if isinstance(node, dict):
        yield node
    for each in node.values() if isinstance(node, dict) else node:
        if isinstance(each, dict | list):
            yield from _nodes(each)


def _assigned(node: Node) -> Iterator[Node]:
    """Its assignments, and the names of its loops."""
    for each in _nodes(node):
        if "Name" in each and each.get("Type") in (None, "WordIter"):
            yield each


def _literals(node: Node) -> list[str]:
    return [each["Value"] for each in _nodes(node) if each.get("Type") in ("Lit", "SglQuoted") and "Value" in each]


def _changed(node: Node) -> list[str]:
    """The names that an arithmetic expression may assign."""
    assigns = any(
        str(each.get("Op", "")) in ("++", "--") or str(each.get("Op", "")).endswith("=") for each in _nodes(node)
    )
    return [text for text in _literals(node) if re.fullmatch(r"[A-Za-z_]\w*", text)] if assigns else []


def _is_test(statement: Node) -> bool:
    """Whether it only asks: a condition that is another command is run for its effect, too."""
    command = statement.get("Cmd") or {}
    if command.get("Type") == "BinaryCmd":
        return command["Op"] in ("&&", "||") and _is_test(command["X"]) and _is_test(command["Y"])
    words = [_literals(word)[:1] for word in command.get("Args", ())[:1]]
    return command.get("Type") in ("TestClause", "ArithmCmd") or words in ([["["]], [["test"]], [["true"]], [["false"]])


_CHANGES = ("Length", "Excl", "Width", "Names", "Slice", "Repl")
"""What a `${...}` has that does not stand for the value itself."""


def _is_all(node: Node) -> bool:
    """`$A`, `${A}`, `${A[@]}` or `${A[*]}`, and not one element."""
    return "Index" not in node or _literals(node["Index"]) in (["@"], ["*"])


def _word_of(command: Node) -> str:
    """The word that begins a compound command, as in `for`."""
    kind: str = command["Type"]
    return {"ForClause": "for", "WhileClause": "until" if command.get("Until") else "while"}.get(
        kind, kind.removesuffix("Clause").lower()
    )


def _lines(text: str, line: int) -> Value:
    return [Piece(part, line + number) for number, part in enumerate(text.splitlines(keepends=True))]


def _joined(value: Value, line: int) -> Piece:
    missing = tuple(name for piece in value for name in piece.missing)
    return Piece("".join(piece.text for piece in value), line, missing)


def _split(value: Value) -> list[Piece]:
    """The words of a value, as a shell reads them.

    Raises:
        ValueError: its quotes do not end.
    """
    text, starts, at = "", list[int](), 0
    for piece in value:
        starts.append(at)
        text, at = text + piece.text, at + len(piece.text)
    shlex.split(text)  # raises
    words = []
    for match in _TOKEN.finditer(text):
        within = [
            p
            for p, start in zip(value, starts, strict=True)
            if start < match.end() and start + len(p.text) > match.start()
        ]
        words.append(replace(_joined(within, within[0].line), text="".join(shlex.split(match[0]))))
    return words


# -- step 3: flags -------------------------------------------------------------------------------------------------


def _flags(words: Sequence[Piece]) -> dict[str, Setting]:
    """Flag -> setting: `--a`, `--a b c`, `--a=b`; the last one counts, as in argparse, and has the one before."""
    found: dict[str, Setting] = {}
    key, start, values = "", 0, list[Piece]()
    for word in (*words, Piece("--", 0)):
        if word.text.startswith("--"):
            if key:
                found[key] = replace(_setting(key, values, start), before=found.get(key))
            name, equals, value = word.text[2:].partition("=")
            key, start = name.replace("_", "-"), word.line
            values = [replace(word, text=value)] if equals else []
        elif key:
            values.append(word)
    return found


def _setting(key: str, values: Sequence[Piece], line: int) -> Setting:
    shown = " ".join(word.text for word in values if not word.text.endswith((".py", ".sh")))
    missing = tuple(name for word in values for name in word.missing)
    return Setting(key=key, value=shown or "true", line=line, missing=missing)


def expanded(text: str, given: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A value with the names that the caller gives, and those without a value (in YAML files with `${NAME}`)."""

    def value(match: re.Match[str]) -> str:
        name, sign, other = match[1] or match[4], match[2] or "", match[3]
        known = given.get(name)
        if sign.endswith("+"):
            return other if known else ""
        empty = known is None or (sign.startswith(":") and not known)
        return (other if sign else f"${name}") if empty else str(known)

    for _ in range(_MOST_NESTED):
        before, text = text, _NAMES.sub(value, text)
        if text == before:
            break
    return text, tuple(match[1] or match[4] for match in _NAMES.finditer(text))
