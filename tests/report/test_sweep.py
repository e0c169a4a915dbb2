"""Table and picture of a multirun, from the files alone."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.report import sweep_plot
from moecompile.report.sweep import summarize
from moecompile.report.sweep_plot import Point, draw


def write_job(folder: Path, config: dict[str, Any] | None, result: dict[str, Any] | None, *overrides: str) -> None:
    folder.mkdir()
    (folder / "overrides.txt").write_text("\n".join(overrides))
    if config is not None:
        (folder / "resolved.yaml").write_text(yaml.safe_dump(config))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


def config(top_k: int, lr: float = 1e-3) -> dict[str, Any]:
    return {"name": "mixtral_ep", "routing": {"top_k": top_k}, "optimizer": {"lr": lr, "betas": [0.9, 0.95]}}


def result(loss_last: float) -> dict[str, Any]:
    return {
        "status": "ok", "loss_first": 7.5, "loss_last": loss_last, "val_loss_first": 7.75, "val_loss": loss_last + 0.25,
        "max_violation_last": 0.75, "max_violation_mean_last": 0.5, "max_violation_bound_mean_last": 3.0,
        "tokens_per_second": 8123.4,
        "bytes_per_token_per_layer": {"intra_node": 100.0, "inter_node": 1536.0},
    }  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_job(tmp_path / "0", config(1), result(4.5), "recipe=mixtral_ep", "routing.top_k=1")
    write_job(tmp_path / "2", config(4), None, "recipe=mixtral_ep", "routing.top_k=4")
    write_job(tmp_path / "10", config(2), result(4.125), "recipe=mixtral_ep", "routing.top_k=2")
    write_job(tmp_path / "11", None, None)
    write_job(tmp_path / ".submitit", None, None)
    return tmp_path


def point(loss: float | None, **settings: str) -> Point:
    return Point(settings=settings, measured={"val_loss": loss, "tokens_per_second": 1000.0})


def drawn_lines(points: list[Point], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Label -> (x, mean) of every line in the panel of the loss."""
    figure = sweep_plot._lines(points, sweep_plot._keys(points), axis, ["val_loss"])
    return {
        line.get_label(): [(float(x), float(y)) for x, y in line.lines[0].get_xydata()]
        for line in figure.axes[0].containers
    }


# -- the table -----------------------------------------------------------------------------------------------------


def test_csv_has_the_keys_that_differ_and_every_job(sweep: Path) -> None:
    summarize(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["job", "routing.top_k", "status"]
    assert [(r["job"], r["routing.top_k"], r["status"]) for r in rows] == [
        ("0", "1", "ok"), ("2", "4", "failed"), ("10", "2", "ok"), ("11", "", "failed"),
    ]  # fmt: skip
    assert rows[2]["loss_last"] == "4.125"
    assert rows[2]["inter_node_bytes_per_token"] == "1536.0"
    assert rows[1]["loss_last"] == ""


def test_printed_table_fits_80_columns(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summarize(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if "/sweep." not in line)
    assert next(line for line in lines if line.startswith("10")).split() == [
        "10", "top_k=2", "ok", "4.125", "7.750", "4.375", "0.50", "3.00", "8,123", "1.50", "KiB",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("2")).split() == ["2", "top_k=4", "failed", *"-------"]
    assert [line.rpartition("/")[2] for line in lines[-2:]] == ["sweep.csv", "sweep.png"]


def test_runs_that_differ_in_the_seed_have_a_mean_and_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {(1, 0): 4.0, (1, 1): 5.0, (1, 2): None, (2, 0): 5.0, (2, 1): 6.0}
    for i, ((top_k, seed), loss) in enumerate(losses.items()):
        found = None if loss is None else result(loss)
        write_job(tmp_path / str(i), {**config(top_k), "seed": seed}, found, f"routing.top_k={top_k}", f"seed={seed}")
    summarize(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    first, second = (
        f"top_k={top_k}: 2 seeds{missing}, mean +- 95% interval: validation loss {mean:.4f} +- 6.3531 nats per token"
        for top_k, missing, mean in ((1, ", 1 failed", 4.75), (2, "", 5.75))
    )
    assert f"{first} {second}" in said
    page = (tmp_path / "report.html").read_text()
    assert f'<p class="big">{first}</p><p class="big">{second}</p>' in page


def test_what_an_earlier_attempt_has_left_of_a_job_that_failed_is_no_result(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep / "failures.txt").write_text("10\t2\tmesh.ep=3: must divide 8.\n0\t1\t\n")  # 0 has returned a code
    summarize(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = {row["job"]: (row["status"], row["loss_last"]) for row in csv.DictReader(file)}
    assert rows["10"] == ("failed", "") and rows["0"] == ("ok", "4.5")


def test_what_a_run_warns_of_is_in_the_table_in_the_file_and_below(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path / "0", config(1), {**result(4.5), "warnings": ["Add balance=aux"]}, "routing.top_k=1")
    write_job(tmp_path / "1", config(2), {**result(815.0), "status": "diverged"}, "routing.top_k=2")
    summarize(tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"^0 +top_k=1 +ok +4\.500.*\n +warned", out, re.MULTILINE) and "diverged" in out
    assert "warning  job 0: Add balance=aux" in out
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [(row["status"], row["warnings"]) for row in csv.DictReader(file)] == [
            ("ok", "Add balance=aux"), ("diverged", "")
        ]  # fmt: skip


def test_keys_with_one_last_part_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("a", "b")):
        write_job(tmp_path / str(i), {}, result(4.0), f"model.name={name}", f"data.name={name}")
    summarize(tmp_path)
    out = capsys.readouterr().out
    assert "model.name=a" in out
    assert "data.name=b" in out


def test_a_swept_group_is_one_name_in_print_and_all_its_keys_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, mesh in enumerate(("cpu_1", "cpu_2x2")):
        write_job(tmp_path / str(i), {"mesh": {"ep": i, "num_nodes": i}}, result(4.0), f"mesh={mesh}", "+data.path=x")
    summarize(tmp_path)
    out = capsys.readouterr().out
    assert "mesh=cpu_2x2" in out
    assert "num_nodes" not in out and "path" not in out
    assert (tmp_path / "sweep.csv").read_text().splitlines()[0].startswith("job,mesh.ep,mesh.num_nodes,status,")


def test_plans_are_tabulated_by_memory_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (gib, fits) in enumerate([(1.5, True), (100.0, False)]):
        found = {
            "status": "ok", "memory_bytes_per_rank": {"total": gib * 2**30}, "fits": fits,
            "bytes_per_token_per_layer": {"intra_node": 1024.0, "inter_node": 0.0},
        }  # fmt: skip
        write_job(tmp_path / str(number), config(number + 1), found, f"routing.top_k={number + 1}")
    summarize(tmp_path)
    heading, _, *rows = capsys.readouterr().out.splitlines()[:4]
    assert heading.split() == ["job", "overrides", "status", "memory", "fits", "intra-node", "inter-node"]
    assert rows[0].split()[3:] == ["1.50", "GiB", "yes", "1", "KiB", "0", "B"]
    assert rows[1].split()[3:] == ["100", "GiB", "no", "1", "KiB", "0", "B"]
    (first, second) = csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines())
    assert (first["memory_bytes_per_rank"], first["fits"], second["fits"]) == (str(1.5 * 2**30), "True", "False")
    assert (tmp_path / "sweep.png").is_file()


def test_neither_torch_nor_hydra_is_imported() -> None:
    code = "import sys, moecompile.report.sweep, moecompile.report.sweep_plot; assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_is_a_png_beside_the_table(sweep: Path) -> None:
    summarize(sweep)
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_one_job_that_succeeded_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_job(tmp_path / "0", config(1), result(4.5), "routing.top_k=1")
    write_job(tmp_path / "1", config(2), {"status": "failed", "val_loss": 4.0}, "routing.top_k=2")
    summarize(tmp_path)
    assert not (tmp_path / "sweep.png").exists()
    assert "sweep.png" not in capsys.readouterr().out


def test_a_picture_that_fails_does_not_lose_the_table(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise MemoryError("no room")

    monkeypatch.setattr(sweep_plot, "draw", broken)
    summarize(sweep)
    out = capsys.readouterr().out
    assert "top_k=2" in out
    assert out.splitlines()[-1] == "sweep.png could not be drawn: MemoryError: no room"
    assert (sweep / "sweep.csv").is_file()


def test_a_number_is_the_axis_and_the_rest_are_lines_in_the_order_of_x() -> None:
    points = [point(loss, experts=e, top_k=k) for e, k, loss in (
        ("8", "1", 5.0), ("8", "2", 4.0), ("16", "1", 6.0), ("16", "2", 3.0), ("4", "2", 9.0),
    )]  # fmt: skip
    assert sweep_plot._axis(points, ["experts", "top_k"]) == "experts"
    assert drawn_lines(points, "experts") == {
        "top_k=1": [(8, 5.0), (16, 6.0)],
        "top_k=2": [(4, 9.0), (8, 4.0), (16, 3.0)],
    }


def test_a_seed_is_repetition() -> None:
    points = [point(loss, top_k=k, seed=s) for k, s, loss in (("1", "0", 5.0), ("1", "1", 6.0), ("2", "0", 4.0))]
    keys = sweep_plot._keys(points)
    assert keys == ["top_k"]
    assert list(drawn_lines(points, "top_k").values()) == [[(1, 5.5), (2, 4.0)]]
    figure = sweep_plot._rows(points[:2], sweep_plot._keys(points[:2]), ["val_loss"])  # nothing else differs
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["2 seeds"]


def test_words_and_numbers_that_stand_alone_are_dots_on_a_tight_axis_and_the_best_has_a_ring(tmp_path: Path) -> None:
    words = [point(5 + i / 10 + int(s) / 100, balance=b, seed=s) for i, b in enumerate(("none", "bias")) for s in "012"]
    assert sweep_plot._axis(words, ["balance"]) is None
    assert sweep_plot._axis([point(5.0, recipe="a", lr="1"), point(5.0, recipe="b", lr="2")], ["recipe", "lr"]) is None
    figure = sweep_plot._rows(words, ["balance"], ["val_loss", "tokens_per_second"])
    loss, speed = figure.axes
    assert [text.get_text() for text in loss.get_yticklabels()] == ["none (3 seeds)", "bias (3 seeds)"]
    assert 4.9 < loss.get_xlim()[0] < 5.0 and loss.get_xlim()[1] < 5.3
    assert [text.get_text() for text in loss.texts] == ["5.010", "5.110"]
    seeds = [list(line.get_xdata()) for line in loss.lines if len(line.get_xdata()) == 3]
    assert seeds == [pytest.approx([5.0, 5.01, 5.02]), pytest.approx([5.1, 5.11, 5.12])]
    assert rings(loss) == [(pytest.approx(5.01), 0)] and rings(speed) == []  # all are alike
    assert draw(words, tmp_path / "rows.png")
    fast = [Point(settings={"top_k": k}, measured={"tokens_per_second": v}) for k, v in (("1", 9.0), ("2", 7.0))]
    (axes,) = sweep_plot._lines(fast, ["top_k"], "top_k", ["tokens_per_second"]).axes
    assert rings(axes) == [(1.0, 9.0)]


def rings(axes: Any) -> list[tuple[float, float]]:
    """Where the best is marked."""
    found = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found]


def test_what_was_not_measured_has_no_panel(tmp_path: Path) -> None:
    idle = {"val_loss": None, "tokens_per_second": 0.0}
    points = [Point(settings={"top_k": k}, measured=idle) for k in ("1", "2")]
    assert not draw(points, tmp_path / "none.png")
    figure = sweep_plot._lines(points, ["top_k"], "top_k", ["val_loss"])
    assert not figure.axes[0].lines


def test_a_line_that_is_in_some_panels_alone_is_in_the_legend() -> None:
    points = [point(None if e == "8" else 5.0, top_k=k, experts=e) for e in ("8", "16") for k in ("1", "2")]
    figure = sweep_plot._lines(points, ["top_k", "experts"], "top_k", ["val_loss", "tokens_per_second"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["experts=8", "experts=16"]


def test_more_lines_than_can_be_told_apart_are_cut_and_it_is_said() -> None:
    points = [point(5.0, top_k=k, name=f"n{i}") for i in range(25) for k in ("1", "2")]
    figure = sweep_plot._lines(points, ["top_k", "name"], "top_k", ["val_loss"])
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 21
    assert figure.get_suptitle() == "the first 21 of 25 combinations; all are in sweep.csv"


def test_a_sweep_has_a_report_that_links_those_of_its_jobs(tmp_path: Path) -> None:
    from moecompile.report.page.sweeps import SweepJob, write_sweep_report

    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,loss,val_loss\n1,3.0,\n2,2.0,2.5\n")
    (tmp_path / "0" / "report.html").write_text("")
    jobs = [
        SweepJob(name=str(i), settings={"lr": rate}, status=status, task="train", figures={"val_loss": loss, "fits": None})
        for i, (rate, status, loss) in enumerate([("0.1", "ok", 2.5), ("<b>", "ok", 2.25), ("1", "failed", None)])
    ]  # fmt: skip
    text = write_sweep_report(tmp_path, jobs).read_text()
    assert '<a href="0/report.html">0</a>' in text
    assert 'href="1/report.html"' not in text
    assert "1 of 3 jobs failed" in text
    assert "<b>" not in text
    assert [f'id="{name}"' in text for name in ("loss", "val_loss", "bars-val_loss", "bars-step_seconds")] == [
        True
    ] * 3 + [False]
