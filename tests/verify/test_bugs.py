"""The page of bugs that others had names mutations and checks as the tests have them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "understand" / "bugs-of-others.md").read_text(encoding="utf-8")
_ROW = re.compile(r"\| `(?P<mutation>[^`]+)` \| `(?P<file>tests/[\w/]+\.py)` \| `(?P<check>[^`]+)` \|")
_WITHOUT = re.compile(r"\| none \| `(?P<file>tests/[\w/]+\.py)::(?P<test>\w+)` \| \|")
HEAD = "| mutation | test | check that fails |\n|---|---|---|\n"


def rows() -> list[str]:
    """Of all tables of mutations."""
    tables = [part.partition("\n\n")[0] for part in PAGE.split(HEAD)[1:]]
    return [row for table in tables for row in table.splitlines()]


def demanded(file: str) -> dict[str, str]:
    """Mutation of a test file -> the check that has to fail: from `MUTATIONS`, whose keys may be functions, or `FAULTS`."""
    found = {}
    for node in ast.parse((REPOSITORY / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and target.id in ("MUTATIONS", "FAULTS"):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    said = ast.literal_eval(value)
                    name = key.id if isinstance(key, ast.Name) else ast.literal_eval(key or "")
                    found[name] = said if isinstance(said, str) else said[0]
    return found


def test_each_mutation_of_the_page_is_in_its_test_with_its_check() -> None:
    named = [match for row in rows() if (match := _ROW.fullmatch(row))]
    wrong = [match[0] for match in named if demanded(match["file"]).get(match["mutation"]) != match["check"]]
    assert len(named) > 40 and wrong == []


def test_each_test_without_a_mutation_exists() -> None:
    others = [row for row in rows() if not _ROW.fullmatch(row)]
    matches = [_WITHOUT.fullmatch(row) for row in others]
    assert others and None not in matches, others
    for match in matches:
        assert match and f"\ndef {match['test']}(" in (REPOSITORY / match["file"]).read_text(encoding="utf-8"), match


def test_each_class_has_a_mutation() -> None:
    classes = PAGE.partition("\n## What these checks do not see")[0].split("\n## ")[1:]
    assert len(classes) > 14
    assert [text.partition("\n")[0] for text in classes if not re.search(_ROW, text)] == []


def test_every_fault_that_a_certificate_tells_is_on_the_page() -> None:
    missing = {name for name in demanded("tests/verify/test_certificate.py") if f"| `{name}` |" not in PAGE}
    assert missing == {"another decay"}  # of nobody
