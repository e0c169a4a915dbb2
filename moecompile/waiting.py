"""Progress display for long steps: a spinner on a terminal, else one plain line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

_shown: list[Status] = []


def show(text: str, *, line: bool = True) -> None:
    """Shows `text` until `done` and replaces an earlier one. line: whether to print it if there is no terminal."""
    done()
    if sys.stdout.isatty():
        from rich.console import Console

        _shown.append(Console().status(text))
        _shown[-1].start()
    elif line:
        print(f"{text} ...", flush=True)


def done() -> None:
    """Removes the spinner, before anything else is printed."""
    while _shown:
        _shown.pop().stop()
