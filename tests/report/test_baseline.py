"""Was it worth it: two curves at equal steps, FLOPs and time, computed by hand; the sentence; the report's page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from moecompile.report.baseline import (
    _T,
    Curves,
    baseline_rows,
    compare,
    curves,
    flops_for_same_loss,
    over_seeds,
    verdict,
)
from moecompile.report.page import try_report

OURS = Curves(tuple((float(step), 6 - step / 10) for step in range(1, 21)))  # falls by 0.1 a step, to 4
DENSE = Curves(tuple((float(step), 6 - step / 20) for step in range(1, 21)))  # by 0.05, to 5
RESULT: dict[str, Any] = {
    "task": "train", "recipe": "mine", "status": "ok", "seconds": 1.0, "steps": 20, "loss_first": 5.9, "loss_last": 4.0,
    "val_loss": 4.1, "val_loss_first": 6.0, "flops_per_token": 2e6, "tokens_per_second": 100.0, "params_total": 5_000_000,
    "params_active": 2_000_000,
}  # fmt: skip
OTHER = {
    "kind": "dense",
    "steps": 20,
    "val_loss": 5.1,
    "val_loss_first": 6.0,
    "flops_per_token": 1e6,
    "tokens_per_second": 400.0,
}


def with_baseline(ours: Curves = OURS, dense: Curves = DENSE, **changed: Any) -> dict[str, Any]:
    result = {**RESULT, "baseline": {**OTHER, **changed}}
    result["baseline"]["compared"] = compare(result, ours, dense)
    result["baseline"]["flops_for_same_loss"] = flops_for_same_loss(result, ours, dense)
    return result


def test_a_budget_is_what_the_cheaper_of_the_two_has_spent() -> None:
    steps, flops, time = with_baseline()["baseline"]["compared"]
    assert (steps["at"], steps["steps"]) == ("steps", [20, 20])
    assert steps["loss"] == [pytest.approx(6 - 1.9), pytest.approx(6 - 0.95)]  # the means of steps 18 to 20
    assert (flops["at"], flops["steps"]) == ("FLOPs", [10, 20])
    assert flops["loss"] == [pytest.approx(6 - 0.95), pytest.approx(6 - 0.95)]  # of steps 9 and 10
    assert (time["at"], time["steps"]) == ("time", [5, 20])
    assert time["loss"] == [pytest.approx(5.5), pytest.approx(6 - 0.95)]


def test_between_two_rows_is_a_straight_line_and_what_is_not_known_is_left_out() -> None:
    result = with_baseline(flops_per_token=None)
    assert [each["at"] for each in result["baseline"]["compared"]] == ["steps", "time"]
    coarse = ((1.0, 6.0), (20.0, 4.0))
    assert compare(result, Curves(coarse), DENSE)[1]["loss"][0] == pytest.approx(6 - 2 * 4 / 19)
    assert [each["at"] for each in compare(result, Curves(coarse[1:]), DENSE)] == [
        "steps"
    ]  # a resumed run begins later


def test_the_sentence_says_where_it_is_worth_it() -> None:
    assert verdict(with_baseline()) == (
        "beside the dense model: no difference seen at equal FLOPs; worth it at equal steps; not worth it at equal time "
        "(within 1%, as one seed differs from another). At equal FLOPs its training loss is "
        "0.0% higher; for the same loss the dense model needs 1.00 x the FLOPs; a token takes 4.00 x the time"
    )
    alike = {"flops_per_token": 2e6, "tokens_per_second": 100.0}
    assert verdict(with_baseline(**alike)) == (
        "beside the dense model: worth it. At equal FLOPs its training loss is 18.8% lower; for the same loss the dense "
        "model needs 2.00 x the FLOPs; a token takes 1.00 x the time"
    )
    assert verdict(with_baseline(flops_per_token=None, tokens_per_second=None)) == "beside the dense model: worth it."
    assert verdict(RESULT) is None


def test_no_praise_within_noise_and_flops_come_first() -> None:
    def of(**losses: tuple[float, float]) -> str:
        compared = [{"at": at, "steps": [1, 1], "loss": list(pair)} for at, pair in losses.items()]
        return str(verdict({"steps": 1, "baseline": {"steps": 1, "compared": compared}}))

    near = (5.9633, 5.9665)
    assert of(steps=near, FLOPs=near).startswith("beside the dense model: no difference seen (within 1%, ")
    assert of(steps=near, FLOPs=(6.1, 5.9665), time=(6.2, 5.9)).startswith(
        "beside the dense model: not worth it at equal FLOPs and time; no difference seen at equal steps (within 1%, "
    )


def test_the_loss_that_both_reach_is_that_of_the_worse_one() -> None:
    """The dense model is better here: it has the MoE's last loss at step 10 of 20, at a quarter of the FLOPs."""
    result = with_baseline()
    assert flops_for_same_loss(result, DENSE, OURS) == pytest.approx(10 / 20 / 2)
    flat = Curves(tuple((step, 6.0) for step, _ in OURS.training))  # it never comes down
    assert flops_for_same_loss(result, flat, DENSE) is None
    assert flops_for_same_loss(result, Curves(), DENSE) is None


def test_where_both_were_validated_the_validation_losses_count() -> None:
    """The dense model has 40 steps for the FLOPs of 20: each is validated at the end of its own schedule."""
    ours = Curves(OURS.training, ((0, 6.0), (20, 4.1)))
    twice = tuple((float(step), 6 - step / 40) for step in range(1, 41))
    result = with_baseline(ours, Curves(twice, ((0, 6.0), (40, 4.2))), steps=40, val_loss=4.2)
    steps, flops, _ = result["baseline"]["compared"]
    assert flops["steps"] == [20, 40] and flops["val_loss"] == [4.1, 4.2]
    assert steps["steps"] == [20, 20] and "val_loss" not in steps  # the dense model was not validated there
    assert "At equal FLOPs its validation loss is 2.4% lower;" in str(verdict(result))
    rows = {name: texts for name, *texts in baseline_rows(result)}
    assert rows["validation loss at equal FLOPs (steps 20 and 40)"] == ["4.1000", "4.2000"]
    assert rows["validation, nats per token, step 20 and 40"] == ["4.1000", "4.2000"]
    same = with_baseline(ours, Curves(DENSE.training, ((0, 6.0), (20, 4.0))), val_loss=4.0)
    text = str(verdict(same))
    assert text.startswith(
        "beside the dense model: no difference seen at equal FLOPs; not worth it at equal steps and time "
    )
    assert "; at equal steps its validation loss is 2.5% higher;" in text


def test_over_seeds_differences_are_taken_within_each_run() -> None:
    def of_seed(ours: float, dense: float) -> dict[str, Any]:
        validated = ((Curves(each.training, ((20, loss),))) for each, loss in ((OURS, ours), (DENSE, dense)))
        return {**with_baseline(*validated, flops_per_token=2e6), "val_loss": ours}

    pairs = [(4.0, 5.0), (4.5, 5.0), (4.4, 4.0)]
    text = over_seeds([of_seed(*pair) for pair in pairs])
    shares = [100 * (ours / dense - 1) for ours, dense in pairs]
    half = stats.t.ppf(0.975, 2) * stats.sem(shares)
    assert text == (
        f"validation loss 4.3000 +- {stats.t.ppf(0.975, 2) * stats.sem([4.0, 4.5, 4.4]):.4f} nats per token; "
        f"at equal FLOPs its validation loss is {-sum(shares) / 3:.1f} +- {half:.1f} % lower than the dense model's; the "
        "dense model needs 2.00 +- 0.00 x the FLOPs for the same loss"
    )
    assert over_seeds([of_seed(4.0, 5.0)]) is None  # one seed has no interval
    assert list(_T) == pytest.approx(list(stats.t.ppf(0.975, range(1, len(_T) + 1))), abs=6e-5)


def test_the_page_has_the_sentence_the_table_and_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, curve: Curves) -> None:
        folder.mkdir(exist_ok=True)
        text = "".join(f"{step},{loss},\n" for step, loss in curve.training)
        (folder / "metrics.csv").write_text(f"step,loss,val_loss\n{text}20,,5.1\n")

    write(tmp_path, OURS)
    write(tmp_path / "baseline", DENSE)
    result = with_baseline()
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "resolved.yaml").write_text("data: {global_batch_size: 8, seq_len: 32}")
    drawn: list[Any] = []
    from moecompile.report.page import outcome

    lines = outcome.lines
    monkeypatch.setattr(outcome, "lines", lambda name, curves, *rest, **more: drawn.append((name, curves)) or lines(name, curves, *rest, **more))  # fmt: skip
    try_report(tmp_path, "train")
    page = (tmp_path / "report.html").read_text()
    assert f'<p class="big">{verdict(result)}</p>' in page
    assert all(name in page for name, _, _ in baseline_rows(result))
    curves = {label: (steps, values) for label, steps, values in dict(drawn)["loss"]}
    assert list(curves) == ["training", "validation", "dense model, training", "dense model, validation"]
    assert tuple(zip(*curves["dense model, training"], strict=True)) == DENSE.training
    over = {label: steps for label, steps, _ in dict(drawn)["loss-flops"]}
    assert over["training"][-1] == 20 * 8 * 32 * 2e6 and over["dense model, training"][-1] == 20 * 8 * 32 * 1e6


def test_a_curve_that_diverged_is_not_compared() -> None:
    rows = [{"step": 1.0, "loss": 5.0}, {"step": 2.0, "loss": float("nan")}]
    assert curves(rows) == Curves() and compare(with_baseline(), curves(rows), DENSE) == []
    assert curves(rows[:1]) == Curves(((1.0, 5.0),))
