"""benchmarks/growth.py, overhead.py and startup.py: small runs, and what they conclude."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """They import each other as scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import growth
    import overhead

    return growth, overhead


def rows(growth: Any, time_of: Any, kept_of: Any) -> dict[str, list[dict[str, Any]]]:
    """What a machine of these properties would have shown."""
    return {
        axis: [
            {"tokens": s.tokens, "experts": s.experts, "layers": s.layers, "weights_mib": 1.5 * s.experts,
             "cpu_ms": time_of(s), "kept_mib": kept_of(s)}
            for s in sizes
        ]
        for axis, sizes in growth.AXES.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "experts", "missed"),
    [
        (1.0, 0.0, set()),
        (2.0, 0.0, {"cpu_ms ~ tokens^"}),
        (1.0, 1.0, {"time added per doubling of experts"}),
    ],
)
def test_what_is_not_linear_is_told(programs: Any, tokens: float, experts: float, missed: set[str]) -> None:
    growth, _ = programs
    found = growth.findings(
        rows(growth, lambda s: s.tokens**tokens * s.layers * s.experts**experts, lambda s: s.tokens * s.layers), 0.0
    )
    assert {what for what, _, holds in found if not holds} == missed


def test_reading_the_weights_does_not_count(programs: Any) -> None:
    growth, _ = programs
    found = growth.findings(
        rows(growth, lambda s: s.tokens * s.layers + 3 * 1.5 * s.experts, lambda s: s.tokens * s.layers), 1e-3
    )
    assert found[-1][1] == pytest.approx(0.0, abs=1e-9)


def test_a_stack_is_measured(programs: Any) -> None:
    growth, _ = programs
    sizes = [growth.Size(tokens=16, experts=4, top_k=2, layers=n) for n in (1, 2)]
    one, two = growth.one_rank(sizes, rounds=1)
    assert one["cpu_ms"] > 0
    assert two["weights_mib"] == 2 * one["weights_mib"]
    assert two["kept_mib"] == pytest.approx(2 * one["kept_mib"], rel=0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at inputs that are no leaves
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_overheads(programs: Any) -> None:
    """Small, so that no time is held against a limit; another number of tokens must not compile again."""
    _, overhead = programs
    assert overhead.one_expert(torch.float32, rounds=1, tokens=64) > 0
    assert overhead.compiled_region(torch.float32, rounds=2, tokens=64) > 0
    assert math.isfinite(overhead.import_seconds(1))


def test_the_stored_results_are_as_they_must_be(programs: Any) -> None:
    growth, overhead = programs
    stored = json.loads((BENCHMARKS / "results" / "growth.json").read_text())
    assert {axis: len(found) for axis, found in stored["rows"].items()} == {a: len(s) for a, s in growth.AXES.items()}
    assert all(finding["holds"] for finding in stored["findings"])
    found = json.loads((BENCHMARKS / "results" / "overhead.json").read_text())
    assert found.keys() == overhead.LIMITS.keys()
    assert all(found[name] <= limit for name, limit in overhead.LIMITS.items())


def test_starting_is_measured_beside_a_bare_program(programs: Any, tmp_path: Path) -> None:
    import startup

    (tmp_path / "bare.py").write_text(startup.BARE)
    bare, ours, times = startup.ratio("--cfg job", tmp_path / "bare.py", rounds=1)
    assert times == pytest.approx(ours / bare)
    found = json.loads((BENCHMARKS / "results" / "startup.json").read_text())
    assert found.keys() == startup.FLAGS.keys()
    assert all(value <= startup.LIMIT for value in found.values())
    page = (BENCHMARKS.parent / "docs" / "understand" / "speed.md").read_text()
    assert all(f"| `{name}` | {value:.1f} x |" in page for name, value in found.items())
