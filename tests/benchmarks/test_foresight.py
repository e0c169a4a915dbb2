"""benchmarks/foresight.py: the calibration is that of the data, the stored scores are what the code computes."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from moecompile.compose import compose_config
from moecompile.imports.composed import with_import
from moecompile.models.source import source_model
from moecompile.pipeline.shape import shape_of_model
from moecompile.planner.cost_model.constants import CALIBRATION, CONSTANTS, PRIORS, calibrated
from moecompile.planner.cost_model.forecast import forecast_plan
from moecompile.schema import with_workload
from moecompile.tasks import plan
from tests.imports.test_primus import experiment

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # programs import each other as scripts do
    spec = importlib.util.spec_from_file_location("foresight_benchmark", BENCHMARKS / "foresight.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored() -> Any:
    return json.loads((BENCHMARKS / "results" / "foresight.json").read_text())


def test_the_calibration_is_of_this_data_and_these_rows(program: ModuleType, stored: Any) -> None:
    calibration = yaml.safe_load(CALIBRATION.read_text(encoding="utf-8"))
    runs, left_out = program.read_runs()
    assert calibration["data_sha256"] == stored["data_sha256"] == program.data_hash()
    assert calibration["rows"] == [run.id for run in runs]
    assert stored["left_out"] == left_out
    assert len(runs) + len(left_out) == 160
    assert not set(calibration["constants"]) ^ {constant.name for constant in CONSTANTS}


def test_the_stored_scores_are_what_the_code_computes(program: ModuleType, stored: Any) -> None:
    runs, _ = program.read_runs()
    constants = calibrated()
    assert program.summary(program.errors(runs, constants)) == stored["calibrated on all"]
    assert program.summary(program.errors(runs, PRIORS)) == stored["splits"]["priors alone"]
    assert program.one_vote(runs, constants) == stored["one vote per config"]
    assert program.deepseek_v3(constants) == stored["deepseek_v3"]
    assert program.simumax(constants) == stored["simumax"]["rows"]
    assert program.counted() == stored["counts"]
    assert [round(program.tokens_s(run, constants), 1) for run in runs] == [run["predicted"] for run in stored["runs"]]
    for run in runs:
        assert sum(program.parts(run, constants).values()) > 0


@pytest.mark.slow
def test_the_documented_step_is_what_the_command_beside_it_prints(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs" / "understand" / "foresight.md").read_text()
    (line,) = re.findall(r"^python -m moecompile (task=plan .*deepseek_v3_dualpipe)$", page, re.MULTILINE)
    plan.run(compose_config(line.split()), tmp_path)
    seconds = json.loads((tmp_path / "result.json").read_text())["step_seconds"]
    assert round(seconds, 2) == stored["deepseek_v3"]["predicted_s"]
    printed = re.search(r"predicted step +(\S+ s)", capsys.readouterr().out)
    assert printed is not None
    assert f"`predicted step  {printed[1]}`" in page
    assert f"{stored['deepseek_v3']['predicted_s']} s" in page


@pytest.mark.slow
def test_the_stored_fit_is_what_a_fit_finds(program: ModuleType, stored: Any) -> None:
    runs, _ = program.read_runs()
    assert program.calibrate(runs) == pytest.approx(dict(calibrated()), rel=2e-2)
    for name, scores in program.splits(runs).items():
        assert scores["median"] == pytest.approx(stored["splits"][name]["median"], abs=0.3)
        assert scores["p90"] == pytest.approx(stored["splits"][name]["p90"], abs=1.0)


def test_counts_agree_with_published_ones(stored: Any) -> None:
    for row in stored["counts"]:
        assert abs(row["percent"]) <= (0.2 if "parameters" in row["what"] else 1.0), row


def test_a_split_never_cuts_a_group(program: ModuleType) -> None:
    from forecast.scores import FOLDS, fold

    runs, _ = program.read_runs()
    groups = sorted({run.group for run in runs})
    sides = {(run.group, fold(run, groups)) for run in runs}
    assert len(sides) == len(groups)
    assert {side for _, side in sides} == set(range(FOLDS))


def test_a_wrong_constant_changes_the_scores(program: ModuleType, stored: Any) -> None:
    runs, _ = program.read_runs()
    for name in ("dense", "grouped", "passes", "launch"):
        broken = {**calibrated(), name: 3 * calibrated()[name]}
        assert program.summary(program.errors(runs, broken))["median"] > stored["calibrated on all"]["median"]


def test_another_file_of_runs_is_scored(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((BENCHMARKS / "published" / "published.yaml").read_text())
    row = next(row for row in data["throughput"] if row["id"] == "T008")
    rows = tmp_path / "rows.yaml"
    rows.write_text(yaml.safe_dump({"throughput": [row, {**row, "id": "X", "model": "unheard-of"}]}))
    program.main(["score", str(rows), str(BENCHMARKS / "published" / "published_features.yaml")])
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"] == 1
    assert printed["left_out"] == {"X": "the architecture of unheard-of is not described"}


def test_runs_on_gpus_of_amd_are_predicted_as_the_page_says(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(BENCHMARKS / "published" / "amd.yaml")
    program.main(["score", file, file])
    printed = json.loads(capsys.readouterr().out)
    page = (REPOSITORY / "docs" / "understand" / "foresight.md").read_text()
    said = re.findall(r"^\| A\d{3} .*$", page, re.MULTILINE)
    assert len(said) == len(printed["rows"]) == 9 and printed["left_out"] == {}
    for line, (name, row) in zip(said, printed["rows"].items(), strict=True):
        made, measured, percent = re.findall(r"([\d,]+) of ([\d,]+) tokens/s, (.*%)", row)[0]
        assert line.endswith(f"| {measured} | {made} | {percent} |") and line.startswith(f"| {name} ")
    assert f"**median {printed['median']:.0f}%**" in page


def test_the_page_shows_what_is_stored(program: ModuleType, stored: Any) -> None:
    assert (REPOSITORY / "docs" / "assets" / "foresight.md").read_text() == program.tables(stored)
    page = (REPOSITORY / "docs" / "understand" / "foresight.md").read_text()
    held = stored["splits"]["held out"]
    assert re.search(rf"median {held['median']}%,\s+90th\s+percentile\s+{held['p90']}%", page)
    assert f"{stored['deepseek_v3']['predicted_s']} s" in page
    assert f"{stored['simumax']['ours']['median']}%" in page


@pytest.mark.slow
def test_an_imported_experiment_is_forecast_as_the_run_described_by_hand(program: ModuleType, tmp_path: Path) -> None:
    """Row A001 of amd.yaml, without multi-token prediction, says on its own what the experiment of Primus was."""
    rows = BENCHMARKS / "published" / "amd.yaml"
    by_hand = next(run for run in program.read_runs(rows, rows)[0] if run.id == "A001")
    words = ["task=import", "from=megatron", f"file={experiment(tmp_path)}", "workload.mtp=0"]
    words += ["mesh.num_nodes=32", "mesh.ranks_per_node=8"]
    config, _ = with_workload(with_import(compose_config(words), words))
    model = source_model(config)
    found = plan.planned(model, config, None).plan
    imported = forecast_plan(shape_of_model(model, found), found, config)
    assert imported.seconds == pytest.approx(19.8, abs=0.05)  # docs/use/import.md
    assert imported.tokens_per_second_per_rank == pytest.approx(program.tokens_s(by_hand, calibrated()), rel=0.01)
