"""docs/use/add-your-own.md lists every file of the package that a new router score or dispatch kind touches.

The page marks each list with a word that exists already, `<!-- files that name: allgather -->`. Whoever adds a file that
names it, or takes one away, changes the table below that line.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "moecompile"
PAGE = (REPOSITORY / "docs" / "use" / "add-your-own.md").read_text(encoding="utf-8")

_TABLE = re.compile(r"^<!-- files that name: (\w+) -->\n\n((?:\|.*\n)+)", re.MULTILINE)
TABLES = {found[1]: found[2] for found in _TABLE.finditer(PAGE)}


def listed(word: str) -> set[str]:
    """The files of the table, `KIND.py` being the word's own."""
    rows = re.findall(r"^\| `([^`]+)` \|", TABLES[word], re.MULTILINE)
    return {row.replace("KIND", word) for row in rows}


def naming(word: str) -> set[str]:
    """The files of the package whose code names the word, or which bear its name."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.stem == word or any(re.search(rf"\b{word}\b", name) for name in _names(path.read_text("utf-8")))
    }


def _names(code: str) -> Iterator[str]:
    """Texts and names in code; docstrings and comments are left out."""
    tree = ast.parse(code)
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def test_both_lists_are_there() -> None:
    assert set(TABLES) == {"softmax_after_topk", "allgather"}


@pytest.mark.parametrize("word", TABLES)
def test_the_page_lists_the_files_that_name_one(word: str) -> None:
    assert listed(word) == naming(word)


def test_a_name_in_code_counts_and_prose_does_not() -> None:
    code = '"""one: prose."""\nkind = "two"  # three\n\n\ndef f():\n    """four"""\n    return kind.five\n'
    assert sorted(_names(code)) == ["five", "kind", "kind", "two"]
