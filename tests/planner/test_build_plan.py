"""build_plan: decisions, and errors that say what to change."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError, PlanError
from moecompile.plan import FFNSite, Plan
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import build_plan, select
from moecompile.planner.existing import notes
from moecompile.schema import Config, PerLayerConfig
from tests.tiny import config

FACTS = ModelFacts(params_total=10_000)
EP4 = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]


def site(index: int, fqn: str = "", d_ff: int = 48) -> FFNSite:
    return FFNSite(
        fqn=fqn or f"model.layers.{index}.mlp", kind="gated", d_model=16, d_ff=d_ff, bias_up=False, bias_down=False,
        activation="silu, mul", index=index,
    )  # fmt: skip


SITES = [*(site(i) for i in range(4)), site(4, "encoder.mlp")]


def plan(*overrides: str, sites: list[FFNSite] | None = None) -> Plan:
    return build_plan(SITES if sites is None else sites, config(*overrides), FACTS)


def names(*overrides: str) -> list[int]:
    return [chosen.index for chosen in select(SITES, config(*overrides))]


# -- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "selected"),
    [
        ([], [0, 1, 2, 3, 4]),
        (["experts.match='*'"], [0, 1, 2, 3, 4]),
        (["experts.match=model.*"], [0, 1, 2, 3]),
        (["experts.match='*.layers.[12].mlp'"], [1, 2]),
        (["experts.match=encoder.mlp"], [4]),
        (["experts.layers='1:'"], [1, 2, 3, 4]),
        (["experts.layers='::2'"], [0, 2, 4]),
        (["experts.layers='-1:'"], [4]),
        (["experts.layers='[1:3]'"], [1, 2]),
        (["experts.layers='::-2'"], [4, 2, 0]),
        (["experts.match=model.*", "experts.layers='-1:'"], [3]),
    ],
)
def test_sites_are_selected_by_name_and_by_position(overrides: list[str], selected: list[int]) -> None:
    assert names(*overrides) == selected


def test_a_pattern_that_matches_nothing() -> None:
    message = (
        "experts.match=decoder.*: matches none of the 5 FFNs (model.layers.0.mlp, model.layers.1.mlp, "
        "model.layers.2.mlp, ...). Change the pattern."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan("experts.match=decoder.*")


def test_a_slice_that_selects_nothing() -> None:
    message = "experts.layers=7:: selects none of 5 FFNs. Use ':' for all of them."
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan("experts.layers='7:'")


def test_a_model_without_a_site_has_an_empty_plan() -> None:
    empty = plan(sites=[])
    assert empty.layers == ()
    assert empty.estimate is not None
    assert empty.estimate.params_total == 10_000


# -- decisions -------------------------------------------------------------------------------------------------------


def test_a_layer_holds_what_the_config_says() -> None:
    made = plan(
        *EP4, "experts.num_routed=12", "experts.granularity=4", "experts.num_shared=1", "experts.init=virtual_group",
        "routing.top_k=3", "routing.score=sigmoid", "routing.scale=2.5", "routing.groups=4", "routing.top_groups=1",
        "routing.group_score=topk_over_m", "routing.max_nodes=1", "balance.rule=bias", "balance.rate=0.01",
    )  # fmt: skip
    assert len(made.layers) == 5
    layer = made.layers[1]
    assert layer.site == SITES[1]
    assert vars(layer.experts) == {
        "num_routed": 12, "granularity": 4, "num_shared": 1, "d_expert": 12, "d_shared": 12, "init": "virtual_group",
        "shared_gate": False, "shared_routed": False, "num_identity": 0, "latent_size": None, "latent_norm": False, "drop_ratio": 0.0, "weight_scaling": "exact", "backend": "",
    }  # fmt: skip
    assert vars(layer.routing) == {
        "top_k": 3, "score": "sigmoid", "normalize": True, "scale": 2.5, "groups": 4, "top_groups": 1,
        "group_score": "topk_over_m", "choice": "token", "bias": False, "capacity_factor": None, "drop": "none",
        "jitter": 0.0, "workload": "none", "skew": 1.0, "hot_experts": 1, "norm": False, "expert_scale": False,
        "even_groups": False,
    }  # fmt: skip
    assert vars(layer.balance) == {
        "rule": "bias", "rate": 0.01, "update": "sign", "micro_batch": 0.0, "sequence": 0.0, "global_batch": 0.0, "z": 0.0,
        "recenter": False,
    }  # fmt: skip
    assert vars(layer.placement) == {"num_experts": 12, "ep": 4, "nodes": 2, "num_identity": 0, "order": ()}


def test_a_layer_holds_the_rest_of_the_routing_and_the_balance() -> None:
    given = config(
        "experts.num_shared=1", "experts.shared_gate=true", "routing.bias=true", "routing.capacity_factor=1.25",
        "routing.drop=score", "routing.jitter=0.01", "routing.workload=drift", "routing.skew=2.0",
        "balance.update=proportional",
    )  # fmt: skip
    given.balance.losses.micro_batch, given.balance.losses.z = 0.01, 1e-3
    layer = build_plan(SITES, given, FACTS).layers[0]
    assert layer.experts.shared_gate
    routing = layer.routing
    assert (routing.bias, routing.capacity_factor, routing.drop, routing.jitter) == (True, 1.25, "score", 0.01)
    assert (routing.workload, routing.skew, routing.dropless) == ("drift", 2.0, False)
    assert layer.balance.losses == {"micro_batch": 0.01, "z": 1e-3}
    assert layer.balance.update == "proportional"
    assert not plan("experts.shared_gate=true").layers[0].experts.shared_gate  # there is no shared expert


@pytest.mark.parametrize("kind", ["flat", "dedup", "auto"])
@pytest.mark.parametrize("limit", [[], ["routing.capacity_factor=1.25"]])
def test_expert_choice_is_planned_and_estimated(limit: list[str], kind: str) -> None:
    """Its tokens have top_k experts on average, so flat sends as many rows as with token choice."""
    chosen = [*EP4, f"dispatch.kind={kind}", *limit]
    token, expert = plan(*chosen), plan(*chosen, "routing.choice=expert", "routing.normalize=false")
    assert expert.layers[0].routing.choice == "expert"
    assert not expert.layers[0].routing.dropless
    assert expert.estimate is not None
    assert expert.estimate.memory_bytes_per_rank.total > 0
    if kind == "flat" and not limit:
        assert token.estimate is not None
        assert expert.estimate.expected_load == 1.0 < token.estimate.expected_load  # each expert gets the mean
        differ = {
            name: getattr(token.estimate, name) for name in ("memory_bytes_uneven", "expected_load", "expected_from")
        }
        assert dataclasses.replace(expert.estimate, **differ) == token.estimate


# -- per layer -------------------------------------------------------------------------------------------------------


def per_layer(**changes: dict[str, Any]) -> Config:
    """The default config with `per_layer.NAME` for each name."""
    given = config(*EP4)
    given.per_layer = {name: PerLayerConfig(**change) for name, change in changes.items()}
    return given


def test_layers_differ_in_what_is_their_own() -> None:
    given = per_layer(
        early={"layers": ":2", "experts": {"num_routed": 4}, "routing": {"top_k": 1, "capacity_factor": 1}},
        second={"match": "*.layers.1.*", "routing": {"top_k": 3}, "balance": {"losses": {"z": 0.1}, "rule": "bias"}},
        last={"match": "encoder.*", "experts": {"num_shared": 1, "granularity": 2, "init": "random"}},
    )
    layers = build_plan(SITES, given, FACTS).layers
    assert [layer.experts.num_routed for layer in layers] == [4, 4, 8, 8, 8]
    assert [layer.routing.top_k for layer in layers] == [1, 3, 2, 2, 2]  # the later change wins
    assert [layer.routing.capacity_factor for layer in layers] == [1.0, 1.0, None, None, None]
    assert [layer.routing.drop for layer in layers] == ["position", "position", "none", "none", "none"]
    assert [layer.balance.losses for layer in layers] == [
        {"micro_batch": 0.01},
        {"z": 0.1},
        *[{"micro_batch": 0.01}] * 3,
    ]
    assert [layer.balance.rate > 0 for layer in layers] == [False, True, False, False, False]
    assert [layer.experts.d_expert for layer in layers] == [48, 48, 48, 48, 24]
    assert [layer.experts.d_shared for layer in layers] == [0, 0, 0, 0, 24]
    assert given.routing.top_k == 2  # the config itself is left as it was


BROKEN_PER_LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "no such key": (
        {"routing": {"topk": 1}},
        "per_layer.odd.routing.topk=1: is not a key that a layer can have of its own. Did you mean top_k.",
    ),
    "no such loss": (
        {"balance": {"losses": {"importance": 1.0}}},
        "per_layer.odd.balance.losses.importance=1.0: is not a key that a layer can have of its own. Use one of micro_batch, "
        "sequence, global_batch, z.",
    ),
    "a word for a number": (
        {"routing": {"top_k": "two"}}, "per_layer.odd.routing.top_k=two: must be a whole number. Change the value.",
    ),
    "a fraction for a whole number": (
        {"routing": {"top_k": 1.5}}, "per_layer.odd.routing.top_k=1.5: must be a whole number. Change the value.",
    ),
    "a choice that is none": (
        {"routing": {"score": "softplus"}},
        "per_layer.odd.routing.score=softplus: must be one of ['softmax', 'sigmoid', 'softmax_after_topk', 'sqrt_softplus', "
        "'sigmoid_after_topk']. Did you mean sqrt_softplus? Use one of these; ",
    ),
    "neither a number nor null": (
        {"routing": {"capacity_factor": "much"}},
        "per_layer.odd.routing.capacity_factor=much: must be a number or null. Change the value.",
    ),
    "a number for a mapping": (
        {"balance": {"losses": 3}},
        "per_layer.odd.balance.losses=3: must be a mapping with keys of ['micro_batch', 'sequence', 'global_batch', 'z']. "
        "Change the value.",
    ),
    "of the model, not of a layer": (
        {"experts": {"layers": "1:"}},
        "per_layer.odd.experts.layers=1:: is not a key that a layer can have of its own.",
    ),
    "not a slice": ({"layers": "first"}, "per_layer.odd.layers=first: must be a Python slice over the matched sites."),
    "selects nothing": (
        {"match": "decoder.*"},
        "per_layer.odd.match=decoder.*: with layers=: selects none of the 5 rewritten layers (model.layers.0.mlp, "
        "model.layers.1.mlp, model.layers.2.mlp, ...). Change match or layers, or remove it.",
    ),
    "a rule between keys": (
        {"routing": {"top_k": 9}},
        "per_layer.odd.routing.top_k=9: a token cannot use more than experts.num_routed=8 experts. Use at most 8, or "
        "raise experts.num_routed.",
    ),
    "a rule that the change breaks from afar": (
        {"experts": {"num_routed": 6}}, "per_layer.odd.experts.num_routed=6: must be a multiple of mesh.ep=4. Use 4 or 8.",
    ),
    "a rule of the site": (
        {"experts": {"granularity": 5, "init": "random"}},
        "per_layer.odd.experts.granularity=5: must divide d_ff=48 of model.layers.0.mlp. Use a divisor of 48.",
    ),
    "a negative loss": (
        {"balance": {"losses": {"z": -1}}},
        "per_layer.odd.balance.losses.z=-1.0: must not be negative. Use 0 for none.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_PER_LAYER)
def test_a_mistake_names_its_change(name: str) -> None:
    change, message = BROKEN_PER_LAYER[name]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        build_plan(SITES, per_layer(odd=change, other={"balance": {"rate": 0.5}}), FACTS)


def test_a_mistake_of_two_changes_together_names_the_last() -> None:
    given = per_layer(few={"experts": {"num_routed": 4}}, last={"layers": ":1", "balance": {"rate": 0.5}})
    given.routing.top_k = 8
    with pytest.raises(ConfigError, match=r"^per_layer\.last\.routing\.top_k=8: a token cannot use more than"):
        build_plan(SITES, given, FACTS)


# -- expert choice sees the future --------------------------------------------------------------------------------------

EXPERT_CHOICE = ["routing.choice=expert", "routing.normalize=false"]


@pytest.mark.parametrize("causal", [False, None])
def test_expert_choice_on_a_model_that_is_not_known_to_be_causal(causal: bool | None) -> None:
    made = build_plan(SITES, config(*EXPERT_CHOICE), ModelFacts(params_total=10_000, causal=causal))
    assert made.layers[0].routing.choice == "expert"


def test_expert_choice_on_a_causal_model_must_be_asked_for() -> None:
    facts = ModelFacts(params_total=10_000, causal=True)
    message = (
        "routing.choice=expert: an expert takes its highest-scoring tokens, so the output of a token depends on later "
        "tokens, and this model is causal. Use routing.choice=token, or routing.allow_future=true."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_plan(SITES, config(*EXPERT_CHOICE), facts)
    made = build_plan(SITES, config(*EXPERT_CHOICE, "routing.allow_future=true"), facts)
    assert made.layers[0].routing.choice == "expert"
    given = config()
    given.per_layer = {"odd": PerLayerConfig(routing={"choice": "expert", "normalize": False}, layers="1:2")}
    with pytest.raises(ConfigError, match=r"^per_layer\.odd\.routing\.choice=expert"):
        build_plan(SITES, given, facts)


@pytest.mark.parametrize(
    ("overrides", "losses"),
    [
        ([], {"micro_batch": 0.01}),
        (["balance.losses.z=0.001"], {"micro_batch": 0.01, "z": 0.001}),  # which evens no load
        (["balance.losses.micro_batch=0"], {}),
        (["balance.losses.sequence=0.1"], {"sequence": 0.1}),
        (["balance.rule=none"], {}),
        (["balance.rule=quantile"], {}),
        (["routing.choice=expert", "routing.normalize=false", "routing.allow_future=true"], {}),
        (["routing.choice=hash"], {}),
    ],
)
def test_a_new_router_is_balanced_unless_the_config_says_how(overrides: list[str], losses: dict[str, float]) -> None:
    assert {tuple(layer.balance.losses.items()) for layer in plan(*overrides).layers} == {tuple(losses.items())}


def test_without_a_balance_rule_the_rate_is_zero() -> None:
    assert plan("balance.rate=0.5").layers[0].balance.rate == 0.0


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["dispatch.kind=auto"], "local"),
        (["dispatch.kind=flat"], "local"),  # with one EP rank nothing has to travel, whatever is asked for
        (["dispatch.kind=local"], "local"),
        ([*EP4, "dispatch.kind=flat"], "flat"),
        ([*EP4, "dispatch.kind=dedup"], "dedup"),
        ([*EP4, "dispatch.kind=hierarchical"], "hierarchical"),
        ([*EP4, "dispatch.kind=allgather"], "allgather"),
        (["mesh.ranks_per_node=4", "dispatch.kind=hierarchical"], "dedup"),  # on one node they are the same
        ([*EP4, "dispatch.kind=auto", "routing.top_k=4"], "dedup"),  # played nodes: their link is no slower
        ([*EP4, "dispatch.kind=auto", "routing.top_k=4", "hardware.inter_node_gb_s=1e-4"], "hierarchical"),
        (["mesh.ranks_per_node=4", "dispatch.kind=auto", "routing.top_k=2"], "dedup"),
        ([*EP4, "dispatch.kind=auto", "routing.top_k=1"], "flat"),
        ([*EP4, "mesh.ep=1", "dispatch.kind=auto"], "local"),
    ],
)
def test_dispatch(overrides: list[str], kind: str) -> None:
    assert {layer.dispatch.kind for layer in plan(*overrides).layers} == {kind}


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical", "allgather"])
def test_narrow_rows_are_planned_and_estimated(kind: str) -> None:
    auto, wide, narrow = (
        plan(*EP4, f"dispatch.kind={kind}", f"dispatch.wire_dtype={w}") for w in ("auto", "fp32", "bf16")
    )
    assert [p.layers[0].dispatch.wire_dtype for p in (auto, wide, narrow)] == ["auto", "fp32", "bf16"]
    assert auto.estimate == wide.estimate  # the model is fp32
    assert wide.estimate is not None and narrow.estimate is not None
    before, after = wide.estimate.bytes_per_token_per_layer, narrow.estimate.bytes_per_token_per_layer
    assert 0.5 < after.inter_node / before.inter_node < 0.65
    assert plan("dispatch.wire_dtype=bf16").layers[0].dispatch.wire_dtype == "auto"  # nothing travels


@pytest.mark.parametrize("kind", ["flat", "dedup", "hierarchical"])
@pytest.mark.parametrize("name", ["fp8", "fp8_128"])
def test_rows_in_eight_bits_are_planned_and_estimated(kind: str, name: str) -> None:
    wide, narrow = (plan(*EP4, f"dispatch.kind={kind}", f"dispatch.wire_dtype={w}") for w in ("bf16", name))
    assert narrow.layers[0].dispatch.wire_dtype == name
    assert wide.estimate is not None and narrow.estimate is not None
    before, after = (each.estimate.bytes_per_token_per_layer for each in (wide, narrow))
    assert 0.75 < after.inter_node / before.inter_node < 0.95  # a row has few numbers here
    assert plan(f"dispatch.wire_dtype={name}").layers[0].dispatch.wire_dtype == "auto"  # nothing travels


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["dispatch.kind=allgather"], "it gathers rows, and adds up what comes back on the way"),
        (["dispatch.kind=dedup", "dispatch.backend=tests.backends:plain"], "the back end tests.backends:plain has"),
    ],
)
def test_what_cannot_send_rows_in_eight_bits(overrides: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match=f"dispatch.wire_dtype=fp8: rows cannot be sent in eight bits: {rule}"):
        plan(*EP4, *overrides, "dispatch.wire_dtype=fp8")
    assert plan(*EP4, *overrides, "dispatch.wire_dtype=fp8_if_faster").layers[0].dispatch.wire_dtype == "auto"


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["hardware.inter_node_gb_s=0.1"], "fp8"),
        (["hardware.inter_node_gb_s=1000", "hardware.intra_node_gb_s=1000"], "auto"),  # packing takes longer
        (["hardware.inter_node_gb_s=0.1", "mesh.num_nodes=1", "mesh.ranks_per_node=4"], "auto"),
        (["hardware.inter_node_gb_s=0.1", "mesh.ep=2"], "auto"),  # its groups are on one node
        (["hardware.inter_node_gb_s=0.1", "trainer.precision=bf16_mixed"], "fp8"),
        (["hardware.inter_node_gb_s=1000", "hardware.intra_node_gb_s=1000", "trainer.precision=bf16_mixed"], "bf16"),
    ],
)
def test_eight_bits_where_nodes_are_crossed_and_it_is_faster(overrides: list[str], wanted: str) -> None:
    found = plan(*EP4, "dispatch.wire_dtype=fp8_if_faster", *overrides)
    assert {layer.dispatch.wire_dtype for layer in found.layers} == {wanted}


def test_under_autocast_rows_travel_as_experts_round_them() -> None:
    for precision, wire_dtype, wanted in (
        ("bf16_mixed", "auto", "bf16"),
        ("bf16_mixed", "fp32", "fp32"),
        ("bf16_params", "auto", "auto"),
    ):
        found = plan(*EP4, f"trainer.precision={precision}", f"dispatch.wire_dtype={wire_dtype}")
        assert found.layers[0].dispatch.wire_dtype == wanted
    wide, narrow = (
        plan(*EP4, f"trainer.precision={p}").estimate.bytes_per_token_per_layer for p in ("fp32", "bf16_params")
    )
    assert 0.5 <= narrow.inter_node / wide.inter_node < 0.55


def test_groups_resolve_to_the_nodes_once() -> None:
    routing = plan(*EP4, "routing.max_nodes=1").layers[0].routing
    assert (routing.groups, routing.top_groups) == (2, 1)
    routing = plan(*EP4).layers[0].routing
    assert (routing.groups, routing.top_groups) == (1, 1)


# -- impossible ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experts.init=random", "experts.granularity=5"],
            "experts.granularity=5: must divide d_ff=48 of model.layers.0.mlp. Use a divisor of 48.",
        ),
        (
            [*EP4, "dispatch.kind=local"],
            "dispatch.kind=local: experts are spread over mesh.ep=4 ranks. Use auto, flat or dedup.",
        ),
        ([*EP4, "experts.num_routed=6"], "experts.num_routed=6: must be a multiple of mesh.ep=4. Use 4 or 8."),
        (
            ["routing.top_k=9"],
            "routing.top_k=9: a token cannot use more than experts.num_routed=8 experts. Use at most 8, or raise "
            "experts.num_routed.",
        ),
    ],
)
def test_impossible_plans_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan(*overrides)


def test_experts_without_weights_are_not_in_even_groups() -> None:
    slices = [
        "experts.init=virtual_group",
        "experts.granularity=2",
        "experts.num_identity=4",
        "routing.even_groups=true",
    ]
    with pytest.raises(PlanError, match=r"routing.even_groups=True: is not for a router with experts.num_identity=4 "):
        plan(*slices)


def test_a_described_step_is_said_to_be_ignored_where_another_one_is_run() -> None:
    def said(*words: str) -> list[str]:
        chosen = compose_config([*words])
        return notes(build_plan([site(0)], chosen, FACTS), chosen)

    why = "task=train runs the step of data, trainer and mesh; task=plan, rehearse and search read workload"
    given = ["workload.seq_len=4096", "workload.precision=bf16_params", "workload.pp=2"]
    assert said(*given) == [f"ignored: {word} ({why})" for word in given]
    assert said("workload=olmoe") == [f"ignored: workload=olmoe ({why})"]
    assert not said() and not said("workload.seq_len=4096", "task=plan")


def test_what_only_another_setting_reads_is_said() -> None:
    given = [
        "balance.rate=0.5", "experts.drop_ratio=0.9", "routing.drop=score", "routing.skew=2", "routing.hot_experts=2"
    ]  # fmt: skip

    def said(*words: str) -> list[str]:
        chosen = compose_config([*given, *words])
        return [note.partition("=")[0] for note in notes(build_plan([site(0)], chosen, FACTS), chosen)]

    every = [f"ignored: {word.partition('=')[0]}" for word in given]
    assert said() == said("balance=aux") == every
    assert said("balance.rule=bias", "experts.init=drop") == every[2:]
    assert said("routing.capacity_factor=1.5") == [*every[:2], *every[3:]]
    groups = ["routing.group_score=max", "routing.groups=2"]
    limited = [note.replace("routing.drop", "routing.group_score") for note in every[2:3]]
    assert said(*groups) == said(*groups, "routing.even_groups=true") == [*every[:3], *limited, *every[3:]]
    assert said(*groups, "routing.top_groups=1") == every
    assert said("routing.workload=zipf") == [*every[:3], every[4]] and said("routing.workload=hot_block") == every[:4]
