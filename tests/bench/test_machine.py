"""The hardware file of task=bench: prices by hand, a step that is met, and a file that says the same when it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moecompile.bench import MachineCost, calibrated, cpu_parts, hardware_config, hardware_of, write_hardware
from moecompile.bench.machine import ExchangeCost, line_of
from moecompile.compose import compose_config
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.inputs import Host, Inputs, machine_of
from tests.planner.cost_model.test_host import MACHINE, MODEL, ONE, SOFTWARE

EXCHANGES = [
    ExchangeCost(kind=kind, ranks=2, bytes=size, wall_us=9.0, cpu_us=100.0 + 0.002 * size)
    for kind in ("all_to_all", "all_gather") for size in (64, 4096, 65536)
]  # fmt: skip
COST = MachineCost(
    cores=2, threads=1, products=[(16, 1.0), (64, 3.0)], grouped=[(4, 1.0), (16, 2.0)], attention_gflops=0.5,
    pass_gb_s=10.0, optimizer_ns=1.0, model_seconds=0.5, contention=[(1, 1.0), (2, 1.5)], exchanges=EXCHANGES,
)  # fmt: skip
ALONE = replace(ONE, global_batch=2)
CASE = Inputs(
    model=MODEL, layout=replace(ONE, gpus=2, ep=2), machine=replace(MACHINE, domain=2, host=None), software=SOFTWARE
)
FREE = Inputs(model=MODEL, layout=ALONE, machine=replace(MACHINE, host=None), software=SOFTWARE)


def by_hand(host: Host) -> float:
    """Seconds of one micro-batch beyond its operations: what products, attention and passes take."""
    counts = count(MODEL, ALONE, MACHINE, SOFTWARE)
    dense, grouped = counts.body.dense + counts.body.narrow + counts.head.narrow, counts.body.grouped
    passes = 2 * (counts.body.passes + counts.head.passes)  # fp32
    core = 3.5 * 32 * 2 * 2 * 2 * (8 + 8) * (16 + 1) / 2
    return dense / 2e9 + grouped / 2e9 + passes / host.passes + core / host.attention


def test_an_operation_has_the_price_of_what_is_left_and_messages_that_of_the_step() -> None:
    host, factor = calibrated(COST, FREE, CASE, step_seconds=0.76)
    assert (host.cores, host.passes, host.attention, host.optimizer) == (2, 1e10, 5e8, 1e-9)
    launches = count(MODEL, ALONE, MACHINE, SOFTWARE).body.launches
    assert host.node == pytest.approx((0.5 - by_hand(host)) / launches)
    assert sum(cpu_parts(CASE, host).values()) == pytest.approx(0.76)
    assert factor is not None and 1 < factor < 10
    ((ranks, fixed, each),) = host.messages
    assert (ranks, fixed, each) == (2.0, pytest.approx(factor * 100e-6), pytest.approx(factor * 2e-9))


@pytest.mark.parametrize(("seconds", "factor"), [(0.001, 0.1), (1e3, 10.0)])
def test_a_step_that_cannot_be_one_of_these_messages_changes_them_tenfold_at_most(
    seconds: float, factor: float
) -> None:
    assert calibrated(COST, FREE, CASE, seconds)[1] == factor


def test_one_rank_has_no_messages_to_scale() -> None:
    host, factor = calibrated(replace(COST, exchanges=[], contention=[(1, 1.0)]), FREE, FREE, 2.0)
    assert factor is None and host.messages == ()


def test_messages_are_the_line_through_what_was_measured() -> None:
    assert line_of(EXCHANGES) == [(2, pytest.approx(100.0), pytest.approx(2.0))]
    shrinking = [replace(each, cpu_us=1e3 / each.bytes) for each in EXCHANGES]
    ((_, fixed, each),) = line_of(shrinking)
    assert fixed > 0 and each == 0  # nothing is negative


def test_the_file_is_read_as_what_was_measured(tmp_path: Path) -> None:
    host, _ = calibrated(COST, FREE, CASE, step_seconds=0.76)
    content = hardware_of(COST, host, compose_config([]).hardware, local_ranks=2)
    write_hardware(tmp_path, content)
    read = compose_config(["hardware=this_machine", f"hydra.searchpath=[file://{tmp_path}]"]).hardware
    assert read.name == "this_machine" and "measured by task=bench" in read.figures.bf16_tflops.source
    assert hardware_config(content) == read
    again = machine_of(read).host
    assert again is not None
    for name in ("cores", "passes", "attention", "node", "optimizer"):
        assert getattr(again, name) == pytest.approx(getattr(host, name), rel=1e-3), name
    for name in ("products", "grouped", "contention", "messages"):
        assert [*map(tuple, getattr(again, name))] == [pytest.approx(row, rel=1e-3) for row in getattr(host, name)], (
            name
        )
    assert read.figures.latency_us.value == 9.0  # wall time of the smallest all_to_all
