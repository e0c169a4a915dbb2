"""A program that is killed at one of its changes of files, played by an exception that nothing catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def killed_at(moment: int, *changes: tuple[Any, str]) -> Iterator[None]:
    """Within it, the `moment`-th call (from 0) of any of these functions, (owner, name), does not happen any more."""
    left = moment

    def killed(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return change(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in changes:
            patch.setattr(owner, name, killed(getattr(owner, name)))
        try:
            yield
        except KeyboardInterrupt:
            return
