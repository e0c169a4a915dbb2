"""Where the minutes of the tests go: `python tests/minutes.py FOLDER`, after `.ci/run` has left its reports there.

FOLDER has `steps`, a line `NAME SECONDS` for each step, and a JUnit file for each step that runs pytest. `--write PATH`
puts the tables between the two marks of a page.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

LIMIT_MIN = 90
BEGIN, END = "<!-- minutes: begin -->", "<!-- minutes: end -->"
_NUM_FILES = 10


def steps_of(folder: Path) -> dict[str, float]:
    """Name of a step -> minutes."""
    lines = (folder / "steps").read_text(encoding="utf-8").split("\n")
    return {name: float(seconds) / 60 for name, seconds in (line.split() for line in lines if line)}


def files_of(folder: Path) -> dict[str, tuple[float, int]]:
    """File of tests -> (minutes of a worker, tests), over all JUnit files."""
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for report in sorted(folder.glob("*.xml")):
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.attrib["classname"].replace(".", "/") + ".py"
            seconds[name] += float(case.attrib["time"])
            tests[name] += 1
    return {name: (seconds[name] / 60, tests[name]) for name in seconds}


def tables(folder: Path) -> str:
    """Minutes by step, and the dearest files."""
    steps, files = steps_of(folder), files_of(folder)
    dearest = sorted(files, key=lambda name: -files[name][0])[:_NUM_FILES]
    return "\n".join([
        "| step of `.ci/run` | minutes |", "|---|---|",
        *(f"| {name} | {minutes:.1f} |" for name, minutes in steps.items()),
        f"| all (ended at {LIMIT_MIN}) | {sum(steps.values()):.1f} |",
        "", "| dearest files | minutes of a worker | tests |", "|---|---|---|",
        *(f"| `{name}` | {files[name][0]:.1f} | {files[name][1]} |" for name in dearest),
    ])  # fmt: skip


def write(page: Path, text: str) -> None:
    """Puts `text` between the two marks of `page`."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path)
    told = parser.parse_args(words)
    text = tables(told.folder)
    if told.write is not None:
        write(told.write, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
