"""A process group of one rank, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import one_rank


@pytest.fixture
def axis(tmp_path: Path) -> Iterator[str]:
    """The name of a gloo process group whose only rank is this process."""
    with one_rank(tmp_path) as name:
        yield name
