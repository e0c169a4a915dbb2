"""What is shown while nothing else can be: a spinner on a terminal, one plain line elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

_shown: list[Status] = []


def show(text: str, *, line: bool = True) -> None:
    """Shows `text` until `done`, in place of an earlier one. line: whether it is printed where there is no terminal."""
    done()
    if sys.stdout.isatty():
        from rich.console import Console

        _shown.append(Console().status(text))
        _shown[-1].start()
    elif line:
        print(f"{text} ...", flush=True)


def done() -> None:
    """Makes room for what is printed next."""
    while _shown:
        _shown.pop().stop()
