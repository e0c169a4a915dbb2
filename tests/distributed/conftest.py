"""What tests of launched ranks share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks import their module from the working directory; no launcher around the tests is seen."""
    monkeypatch.chdir(REPOSITORY)
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MODE", "PHASE"):
            monkeypatch.delenv(name)
