"""Files that several processes write and read, errors in the middle, and that there is no other way to write them."""

from __future__ import annotations

import ast
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from moecompile.atomic import creating, replacing, write_text

PACKAGE = Path(__file__).parents[1] / "moecompile"
TIMES = 300
MOVES = {
    "atomic.py",
    "checkpoint/folders.py",  # checkpoints that many ranks have written, or that are set aside
    "rundir.py",  # what is kept apart until a run is accepted
    "runtime/failures.py",  # what ranks have recorded, when they start again
}
"""Modules that rename what is there already."""


def _write(path: Path, letter: str) -> None:
    for length in range(1, TIMES):
        write_text(path, letter * 100 * length + "end", durable=length % 100 == 0)


def test_two_processes_write_and_a_reader_sees_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "end")
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert text.endswith("end") and len(set(text[:-3])) < 2
        seen.add(text)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0] and len(seen) > 1
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("error", [OSError("no space"), SystemExit(1)])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    with pytest.raises(type(error)), creating(tmp_path / "new" / "parent" / "folder") as folder:
        (folder / "half").write_text("half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_folder_never_replaces_another_one(tmp_path: Path) -> None:
    killed, of_another = tmp_path / ".folder.0a1b2c3d.tmp", tmp_path / "folder"
    killed.mkdir()
    with pytest.raises(OSError, match="not empty"), creating(of_another) as folder:
        assert not killed.exists() and folder.parent == tmp_path
        of_another.mkdir()
        (of_another / "theirs").touch()
    killed.mkdir()
    with creating(tmp_path / "new[1]", alone=False):  # another process may be writing there
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [killed.name, "folder", "new[1]"]


def _renames(tree: ast.AST) -> Iterator[str]:
    """Calls that may rename a file: `replace` of strings has two arguments, that of dataclasses has keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value)
            if (name in ("replace", "rename") and len(node.args) == 1 and not node.keywords) or (
                f"{of}.{name}" in ("os.replace", "os.rename", "shutil.move")
            ):
                yield ast.unparse(node)


def test_no_other_module_renames_files() -> None:
    files = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
    found = {name: [*_renames(ast.parse(path.read_text(encoding="utf-8")))] for name, path in files.items()}
    assert {name for name, calls in found.items() if calls} == MOVES, "write files by moecompile.atomic"
