"""Lists the messages of the package by reading its source: the page `reference/messages.md`.

Algorithm:
    1. Find every place that makes an error or a warning.
    2. Evaluate its texts without running anything: constants, and names whose values stand in the same file (variables,
       parameters of helpers, loops over literals, what a helper returns). What only a run knows becomes `…`.
    3. Group the messages: those about a config path by its group, the others by what raises them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path

from moecompile import mesh
from moecompile.schema import Config

PACKAGE = Path(__file__).parents[1] / "moecompile"
ABOUT_A_VALUE = ("ConfigError", "PlanError", "ArgumentError", "Misfit")
OTHERS = {
    "UserError": "Other mistakes",
    "NotFinite": "Other mistakes",
    "ChatError": "Chats",
    "CaptureError": "A model that cannot be recorded",
    "RankFailure": "Ranks",
    "VerificationFailed": "Failed checks",
    "UnboundAxisError": "Defects, and wrong order of calls",
    "MoecompileError": "Defects, and wrong order of calls",
    "PassError": "Defects, and wrong order of calls",
    "warn": "Warnings",
}
ANY = "…"
_PARTS = {**dict.fromkeys(ABOUT_A_VALUE, (0, 2, 3)), "PassError": (0, 1, 2), "VerificationFailed": (0, 1)}
"""Which arguments of an error are texts; of others the first one."""
_MOST = 24
_NAMES_OF_ARGUMENTS = "Arguments of the Python API"

_HEAD = f"""<!-- Written by docs/generate.py: change the message, not this page. -->

# Messages

Every message that moecompile makes, read from its source. `{ANY}` stands for what only a run knows: a name, a number, a
list. Search this page for the words that your message has around them.
[Troubleshooting](../use/troubleshooting.md) begins with symptoms instead.

A message about a value is `path=value: rule. What to change.`, with exit code 2
([exit codes](../use/command-line.md#exit-codes)). The path is a key of [the configuration](configuration.md), a plan or
a file, or an argument of [the API](api.md). A message of a pass is a defect of moecompile: please report it.
"""


@dataclass
class Scope:
    """What names mean in one function: its node, the file's tree, names that are being resolved, and values that belong
    together: those of one row of a loop, or of one call of the function.
    """

    tree: ast.Module
    function: ast.AST | None
    busy: frozenset[str] = field(default_factory=frozenset)
    row: dict[str, Bound] = field(default_factory=dict)


Bound = tuple[ast.expr, Scope]
"""An expression and where its names have their meaning."""


@dataclass(frozen=True, order=True)
class Message:
    """One message. section: its heading. text: whole."""

    section: str
    text: str


def page() -> str:
    """The page `reference/messages.md`."""
    by_section: dict[str, set[str]] = {}
    for message in messages():
        by_section.setdefault(message.section, set()).add(message.text)
    last = [*dict.fromkeys(OTHERS.values())]
    order = sorted(by_section, key=lambda name: (name in last, name == _NAMES_OF_ARGUMENTS, name))
    parts = [_HEAD]
    for section in order:
        lines = [f"* {_code(text)}" for text in sorted(by_section[section], key=lambda text: text.replace("`", ""))]
        parts += [f"## {section}\n", *lines, ""]
    return "\n".join(parts)


def messages() -> Iterator[Message]:
    """Every message of the package; a call whose texts have several values gives several."""
    yield from (message for _, made in found() for message in made)


@cache
def found() -> list[tuple[ast.Call, list[Message]]]:
    """Step 1: every call that makes an error or a warning, with its messages."""
    made = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = parsed(path)
        made += [
            (call, list(of_call(call, Scope(tree, function)))) for call, function in _all_calls(tree) if _is_error(call)
        ]
    return made


@cache
def parsed(path: Path) -> ast.Module:
    """The tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _is_error(call: ast.Call) -> bool:
    return _called(call) in (*ABOUT_A_VALUE, *OTHERS)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def of_call(call: ast.Call, scope: Scope) -> Iterator[Message]:
    """Step 3. Nothing for an error that only repeats another one."""
    kind, arguments = _called(call), call.args
    parts = _PARTS.get(kind, (0,))
    if len(arguments) <= max(parts):
        return
    for each in _contexts(call, scope):
        for found in product(*(texts(arguments[i], each) for i in parts)):
            if kind in ABOUT_A_VALUE and (found[1] != ANY or found[2].strip(f"{ANY} ")):
                yield Message(_section(found[0], kind), f"{found[0]}={ANY}: {found[1]}. {found[2]}.")
            elif kind == "PassError" and found[2] != ANY:
                yield Message(OTHERS[kind], f"pass {found[0]}, {found[1]}: {found[2]}")
            elif kind == "VerificationFailed":
                yield Message(OTHERS[kind], f"verification of {ANY} failed: {ANY}")
            elif kind in OTHERS and len(parts) == 1 and found[0].strip(f"{ANY} :;."):
                yield Message(OTHERS[kind], found[0])


def _contexts(call: ast.Call, scope: Scope) -> list[Scope]:
    """The rows of the loop around a call, or the calls of its function, if the arguments are named there."""
    names = {node.id for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Name)}
    if not isinstance(scope.function, ast.FunctionDef):
        return [scope]
    loops = [
        loop
        for loop in ast.walk(scope.function)
        if isinstance(loop, ast.For) and loop.lineno <= call.lineno <= (loop.end_lineno or 0)
        if isinstance(loop.target, ast.Tuple)
        and names & {each.id for each in loop.target.elts if isinstance(each, ast.Name)}
    ]
    rows: list[dict[str, Bound]] = []
    if loops:
        for value in _rows(loops[-1].iter, scope):
            rows.append({name: bound for name in names for bound in _unpacked(loops[-1].target, value, name)})
    else:
        rows = list(_calls_of(scope.function, scope))
    rows = [row for row in rows if len(names & set(row)) > 1]
    return [Scope(scope.tree, scope.function, scope.busy, row) for row in rows] or [scope]


def _calls_of(function: ast.FunctionDef, scope: Scope) -> Iterator[dict[str, Bound]]:
    """Parameter -> argument, for each call of a function in its file."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    for call, caller in _all_calls(scope.tree):
        if _called(call) == function.name and caller is not function:
            where = Scope(scope.tree, caller, scope.busy)
            row = {name: (value, where) for name, value in zip(names, call.args, strict=False)}
            yield row | {keyword.arg: (keyword.value, where) for keyword in call.keywords if keyword.arg}


def _section(path: str, kind: str) -> str:
    """The group of a config path, or what else is wrong."""
    if kind == "ArgumentError":
        return _NAMES_OF_ARGUMENTS
    group = re.split(r"[.\[= ]", path)[0]
    if group in {each.name for each in fields(Config)} - {"mesh"} or (group == "mesh" and kind == "ConfigError"):
        return group
    if group.startswith(("--", "hydra", "MOECOMPILE")):
        return "The command line"
    if kind == "PlanError":
        return "Plans, checkpoints, exports"
    return "Any key" if path.startswith(ANY) else _NAMES_OF_ARGUMENTS


# -- step 2 ------------------------------------------------------------------------------------------------------------


def texts(node: ast.AST, scope: Scope) -> list[str]:  # noqa: PLR0911 (one line for each kind of expression)
    """What an expression may be as a text, in the order of the source."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return _joined([_part(value, scope) for value in node.values])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined([texts(node.left, scope), texts(node.right, scope)])
    if isinstance(node, ast.IfExp):
        return _unique([*texts(node.body, scope), *texts(node.orelse, scope)])
    if isinstance(node, ast.Name):
        return _of_name(node.id, node.lineno, scope)
    if isinstance(node, ast.Call):
        return _of_call(node, scope)
    if isinstance(node, ast.Dict):
        return _unique([text for value in node.values if value for text in texts(value, scope)])
    if isinstance(node, ast.ListComp):
        return texts(node.elt, scope)
    if isinstance(node, ast.Subscript):
        return texts(node.value, scope) if isinstance(node.value, ast.Name | ast.Dict | ast.Call) else [ANY]
    return [ANY]


def _part(value: ast.expr, scope: Scope) -> list[str]:
    """A part of an f-string; what has many values stays open."""
    if not isinstance(value, ast.FormattedValue):
        return texts(value, scope)
    if isinstance(value.value, ast.Name | ast.IfExp | ast.Subscript) or _axes(value.value):
        found = texts(value.value, scope)
        return found if len(found) <= 4 else [ANY]
    return [ANY]


def _joined(parts: list[list[str]]) -> list[str]:
    """Every combination, with neighbouring `…` as one."""
    count = 1
    for part in parts:
        count *= len(part)
    if count > _MOST:
        parts = [part if len(part) == 1 else [ANY] for part in parts]
    return _unique([re.sub(rf"{ANY}(\s?{ANY})+", ANY, "".join(each)) for each in product(*parts)])


def _unique(found: list[str]) -> list[str]:
    return list(dict.fromkeys(found))


def _of_name(name: str, line: int, scope: Scope) -> list[str]:
    """A variable of the function, a parameter, a constant of the file or of another module."""
    if name in scope.busy:
        return [ANY]
    if name in scope.row:
        return texts(*scope.row[name])
    inner = Scope(scope.tree, scope.function, scope.busy | {name})
    values = list(_reaching(name, line, inner)) if isinstance(scope.function, ast.FunctionDef) else []
    found = [text for value, where in values for text in texts(value, where)]
    if not values and isinstance(scope.function, ast.FunctionDef):
        found = _passed(scope.function, name, inner)
    if not values and not found:
        constants = [value for node in scope.tree.body for value, _ in _bound(node, name, inner)]
        found = [text for value in constants for text in texts(value, inner)] or _imported(name, inner)
    known = [text for text in _unique(found) if text not in (ANY, "None", "")]
    return known if 0 < len(known) <= _MOST else [ANY]


def _reaching(name: str, line: int, scope: Scope) -> Iterator[Bound]:
    """Values that a name may have at a line: from there backwards, up to an assignment that is always made."""
    body: list[ast.stmt] | None = scope.function.body if isinstance(scope.function, ast.FunctionDef) else None
    chain: list[tuple[list[ast.stmt], ast.stmt | None]] = []
    while body:
        holder = next((s for s in body if s.lineno <= line <= (s.end_lineno or s.lineno)), None)
        chain.append((body, holder))
        bodies = [getattr(holder, part, []) for part in ("body", "orelse", "finalbody", "handlers")]
        body = next((b for b in bodies if any(s.lineno <= line <= (s.end_lineno or s.lineno) for s in b)), None)
    for statements, holder in reversed(chain):
        if holder is not None:
            simple = not hasattr(holder, "body")
            inside = [b for node in (ast.walk(holder) if simple else [holder]) for b in _bound(node, name, scope)]
            tests = [getattr(holder, "test", None)]
            inside += [b for test in tests if test for node in ast.walk(test) for b in _bound(node, name, scope)]
            yield from inside
            if inside:
                return
        for statement in reversed([s for s in statements if s.lineno < line and s is not holder]):
            direct = list(_bound(statement, name, scope))
            yield from direct or (b for node in ast.walk(statement) for b in _bound(node, name, scope))
            if direct:
                return


def _bound(node: ast.AST, name: str, scope: Scope) -> Iterator[Bound]:
    """Values that a statement, a loop or `.append` gives to a name."""
    if isinstance(node, ast.Assign):
        pairs = [(target, (node.value, scope)) for target in node.targets]
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        pairs = [(node.target, (node.value, scope))]
    elif isinstance(node, ast.For | ast.comprehension):
        pairs = [(node.target, row) for row in _rows(node.iter, scope)]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
        pairs = [(node.func.value, (node.args[0], scope))]
    else:
        return
    for target, value in pairs:
        yield from _unpacked(target, value, name)


def _unpacked(target: ast.AST, value: Bound, name: str) -> Iterator[Bound]:
    if isinstance(target, ast.Name) and target.id == name:
        yield value
    elif isinstance(target, ast.Tuple) and isinstance(value[0], ast.Tuple | ast.List):
        for one, its in zip(target.elts, value[0].elts, strict=False):
            yield from _unpacked(one, (its, value[1]), name)


def _rows(node: ast.AST, scope: Scope) -> list[Bound]:  # noqa: PLR0911
    """The elements of a literal, of a name for one, of a mapping's items, or what a function of the file yields."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return [(element, scope) for element in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return [(ast.Tuple([key, value]), scope) for key, value in pairs if key]
    if axes := _axes(node):
        return [(ast.Constant(axis), scope) for axis in axes]
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "items":
            return _rows(node.func.value, scope)
        function = _function(_called(node), scope)
        if function is None:
            return []
        inner = Scope(scope.tree, function, scope.busy | {function.name})
        yields = [each.value for each in ast.walk(function) if isinstance(each, ast.Yield) and each.value]
        returns = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
        return [(value, inner) for value in yields] or [row for value in returns for row in _rows(value, inner)]
    if isinstance(node, ast.Name) and node.id not in scope.busy:
        inner = Scope(scope.tree, scope.function, scope.busy | {node.id})
        owners = [owner for owner in (scope.function, scope.tree) if owner is not None]
        assigned = [
            each for owner in owners for each in ast.walk(owner) if isinstance(each, ast.Assign | ast.AnnAssign)
        ]
        values = [value for each in assigned for value, _ in _bound(each, node.id, inner)]
        if node.id == "NOT_YET":
            values = [ast.parse(repr(mesh.NOT_YET), mode="eval").body]
        return [row for value in values for row in _rows(value, inner)]
    return []


def _function(name: str, scope: Scope) -> ast.FunctionDef | None:
    """A function or method of the file, unless it is being evaluated."""
    return _functions(scope.tree).get(name) if name not in scope.busy else None


@cache
def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The first function or method of each name."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, node)
    return found


@cache
def _imports(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]


def _passed(function: ast.FunctionDef, name: str, scope: Scope) -> list[str]:
    """What the calls of a function in its file give for a parameter."""
    rows = _calls_of(function, scope)
    return [text for row in rows if name in row for text in texts(*row[name])]


@cache
def _all_calls(tree: ast.AST, function: ast.AST | None = None) -> list[tuple[ast.Call, ast.AST | None]]:
    """Every call below a node, with the outermost function or method that it is in."""
    found: list[tuple[ast.Call, ast.AST | None]] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Call):
            found.append((child, function))
        found += _all_calls(child, child if isinstance(child, ast.FunctionDef) and function is None else function)
    return found


def _imported(name: str, scope: Scope) -> list[str]:
    """A constant of another module of the package."""
    for node in _imports(scope.tree):
        for original in (alias.name for alias in node.names if (alias.asname or alias.name) == name):
            path = PACKAGE.parent / str(node.module).replace(".", "/")
            home = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if home.is_relative_to(PACKAGE) and home.exists():
                return _of_name(original, 0, Scope(parsed(home), None))
    return []


def _of_call(call: ast.Call, scope: Scope) -> list[str]:
    """What a function of the file returns, all values of `mapping.get(key, default)`, elements of `", ".join(list)`."""
    if axes := _axes(call):
        return axes
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "get" and len(call.args) == 2:
        return _unique([*texts(call.func.value, scope), *texts(call.args[1], scope)])
    if method == "join" and isinstance(call.args[0], ast.Name):
        return texts(call.args[0], scope)
    if method == "path_of":  # the key, or the same key in `per_layer`
        return texts(call.args[0], scope)
    function = _function(_called(call), scope)
    if function is None:
        return [ANY]
    inner = Scope(scope.tree, function, scope.busy | {function.name})
    returns = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
    known = [text for value in returns for text in texts(value, inner) if text not in (ANY, "None", "")]
    return _unique(known) or [ANY]


def _axes(node: ast.AST) -> list[str]:
    """What the mesh answers where the axes depend on its table alone; empty for other questions.

    `mesh.axes(Part.TOKENS)` and `axes_that_split`: their names. `mesh.setting(Part.TOKENS)`: `mesh.tp=…`. Joined,
    `" / ".join(("ranks", *mesh.sharing))`: for none and for each of the axes.
    """
    if isinstance(node, ast.Attribute) and node.attr == "sharing":
        return [axis for axis in mesh.dense_axes() if axis not in mesh.axes_that_split(mesh.Part.BATCH)]
    if not isinstance(node, ast.Call):
        return []
    if _called(node) == "join" and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Constant):
        (given,) = node.args
        if isinstance(given, ast.Tuple) and isinstance(last := given.elts[-1], ast.Starred):
            first = [str(each.value) for each in given.elts if isinstance(each, ast.Constant)]
            return [
                str(node.func.value.value).join(each) for each in (first, *([*first, a] for a in _axes(last.value)))
            ]
        return _axes(given)
    parts = [each.attr for each in node.args if isinstance(each, ast.Attribute) and each.attr in mesh.Part.__members__]
    if _called(node) not in ("axes", "axes_that_split", "setting") or not parts:
        return []
    axes = mesh.axes_that_split(*(mesh.Part[part] for part in parts))
    return [f"mesh.{axis}={ANY}" if _called(node) == "setting" else axis for axis in axes]


def _code(text: str) -> str:
    """As code in Markdown, on one line; a text with backticks between two of them."""
    line = " ".join(text.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"
