"""benchmarks/checksums.py: a small run, and that its two ways of saving differ in what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moecompile.checkpoint.folders import SUMS, check
from moecompile.errors import ConfigError
from tests.distributed.harness import run_distributed_test

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measured(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    sys.path.insert(0, str(BENCHMARKS))  # programs import each other as scripts do
    import checksums

    rows: list[dict[str, Any]] = checksums.measure(Path(folder), mib=1, rounds=1)
    return rows


@pytest.mark.slow
def test_every_cost_is_measured_on_all_ranks(tmp_path: Path) -> None:
    rows, others = run_distributed_test(measured, 2, str(tmp_path))
    assert rows == others
    assert [row["what"] for row in rows] == ["save", "load", "compare", "hash"]
    assert all(row["wall_ms"] > 0 and row["beside_wall_ms"] > 0 for row in rows)
    assert all(row["wall_ratio"] == pytest.approx(row["wall_ms"] / row["beside_wall_ms"]) for row in rows)
    names = {f"__{rank}_0.distcp" for rank in range(2)}
    summed, unsummed = (json.loads((tmp_path / name / SUMS).read_text()) for name in ("summed", "unsummed"))
    assert names <= summed.keys() == unsummed.keys()
    assert set(unsummed.values()) == {"00000000 0"}
    check(tmp_path / "summed", names)
    with pytest.raises(ConfigError, match="is damaged"):
        check(tmp_path / "unsummed", names)
