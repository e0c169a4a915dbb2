"""Whether and how experts are lent: slots, prices in rows, memory, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from moecompile.errors import ConfigError, PlanError
from moecompile.plan import DispatchPlan, ExpertsSite, FFNSite, LayerPlan, Plan, from_yaml, on_one_process, to_yaml
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan
from tests.tiny import config

SITE = FFNSite(
    fqn="mlp", kind="gated", d_model=64, d_ff=128, bias_up=False, bias_down=False, activation="silu, mul", index=0,
    swiglu=True,
)  # fmt: skip
# An expert has 3 * 64 * 128 = 24,576 numbers, 98,304 bytes; a row takes 3 * 2 * 24,576 operations.
EXPERT_BYTES, ROW_OPERATIONS = 98_304, 147_456
LEND = "dispatch.balance=lend"


FACTS = ModelFacts(params_total=200_000)


def plan(*overrides: str, sites: int = 1, facts: ModelFacts = FACTS) -> Plan:
    """Two ranks with four experts each; a link of 1 GB/s, a processor of 1e10 operations/s."""
    given = (
        "experts.num_routed=8", "mesh.ranks_per_node=2", "hardware.intra_node_gb_s=1", "hardware.inter_node_gb_s=0.5",
        "hardware.tflops=0.01", "data.seq_len=512", "data.micro_batch_size=1", *overrides,
    )  # fmt: skip
    layers = [dataclasses.replace(SITE, fqn=f"{i}.mlp", index=i) for i in range(sites)]
    return build_plan(layers, config(*given), facts)


def dispatch(*overrides: str) -> DispatchPlan:
    return plan(*overrides).layers[0].dispatch


def test_a_loan_costs_as_many_rows_as_are_computed_meanwhile() -> None:
    """There and back 196,608 bytes: 196.6 us within the node, in which 13.3 rows of 14.7 us are computed."""
    seconds = 2 * EXPERT_BYTES / 1e9
    row = ROW_OPERATIONS / 1e10
    assert 13 < seconds / row < 14
    planned = dispatch(LEND)
    assert (planned.balance, planned.slots, planned.loan_rows, planned.far_loan_rows) == ("lend", 2, 14, 0)
    two_nodes = dispatch(LEND, "mesh.num_nodes=2", "mesh.ranks_per_node=1")
    assert two_nodes.far_loan_rows == 27
    narrow = dispatch(LEND, "trainer.precision=bf16_params")
    assert narrow.loan_rows == 7
    stored = plan(LEND, facts=dataclasses.replace(FACTS, bytes_per_param=2)).layers[0].dispatch
    assert stored.loan_rows == 7


def test_auto_lends_where_a_loan_can_pay() -> None:
    """A rank computes 1,024 rows on average, so no loan can move more."""
    auto = "dispatch.balance=auto"
    assert dispatch(auto) == dispatch(LEND)
    assert dispatch(auto, "hardware.intra_node_gb_s=0.0138").balance == "lend"  # 966 rows
    assert dispatch(auto, "hardware.intra_node_gb_s=0.0128").balance == "none"  # 1,042 rows
    assert dispatch(auto, "dispatch.kind=allgather").balance == "none"
    assert dispatch(auto, "mesh.ranks_per_node=1") == DispatchPlan(kind="local")
    far = ("mesh.num_nodes=2", "mesh.ranks_per_node=1", "hardware.inter_node_gb_s=0.01")
    assert dispatch(auto, *far).balance == "none"
    assert dispatch(auto, "mesh.num_nodes=2", "hardware.inter_node_gb_s=0.01").balance == "lend"  # within nodes
    even = (auto, "routing.even_groups=true", "routing.groups=2")
    assert dispatch(*even).balance == "none"  # each rank has a group
    assert dispatch(*even, "mesh.ranks_per_node=4").balance == "lend"  # half of one


def test_experts_that_cannot_be_lent_are_not_by_auto() -> None:
    """Those with adapters, and those of a back end, whose exchanges do not overlap either."""
    site = ExpertsSite(
        fqn="mlp.experts", d_model=64, d_ff=128, num_experts=8, top_k=2, activation="SiLU", index=0, swiglu=True
    )
    machine = ("mesh.ranks_per_node=2", "hardware.tflops=0.01", "data.seq_len=512", "data.micro_batch_size=1")

    def of(*overrides: str) -> DispatchPlan:
        facts = ModelFacts(params_total=200_000, num_layers=1, linears={"q": (8, 8)})
        return build_plan([site], config(*machine, *overrides), facts).layers[0].dispatch

    auto, overlap = ("dispatch.balance=auto", "dispatch.overlap=auto")
    assert of(auto, overlap).balance == "lend"
    for other, fix in (
        ("adapters.kind=lora", "adapters.experts"),
        ("experts.backend=tests.backends:one", "experts.backend"),
    ):
        assert of(auto, other).balance == "none"
        with pytest.raises(ConfigError, match=rf"^dispatch.balance=lend: .* Use none or auto, or {fix}=null\.$"):
            of(LEND, other)
    slow = ("hardware.intra_node_gb_s=0.01", "data.seq_len=65536")
    assert of(overlap, *slow).overlap == "chunks"
    assert of(overlap, *slow, "experts.backend=tests.backends:one").overlap == "none"
    assert of(auto, "adapters.kind=lora", "adapters.experts=null").balance == "lend"


def test_slots_of_auto_are_at_most_what_other_ranks_have() -> None:
    assert dispatch(LEND, "experts.num_routed=2", "routing.top_k=1").slots == 1
    assert dispatch(LEND, "dispatch.slots=4").slots == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [LEND, "dispatch.slots=0"],
            "dispatch.slots=0: must be at least 1. Use 1 or more.",
        ),
        (
            [LEND, "dispatch.slots=5"],
            "dispatch.slots=5: other ranks have only 4 experts (experts.num_routed, mesh.ep). Use at most 4.",
        ),
        (
            ["dispatch.slots=2"],
            "dispatch.slots=2: needs lending, but dispatch.balance=none. Use dispatch.balance=lend, or slots=auto.",
        ),
        (
            [LEND, "mesh.ranks_per_node=1"],
            "dispatch.balance=lend: experts cannot be lent: mesh.ep=1, and no other rank could borrow. "
            "Use none or auto, or mesh.ep=2 or more.",
        ),
        (
            [LEND, "dispatch.kind=allgather"],
            "dispatch.balance=lend: experts cannot be lent: dispatch.kind=allgather gives all tokens to all ranks. "
            "Use none or auto, or dispatch.kind=dedup.",
        ),
    ],
)
def test_what_is_impossible_is_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(*overrides)
    assert str(error.value) == message


def test_a_plan_by_hand_is_checked_too() -> None:
    for wrong, message in (
        ({"kind": "allgather", "balance": "lend", "slots": 1}, "cannot be lent: dispatch.kind=allgather"),
        ({"kind": "dedup", "balance": "lend"}, "dispatch.slots=0: must be at least 1 with balance=lend, else 0"),
        ({"kind": "dedup", "slots": 1}, "dispatch.slots=1: must be at least 1 with balance=lend, else 0"),
        ({"kind": "dedup", "balance": "lend", "slots": 1, "loan_rows": -1}, "dispatch.loan_rows=-1"),
    ):
        with pytest.raises(PlanError, match=message):
            DispatchPlan(**wrong)  # type: ignore[arg-type]
    layer: LayerPlan = plan(LEND).layers[0]
    with pytest.raises(PlanError, match=r"dispatch.slots=5: other ranks have only 4 experts"):
        dataclasses.replace(layer, dispatch=dataclasses.replace(layer.dispatch, slots=5))


def test_it_is_part_of_the_plan_its_hash_and_its_exchanges() -> None:
    lent, plain = plan(LEND), plan()
    assert len({lent.hash, plain.hash, plan(LEND, "dispatch.slots=1").hash}) == 3
    assert from_yaml(to_yaml(lent)) == lent
    (layer,) = lent.layers
    assert layer.steps == plain.layers[0].steps
    assert [op for op, _ in layer.scheduled_steps] == [
        "gather_counts", "exchange_counts", "lend_experts", "all_to_all", "exchange_assignments", "all_to_all",
    ]  # fmt: skip
    assert on_one_process(lent).layers[0].dispatch == DispatchPlan(kind="local")


def test_slots_need_memory() -> None:
    """Weights of both slots in every layer until backward, and their gradients in one layer."""
    lent, plain = (plan(*overrides, sites=3).estimate for overrides in ([LEND], []))
    assert lent is not None and plain is not None and plain.lending is None and lent.lending is not None
    assert lent.lending.expert_bytes == EXPERT_BYTES
    assert lent.lending.bytes_received == 2 * EXPERT_BYTES
    assert lent.lending.slot_bytes == (3 + 1) * 2 * EXPERT_BYTES
    more = lent.memory_bytes_per_rank.dispatch - plain.memory_bytes_per_rank.dispatch
    assert more == lent.lending.slot_bytes
    full = plan(LEND, "trainer.checkpointing=full", sites=3).estimate
    assert full is not None and full.lending is not None and full.lending.slot_bytes == 2 * 2 * EXPERT_BYTES
