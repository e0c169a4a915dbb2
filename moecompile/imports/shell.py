"""Shell scripts as data: variables, arrays and the flags of the command that trains. Nothing is ever run.

Algorithm:
  1. One scan over the characters takes out comments and here-documents, joins continued lines, and packs arithmetic and
     command substitutions into single marks, because they hold blanks and parentheses.                     -> `_plain`
  2. `shlex` splits the rest into words; redirections are left out.                      -> `_words`, `_redirected`
  3. The commands, in order. An assignment sets a variable; one that the caller gives is not changed. A branch is taken
     if its test compares plain words, and so is what follows `[ TEST ] &&` or `||`; where such a test is not decided,
     the names that it guards have no value. What is in loops, functions and other branches is not read, and said.
                                                                                                           -> `_Reader`
  4. The flags are those of the command with the most of them; without such a command, those of all lists.
                                                                                                     -> `read_script`

A name without a value, or a command substitution, stays within the value as a mark: who needs the value refuses it.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moecompile.errors import ConfigError
from moecompile.imports.settings import Setting

Word = tuple[str, int]
"""A word and its line."""
_CONTINUED, _OPEN, _CLOSE, _COMMAND, _UNSET, _END = "\x01", "\x02", "\x03", "\x04", "\x05", "\x06"
_REDIRECT = "\x0f"
_PACKED, _UNPACKED = str.maketrans("()", "\x07\x0e"), str.maketrans("\x07\x0e", "()")
_BREAKS = ("\n", ";", "&", "|")
_LISTS = ("&&", "||")
_TESTS = {"[": "]", "[[": "]]"}
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_DECLARES = ("export", "local", "declare", "readonly", "typeset")
_REFERS = re.compile(r"\$\{(\w+)(?:(:?[-=+])([^${}]*))?\}|\$\{(\w+)\[[@*]\]\}|\$(\w+|@|\*)")
_WHOLE = re.compile(r"\$\{?(\w+)(?:\[[@*]\])?\}?")
_SBATCH = re.compile(r"#SBATCH\s+(--[\w-]+)(?:[= ]\s*(\S+))?")
_MOST_NESTED = 20
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv, ast.Div: lambda a, b: int(a / b),
}  # fmt: skip


@dataclass(kw_only=True)
class Script:
    """What a script says. settings: flag without dashes -> its setting. launch: flags of what launches the program.
    variables: name -> value. unread: (line, flags, why) of what was not decided.
    """

    settings: dict[str, Setting]
    launch: dict[str, Setting] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    unread: list[tuple[int, str, str]] = field(default_factory=list)


def read_script(text: str, given: Mapping[str, str], path: str) -> Script:
    """The settings of a script.

    Args:
        given: variables that the caller gives.

    Raises:
        ConfigError: its quotes do not end, or two commands train.
    """
    try:
        reader = _Reader(given)
        reader.run(_redirected(list(_words(_plain(text)))))
        return _script(reader, text, path)
    except ValueError as error:
        raise ConfigError("file", path, f"is no shell script that can be read: {error}", "Correct the file") from None


def _script(reader: _Reader, text: str, path: str) -> Script:
    """Step 4."""
    commands = [flags for flags in map(_flags, reader.commands) if len(flags) > 1 and "num-layers" in flags]
    said = [{key: each.value for key, each in flags.items()} for flags in commands]
    if any(each != said[0] for each in said[1:]):
        lines = ", ".join(str(min(each.line or 0 for each in flags.values())) for flags in commands)
        raise ConfigError("file", path, f"has several commands that train (lines {lines})", "Keep one of them")
    script = Script(settings={}, variables=reader.plain_variables(), unread=reader.unread)
    if commands:
        script.settings = commands[0]
    else:
        for values in (*reader.arrays.values(), *map(reader.split, reader.texts())):
            script.settings |= _flags(values)
    for words_of in reader.commands:
        script.launch |= {key: each for key, each in _flags(words_of).items() if key in _LAUNCH}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _SBATCH.match(line):
            key = match[1].lstrip("-")
            script.launch.setdefault(key, reader.setting(key, match[2] or "true", number))
    script.settings = {key: each for key, each in script.settings.items() if key not in _LAUNCH}
    return script


_LAUNCH = (
    "nproc-per-node", "nnodes", "node-rank", "master-addr", "master-port", "rdzv-id", "rdzv-backend", "rdzv-endpoint",
    "nodes", "ntasks-per-node", "gpus-per-node", "gres", "max-restarts", "tee", "log-dir", "redirects", "standalone",
)  # fmt: skip
"""Flags of torchrun, srun and sbatch."""


# -- step 1: characters --------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    out: list[str] = []
    at, quote, end = 0, "", len(text)
    while at < end:
        char = text[at]
        if quote == "'":
            quote = "" if char == "'" else quote
        elif char == "\\" and text[at + 1 : at + 2] == "\n":
            out.append(f" {_CONTINUED} ")
            at += 2
            continue
        elif char == "\\":
            out.append(text[at : at + 2])
            at += 2
            continue
        elif text.startswith("$((", at):
            inner, at = _balanced(text, at + 3, 2)
            packed = "".join(inner.split()).translate(_PACKED)
            out.append(_OPEN + packed + _CLOSE + _CONTINUED * inner.count("\n"))
            continue
        elif text.startswith("$(", at) or char == "`":
            inner, at = _balanced(text, at + 2, 1) if char == "$" else _until(text, at + 1)
            out.append(f"{_COMMAND}{_END}" + _CONTINUED * inner.count("\n"))
            continue
        elif char in "'\"":
            quote = "" if quote == char else quote or char
        elif not quote and char == "#" and (at == 0 or text[at - 1] in " \t\n;("):
            at = text.find("\n", at) if "\n" in text[at:] else end
            continue
        elif not quote and (match := re.compile(r"<<-?\s*(['\"]?)(\w+)\1").match(text, at)):
            skipped, at = _here_document(text, match)
            out.append("\n" * skipped)
            continue
        out.append(_REDIRECT if not quote and char in "<>" else char)
        at += 1
    return "".join(out)


def _balanced(text: str, at: int, closing: int) -> tuple[str, int]:
    """What is between here and the `closing` parentheses that end it, and where it goes on."""
    depth, start, quote = closing, at, ""
    while depth and at < len(text):
        char = text[at]
        if quote or char in "'\"":
            quote = "" if char == quote else quote or char
        else:
            depth += {"(": 1, ")": -1}.get(char, 0)
        at += 1
    if depth:
        raise ValueError("No closing parenthesis")
    return text[start : at - closing], at


def _until(text: str, at: int) -> tuple[str, int]:
    end = text.find("`", at)
    if end < 0:
        raise ValueError("No closing quotation")
    return text[at:end], end + 1


def _here_document(text: str, match: re.Match[str]) -> tuple[int, int]:
    """The lines of a here-document, and where it ends; the rest of the line that begins it is left out too."""
    end = re.compile(rf"^\s*{match[2]}\s*$", re.MULTILINE).search(text, text.find("\n", match.end()))
    stop = end.end() if end else len(text)
    return text.count("\n", match.start(), stop), stop


# -- step 2: words -------------------------------------------------------------------------------------------------


def _words(plain: str) -> Iterator[Word]:
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="();&|\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    line = 1
    for token in lexer:
        if token and set(token) <= set("();&|\n"):
            for char in token:
                yield char, line
                line += char == "\n"
        elif token == _CONTINUED:
            line += 1
        else:
            yield token, line
            line += token.count("\n") + token.count(_CONTINUED)


def _redirected(words: Sequence[Word]) -> list[Word]:
    """The words but `> FILE`, `2>&1`, `&>FILE` and `< FILE`, which are none of the command's."""
    out: list[Word] = []
    at = 0
    while at < len(words):
        (word, line), at = words[at], at + 1
        head, sign, target = word.partition(_REDIRECT)
        if not sign or (head and not head.isdigit()):
            out.append((head, line))
        if sign and not head and _signs(out, len(out) - 1, 1) == "&" and _signs(out, len(out) - 2, 2) != "&&":
            out.pop()
        if sign and not target.strip(_REDIRECT):
            at = _target_end(words, at)
    return out


def _target_end(words: Sequence[Word], at: int) -> int:
    """The place behind what a redirection names: `FILE`, `&1`, or `>(COMMAND)`."""
    while at < len(words) and words[at][0].strip("&|" + _REDIRECT) == "":
        at += 1
    if _signs(words, at, 1) == "(":
        return next((place + 1 for place in range(at, len(words)) if words[place][0] == ")"), len(words))
    return at if _signs(words, at, 1) in ("\n", ";", ")") else at + 1


# -- step 3: commands ----------------------------------------------------------------------------------------------


class _Reader:
    """Assigns variables in the order of the script, and collects its commands."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = dict(given)
        self.variables: dict[str, tuple[str, int]] = {name: (value, 0) for name, value in given.items()}
        self.arrays: dict[str, list[Word]] = {}
        self.undecided: set[str] = set()
        self.commands: list[list[Word]] = []
        self.unread: list[tuple[int, str, str]] = []

    def run(self, words: Sequence[Word]) -> None:
        at = 0
        while at < len(words):
            word, line = words[at]
            if end := _test_end(words, at):
                at = self._guarded(words, end, self._holds(words[at:end]))
            elif word in (*_BREAKS, "(", ")", "{", "}", "then", "fi", "do", "done"):
                at += 1
            elif word == "if":
                at = self._branch(words, at)
            elif word in ("for", "while", "until", "case", "select"):
                end = _closing(words, at, {"case": "esac"}.get(word, "done"))
                self._skip(words[at:end], line, f"within `{word}`, which is not run")
                at = end
            elif word == "function" or (_signs(words, at + 1, 2) == "()" and not word.endswith("=")):
                end = _braces(words, at)
                self._skip(words[at:end], line, "within a function, which is not run")
                at = end
            else:
                at = self._command(words, at)

    def _command(self, words: Sequence[Word], at: int) -> int:
        command: list[Word] = []
        while at < len(words) and words[at][0] not in (*_BREAKS, ")"):
            word, line = words[at]
            match = _ASSIGNED.fullmatch(word) if not command else None
            if not command and word in _DECLARES:
                at += 1
            elif match and words[at + 1 : at + 2] and words[at + 1][0] == "(" and not match[3]:
                at = self._array(words, at + 2, match)
            elif match:
                self._assign(match[1], self.expand(match[3]), line, adds=bool(match[2]))
                at += 1
            else:
                command += self.split((word, line))
                at += 1
        if command:
            self.commands.append(command)
        return at

    def _guarded(self, words: Sequence[Word], at: int, holds: bool | None) -> int:
        """What follows a test after `&&` and `||`, up to the end of this list. Commands that are run succeed."""
        while (sign := _signs(words, at, 2)) in _LISTS:
            at += 2
            while at < len(words) and words[at][0] == "\n":
                at += 1
            end = _command_end(words, at)
            body = words[at:end]
            if holds is None:
                self._undecided(body)
            elif holds == (sign == "&&"):
                is_test = bool(body) and _test_end(body, 0) == len(body)
                holds = self._holds(body) if is_test else True
                self.run([] if is_test else body)
            at = end
        return at

    def _undecided(self, words: Sequence[Word]) -> None:
        """Names that these words assign have no value from here on, so that who needs one refuses it."""
        for place, (word, line) in enumerate(words):
            match = _ASSIGNED.fullmatch(word)
            if match and match[1] not in self.given and words[place + 1 : place + 2] != [("(", line)]:
                self.variables[match[1]] = (f"{_UNSET}{match[1]}{_END}", line)
                self.undecided.add(match[1])
        if words:
            self._skip(words, words[0][1], "after a test that is not decided")

    def _array(self, words: Sequence[Word], at: int, match: re.Match[str]) -> int:
        values: list[Word] = []
        while at < len(words) and words[at][0] != ")":
            if words[at][0] != "\n":
                values += self.split(words[at])
            at += 1
        if match[1] not in self.given:
            self.arrays[match[1]] = [*(self.arrays.get(match[1], []) if match[2] else []), *values]
        return at + 1

    def _assign(self, name: str, value: str, line: int, *, adds: bool) -> None:
        if name in self.given:
            return
        if adds and name in self.arrays:
            self.arrays[name].append((value, line))
            return
        before = self.variables.get(name, ("", line))[0] if adds else ""
        if not adds:
            self.undecided.discard(name)
        self.variables[name] = (before + value, line)

    def _branch(self, words: Sequence[Word], at: int) -> int:
        """`if TEST; then ... elif ... else ... fi`: the branch whose test holds; none, if one cannot be decided."""
        end, line = _closing(words, at, "fi"), words[at][1]
        arms = list(_arms(words[at : end - 1]))
        for test, body in arms:
            holds = True if test is None else self._holds(test)
            if holds is None:
                self._skip(words[at:end], line, "within `if`, whose condition is not decided")
                return end
            if holds:
                self.run(body)
                return end
        return end

    def _holds(self, test: Sequence[Word]) -> bool | None:
        """Whether a test of plain words holds; a name without a value is empty, as in a shell. None: not known."""
        texts = [self._tested(word) for word, _ in test if word not in ("\n", ";")]
        denied = texts[:1] == ["!"]
        holds = self._bracketed(texts[denied:])
        return None if holds is None else holds != denied

    def _bracketed(self, texts: list[str | None]) -> bool | None:
        if texts[:1] == ["test"]:
            texts = ["[", *texts[1:], "]"]
        if len(texts) < 3 or (texts[0], texts[-1]) not in (("[", "]"), ("[[", "]]")):
            return None
        inner = texts[1:-1]
        if any(text is None for text in inner):
            return None
        if inner[0] == "!":
            rest = self._compared([str(text) for text in inner[1:]])
            return None if rest is None else not rest
        return self._compared([str(text) for text in inner])

    @staticmethod
    def _compared(texts: list[str]) -> bool | None:
        if len(texts) == 2 and texts[0] in ("-n", "-z"):
            return bool(texts[1]) == (texts[0] == "-n")
        if len(texts) != 3:
            return None
        left, sign, right = texts
        if sign in ("=", "==", "!="):
            return (left == right) == (sign != "!=")
        if sign in _NUMBERS and re.fullmatch(r"-?\d+", left) and re.fullmatch(r"-?\d+", right):
            return _NUMBERS[sign](int(left), int(right))
        return None

    def _tested(self, word: str) -> str | None:
        text = self.expand(word)
        if self.undecided.intersection(_missing(text)):
            return None
        text = re.sub(f"{_UNSET}[^{_END}]*{_END}", "", text)
        return None if _COMMAND in text or "$" in text else text

    def _skip(self, words: Sequence[Word], line: int, why: str) -> None:
        flags = [word for word, _ in words if word.startswith("--")]
        if flags:
            self.unread.append((line, " ".join(flags), why))

    # -- values

    def expand(self, text: str) -> str:
        """`text` with the values of its names; those without a value become marks."""
        for _ in range(_MOST_NESTED):
            changed = _REFERS.sub(self._value, text)
            changed = re.sub(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}", self._arithmetic, changed)
            if changed == text:
                break
            text = changed
        return text

    def split(self, word: Word) -> list[Word]:
        """The words of a word: those of a list, if it is nothing but a name, and its expansion otherwise."""
        text, line = word
        if match := _WHOLE.fullmatch(text):
            if match[1] in self.arrays:
                return self.arrays[match[1]]
            if match[1] in self.variables:
                value, at = self.variables[match[1]]
                return list(_split_text(value, at))
        expanded = self.expand(text)
        return list(_split_text(expanded, line)) if _CONTINUED in text else [(expanded, line)]

    def texts(self) -> list[Word]:
        """The variables that are lists of flags: references to them, with their lines."""
        return [
            (f"${name}", line)
            for name, (value, line) in self.variables.items()
            if value.replace(_CONTINUED, " ").lstrip().startswith("--")
        ]

    def plain_variables(self) -> dict[str, str]:
        """Name -> value, of those whose value is known."""
        return {name: value for name, (value, _) in self.variables.items() if not _missing(value)}

    def setting(self, key: str, value: str, line: int) -> Setting:
        """A setting whose value is expanded."""
        return _setting(key, [(self.expand(value), line)], line)

    def _value(self, match: re.Match[str]) -> str:
        name = match[1] or match[4] or match[5]
        if name in self.arrays:
            return " ".join(word for word, _ in self.arrays[name])
        known = self.variables.get(name)
        value = known[0] if known else None
        sign = match[2] or ""
        if sign.endswith("+"):
            return match[3] if value else ""
        if sign and (value is None or (sign.startswith(":") and not value)):
            return match[3]
        return f"{_UNSET}{name}{_END}" if value is None else value

    def _arithmetic(self, match: re.Match[str]) -> str:
        """Plain whole numbers, names and + - * / %."""
        plain = match[1].translate(_UNPACKED)
        text = re.sub(r"[A-Za-z_]\w*", lambda name: self._value_of_name(name[0]), plain)
        if missing := re.findall(f"{_UNSET}([^{_END}]*){_END}", text):
            return "".join(f"{_UNSET}{name}{_END}" for name in missing)
        try:
            return str(_number(ast.parse(text.strip(), mode="eval").body))
        except (ValueError, SyntaxError, ZeroDivisionError):
            return f"{_COMMAND}{_END}"

    def _value_of_name(self, name: str) -> str:
        known = self.variables.get(name)
        return f"{_UNSET}{name}{_END}" if known is None else known[0]


_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq, "-ne": operator.ne, "-gt": operator.gt, "-ge": operator.ge, "-lt": operator.lt,
    "-le": operator.le,
}  # fmt: skip


def _number(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_number(node.left), _number(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    raise ValueError("no plain arithmetic")


def _arms(words: Sequence[Word]) -> Iterator[tuple[Sequence[Word] | None, Sequence[Word]]]:
    """The tests of an `if`, and what each of them guards; no test: `else`."""
    depth, start, test = 0, 1, None
    for at, (word, _) in enumerate(words):
        depth += (word == "if") - (word == "fi")
        if depth != 1:
            continue
        if word == "then":
            test, start = words[start:at], at + 1
        elif word in ("elif", "else"):
            if test is not None:
                yield test, words[start:at]
            test, start = None, at + 1
    yield test, words[start:]


def _closing(words: Sequence[Word], at: int, end: str) -> int:
    """The place behind the word that ends what begins at `at`."""
    opens, depth = words[at][0], 0
    begin = {"done": ("for", "while", "until", "select")}.get(end, (opens,))
    for place in range(at, len(words)):
        depth += (words[place][0] in begin) - (words[place][0] == end)
        if not depth:
            return place + 1
    return len(words)


def _test_end(words: Sequence[Word], at: int) -> int:
    """The place behind `[ ... ]`, `[[ ... ]]`, `test ...` or `(( ... )) &&`; 0: there is none of them here."""
    first = at + (words[at][0] == "!")
    word = words[first][0] if first < len(words) else ""
    if word == "test":
        return next((place for place in range(first, len(words)) if words[place][0] in _BREAKS), len(words))
    if _signs(words, first, 2) == "((":  # without `&&` or `||`: arithmetic, or subshells
        end = next((place + 2 for place in range(first, len(words)) if _signs(words, place, 2) == "))"), 0)
        return end if _signs(words, end, 2) in _LISTS else 0
    if word not in _TESTS:
        return 0
    return next((place + 1 for place in range(first, len(words)) if words[place][0] == _TESTS[word]), 0)


def _signs(words: Sequence[Word], at: int, count: int) -> str:
    return "".join(word for word, _ in words[at : at + count])


def _command_end(words: Sequence[Word], at: int) -> int:
    """The place behind a command of a list: a test, a group, a compound, or up to `;`, `&` or `||`, with its pipes."""
    ends = {"if": "fi", "for": "done", "while": "done", "until": "done", "case": "esac"}
    if at < len(words) and (end := _test_end(words, at)):
        at = end
    elif at < len(words) and words[at][0] in ends:
        at = _closing(words, at, ends[words[at][0]])
    depth = 0
    while at < len(words):
        word = words[at][0]
        depth += (word in ("(", "{")) - (word in (")", "}"))
        if depth < 0 or (not depth and (word in ("\n", ";", "&") or _signs(words, at, 2) == "||")):
            return at
        at += 1
    return at


def _braces(words: Sequence[Word], at: int) -> int:
    depth = 0
    for place in range(at, len(words)):
        depth += (words[place][0] == "{") - (words[place][0] == "}")
        if words[place][0] == "}" and not depth:
            return place + 1
    return len(words)


# -- step 4: flags -------------------------------------------------------------------------------------------------


def _split_text(text: str, line: int) -> Iterator[Word]:
    for number, part in enumerate(re.split(f"\n|{_CONTINUED}", text)):
        for word in shlex.split(part, posix=True):
            yield word, line + number


def _flags(words: Sequence[Word]) -> dict[str, Setting]:
    """Flag -> setting: `--a`, `--a b c`, `--a=b`; the last one counts, as in argparse."""
    found: dict[str, Setting] = {}
    key, start, values = "", 0, list[Word]()
    for word, line in (*words, ("--", 0)):
        if word.startswith("--"):
            if key:
                found[key] = _setting(key, values, start)
            name, equals, value = word[2:].partition("=")
            key, start, values = name.replace("_", "-"), line, [(value, line)] if equals else []
        elif key:
            values.append((word, line))
    return found


def _setting(key: str, values: Sequence[Word], line: int) -> Setting:
    text = " ".join(word for word, _ in values if not word.endswith((".py", ".sh"))) if values else "true"
    shown = text.replace(_COMMAND, "$(...)").replace(_END, "").replace(_UNSET, "$").replace(_CONTINUED, " ")
    return Setting(key=key, value=shown or "true", line=line, missing=_missing(text))


def _missing(text: str) -> tuple[str, ...]:
    names = tuple(re.findall(f"{_UNSET}([^{_END}]*){_END}", text))
    return names + ("a command's output",) * (_COMMAND in text)


def expanded(text: str, given: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A value with the names that the caller gives, and those without a value (in YAML files with `${NAME}`)."""
    value = _Reader(given).expand(text)
    return value.replace(_UNSET, "$").replace(_END, ""), _missing(value)
