"""Described layouts: all that divide, and none that does not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from benchmarks.forecast.families import shape_of
from moecompile.compose import compose_config
from moecompile.planner.cost_model.forecast import step_of
from moecompile.planner.cost_model.inputs import Inputs, Layout, Software, machine_of
from moecompile.planner.cost_model.memory import memory_of
from moecompile.planner.search.described import Space, described, layouts, space_of
from moecompile.planner.search.found import Rejected

MODEL = shape_of(
    "tiny", {"layers": 4, "hidden": 64, "vocab": 100, "heads": 4, "kv": 2, "moe_ffn": 32, "experts": 6, "topk": 2}
)
CASE = Inputs(
    model=MODEL, layout=Layout(gpus=16, seq=64, global_batch=32), software=Software(dispatcher="dedup"),
    machine=machine_of(compose_config(["hardware=h100"]).hardware),
)  # fmt: skip
SIZES = ("tp", "pp", "cp", "ep", "etp", "zero", "micro_batch", "vpp")
SPACE = Space(
    ep=(1, 2, 3, 4), tp=(1, 2, 8), pp=(1, 2, 4, 8), cp=(1, 4, 64), micro_batch=(1, 8), zero=(1, 3), kinds=("flat", "dedup"),
    recompute={"": ()}, batch=32, ran=(1,),
)  # fmt: skip


def test_every_layout_that_divides_once() -> None:
    rejected = Rejected()
    found = {tuple(getattr(each, name) for name in SIZES) for each in layouts(CASE, SPACE, rejected)}
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
    all_of_them = list(described(CASE, SPACE, 1e12, rejected))
    limit = sorted(each.memory for each in all_of_them)[len(all_of_them) // 2]
    fitting = list(described(CASE, SPACE, limit, Rejected()))
    assert [each for each in all_of_them if each.memory <= limit] == fitting
    for each in all_of_them[::7]:
        assert each.memory == round(memory_of(MODEL, each.layout, each.software).total)
        seconds = {
            kind: sum(step_of(replace(CASE, layout=each.layout, software=Software(dispatcher=kind))).values())
            for kind in SPACE.kinds
        }
        assert each.seconds == min(seconds.values())


def test_the_space_of_a_case() -> None:
    space = space_of(CASE, 32)
    assert space.ep == [1, 2]  # divide 6 experts and 16 ranks
    assert space.pp == space.cp == [1, 2, 4, 8, 16]
    assert space.recompute == {"": ()}
    even = list(layouts(replace(CASE, software=Software(schedule="dualpipe")), SPACE, Rejected()))
    assert {each.pp for each in even} == {2, 4}
    assert {each.vpp for each in even} == {1}
