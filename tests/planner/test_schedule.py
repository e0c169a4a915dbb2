"""When weights are gathered and gradients reduced: bytes and memory by hand, and what `auto` chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecompile.errors import PlanError
from moecompile.mesh import MeshSpec
from moecompile.plan import Plan, WeightTraffic, from_yaml, to_yaml
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.counts import parallel_bytes, step_bytes
from moecompile.planner.cost_model.inputs import Layout, Machine, Software
from moecompile.planner.memory import memory_of_fullest_rank
from moecompile.planner.schedule import choose, sharded, ways, weight_traffic
from moecompile.planner.traffic import Links
from tests.planner.search.test_described import TINY
from tests.planner.test_build_plan import SITES
from tests.planner.test_estimate import FACTS, RUN, layer
from tests.tiny import config

MESH = MeshSpec(ranks_per_node=4, ep=2)
LAYERS = [layer(2, "flat")]
MICRO = 6
EXPERTS, ROUTER = 4 * 384 // 2, 32  # of one rank of ep
ROOT, IN_LAYERS = 800, 1668 - 800 - 384  # outside the layers; in them, without the FFN that was replaced
ACCUMULATED = replace(RUN, accumulation=MICRO)
AUTO = replace(ACCUMULATED, reduce="auto", gather="auto", checkpointing="auto")


def test_bytes_of_a_step() -> None:
    """Of four ranks, each receives 3/4 of dense weights and 1/2 of its experts."""
    layers, root = IN_LAYERS * 3 // 4 + EXPERTS // 2, ROOT * 3 // 4
    for reduce, gather in (("last", "layer"), ("last", "step"), ("each", "layer"), ("each", "step")):
        found = weight_traffic(sharded(LAYERS, MESH, FACTS), replace(ACCUMULATED, reduce=reduce, gather=gather))
        gathered = layers + root if gather == "step" else MICRO * (2 * layers + root)
        reduced = (layers + root) * (MICRO if reduce == "each" else 1)
        assert found == WeightTraffic(gathered=4 * gathered, reduced=4 * reduced, replicas=0)


def test_replicas_sum_their_shards_once() -> None:
    mesh = replace(MESH, dp_replicate=2)
    each, last = (
        weight_traffic(sharded(LAYERS, mesh, FACTS), replace(ACCUMULATED, reduce=when)) for when in ("each", "last")
    )
    own = (ROOT + IN_LAYERS) // 2 + EXPERTS
    assert each.replicas == last.replicas == 4 * own


def test_one_rank_has_one_way() -> None:
    run = replace(AUTO, checkpointing="none")
    assert [(each.reduce, each.gather) for each in ways(None, run)] == [("last", "layer")]


def test_memory_of_each_way() -> None:
    """Gradients are a rank's shards, a whole layer, its head's and a buffer of its experts, which are reduced first,
    instead of all; weights are all of them, instead of a layer.
    """
    own = (ROOT + IN_LAYERS) // 4 + EXPERTS // 2
    of_layer, every = ROOT + IN_LAYERS // 2 + EXPERTS, ROOT + IN_LAYERS + EXPERTS
    assert FACTS.num_layers == 2
    for gather, whole in (("layer", of_layer), ("step", every)):
        for reduce, grads in (("last", every), ("each", own + of_layer + EXPERTS)):
            run = replace(ACCUMULATED, reduce=reduce, gather=gather)
            found = memory_of_fullest_rank(LAYERS, MESH, FACTS, run)
            assert found.grads == 4 * (grads + ROUTER)
            assert found.weights == 4 * (own + whole + ROUTER)


def test_bf16_weights_have_gradients_in_fp32_beside_them() -> None:
    facts = replace(FACTS, bytes_per_param=2)
    run = replace(ACCUMULATED, reduce="each", compute_bytes=2)
    own, dense = (ROOT + IN_LAYERS) // 4 + EXPERTS // 2, IN_LAYERS // 2
    sums, shards, reduced = 4 * (own + ROUTER), 2 * dense // 4, 4 * (EXPERTS + EXPERTS // 2) + 2 * EXPERTS // 2
    assert memory_of_fullest_rank(LAYERS, MESH, facts, run).grads == sums + shards + 2 * (ROOT + dense) + reduced


def test_the_fewest_bytes_come_first_and_keep_exchanges_before_full() -> None:
    tried = [(each.checkpointing, each.reduce, each.gather) for each in ways(sharded(LAYERS, MESH, FACTS), AUTO)]
    synced = [("last", "step"), ("each", "step"), ("last", "layer"), ("each", "layer")]
    assert tried == [(again, *way) for again in ("keep_exchanges", "full") for way in synced]
    once = ways(sharded(LAYERS, MESH, FACTS), replace(AUTO, accumulation=1, checkpointing="none"))
    assert [(each.reduce, each.gather) for each in once][:2] == [("last", "step"), ("each", "step")]
    fixed = replace(AUTO, checkpointing="none", reduce="each", gather="layer")
    assert ways(sharded(LAYERS, MESH, FACTS), fixed) == [fixed]


def test_the_first_that_fits_is_chosen_else_the_least() -> None:
    tried = ways(sharded(LAYERS, MESH, FACTS), AUTO)
    sizes = (9.0, 7.0, 8.0, 5.0, 6.0, 4.0, 4.5, 3.0)
    found = [
        tried.index(choose(tried, lambda each: sizes[tried.index(each)], limit)) for limit in (9, 8.5, 6.5, 4.2, 1)
    ]
    assert found == [0, 1, 3, 5, 7]


def test_a_plan_keeps_what_was_chosen_and_knows_its_words() -> None:
    def planned(*overrides: str) -> Plan:
        return build_plan(SITES, config(*overrides), ModelFacts(params_total=100_000, num_layers=5))

    batch = ["mesh.ranks_per_node=2", "mesh.ep=2", "data.micro_batch_size=1", "data.global_batch_size=16"]
    made = planned(*batch)
    assert (made.reduce, made.gather) == ("last", "step")
    given = planned(*batch, "trainer.reduce=each", "trainer.gather=layer")
    assert (given.reduce, given.gather) == ("each", "layer") and given.hash != made.hash
    assert from_yaml(to_yaml(given)) == given
    assert made.estimate is not None and made.estimate.checkpointing == "keep_exchanges"
    tight = made.estimate.memory_bytes_uneven - 1
    smaller = planned(*batch, f"hardware.memory_gib={tight / 2**30:.12f}")
    assert smaller.estimate is not None and smaller.estimate.fits == "yes"
    assert (smaller.reduce, smaller.gather) != ("last", "step")
    with pytest.raises(PlanError, match=r"^reduce=sometimes: must be each or last\. Use one of these"):
        replace(made, reduce="sometimes")


def test_the_forecast_counts_the_same_ways() -> None:
    machine = Machine(
        name="any", peak={16: 1.0}, watts=1.0, memory=1.0, passes=1.0, links=Links(intra=1.0, inter=1.0), domain=64,
        units=1, capacity=1.0,
    )  # fmt: skip
    layout = Layout(gpus=4, seq=16, global_batch=4 * MICRO, zero=3)
    for reduce, gather in (("last", "layer"), ("last", "step"), ("each", "layer"), ("each", "step")):
        way = replace(layout, reduce=reduce, gather=gather)
        micro, step = (
            parallel_bytes(TINY, way, machine, Software()).gathered.intra,
            step_bytes(TINY, way, machine, Software()).reduced,
        )
        once = step_bytes(TINY, replace(layout, zero=1), machine, Software()).reduced.intra / 6  # a byte of a weight
        assert micro == pytest.approx(once * ((4 if gather == "layer" else 0) + (4 if reduce == "each" else 0)))
        assert step.intra == pytest.approx(once * ((2 if gather == "step" else 0) + (4 if reduce == "last" else 0)))
        fp32 = parallel_bytes(TINY, way, machine, Software(wide_bytes=4)).gathered.intra
        assert fp32 - micro == pytest.approx(once * (4 if gather == "layer" else 0))
