"""benchmarks/quality: which units are run, what they see, and what the tables compute from them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """run.py, with its folder in `tmp_path`; a unit leaves its result at once, a parent its hash too."""
    from quality import run, study

    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(study, "FOLDER", tmp_path)

    def at_once(worker: Any, unit: Any, lock: int) -> bool:
        result = {"settings": unit.settings, "settings_hash": unit.hash}
        if unit.seed is None:
            folder = study.parent_folder(unit)
            folder.mkdir(parents=True)
            (folder / "weights.sha256").write_text("w")
        else:
            result["parent_hash"] = study.hash_of_parent(unit.parent) if unit.parent else None
        run.write(worker.folder / unit.path.name, result)
        worker.ran.append(unit.name)
        return True

    monkeypatch.setattr(run.Worker, "run", at_once)
    return run


def worked(program: Any, folder: Path, units: Any, hours: float | None = None) -> list[str]:
    worker = program.Worker(units, hours, folder)
    worker.ran = []
    worker.work()
    if worker.stop is not None:
        raise worker.stop
    return list(worker.ran)


def few() -> list[Any]:
    from quality import study

    return study.units()[:4]


# -- what is run ----------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_stopped(program: Any, tmp_path: Path) -> None:
    curves, units = tmp_path / "curves", few()
    names = [unit.name for unit in units]
    assert names == ["3m-prose-parent_dense", "3m-prose-dense-0", "3m-prose-copies-0", "3m-prose-virtual-0"]
    assert worked(program, curves, units, hours=0) == []
    assert worked(program, curves, units[:2]) == names[:2]
    with program.taken(units[2]) as lock:  # another process runs it
        assert lock is not None
        with program.taken(units[2]) as second:
            assert second is None
    assert worked(program, curves, units) == names[2:]
    assert worked(program, curves, units) == []
    with pytest.raises(FileExistsError):
        program.write(curves / f"{names[1]}.json", {})


def test_weights_of_a_parent_are_made_again_only_if_something_needs_them(program: Any, tmp_path: Path) -> None:
    from quality import study

    curves, units = tmp_path / "curves", few()
    worked(program, curves, units)
    weights = study.parent_folder(units[0]) / "weights.sha256"
    weights.unlink()
    assert program.missing(units, curves) == []
    (curves / f"{units[3].name}.json").unlink()
    assert program.missing(units, curves) == [units[0], units[3]]
    weights.write_text("other")  # as on another processor
    assert worked(program, curves, units) == []
    assert "would begin with other weights" in (program.why_not(units[3], curves) or "")


def test_a_result_of_other_settings_is_refused(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quality import study

    curves, units = tmp_path / "curves", few()
    worked(program, curves, units)
    monkeypatch.setitem(study.OVERRIDES, "copies", (*study.OVERRIDES["copies"], "routing.top_k=1"))
    with pytest.raises(study.OtherSettings, match=r"3m-prose-copies-0\.json.*different: overrides.*delete the file"):
        worked(program, curves, units)


def test_stored_curves_are_of_the_plan_and_the_plan_names_what_is_run() -> None:
    from quality import study

    for name in ("quality", "real", "layout"):
        study.read_all(name)
    known = {unit.path.stem for name in ("quality", "real", "layout") for unit in study.units(name)}
    assert {path.name.split(".")[0] for path in study.CURVES.glob("*.json")} <= known
    plan = (BENCHMARKS / "quality" / "PLAN.md").read_text()
    assert len(study.units()) == 168 and "all 168 runs" in plan
    for arm in study.ARMS:
        assert f"| `{arm}` |" in plan
    for size, rate in list(study.RATES.items())[:2]:
        sizes = study.SIZES[size]
        line = next(line for line in plan.splitlines() if line.startswith(f"| `{size}` |"))
        assert f"{sizes.parent_steps} steps" in line and f"{sizes.branch_steps} steps" in line
        assert f"{rate:.0e}".replace("e-0", "e-") in line
    for domain in study.DOMAINS.values():
        for package in domain:
            assert package.kind == "own" or f"`{package.name}` {package.version}" in plan


def test_the_page_shows_what_the_curves_say() -> None:
    from quality import study, tables

    made = {name: make(tables.of_quality()) for name, make in tables.TABLES.items()}
    made["layouts"] = tables.layouts(study.read_all("layout"))
    assert {name: (tables.ASSETS / f"{name}.txt").read_text() for name in made} == made


# -- what a unit sees -----------------------------------------------------------------------------------------------


def test_all_arms_of_a_seed_see_the_same_windows_in_the_same_order() -> None:
    from quality import study
    from quality.order import in_order, order_of
    from quality.study import ROWS, Unit

    from moecompile.runtime.data.batches import GlobalBatchSampler

    sizes = study.SIZES["3m"]
    first, second = sizes.parent_steps * ROWS, sizes.branch_steps * ROWS
    orders = {
        (arm, seed): order_of(Unit("quality", "3m", "prose", arm, seed), first + 9, second + 9)
        for arm in study.ARMS
        for seed in (0, 1)
    }
    dense = orders["dense", 0]
    assert len(dense) == second and len(set(dense.tolist())) == second and dense.min() >= first + 9
    assert all(
        order.equal(dense) for (arm, seed), order in orders.items() if seed == 0 and arm not in study.FROM_SCRATCH
    )
    assert not orders["dense", 1].equal(dense)
    parent = order_of(Unit("quality", "3m", "prose", "parent_moe", None), first + 9, second + 9)
    assert len(set(parent.tolist())) == first and parent.max() < first + 9
    for arm in study.FROM_SCRATCH:
        assert orders[arm, 0].equal(torch.cat((parent, dense)))
    # a real model has no parent that saw a part, and asks for more windows than the branches' part has
    needed = study.SHAPES[study.REAL].branch_steps * ROWS
    real = {arm: order_of(Unit("real", study.REAL, "prose", arm, 1), 6000, 4874) for arm in study.REAL_ARMS}
    assert all(len(set(order.tolist())) == needed and order.equal(real["dense"]) for order in real.values())
    assert real["dense"].min() < 6000 <= real["dense"].max() < 6000 + 4874
    # moecompile's sampler reads them in this order, with the seed of any arm
    rows = torch.arange(1000, 1000 + first + second + 18).view(-1, 1).expand(-1, 5)
    split = in_order(rows, dense, seed=3)
    sampler = GlobalBatchSampler(
        len(split), global_batch_size=8, micro_batch_size=8, rank=0, world_size=1, seed=3, num_steps=2
    )
    read = [int(split[i]["input_ids"][0]) - 1000 for batch in sampler for i in batch]
    assert read == dense[:16].tolist()


def test_parts_of_a_text_share_nothing_and_blocks_are_spread() -> None:
    from quality import texts
    from quality.study import NUM_VAL, PIECE, SEQ

    lines = [f"{i} " + "a word or two " * (1 + i % 7) + "\n" for i in range(16000)]
    documents = [("one", "".join(lines[:12000])), ("two", "".join(lines[12000:]))]
    found = texts.cut(documents, vocab=300)
    assert found.val.shape == (NUM_VAL, SEQ + 1) and found.parent.shape[1] == SEQ + 1
    assert found.val_sources == sorted(found.val_sources) and set(found.val_sources) == {"one", "two"}
    decoded = [found.tokenizer.decode(part[:, :-1].flatten().tolist()) for part in (found.parent, found.branch)]
    numbers = [{int(line.split()[0]) for line in text.split("\n")[1:-1]} for text in [*decoded, *found.val_texts]]
    assert sum(map(len, numbers)) == len(set().union(*numbers))  # no line is in two parts
    held = [min(found) for found in numbers[2:]]
    gaps = [b - a for a, b in itertools.pairwise(held)]
    assert max(gaps) < 2 * min(gaps)
    assert len(decoded[0]) / sum(map(len, decoded)) == pytest.approx(0.58, abs=0.02)
    targets = [found.tokenizer.decode(row[1:].tolist()) for row in found.val]
    assert found.val_bytes == sum(len(text.encode()) for text in targets)
    assert all(PIECE <= len(text) < PIECE + 200 for text in found.val_texts)


# -- what the tables compute ----------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    from quality import tables
    from scipy import stats

    ours, theirs = [1.1, 1.3, 0.9, 1.25, 1.0], [1.2, 1.35, 1.05, 1.2, 1.1]
    found = tables.interval([a - b for a, b in zip(ours, theirs, strict=True)])
    test = stats.ttest_rel(ours, theirs)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.p == pytest.approx(test.pvalue) and found.n == 5
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_multiplier_is_read_at_a_loss_that_both_reach() -> None:
    from quality import tables

    dense = [(0.0, 4.0), (1.0, 3.0), (4.0, 2.0), (16.0, 1.0)]
    arm = [(0.0, 4.0), (1.0, 2.0), (4.0, 1.0), (16.0, 0.5)]
    assert tables.multiplier(arm, dense) == pytest.approx(4.0)  # at 1.0: 16 and 4
    assert tables.multiplier(dense, arm) == pytest.approx(1 / 4)
    assert tables.flops_at(dense, 1.5) == pytest.approx(8.0)  # half way on a logarithmic axis
    assert tables.loss_at(dense, 2.0) == pytest.approx(2.5)


def test_specialisation_is_none_for_equal_loads_and_all_for_experts_of_one_group() -> None:
    from quality import tables

    assert tables.specialisation({"l": {"a": [5, 5], "b": [50, 50]}}, str) == 0
    assert tables.specialisation({"l": {"a": [5, 0], "b": [0, 50]}, "m": {"a": [1, 1], "b": [1, 1]}}, str) == 0.5
    assert tables.specialisation({"l": {"a": [5, 0], "b": [5, 0], "c": [0, 9]}}, "c".__eq__) == pytest.approx(1.0)
    assert tables.specialisation({"l": {"a": [5, 5], "b": [5, 5], "c": [0, 9]}}, str, without="c") == 0


def test_only_arms_of_one_parent_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quality import study, tables
    from quality.study import Unit

    def result(unit: Any, end: float, parent: str | None) -> dict[str, Any]:
        routing = {"max_violation": 1.0, "max_violation_bound": 3.0, "dead_experts": {"l": [1]}, "entropy": 1.0,
                   "loads": {"l": {"faq": [1, 2], "novel": [2, 1], "python": [1, 1]}}}  # fmt: skip
        curve = [{"tokens": n, "val": end + 1 - n / 4, "val_per_byte": (end + 1 - n / 4) / 3} for n in (0, 2, 4)]
        return {
            "settings": unit.settings, "settings_hash": unit.hash, "parent_hash": parent, "order_sha256": "o",
            "text_sha256": "t", "curve": curve, "flops_per_token": {"plan": 1e6, "counter": 1e6}, "cpu_s": 1.0,
            "wall_s": 2.0, "params": {"total": 1}, "routing": None if unit.arm == "dense" else routing,
        }  # fmt: skip

    for seed, gap, parent in ((0, -0.1, "p"), (1, -0.3, "p"), (2, 9.0, "q")):
        for arm, end in (("dense", 2.0), ("copies", 2.0 + gap)):
            unit = Unit("quality", "3m", "prose", arm, seed)
            body = result(unit, end, parent if arm == "dense" else "p")
            (tmp_path / unit.path.name).write_text(json.dumps(body))
    for arm, end in (("dense", 2.0), ("copies", 1.5)):  # a real model, which has no parent of ours
        unit = Unit("real", study.REAL, "prose", arm, 0)
        (tmp_path / unit.path.name).write_text(json.dumps(result(unit, end, None)))
    found = tables.pairs(study.read_all("quality", tmp_path), "3m", "prose", "copies", "dense")
    assert [pair.seed for pair in found] == [0, 1]
    assert [pair.tokens for pair in found] == pytest.approx([-0.1, -0.3])
    assert [pair.flops for pair in found] == pytest.approx([-0.1, -0.3])
    assert all(pair.multiplier is not None and pair.multiplier > 1 for pair in found)
    from unittest import mock

    with mock.patch("sys.argv", ["tables.py", "--curves", str(tmp_path), "--out", str(tmp_path / "out")]):
        assert tables.main() == 0
    printed = capsys.readouterr().out
    half = 12.706 * math.sqrt(0.02 / 2)  # t of one degree of freedom; the variance of -0.1 and -0.3 is 0.02
    assert f"| copies - dense | -0.2000 ({-0.2 - half:+.4f} to {-0.2 + half:+.4f}) |" in printed
    assert "quality: 162 of 168 units are missing" in printed and "real: 6 of 8 units are missing" in printed
    assert "| 135m | prose | copies - dense | -0.5000 | -0.5000 | -0.1667 |  | not decided | 1 |" in printed
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_arms_are_built_from_one_dense_ffn() -> None:
    """Active parameters of every arm are those of dense, but for the router."""
    from quality import study
    from quality.models import hf_config

    for size, sizes in study.SIZES.items():
        for arm in ("copies", "virtual", "moe", "scratch"):
            config = hf_config(size, arm)
            assert config.intermediate_size * config.num_experts_per_tok == sizes.ffn
        assert "routing.top_k=4" in study.OVERRIDES["virtual"] and hf_config(size, "virtual").num_experts_per_tok == 4
