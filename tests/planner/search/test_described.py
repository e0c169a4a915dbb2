"""Described layouts: all that divide, and none that does not; their memory by hand, and beside published peaks whose
byte widths are known.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.forecast.families import shape_of
from moecompile.compose import compose_config
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import Inputs, Layout, Software, machine_of
from moecompile.planner.cost_model.shapes import ModelShape, with_share
from moecompile.planner.search.described import Space, described, in_flight, layouts, memory_of, space_of
from moecompile.planner.search.found import Rejected

PUBLISHED = Path(__file__).parents[3] / "benchmarks" / "published"
TINY = shape_of(
    "tiny", {"layers": 4, "hidden": 64, "vocab": 100, "heads": 4, "kv": 2, "moe_ffn": 32, "experts": 8, "topk": 2}
)
D, F, E, K, WIDTH, TOKENS = 64, 32, 8, 2, 2 * 64 + 2 * 32, 256  # WIDTH: queries, outputs, keys and values
MODEL = shape_of(
    "tiny", {"layers": 4, "hidden": 64, "vocab": 100, "heads": 4, "kv": 2, "moe_ffn": 32, "experts": 6, "topk": 2}
)
INPUTS = Inputs(
    model=MODEL, layout=Layout(gpus=16, seq=64, global_batch=32), software=Software(dispatcher="dedup"),
    machine=machine_of(compose_config(["hardware=h100"]).hardware),
)  # fmt: skip
SIZES = ("tp", "pp", "cp", "ep", "etp", "zero", "micro_batch", "vpp")
SPACE = Space(
    ep=(1, 2, 3, 4), tp=(1, 2, 8), pp=(1, 2, 4, 8), cp=(1, 4, 64), micro_batch=(1, 8), zero=(1, 3), kinds=("flat", "dedup"),
    recompute={"": ()}, batch=32, ran=((1, 1),),
)  # fmt: skip


def test_every_layout_that_divides_once() -> None:
    rejected = Rejected()
    found = {tuple(getattr(each, name) for name in SIZES) for each in layouts(INPUTS, SPACE, rejected)}
    expected, count = set(), 0
    for tp, pp, cp, ep, zero, mbs in product(SPACE.tp, SPACE.pp, SPACE.cp, SPACE.ep, SPACE.zero, SPACE.micro_batch):
        for etp, vpp in product({1, tp}, (1, 2, 4)):
            if vpp > 1 and (pp == 1 or 4 % (pp * vpp)):
                continue
            if (tp, pp, cp, etp, zero) == (1, 1, 1, 1, 3):
                continue  # it runs
            count += 1
            whole = 16 % (tp * pp * cp) == 0 and 16 % (pp * ep * etp) == 0 and 6 % ep == 0
            if whole and pp <= 4 and 4 % tp == 0 and 64 % (2 * cp) == 0 and 32 % (16 // (tp * pp * cp) * mbs) == 0:
                expected.add((tp, pp, cp, ep, etp, zero, mbs, vpp))
    assert found == expected
    assert len(found) + rejected.total == count


def test_what_fits_with_the_fastest_dispatch() -> None:
    rejected = Rejected()
    all_of_them = list(described(INPUTS, SPACE, 1e12, rejected))
    limit = sorted(each.memory for each in all_of_them)[len(all_of_them) // 2]
    fitting = list(described(INPUTS, SPACE, limit, Rejected()))
    assert [each for each in all_of_them if each.memory <= limit] == fitting
    for each in all_of_them[::7]:
        assert each.memory == round(sum(needed(MODEL, each.layout, each.software).values()))
        seconds = {
            kind: sum(step_of(replace(INPUTS, layout=each.layout, software=Software(dispatcher=kind))).values())
            for kind in SPACE.kinds
        }
        assert each.seconds == min(seconds.values())


def test_the_space_of_a_case() -> None:
    space = space_of(INPUTS, 32)
    assert space.ep == [1, 2]  # divide 6 experts and 16 ranks
    assert space.pp == space.cp == [1, 2, 4, 8, 16]
    assert space.recompute == {"": ()}
    even = list(layouts(replace(INPUTS, software=Software(schedule="dualpipe")), SPACE, Rejected()))
    assert {each.pp for each in even} == {2, 4}
    assert {each.vpp for each in even} == {1}
    split = replace(SPACE, tp=(1,), pp=(1,), cp=(4,), ran_cp=4)  # with a mesh whose cp is 4
    assert {each.zero for each in layouts(INPUTS, split, Rejected())} == {1}


def published(name: str, **more: Any) -> Any:
    configs = {e["name"]: e["config"] for e in yaml.safe_load((PUBLISHED / "published.yaml").read_text())["models"]}
    configs |= yaml.safe_load((PUBLISHED / "models.yaml").read_text())["more"]
    return shape_of(name, {**configs[name], **more})


def needed(model: ModelShape, layout: Layout, software: Software) -> dict[str, float]:
    return memory_of(Inputs(model=model, layout=layout, machine=INPUTS.machine, software=software))


def test_memory_by_hand() -> None:
    layout = Layout(gpus=8, seq=TOKENS, global_batch=16, ep=2, pp=2, zero=1)
    attention, expert = 2 * D * D + 2 * D * 2 * 16, 3 * D * F
    dense = (4 * (attention + E * D) + 2 * 100 * D) / 2
    experts = 4 * E * expert / (2 * 2)
    memory = needed(TINY, layout, Software())
    assert memory["weights"] == 2 * (dense + experts)
    assert memory["grads"] == 4 * (dense + experts)
    assert memory["optimizer"] == 12 * (dense / 4 + experts / 2)  # four replicas of dense weights, two of experts
    layer = 2 * (2 * D + WIDTH + 2 * D + K * (D + 3 * F)) + 2 * E * 4
    assert memory["activations"] == 2 * 2 * layer * TOKENS  # two layers, two micro-batches in flight
    assert memory["rows"] == 2 * TOKENS * K * D * 2
    widths = needed(TINY, layout, Software(grad_bits=16, moment_bits=16))
    assert widths["grads"] == 2 * (dense + experts)
    assert widths["optimizer"] == 8 * (dense / 4 + experts / 2)
    whole = needed(TINY, replace(layout, zero=3, ep=1, pp=1), Software())
    params = 4 * (attention + E * D + E * expert) + 2 * 100 * D
    assert whole["weights"] == 2 * (params / 8 + 2 * (attention + E * D + E * expert))
    assert whole["rows"] == 0


def test_what_is_recomputed_is_not_kept() -> None:
    layout = Layout(gpus=8, seq=TOKENS, global_batch=64, ep=8, zero=1)
    kept = {
        name: needed(TINY, layout, Software(recompute=(name,)))["activations"]
        for name in ("full", "all_but_exchanges", "moe", "attention", "layernorm", "moe_act")
    }
    everything = needed(TINY, layout, Software())["activations"]
    assert kept["full"] < kept["all_but_exchanges"] < everything
    assert everything - kept["layernorm"] == 4 * 2 * D * 2 * TOKENS
    assert everything - kept["moe_act"] == 4 * K * F * 2 * TOKENS
    assert everything - kept["attention"] == 4 * (D + WIDTH) * 2 * TOKENS
    assert kept["moe"] < everything
    # In one of four layers: it keeps its input, three keep all, and one layer is whole while it is computed again.
    quarter = needed(with_share(TINY, 0.25), layout, Software(recompute=("full",)))["activations"]
    assert quarter == everything + 2 * D * TOKENS


def test_micro_batches_in_flight() -> None:
    layout = Layout(gpus=32, seq=TOKENS, global_batch=1024, pp=4, vpp=1, zero=1)
    assert in_flight(layout, Software()) == 4
    assert in_flight(replace(layout, vpp=3), Software()) == 5
    assert in_flight(layout, Software(schedule="dualpipe")) == 5
    assert in_flight(replace(layout, pp=1), Software()) == 1
    assert in_flight(replace(layout, global_batch=16), Software()) == 2


def test_published_peaks() -> None:
    """Rows M01 and M06 of published.yaml, 1e9 bytes: fp32 states by the paper, and 16-bit ones of the recipe."""
    deepseek = needed(
        published("deepseek-v3"), Layout(gpus=256, seq=4096, global_batch=4096, ep=64, pp=4, vpp=4), Software()
    )
    assert deepseek["optimizer"] / 1e9 == pytest.approx(32.1, rel=0.01)
    assert deepseek["activations"] / 1e9 == pytest.approx(131.0, rel=0.07)
    assert sum(deepseek.values()) / 1e9 == pytest.approx(199.5, rel=0.08)
    moonlight = needed(
        published("moonlight-16b"), Layout(gpus=8, seq=4096, global_batch=4, ep=8, tp=2),
        Software(grad_bits=16, moment_bits=16),
    )  # fmt: skip
    assert sum(moonlight.values()) / 1e9 == pytest.approx(36.6, rel=0.05)
