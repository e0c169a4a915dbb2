"""A process group of one rank, in this process; and the kernels that are compiled, or torch in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moecompile.ops.cpu import native
from tests.tiny import one_rank


@pytest.fixture
def axis(tmp_path: Path) -> Iterator[str]:
    """The name of a gloo process group whose only rank is this process."""
    with one_rank(tmp_path) as name:
        yield name


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to compute the activation and few rows."""
    native.kernels.cache_clear()
    if request.param == "torch":
        monkeypatch.setenv("MOECOMPILE_NATIVE", "0")
    elif native.kernels() is None:
        pytest.skip("there is no C++ compiler")
    yield
    native.kernels.cache_clear()
