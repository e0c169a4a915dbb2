"""What stands in report.html, and the numbers behind its views, against plain loops."""

from __future__ import annotations

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moecompile import make_plan
from moecompile.load_history import NO_EXPERT
from moecompile.report.heatmap import load_ratios
from moecompile.report.page import try_report, write_report
from moecompile.report.page.document import first_rows
from moecompile.report.page.experts import coactivation, load_section, predictability, quantized, token_lift
from moecompile.report.page.layout import blocks, planned_bytes
from moecompile.report.page.read import read_run
from tests.plan.plans import a_plan
from tests.report.page.runs import FORECAST_FIELDS, a_run
from tests.tiny import COPY4, UpDown, ids, tiny_llama, tokens

TITLES = ["verdict", "steps", "price", "load", "traffic", "layout", "tokens", "curves", "setup"]


def sections(path: Path) -> list[str]:
    return re.findall(r'<section id="([a-z]+)">', path.read_text())


def test_a_training_run_has_every_view_in_order_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    a_run(tmp_path / "other", seed=1)
    a_run(tmp_path / "run")
    path = write_report(tmp_path / "run", "train")
    text = path.read_text()
    assert sections(path) == TITLES
    assert path.stat().st_size < 3e6
    page = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)
    assert "http-equiv" not in page
    for shown in ("loss 3.0000 → 1.0000", "within 1.0e-07", "+20.0%", "python -m moecompile recipe=tiny seed=1",
                  "1.20 x mean", "a rough guess", "the same step, balanced", "lower bound", "<td>seed</td><td>0</td><td>1</td>"):  # fmt: skip
        assert shown in page, shown


def test_a_time_that_is_predicted_for_this_machine_is_no_guess(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "forecast.json").write_text(json.dumps({"hardware": "this_machine", **FORECAST_FIELDS}))
    text = write_report(tmp_path, "train").read_text()
    assert "The time is predicted for this machine" in text and "rough guess" not in text


def test_without_data_a_view_is_left_out(tmp_path: Path) -> None:
    a_run(tmp_path)
    for name in ("load.npz", "metrics.csv", "step_profile.json", "routes_sample.npz", "forecast.json", "result.json"):
        (tmp_path / name).unlink()
    path = write_report(tmp_path, "train")
    assert sections(path) == ["verdict", "traffic", "layout", "setup"]
    assert "http-equiv" in path.read_text()  # not over: it loads itself again
    assert "no result yet: step 0 of 20" in path.read_text()


@pytest.mark.parametrize("name", ["load.npz", "routes_sample.npz", "samples.jsonl"])
def test_a_file_that_is_cut_off_is_left_out(tmp_path: Path, name: str) -> None:
    a_run(tmp_path)
    rows = ({"step": step, "prompt": "one\u2028two", "text": "\x85"} for step in (5, 10))
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert set(sections(write_report(tmp_path, "train"))) == {*TITLES, "samples"}
    whole = (tmp_path / name).read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 3):
        (tmp_path / name).write_bytes(whole[:size])
        write_report(tmp_path, "train")


def test_a_plan_has_a_forecast_and_a_failed_verification_its_checks(tmp_path: Path) -> None:
    a_run(tmp_path)
    head = {"recipe": "tiny", "seconds": 1.0}
    (tmp_path / "result.json").write_text(json.dumps({**head, "task": "plan", "status": "ok", **FORECAST_FIELDS}))
    assert sections(write_report(tmp_path, "plan")) == ["verdict", "steps", "price", "traffic", "layout", "setup"]
    checks = [{"name": "loss", "passed": False, "max_abs_err": 0.5, "tolerance": 1e-6, "where": "step 1"}]
    (tmp_path / "result.json").write_text(json.dumps({**head, "task": "verify", "status": "failed", "checks": checks}))
    text = write_report(tmp_path, "verify").read_text()
    assert "failed: a check failed" in text
    assert "0 of 1 check passed" in text


def test_the_verdict_has_the_warnings(tmp_path: Path) -> None:
    a_run(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "result.json").write_text(json.dumps({**result, "warnings": ["<half> of them are cut"]}))
    text = write_report(tmp_path, "train").read_text()
    assert "warning</span> &lt;half&gt; of them are cut</p>" in text
    assert "validation 3.1250 → 1.2500 nats per token" in text
    assert "MaxVio 0.500 of at most 7.500" in text
    section = load_section(read_run(tmp_path, "train"))
    assert section is not None and any("minus 1; at most 7.50" in str(part) for part in section.parts)


def test_the_command_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    a_run(tmp_path)
    words = [
        "data.path=/my data/a.txt",
        "optimizer.betas=[0.9, 0.95]",
        "model.config={hidden_size: 64}",
        "name='it is'",
    ]
    (tmp_path / "overrides.txt").write_text("\n".join(words))
    (command,) = re.findall(
        r"<h3>Command</h3>.*?<pre>(.*?)</pre>", write_report(tmp_path, "train").read_text(), re.DOTALL
    )
    assert shlex.split(html.unescape(command)) == ["python", "-m", "moecompile", *words]


def test_text_is_escaped(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "overrides.txt").write_text("name='<script>alert(1)</script>'")
    text = write_report(tmp_path, "train").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_long_table_says_what_it_leaves_out() -> None:
    shown = first_rows(("", "seconds"), [(f"rank {i}", i) for i in range(3)], 2, "ranks")
    assert "rank 1" in shown and "rank 2" not in shown and "The first 2 of 3 ranks." in shown
    assert "of 3" not in first_rows(("", "seconds"), [("rank", 0)] * 3, 3, "ranks")


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try_report(tmp_path / "missing", "train")
    assert "report.html could not be written: FileNotFoundError" in capsys.readouterr().err


def test_a_stored_load_is_within_two_percent_and_tells_dead_from_missing() -> None:
    counts = np.random.default_rng(0).integers(1, 500, (3, 40))
    counts[0, 0], counts[1, 1] = 0, NO_EXPERT
    ratios = load_ratios(counts)
    stored = quantized(ratios)
    assert (stored[0, 0], stored[1, 1]) == (1, 0)
    back = 2.0 ** ((stored.astype(float) - 2) / 253 * 8 - 4)
    inside = (ratios > 1 / 16) & (ratios < 16)
    assert np.abs(back[inside] / ratios[inside] - 1).max() < 0.012
    assert quantized(np.ones((1, 1)))[0, 0] in (128, 129)


def test_planned_bytes_add_up_to_the_estimate_and_keep_to_the_links() -> None:
    for kind in ("hierarchical", "dedup", "flat"):
        plan = a_plan(f"dispatch.kind={kind}")
        matrix = planned_bytes(plan)
        assert plan.estimate is not None
        assert plan.estimate.assumes is not None
        tokens = plan.estimate.assumes.tokens_per_rank * plan.estimate.assumes.accumulation * len(plan.layers)
        mean = plan.estimate.bytes_per_token_per_layer
        assert matrix[0].sum() == pytest.approx(tokens * (mean.intra_node + mean.inter_node))
        between = blocks(matrix, 2)
        assert between[0, 1] == pytest.approx(2 * tokens * mean.inter_node)
        assert (matrix[0, 3] == 0) == (kind == "hierarchical")  # rank 3 is not rank 0's place on the other node


def test_planned_bytes_of_a_rank_are_those_of_its_stage() -> None:
    mesh = ["mesh.ranks_per_node=4", "mesh.ep=2", "dispatch.kind=dedup"]
    whole, stages = (
        planned_bytes(make_plan(tiny_llama(), [*COPY4, *mesh, f"mesh.pp={pp}"], example={"input_ids": ids()}))
        for pp in (1, 2)
    )
    assert stages.sum(1) == pytest.approx(whole.sum(1))  # half of the layers, and twice the micro-batches


def test_planned_bytes_are_of_numbers_as_they_are_computed() -> None:
    for stored, precision in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.float32, "bf16_params")):
        settings = [*COPY4, "mesh=cpu_1x2", "dispatch.kind=dedup", f"trainer.precision={precision}"]
        plan = make_plan(UpDown().to(stored), settings, example=tokens(dtype=stored))
        assert plan.estimate is not None
        assert plan.estimate.assumes is not None
        of_step = plan.estimate.assumes.tokens_per_rank * plan.estimate.assumes.accumulation
        planned = planned_bytes(plan)[0].sum()
        assert planned == pytest.approx(of_step * plan.estimate.bytes_per_token_per_layer.intra_node)


def test_lift_and_coactivation_are_those_of_loops() -> None:
    generator = np.random.default_rng(0)
    tokens, ids = generator.integers(0, 4, 60), np.stack([generator.permutation(5)[:2] for _ in range(60)])
    ids[7] = -1
    lift, both = token_lift(tokens, ids, 5, np.array([2, 3])), coactivation(ids, 5)
    chosen = [set(row.tolist()) - {-1} for row in ids]
    every = [e for row in chosen for e in row]
    for expert in range(5):
        of_token = [e for token, row in zip(tokens, chosen, strict=True) if token == 3 for e in row]
        share = every.count(expert) / len(every)
        assert lift[expert, 1] == pytest.approx(of_token.count(expert) / len(of_token) / share)
        for other in range(5):
            count = sum(expert in row and other in row for row in chosen)
            alone = sum(expert in row for row in chosen) * sum(other in row for row in chosen)
            if other != expert:
                assert both[expert, other] == pytest.approx(count * 60 / alone)
    assert np.isnan(np.diag(both)).all()


def test_a_choice_that_follows_from_the_layer_before_is_predicted() -> None:
    before = np.random.default_rng(0).integers(0, 6, (400, 1))
    found, popular = predictability(before, (before + 2) % 6, 6, 6)
    assert found == 1.0
    assert popular < 0.4


def test_neither_torch_nor_hydra_is_imported(tmp_path: Path) -> None:
    a_run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from moecompile.report.page import write_report;"
        f"write_report(Path({str(tmp_path)!r}), 'train'); assert not {{'torch', 'hydra'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
