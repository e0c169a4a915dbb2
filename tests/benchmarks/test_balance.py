"""benchmarks/balance.py: what it computes from jobs, and that the page shows what is stored."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def balance() -> ModuleType:
    """The program, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("balance", REPOSITORY / "benchmarks" / "balance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["balance"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_job(folder: Path, rule: str, seed: int, max_violation: float, val_loss: float) -> None:
    folder.mkdir()
    losses = {"micro_batch": 0.01 if rule == "aux" else 0.0}
    config = {"seed": seed, "balance": {"rule": "bias" if rule == "bias" else "none", "losses": losses}}
    (folder / "resolved.yaml").write_text(json.dumps(config))
    result = {"status": "ok", "max_violation_mean_last": max_violation, "val_loss": val_loss}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.csv").write_text(
        "step,loss,max_violation,max_violation/a,max_violation/b,val_loss\n0,,,,,7.5\n1,7.5,3,3,1,\n5,6.5,5,5,2,\n"
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Nine jobs, numbered in the order of the multirun."""
    ends = {"none": (8.0, 5.0), "aux": (1.0, 5.05), "bias": (0.5, 4.95)}
    for number, (rule, seed) in enumerate((rule, seed) for rule in ends for seed in range(3)):
        violation, loss = ends[rule]
        write_job(tmp_path / str(number), rule, seed, violation * (1 + (seed - 1) / 2), loss)
    (tmp_path / "multirun.yaml").touch()
    return tmp_path


def test_figures_are_means_over_the_seeds(balance: ModuleType, sweep: Path) -> None:
    runs = balance.read(sweep)
    assert [(run.rule, run.seed) for run in runs[:4]] == [("none", 0), ("none", 1), ("none", 2), ("aux", 0)]
    assert runs[0].curve == ((1, 2.0), (5, 3.5))
    found = balance.figures(runs)
    assert found["none"]["max_violation"] == pytest.approx(8.0)
    assert found["aux"]["times_lower"] == pytest.approx(8.0)
    assert found["bias"]["loss_change"] == pytest.approx(-0.01)
    assert "| 1.00 (0.50 to 1.50) | 8.0 times lower | 5.050 (5.050 to 5.050) | +1.0% |" in balance.table(found)


@pytest.mark.parametrize(
    ("violation", "loss", "holds"), [(2.0, 5.05, True), (2.01, 5.0, False), (0.5, 5.06, False), (0.5, 4.0, True)]
)
def test_a_rule_must_be_four_times_lower_for_one_percent(
    balance: ModuleType, sweep: Path, violation: float, loss: float, holds: bool
) -> None:
    result = {"status": "ok", "max_violation_mean_last": violation, "val_loss": loss}
    for number in (3, 4, 5):
        (sweep / str(number) / "result.json").write_text(json.dumps(result))
    assert balance.holds(balance.figures(balance.read(sweep))) is holds


def test_the_picture_has_a_curve_for_each_rule(balance: ModuleType, sweep: Path, tmp_path: Path) -> None:
    balance.draw(balance.read(sweep), tmp_path / "balance.png")
    assert (tmp_path / "balance.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_that_failed_is_no_figure(balance: ModuleType, sweep: Path) -> None:
    (sweep / "8" / "result.json").write_text('{"status": "failed"}')
    with pytest.raises(SystemExit, match="failed"):
        balance.read(sweep)


# -- what is stored ------------------------------------------------------------------------------------------------


def test_the_stored_figures_keep_the_promise_and_the_page_shows_them(balance: ModuleType) -> None:
    stored = json.loads((REPOSITORY / "benchmarks" / "results" / "balance.json").read_text())
    assert balance.holds(stored["rules"])
    assert all(len(rule["seeds"]) == 3 for rule in stored["rules"].values())
    page = (REPOSITORY / "docs" / "understand" / "balance.md").read_text(encoding="utf-8")
    assert balance.table(stored["rules"]) in page
    assert stored["settings"] == [f"balance={','.join(balance.RULES)}", *balance.SETTINGS]
    for setting in stored["settings"]:
        if setting not in ("trainer.progress_bar=false", "trainer.save_checkpoint=false"):
            assert f" {setting}" in page
