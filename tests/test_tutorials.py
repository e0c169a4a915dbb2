"""The quickstart and the tutorials: every program and every command as it stands there, in an empty folder, in order.

A `python` or `yaml` block with a title is a file. Each line of a `bash` block is run. A `text` block after it is what it
prints: each of its lines must be printed, in this order, numbers, hashes and spaces aside. A tutorial is small enough to
be run as it is; commands of the quickstart get settings that make them small.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.forked import python
from tests.test_docs import TINY

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
TUTORIALS = sorted(set((DOCS / "tutorials").glob("*.md")) - {DOCS / "tutorials" / "index.md"})

_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SET_UP = ("source .venv/bin/activate", "python -m pip install")  # what made the environment of this test
_NUMBER = re.compile(r"\b[0-9a-f]{16}\b|-?\d[\d,]*(\.\d+)?(e[-+]\d+)?")


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, title, text) of each fenced block that is not included from a file."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if "--8<--" not in found[3]:
            yield found[1], found[2] or "", found[3]


def shape(line: str) -> str:
    """A line without its numbers, hashes and runs of spaces."""
    return " ".join(_NUMBER.sub("#", line).split())


def missing(shown: str, printed: str) -> list[str]:
    """Lines that are shown and not printed in this order. A shown line may be the beginning of a printed one."""
    lines, lost = iter([shape(line) for line in printed.splitlines()]), []
    for line in shown.splitlines():
        if line.strip() and not any(each.startswith(shape(line)) for each in lines):
            lost.append(line)
            break
    return lost


def expanded(command: str) -> list[str]:
    """A command's words; `make demo` is what the Makefile would run last."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        told = subprocess.run(
            ["make", "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        words = shlex.split(told.splitlines()[-1])
        assert words[0].endswith("/python"), told
        words[0] = "python"
    return words


def run(words: Sequence[str], folder: Path) -> str:
    """What a command prints."""
    start = {
        "python": [],
        "torchrun": ["-m", "torch.distributed.run"],
        "moecompile": ["-m", "moecompile"],
    }[words[0]]
    done = python(*start, *words[1:], cwd=folder)
    assert done.returncode == 0, (words, done.stdout + done.stderr)
    return done.stdout


def walk(page: Path, folder: Path, small: Sequence[str] = ()) -> int:
    """Runs a page; `small` follows commands of moecompile that have a recipe. Returns the number of commands."""
    printed, count, ran = "", 0, set()
    for language, title, text in blocks(page):
        if language in ("python", "yaml") and title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(text, encoding="utf-8")
        elif language == "bash":
            printed = ""
            for line in text.replace("\\\n", " ").splitlines():
                if not line.strip() or line.startswith(("#", *_SET_UP)):
                    continue
                words = expanded(line)
                if small and any(word.startswith("recipe=") for word in words):
                    words += small
                if tuple(words) not in ran:  # `make demo` and the command that it runs
                    printed += run(words, folder)
                    ran.add(tuple(words))
                count += 1
        elif language == "text" and printed and not small:
            lost = missing(text, printed)
            assert not lost, f"{page.name} shows {lost[0]!r}; printed:\n{printed}"
    return count


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page: Path, tmp_path: Path) -> None:
    assert walk(page, tmp_path) >= 1


@pytest.mark.slow
def test_every_command_of_the_quickstart_runs(tmp_path: Path) -> None:
    small = [option for option in TINY if not option.startswith("data.global_batch_size")]
    small += ["data.global_batch_size=8", "model.config.intermediate_size=80"]
    assert walk(DOCS / "getting-started.md", tmp_path, small) >= 7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_the_notebook_prints_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    path = DOCS / "examples" / "router.ipynb"
    shown, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
    nbclient.NotebookClient(fresh, timeout=120, kernel_name="python3").execute()
    assert [_outputs(cell) for cell in fresh.cells] == [_outputs(cell) for cell in shown.cells]
    assert sum("image/png" in output for cell in shown.cells for output in _outputs(cell)) == 2


def _outputs(cell: Any) -> list[str]:
    """Kinds of pictures, and texts without numbers."""
    found: list[str] = []
    for name, outputs in groupby(cell.get("outputs", []), key=lambda output: output.get("name")):
        if name is None:
            found += [" ".join(sorted(output["data"])) for output in outputs]
        else:  # a stream, which a slow kernel sends in parts
            printed = "".join(output["text"] for output in outputs)
            found.append("\n".join(shape(line) for line in printed.splitlines()))
    return found


def test_a_line_that_is_not_printed_is_noticed() -> None:
    printed = "plan  19263dd1b32bdccc, 2 MoE layers   \nloss  4.30 -> 4.03 in 60 steps\n"
    assert missing("plan  aaaabbbbccccdddd, 5 MoE layers\n\nloss 1 -> 2e-3 in 9 steps\n", printed) == []
    assert missing("loss  4.30 -> 4.03 in 60 steps\nplan  19263dd1b32bdccc, 2 MoE layers", printed) != []
    assert missing("loss  4.30 <- 4.03", printed) != []
