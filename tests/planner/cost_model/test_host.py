"""The time of a step on CPUs, by hand: products, nodes, exchanges, and ranks that share cores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.host import WAITING, between, host_seconds, message_seconds
from moecompile.planner.cost_model.inputs import Host, Inputs, Layout, Machine, Software, machine_of
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape
from moecompile.planner.traffic import Links

HOST = Host(
    cores=2, products=((16.0, 1e9), (64.0, 3e9)), grouped=((4.0, 1e9), (16.0, 2e9)), contention=((1.0, 1.0), (2.0, 1.5)),
    attention=5e8, passes=1e10, node=1e-5, optimizer=1e-9, messages=((2.0, 1e-3, 1e-9), (4.0, 3e-3, 2e-9)),
)  # fmt: skip
MACHINE = Machine(
    name="host", peak={32: 1e11, 16: 1e11, 8: 1e11, 4: 1e11}, watts=15, memory=1e10, passes=1e10,
    links=Links(intra=1e9, inter=1e9, latency=1e-3),
    domain=1, units=1, capacity=2**32, host=HOST,
)  # fmt: skip
SOFTWARE = Software(bits=32, dispatcher="dedup", fused=True)
MOE = Layer(
    mixer=Attention(heads=2, kv_heads=2, d_qk=8, d_v=8), ffn=Experts(experts=4, top_k=2, d_expert=32, num_in=2), count=2
)
MODEL = ModelShape(name="tiny", hidden=16, vocab=64, layers=(MOE,), tied=False)
ONE = Layout(gpus=1, seq=16, global_batch=4, micro_batch=2, zero=3)


def seconds(
    layout: Layout, software: Software = SOFTWARE, machine: Machine = MACHINE, load: float = 1.0
) -> dict[str, float]:
    return host_seconds(MODEL, layout, count(MODEL, layout, machine, software), machine, software, load)


def test_points_are_joined_in_logarithms_and_kept_beyond() -> None:
    points = ((4.0, 1.0), (16.0, 3.0), (64.0, 4.0))
    assert [between(points, at) for at in (1, 4, 8, 16, 32, 64, 1000)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 4.0]


def test_a_message_has_a_price_and_one_per_byte() -> None:
    assert message_seconds(HOST, 1, 1e6) == 0
    assert message_seconds(HOST, 2, 1e6) == pytest.approx(1e-3 + 1e-3)
    assert message_seconds(HOST, 4, 1e6) == pytest.approx(3e-3 + 2e-3)
    assert message_seconds(HOST, 8, 1e6) == pytest.approx(3e-3 * 7 / 3 + 2e-3)  # more peers, in proportion
    with pytest.raises(ConfigError, match=r"hardware.host.messages=\[\]: has no exchange, and 2 ranks exchange rows"):
        message_seconds(replace(HOST, messages=()), 2, 1.0)


def test_one_rank_by_hand() -> None:
    """Two micro-batches of 32 tokens through two layers; 32 rows run at 2e9 operations/s, 16 of an expert at 2e9."""
    parts = seconds(ONE)
    tokens, attention_weights, router, head = 32, 16 * 16 * 4, 16 * 4, 16 * 64
    assert parts["dense products"] == pytest.approx(2 * 6 * tokens * (2 * (attention_weights + router) + head) / 2e9)
    assert parts["expert products"] == pytest.approx(2 * 2 * 6 * tokens * 2 * 3 * 16 * 32 / 2e9)
    keys = (16 + 1) / 2
    assert parts["attention"] == pytest.approx(2 * 2 * 3.5 * tokens * 2 * 2 * (8 + 8) * keys / 5e8)
    params = 2 * (attention_weights + router + 4 * 3 * 16 * 32 + 2 * 16) + 2 * head
    assert parts["optimizer"] == pytest.approx(1e-9 * params, rel=0.02)  # norms
    assert parts["gradients"] == pytest.approx(2 * 12 / 28 * parts["optimizer"])  # a second micro-batch, and clipping
    assert parts["exchange"] == parts["weights"] == parts[WAITING] == parts["bubble"] == 0
    assert seconds(ONE, load=2.0)["expert products"] == pytest.approx(2 * parts["expert products"])


def test_nodes_that_one_machine_plays_share_its_cores() -> None:
    """Two ranks on two nodes of two cores; then on one machine of one core."""
    two = replace(ONE, gpus=2, ep=2)
    apart = seconds(two)
    assert apart[WAITING] == 0
    host = replace(HOST, cores=1, one_machine=True)
    parts = seconds(two, machine=replace(MACHINE, host=host))
    assert parts["optimizer"] == pytest.approx(1.5 * apart["optimizer"])  # and its caches
    assert parts[WAITING] == pytest.approx(sum(each for name, each in parts.items() if name != WAITING))


def test_exchanges_are_those_of_the_plan_and_of_fsdp() -> None:
    """dedup: four in forward and three in backward of each of two layers; FSDP: three for each layer and the root."""
    two = replace(ONE, gpus=2, ep=2)
    free = replace(HOST, messages=((2.0, 1e-3, 0.0),), contention=((1.0, 1.0),))
    parts = seconds(two, machine=replace(MACHINE, domain=2, host=free))
    assert parts["exchange"] == pytest.approx(2 * (4 + 3) * 1e-3)  # one micro-batch a rank
    assert parts["weights"] == pytest.approx(3 * (2 + 1) * 1e-3)
    again = seconds(two, replace(SOFTWARE, recompute=("full",)), replace(MACHINE, domain=2, host=free))
    assert again["exchange"] == pytest.approx(2 * (4 + 4 + 3) * 1e-3)
    kept = seconds(two, replace(SOFTWARE, recompute=("all_but_exchanges",)), replace(MACHINE, domain=2, host=free))
    assert kept["exchange"] == pytest.approx(parts["exchange"])
    assert again["host"] == pytest.approx(parts["host"] * 4 / 3) and kept["host"] == pytest.approx(parts["host"] * 2)


def test_split_weights_and_positions_exchange_rows_too() -> None:
    """tp: four for attention in each of two layers (they have no shared expert); cp: four for each attention."""
    free = replace(MACHINE, domain=2, host=replace(HOST, messages=((2.0, 1e-3, 1e-6),), contention=((1.0, 1.0),)))
    split = seconds(replace(ONE, gpus=2, tp=2), machine=free)
    assert split["context"] == split["exchange"] == 0
    assert split["tensor"] == pytest.approx(2 * 2 * 4 * (1e-3 + 1e-6 * 4 * 32 * 16 / 2))  # two micro-batches, fp32
    parts = seconds(replace(ONE, gpus=2, cp=2), machine=free)
    assert parts["tensor"] == 0
    keys = 3 * 16 * 2 * (8 + 8)  # of half of the 32 tokens, forward and twice backward
    assert parts["context"] == pytest.approx(2 * 2 * 4 * (1e-3 + 1e-6 * 4 * keys / 4))


def test_chunks_exchange_rows_more_often_and_counts_once() -> None:
    two = replace(ONE, gpus=2, ep=2)
    free = replace(MACHINE, domain=2, host=replace(HOST, messages=((2.0, 1e-3, 0.0),)))
    chunked = seconds(two, replace(SOFTWARE, in_flight="chunks", chunks=2), machine=free)
    assert chunked["exchange"] == pytest.approx(2 * (1 + 2 * 3 + 2 * 3) * 1e-3)


def test_ranks_of_a_node_slow_each_other_and_share_its_cores() -> None:
    layout = replace(ONE, gpus=4, ep=1, global_batch=8)
    alone, shared = seconds(layout), seconds(layout, machine=replace(MACHINE, domain=4))
    for name in ("dense products", "expert products", "attention", "memory passes", "host", "optimizer"):
        assert shared[name] == pytest.approx(1.5 * alone[name]), name
    assert alone[WAITING] == 0
    cpu = sum(value for name, value in shared.items() if name != WAITING)
    assert shared[WAITING] == pytest.approx(cpu * (4 / 2 - 1))


def test_a_forecast_takes_it() -> None:
    case = Inputs(model=MODEL, layout=ONE, machine=MACHINE, software=SOFTWARE)
    parts = step_of(case)
    assert parts["host"] > 0 and "gaps" not in parts and "stragglers" not in parts
    assert sum(parts.values()) == pytest.approx(sum(seconds(ONE).values()))
    assert "gaps" in step_of(replace(case, machine=replace(MACHINE, host=None)))


TABLES = [
    "hardware.host.cores=2", "hardware.host.products=[{rows:16,gflops:10},{rows:64,gflops:20}]",
    "hardware.host.grouped=[{rows:4,gflops:5}]", "hardware.host.contention=[{ranks:1,factor:1}]",
    "hardware.host.messages=[{ranks:2,fixed_us:500,byte_ns:1}]", "hardware.host.pass_gb_s.value=20",
    "hardware.host.attention_gflops.value=10", "hardware.host.node_us.value=20", "hardware.host.optimizer_ns.value=2",
]  # fmt: skip


def test_a_config_describes_it() -> None:
    host = machine_of(compose_config(TABLES).hardware).host
    assert host == Host(
        cores=2, products=((16, 1e10), (64, 2e10)), grouped=((4, 5e9),), contention=((1, 1),), attention=1e10,
        passes=2e10, node=pytest.approx(2e-5), optimizer=2e-9, messages=((2, pytest.approx(5e-4), 1e-9),),
    )  # fmt: skip
    assert machine_of(compose_config([]).hardware).host is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hardware.host.node_us.value=null", "hardware.host.node_us.value=null: is needed to predict the time of a step"),
        ("hardware.host.node_us.value=0", "hardware.host.node_us.value=0.0: must be positive"),
        ("hardware.host.products=[]", "hardware.host.products=[]: needs rows of positive numbers, with rising first ones"),
        ("hardware.host.products=[{rows:64,gflops:1},{rows:16,gflops:1}]", "Measure it with task=bench"),
        ("hardware.host.messages=[{ranks:2,fixed_us:1}]", "hardware.host.messages=[[2.0, 1.0, 0.0]]: needs rows of"),
        ("hardware.host.grouped=[{rows:4,gflops:-1}]", "hardware.host.grouped=[[4.0, -1.0]]: needs rows of positive"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_one_message(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        machine_of(compose_config([*TABLES, override]).hardware)
    assert message in str(caught.value)
