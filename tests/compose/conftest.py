"""Tests of compositions have Hydra's own."""

from __future__ import annotations

import hydra
import pytest

from tests.composed import HYDRAS_OWN


@pytest.fixture(autouse=True)
def hydras_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydra, "compose", HYDRAS_OWN)
