"""The nouns: placement, hash, and how a plan reads."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import FrozenInstanceError, replace

import pytest

from moecompile.errors import PlanError
from moecompile.mesh import MeshSpec
from moecompile.plan import KINDS, DispatchPlan, ExpertPlacement, Plan, Reduction, reductions
from tests.plan.plans import a_plan

# -- placement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "ep"), [(8, 1), (8, 2), (8, 8), (12, 4), (256, 64)])
def test_every_expert_is_placed_once(num_experts: int, ep: int) -> None:
    placement = ExpertPlacement(num_experts=num_experts, ep=ep)
    placed = [expert for rank in range(ep) for expert in placement.experts_of(rank)]
    assert placed == list(range(num_experts))
    assert all(expert in placement.experts_of(placement.rank_of(expert)) for expert in placed)


def test_ranks_that_hold_whole_groups() -> None:
    assert [ExpertPlacement(num_experts=8, ep=ep).has_whole(4) for ep in (1, 2, 4, 8)] == [True, True, True, False]
    assert ExpertPlacement(num_experts=8, ep=2, order=(6, 7, 0, 1, 2, 3, 4, 5)).has_whole(4)
    assert not ExpertPlacement(num_experts=8, ep=2, order=(0, 2, 1, 4, 3, 5, 6, 7)).has_whole(4)


def test_exchanges_of_each_dispatch() -> None:
    assert {kind: DispatchPlan(kind=kind).exchanges for kind in KINDS} == {
        "local": (),
        "flat": ("exchange_counts", "all_to_all", "all_to_all"),
        "dedup": ("exchange_counts", "all_to_all", "exchange_assignments", "all_to_all"),
        "hierarchical": (
            "send_counts", "send_counts", "all_to_all", "exchange_assignments", "all_to_all", "exchange_assignments",
            "all_to_all", "all_to_all",
        ),
        "allgather": (
            "exchange_counts", "all_gather", "gather_assignments", "all_gather", "gather_assignments",
            "reduce_scatter", "reduce_scatter",
        ),
    }  # fmt: skip
    assert DispatchPlan(kind="flat").axis == "ep"


def test_two_levels_have_axes_of_their_own_and_one_node_has_one_level() -> None:
    assert DispatchPlan(kind="flat").steps(2) == (
        ("exchange_counts", "ep"), ("all_to_all", "ep"), ("all_to_all", "ep"),
    )  # fmt: skip
    dispatch = DispatchPlan(kind="allgather")
    assert [axis for _, axis in dispatch.steps(2)] == [
        "ep", "ep_inter", "ep_inter", "ep_intra", "ep_intra", "ep_intra", "ep_inter",
    ]  # fmt: skip
    assert dispatch.steps(1) == (
        ("exchange_counts", "ep"), ("all_gather", "ep_intra"), ("gather_assignments", "ep_intra"),
        ("reduce_scatter", "ep_intra"),
    )  # fmt: skip


def test_two_levels_hold_for_one_number_of_nodes() -> None:
    plan = a_plan("dispatch.kind=hierarchical")
    mesh = replace(plan.mesh, num_nodes=4, ranks_per_node=1)
    message = "layers[0].placement.nodes=2: an EP group of this mesh spans 4. Plan again for this mesh."
    with pytest.raises(PlanError, match=re.escape(message)):
        replace(plan, mesh=mesh)


# -- hash ------------------------------------------------------------------------------------------------------------


def test_the_hash_is_stable() -> None:
    """Ranks and sessions compare it: it may only change with the format, together with the golden plans."""
    assert a_plan().hash == a_plan().hash == copy.deepcopy(a_plan()).hash == pickle.loads(pickle.dumps(a_plan())).hash
    assert len(a_plan().hash) == 16
    int(a_plan().hash, 16)


@pytest.mark.parametrize(
    "override",
    [
        "routing.scale=1.0", "routing.top_k=6 routing.top_groups=2 routing.max_nodes=2", "balance.rate=0.5",
        "mesh.device=cuda", "mesh.ep=2", "dispatch.kind=flat", "experts.num_routed=24", "experts.layers='1:'",
        "routing.group_score=max", "experts.init=random",
    ],
)  # fmt: skip
def test_whatever_changes_the_plan_changes_the_hash(override: str) -> None:
    assert a_plan(*override.split()).hash != a_plan().hash


@pytest.mark.parametrize("override", ["data.seq_len=64", "hardware.memory_gib=80", "trainer.max_steps=7", "seed=3"])
def test_what_does_not_change_the_plan_does_not_change_the_hash(override: str) -> None:
    assert a_plan(override).hash == a_plan().hash


def test_plans_are_frozen() -> None:
    plan = a_plan()
    with pytest.raises(FrozenInstanceError):
        plan.layers = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        plan.layers[0].routing.top_k = 1  # type: ignore[misc]


def test_layers_are_found_by_name() -> None:
    plan = a_plan()
    assert plan.layer("layers.1.mlp") is plan.layers[1]
    with pytest.raises(KeyError, match=r"layers\.2\.mlp"):
        plan.layer("layers.2.mlp")


def test_a_plan_reads_as_text() -> None:
    plan = a_plan("dispatch.kind=dedup")
    assert str(plan) == (
        f"Plan {plan.hash}: 2 MoE layers on 4 ranks, ep=4\n"
        "  layers.0.mlp: gated 16x48 -> 12 experts of 12 + shared 12, sigmoid top-3, 1 of 4 groups, dedup\n"
        "  layers.1.mlp: gated 16x48 -> 12 experts of 12 + shared 12, sigmoid top-3, 1 of 4 groups, dedup"
    )
    whole_graph = replace(plan, layers=(replace(plan.layers[0], site=replace(plan.layers[0].site, fqn="")),))
    assert "\n  <graph>: gated" in str(whole_graph)


# -- reductions ------------------------------------------------------------------------------------------------------


def by_class(mesh: MeshSpec) -> dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    """parameters -> (replicated over, sharded over, sum over)."""
    return {r.parameters: (r.replicated_over, r.sharded_over, r.sum_over) for r in reductions(mesh)}


@pytest.mark.parametrize(
    ("mesh", "dense", "router", "experts"),
    [
        (MeshSpec(), ((), (), ()), ((), (), ()), ((), (), ())),
        (
            MeshSpec(ranks_per_node=4, ep=4),
            ((), ("dp_shard",), ("dp_shard",)),
            (("dp_shard",), (), ("dp_shard",)),
            ((), ("ep",), ()),  # each rank owns other experts: the all-to-all brought the gradients
        ),
        (
            MeshSpec(ranks_per_node=4, ep=1),
            ((), ("dp_shard",), ("dp_shard",)),
            (("dp_shard",), (), ("dp_shard",)),
            ((), ("edp",), ("edp",)),
        ),
        (
            MeshSpec(num_nodes=2, ranks_per_node=2, ep=2),
            ((), ("dp_shard",), ("dp_shard",)),
            (("dp_shard",), (), ("dp_shard",)),
            ((), ("edp", "ep"), ("edp",)),
        ),
        (
            MeshSpec(num_nodes=2, ranks_per_node=2, ep=2, dp_replicate=2),
            (("dp_replicate",), ("dp_shard",), ("dp_replicate", "dp_shard")),
            (("dp_replicate", "dp_shard"), (), ("dp_replicate", "dp_shard")),
            (("dp_replicate",), ("ep",), ("dp_replicate",)),
        ),
        (
            MeshSpec(num_nodes=4, ranks_per_node=2, ep=2, dp_replicate=2),
            (("dp_replicate",), ("dp_shard",), ("dp_replicate", "dp_shard")),
            (("dp_replicate", "dp_shard"), (), ("dp_replicate", "dp_shard")),
            (("dp_replicate",), ("edp", "ep"), ("dp_replicate", "edp")),
        ),
    ],
)
def test_reductions_follow_from_the_mesh(
    mesh: MeshSpec, dense: tuple[object, ...], router: tuple[object, ...], experts: tuple[object, ...]
) -> None:
    assert by_class(mesh) == {"dense": dense, "router": router, "experts": experts}


def test_with_tensor_parallelism_a_weight_is_summed_over_tp_only_where_its_work_is_split() -> None:
    found = by_class(MeshSpec(ranks_per_node=8, ep=4, tp=2))
    assert found == {
        "dense": (("tp",), ("dp_shard",), ("dp_shard",)),  # every rank of a TP group has the whole gradient
        "dense, split over tp": ((), ("dp_shard", "tp"), ("dp_shard",)),  # tp owns it
        "norms of heads": ((), ("dp_shard", "tp"), ("dp_shard", "tp")),  # a rank sees its own heads
        "inside MoE layers": ((), ("dp_shard", "tp"), ("dp_shard", "tp")),  # a rank sees its slice of the tokens
        "router": (("dp_shard", "tp"), (), ("dp_shard",)),  # it sees all tokens, before they are cut
        "experts": ((), ("edp", "ep"), ("edp",)),
    }
    folded = by_class(MeshSpec(ranks_per_node=4, ep=4, tp=4))
    assert all(
        summed == () for name, (_, _, summed) in folded.items() if name not in ("norms of heads", "inside MoE layers")
    )
    assert folded["norms of heads"][2] == folded["inside MoE layers"][2] == ("tp",)


def test_with_context_parallelism_every_weight_is_summed_over_cp() -> None:
    assert by_class(MeshSpec(ranks_per_node=8, ep=4, cp=2)) == {
        "dense": ((), ("dp_shard", "cp"), ("dp_shard", "cp")),
        "router": (("dp_shard", "cp"), (), ("dp_shard", "cp")),
        "experts": ((), ("edp", "ep"), ("edp",)),  # the backward all-to-all brings gradients from every position
    }


def test_the_plan_holds_the_reductions_of_its_mesh() -> None:
    plan = a_plan()
    assert plan.reductions == reductions(plan.mesh)
    assert all(isinstance(reduction, Reduction) for reduction in plan.reductions)
    assert isinstance(plan, Plan)
