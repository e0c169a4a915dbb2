"""Every rule that needs the config alone: its message, and the values next to it that pass."""

from __future__ import annotations

import dataclasses
import re

import pytest

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.schema import (
    RoutingConfig,
    accumulation_steps,
    mesh_spec,
    router_config,
    site_slice,
    validate,
    validate_transform,
)
from tests.tiny import config

TWO_NODES = ["mesh.num_nodes=2", "mesh.ranks_per_node=2"]
FOUR_NODES = ["mesh.num_nodes=4", "mesh.ranks_per_node=2", "experts.num_routed=16"]
EXPERT_CHOICE = ["routing.choice=expert", "routing.normalize=false"]
SLICES = ["experts.init=virtual_group", "experts.granularity=4"]

BROKEN: dict[str, tuple[list[str], str]] = {
    # mesh
    "pipeline": (
        ["mesh.pp=4"],
        "mesh.pp=4: stages must have equally many ranks, of whole nodes or within one (1 node x 1 rank = 1 rank). "
        "Use one of [1].",
    ),
    "context": (["mesh.cp=0"], "mesh.cp=0: must be at least 1. Give a positive number."),
    "more tp than ranks": (
        ["mesh.tp=2"], "mesh.tp=2: must divide the world size (1 node x 1 rank = 1 rank). Use one of [1]."
    ),
    "dp_shard with tp": (
        [*TWO_NODES, "mesh.tp=2", "mesh.dp_shard=4"],
        "mesh.dp_shard=4: dp_replicate * dp_shard must be the world size / tp, 1 * 4 is not 2. Use 2 or auto.",
    ),
    "device": (["mesh.device=tpu"], "mesh.device=tpu: must be cpu, cuda or auto. Use one of these."),
    "ep is a word": (["mesh.ep=most"], "mesh.ep=most: must be a number, auto or search. Give one of these."),
    "dp_shard": (
        [*TWO_NODES, "mesh.dp_shard=3"],
        "mesh.dp_shard=3: dp_replicate * dp_shard must be the world size, 1 * 3 is not 4. Use 4 or auto.",
    ),
    "dp_shard with copies": (
        [*TWO_NODES, "mesh.ep=2", "mesh.dp_replicate=2", "mesh.dp_shard=4"],
        "mesh.dp_shard=4: dp_replicate * dp_shard must be the world size, 2 * 4 is not 4. Use 2 or auto.",
    ),
    "dp_shard is a word": (
        ["mesh.dp_shard=all"], "mesh.dp_shard=all: must be a number or auto. Give a whole number or auto."
    ),
    # experts
    "no experts": (["experts.num_routed=0"], "experts.num_routed=0: must be at least 1. Use 1 or more."),
    "no slices": (["experts.granularity=0"], "experts.granularity=0: must be at least 1. Use 1 or more."),
    "fewer than no shared": (["experts.num_shared=-1"], "experts.num_shared=-1: must be at least 0. Use 0 or more."),
    "copies of slices": (
        ["experts.granularity=4"],
        "experts.init=copy: copies whole FFNs but experts.granularity=4. Use experts.init=virtual_group, or "
        "experts.granularity=1.",
    ),
    "only shared slices": (
        [*SLICES, "experts.num_shared=4"],
        "experts.num_shared=4: must leave a slice for the routed experts, experts.granularity=4. Lower it or raise "
        "experts.granularity.",
    ),
    "only shared slices beside dropped ones": (
        ["experts.init=drop", "experts.granularity=2", "experts.num_shared=2"],
        "experts.num_shared=2: must leave a slice for the routed experts, experts.granularity=2. Lower it or raise "
        "experts.granularity.",
    ),
    "half a virtual group, dropped": (
        ["experts.init=drop", "experts.granularity=3", "experts.num_routed=9"],
        "routing.top_k=2: must be a multiple of the routed slices, experts.granularity - experts.num_shared = 3. Use 3, "
        "or experts.init=random.",
    ),
    "nothing dropped": (
        ["experts.init=drop", "experts.drop_ratio=0"],
        "experts.drop_ratio=0.0: must lie in (0, 1]. Use 0.5, or another experts.init for none.",
    ),
    "more than all dropped": (
        ["experts.init=drop", "experts.drop_ratio=1.5"],
        "experts.drop_ratio=1.5: must lie in (0, 1]. Use 0.5, or another experts.init for none.",
    ),
    "half a virtual group": (
        [*SLICES, "experts.num_routed=6", "routing.top_k=4"],
        "experts.num_routed=6: must be a multiple of the routed slices, experts.granularity - experts.num_shared = 4. "
        "Use 8, or experts.init=random.",
    ),
    "top-k splits a virtual group": (
        [*SLICES, "experts.num_routed=8", "routing.top_k=6"],
        "routing.top_k=6: must be a multiple of the routed slices, experts.granularity - experts.num_shared = 4. "
        "Use 8, or experts.init=random.",
    ),
    "a routing group splits a virtual group": (
        [*SLICES, "experts.num_routed=8", "routing.top_k=4", "routing.groups=4", "routing.top_groups=2"],
        "routing.groups=4: a virtual group of 4 experts would straddle routing groups. Make experts.num_routed / "
        "routing.groups a multiple of 4.",
    ),
    "layers": (
        ["experts.layers=first"],
        "experts.layers=first: must be a Python slice over the matched sites. Use ':' for all, '1:' for all but the "
        "first, '::2' for every other.",
    ),
    # routing
    "no top-k": (["routing.top_k=0"], "routing.top_k=0: must be at least 1. Use 1 or more."),
    "too many": (
        ["routing.top_k=9"],
        "routing.top_k=9: a token cannot use more than experts.num_routed=8 experts. Use at most 8, or raise "
        "experts.num_routed.",
    ),
    "scale": (["routing.scale=0"], "routing.scale=0.0: must be positive. Use 1.0."),
    "experts over ranks": (
        [*TWO_NODES, "experts.num_routed=10"], "experts.num_routed=10: must be a multiple of mesh.ep=4. Use 8 or 12."
    ),
    "fewer experts than ranks": (
        [*TWO_NODES, "experts.num_routed=2"], "experts.num_routed=2: must be a multiple of mesh.ep=4. Use 4."
    ),
    "no groups": (["routing.groups=0"], "routing.groups=0: must be at least 1. Use 1 or more."),
    "groups is a word": (["routing.groups=few"], "routing.groups=few: must be a number or auto. Give a whole number or auto."),
    "uneven groups": (
        ["routing.groups=3"],
        "routing.groups=3: must divide experts.num_routed=8. Use a divisor of 8, or change experts.num_routed.",
    ),
    "groups that straddle nodes": (
        ["mesh.num_nodes=3", "mesh.ranks_per_node=2", "experts.num_routed=12", "routing.groups=4", "routing.top_groups=2"],
        "routing.groups=4: a group would straddle nodes: the EP group spans 3 nodes. Use a multiple of 3, or a mesh "
        "whose EP group spans a divisor of 4 nodes.",
    ),
    "groups too small for top-k": (
        ["routing.groups=4", "routing.top_groups=1", "routing.top_k=3"],
        "routing.top_k=3: only 1 groups x 2 experts = 2 experts are open to a token. Lower routing.top_k or raise "
        "routing.top_groups.",
    ),
    "no top groups": (
        ["routing.groups=4", "routing.top_groups=0"], "routing.top_groups=0: must be at least 1. Use 1 or more."
    ),
    "more groups than there are": (
        ["routing.groups=2", "routing.top_groups=3"],
        "routing.top_groups=3: there are only routing.groups=2 groups. Use at most 2.",
    ),
    "top groups without groups": (
        ["routing.top_groups=2"], "routing.top_groups=2: there are only routing.groups=1 groups. Use at most 1."
    ),
    "no nodes": (["routing.max_nodes=0"], "routing.max_nodes=0: must be at least 1. Use 1 or more."),
    "more nodes than there are": (
        [*TWO_NODES, "routing.max_nodes=3"],
        "routing.max_nodes=3: the EP group spans only 2 nodes. Use at most 2, or let the EP group span more nodes (mesh, mesh.ep).",
    ),
    "more nodes than one": (
        ["routing.max_nodes=2"],
        "routing.max_nodes=2: the EP group spans only 1 node. Use at most 1, or let the EP group span more nodes (mesh, mesh.ep).",
    ),
    "more nodes than groups": (
        [*FOUR_NODES, "routing.groups=2", "routing.max_nodes=3"],
        "routing.max_nodes=3: there are only routing.groups=2 groups. Use at most 2, or raise routing.groups.",
    ),
    "groups reach too many nodes": (
        [*FOUR_NODES, "routing.groups=8", "routing.top_groups=3", "routing.max_nodes=2"],
        "routing.top_groups=3: lets a token reach 3 nodes, but routing.max_nodes=2. Use routing.top_groups=2.",
    ),
    "all groups reach all nodes": (
        [*FOUR_NODES, "routing.groups=4", "routing.top_groups=4", "routing.max_nodes=1"],
        "routing.top_groups=4: lets a token reach 4 nodes, but routing.max_nodes=1. Use routing.top_groups=1.",
    ),
    "even groups of no slices": (
        ["routing.even_groups=true"],
        "routing.groups=auto: is the number of routed slices of an FFN with routing.even_groups=true, and here there are "
        "not several. Give the number of groups, a divisor of experts.num_routed and of routing.top_k.",
    ),
    "even groups that are all hot": (
        ["routing.even_groups=true", "routing.groups=2", "routing.workload=hot_block", "routing.hot_experts=4"],
        "routing.hot_experts=4: are whole groups of 4, of which every token takes as many with routing.even_groups=true. "
        "Use another number than 4 and its multiples, or another routing.workload.",
    ),
    "even groups of one": (
        ["routing.even_groups=true", "routing.groups=1"],
        "routing.groups=1: is no division of the experts, and routing.even_groups=true lets a token choose as many "
        "experts of every group. Use a divisor of them, or routing.even_groups=false.",
    ),
    "even groups and some closed": (
        ["routing.even_groups=true", "routing.groups=2", "routing.top_groups=1"],
        "routing.top_groups=1: closes some groups, and routing.even_groups=true lets a token choose as many experts of "
        "every group. Use 2, or routing.even_groups=false.",
    ),
    "experts that even groups do not share out": (
        ["routing.even_groups=true", "routing.groups=2", "routing.top_k=3"],
        "routing.top_k=3: is not a multiple of routing.groups=2, and routing.even_groups=true lets a token choose as "
        "many experts of every group. Use 4, or routing.even_groups=false.",
    ),
    "even groups and a hash": (
        ["routing.even_groups=true", "routing.groups=2", "routing.choice=hash"],
        "routing.choice=hash: leaves no choice to the token, and routing.even_groups=true lets a token choose as many "
        "experts of every group. Use token, or routing.even_groups=false.",
    ),
    "even groups that are no slices": (
        [*SLICES, "experts.num_routed=16", "routing.top_k=4", "routing.groups=2", "routing.even_groups=true"],
        "routing.groups=2: must be the number of routed slices, 4: with routing.even_groups=true a group is one slice. "
        "Use 4, or auto.",
    ),
    "even groups on few nodes": (
        [*TWO_NODES, "routing.even_groups=true", "routing.max_nodes=1"],
        "routing.max_nodes=1: limits a token to some groups, and routing.even_groups=true lets it choose experts of "
        "every group. Use null, or routing.even_groups=false.",
    ),
    "quantiles in even groups": (
        ["routing.groups=2", "routing.even_groups=true", "balance.rule=quantile"],
        "balance.rule=quantile: compares all of a token's experts, and routing.even_groups=true lets those of a group "
        "compete. Use balance.rule=bias, or routing.even_groups=false.",
    ),
    # router
    "capacity": (
        ["routing.capacity_factor=0"],
        "routing.capacity_factor=0: must be positive. Use 1.25, or null for dropless.",
    ),
    "endless capacity": (
        ["routing.capacity_factor=.inf"],
        "routing.capacity_factor=inf: must be a finite number. Use 1.25, or null for dropless.",
    ),
    "jitter": (["routing.jitter=1.0"], "routing.jitter=1.0: must lie in [0, 1). Use 0.01."),
    "negative jitter": (["routing.jitter=-0.1"], "routing.jitter=-0.1: must lie in [0, 1). Use 0.01."),
    "skew": (["routing.skew=0"], "routing.skew=0.0: must be positive. Use 1.0."),
    "experts choose by what is chosen": (
        [*EXPERT_CHOICE, "routing.score=softmax_after_topk"],
        "routing.score=softmax_after_topk: has no meaning where experts choose tokens. Use softmax or sigmoid, or "
        "routing.choice=token.",
    ),
    "experts choose and weights are normalised": (
        ["routing.choice=expert"],
        "routing.normalize=True: has no meaning where experts choose tokens. Use false, or routing.choice=token.",
    ),
    "experts choose within groups": (
        [*EXPERT_CHOICE, "routing.groups=4", "routing.top_groups=2"],
        "routing.top_groups=2: has no meaning where experts choose tokens. Use null, or routing.choice=token.",
    ),
    "experts choose within nodes": (
        [*TWO_NODES, *EXPERT_CHOICE, "routing.max_nodes=1"],
        "routing.max_nodes=1: has no meaning where experts choose tokens. Use null, or routing.choice=token.",
    ),
    "experts choose and a workload does": (
        [*EXPERT_CHOICE, "routing.workload=zipf"],
        "routing.workload=zipf: has no meaning where experts choose tokens. Use none, or routing.choice=token.",
    ),
    "a hash chooses within groups": (
        ["routing.choice=hash", "routing.groups=4", "routing.top_groups=2"],
        "routing.top_groups=2: has no meaning where a hash of the token id chooses. Use null, or routing.choice=token.",
    ),
    "a hash chooses within nodes": (
        [*TWO_NODES, "routing.choice=hash", "routing.max_nodes=1"],
        "routing.max_nodes=1: has no meaning where a hash of the token id chooses. Use null, or routing.choice=token.",
    ),
    "a hash chooses and a workload does": (
        ["routing.choice=hash", "routing.workload=zipf"],
        "routing.workload=zipf: has no meaning where a hash of the token id chooses. Use none, or routing.choice=token.",
    ),
    # balance
    "bias where a hash chooses": (
        ["routing.choice=hash", "balance.rule=quantile"],
        "balance.rule=quantile: has no meaning where a hash of the token id chooses: no score could move the load. "
        "Use none.",
    ),
    "quantiles of scores without bounds": (
        ["routing.score=sqrt_softplus", "balance.rule=quantile"],
        "balance.rule=quantile: needs scores in [0, 1], and those of routing.score=sqrt_softplus have no bounds. Use "
        "routing.score=sigmoid or softmax, or balance.rule=bias.",
    ),
    "quantiles within groups": (
        ["routing.groups=4", "routing.top_groups=2", "balance.rule=quantile"],
        "balance.rule=quantile: compares a token's experts, and only 2 of 4 groups are open to it. Use "
        "balance.rule=bias, or no group limit.",
    ),
    "centred without a rule": (
        ["balance.recenter=true"],
        "balance.recenter=True: centres the bias that balance.rule=bias moves, and the rule is none. Use false, or "
        "balance.rule=bias.",
    ),
    "centred quantiles": (
        ["balance.rule=quantile", "balance.recenter=true"],
        "balance.recenter=True: centres the bias that balance.rule=bias moves, and the rule is quantile. Use false, or "
        "balance.rule=bias.",
    ),
    "bias where experts choose": (
        [*EXPERT_CHOICE, "balance.rule=bias"],
        "balance.rule=bias: has no meaning where experts choose tokens: their load is even by itself. Leave it out.",
    ),
    "rate": (
        ["balance.rule=bias", "balance.rate=0"],
        "balance.rate=0.0: must be positive. Use 0.001 or balance.rule=none.",
    ),
}  # fmt: skip

PACKAGE = ["model.architecture=null", "model.package=some-package"]
ONLY_IN_TASKS: dict[str, tuple[list[str], str]] = {
    "no model": (
        ["model.architecture=null"],
        "model=null: exactly one of model.architecture, model.pretrained, model.package and model.factory must be given. Select a model "
        "group, for example model=llama_nano, or give one of the four.",
    ),
    "two models": (
        ["model.pretrained=folder"],
        "model=['architecture', 'pretrained']: exactly one of model.architecture, model.pretrained, model.package and model.factory "
        "must be given. Select a model group, for example model=llama_nano, or give one of the four.",
    ),
    "meta": (
        [*PACKAGE, "task.name=plan", "model.device=meta"],
        "model.device=meta: model.package loads values. Use model.device=cpu, or model.architecture.",
    ),
    "weights that are there": (
        [*PACKAGE, "model.init=keyed"],
        "model.init=keyed: is for models from a config, and model.package gives the weights. Leave it out, or use "
        "model.architecture.",
    ),
    "tokenizer of no model": (
        ["data.tokenizer=model"],
        "data.tokenizer=model: the model llama_nano is not pretrained, so it has no tokenizer. Use data=moby_dick, "
        "or model.pretrained or model.package.",
    ),
    "tokenizer with a size": (
        [*PACKAGE, "data.tokenizer=model"],
        "data.vocab_size=2048: data.tokenizer=model has a fixed vocabulary. Use null.",
    ),
    "tokenizer without a size": (
        ["data.vocab_size=null"],
        "data.vocab_size=null: data.tokenizer=train needs a size. Give a number, such as 2048.",
    ),
    "no files": (
        ["data.kind=corpus"],
        "data.path=null: data.kind=corpus needs files. Give a file, a folder or a pattern.",
    ),
    "chats without a template": (
        ["data.kind=sft", "data.path=x"],
        "data.tokenizer=train: chats need the chat template beside a pretrained model. Use model.",
    ),
    "chats with spans": (
        [
            *PACKAGE,
            "data.kind=sft",
            "data.path=x",
            "data.tokenizer=model",
            "data.vocab_size=null",
            "data.objective=span_corruption",
        ],
        "data.objective=span_corruption: chats are learned token by token. Use data.objective=causal.",
    ),
    "epochs": (["data.epochs=-1"], "data.epochs=-1: must be positive. Use 3, or null for trainer.max_steps."),
    "sequence": (["data.seq_len=1"], "data.seq_len=1: must be at least 2. Use 2 or more."),
    "batch": (["data.global_batch_size=0"], "data.global_batch_size=0: must be at least 1. Use 1 or more."),
    "micro-batch": (["data.micro_batch_size=0"], "data.micro_batch_size=0: must be at least 1. Use 1 or more."),
    "vocabulary": (["data.vocab_size=256"], "data.vocab_size=256: must be at least 257. Use 257 or more."),
    "validation": (["data.val_fraction=1"], "data.val_fraction=1.0: must lie in (0, 1). Use 0.05."),
    "validation batches": (["data.val_batches=-1"], "data.val_batches=-1: must be at least 0. Use 0 or more."),
    "accumulation": (
        [*TWO_NODES, "data.global_batch_size=10", "data.micro_batch_size=2"],
        "data.global_batch_size=10: must be a multiple of data.micro_batch_size * ranks = 2 * 4 = 8. Use 16.",
    ),
    "accumulation of smaller micro-batches": (
        [*TWO_NODES, "data.global_batch_size=12", "data.micro_batch_size=2"],
        "data.global_batch_size=12: must be a multiple of data.micro_batch_size * ranks = 2 * 4 = 8. Use 16, or a "
        "micro_batch_size that divides 3.",
    ),
    **{
        name: ([f"trainer.{name}=0"], f"trainer.{name}=0: must be at least 1. Use 1 or more.")
        for name in ("max_steps", "log_interval", "val_interval", "timeout_s", "threads_per_rank")
    },
    **{
        name: ([f"trainer.{name}=-1"], f"trainer.{name}=-1: must be at least 0. Use 0 or more.")
        for name in ("save_interval", "keep_last", "max_restarts")
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_of_the_transform(name: str) -> None:
    overrides, message = BROKEN[name]
    for check in (validate_transform, validate):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            check(config(*overrides))


@pytest.mark.parametrize(
    ("losses", "overrides", "message"),
    [
        ({"z": -0.1}, [], "balance.losses.z=-0.1: must not be negative. Use 0 for none."),
        (
            {"sequence": 0.1},
            EXPERT_CHOICE,
            "balance.losses.sequence=0.1: has no meaning where experts choose tokens: their load is even by itself. "
            "Leave it out.",
        ),
    ],
)
def test_a_rule_of_the_losses(losses: dict[str, float], overrides: list[str], message: str) -> None:
    given = config(*overrides)
    for name, value in losses.items():
        setattr(given.balance.losses, name, value)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate_transform(given)


@pytest.mark.parametrize("name", ONLY_IN_TASKS)
def test_a_rule_of_the_tasks(name: str) -> None:
    overrides, message = ONLY_IN_TASKS[name]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        validate(config(*overrides))
    validate_transform(config(*overrides))  # the Python API does not need it


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*SLICES, "experts.num_routed=8", "routing.top_k=8"],
        [*SLICES, "experts.num_shared=3", "experts.num_routed=5", "routing.top_k=3"],
        [*SLICES, "experts.num_routed=16", "routing.top_k=4", "routing.groups=4", "routing.top_groups=1"],
        ["experts.init=random", "experts.granularity=3", "experts.num_routed=5", "routing.top_k=5"],
        [*TWO_NODES, "mesh.dp_shard=4"],
        [*TWO_NODES, "mesh.ep=2", "mesh.dp_replicate=2", "mesh.dp_shard=2"],
        ["balance.rule=none", "balance.rate=0"],
        ["routing.max_nodes=1"],
        EXPERT_CHOICE,
        [*EXPERT_CHOICE, "routing.capacity_factor=2.0", "routing.score=sigmoid"],
        ["routing.score=softmax_after_topk", "routing.bias=true"],
        ["routing.top_k=1", "routing.normalize=false", "routing.capacity_factor=1.25", "routing.jitter=0.01"],
        [*FOUR_NODES, "routing.groups=8", "routing.top_groups=2", "routing.max_nodes=2"],
    ],
)
def test_what_is_allowed(overrides: list[str]) -> None:
    validate_transform(config(*overrides))


def test_accumulation_is_not_asked_for_by_other_tasks() -> None:
    odd = config(*TWO_NODES, "data.global_batch_size=10")
    odd.task.name = type(odd.task.name).plan
    validate(odd)


# -- groups ----------------------------------------------------------------------------------------------------------

ONE, TWO, FOUR = (MeshSpec(num_nodes=nodes, ranks_per_node=2, ep=2 * nodes) for nodes in (1, 2, 4))
FOUR_BUT_EP_IN_TWO = MeshSpec(num_nodes=4, ranks_per_node=2, ep=4)


@pytest.mark.parametrize(
    ("given", "mesh", "groups"),
    [
        ({}, FOUR, (1, 1)),
        ({"max_nodes": 2}, FOUR, (4, 2)),
        ({"max_nodes": 4}, FOUR, (4, 4)),
        ({"max_nodes": 1}, ONE, (1, 1)),
        ({"max_nodes": 1}, FOUR_BUT_EP_IN_TWO, (2, 1)),
        ({"groups": 8, "top_groups": 4}, FOUR, (8, 4)),
        ({"groups": 8}, FOUR, (8, 8)),
        ({"groups": 8, "max_nodes": 2}, FOUR, (8, 2)),
        ({"groups": 8, "top_groups": 4}, ONE, (8, 4)),  # a model of 8 groups on fewer nodes is fine
        ({"groups": 8, "top_groups": 4, "max_nodes": 2}, TWO, (8, 4)),  # 4 groups on 2 nodes reach 2 nodes
        ({"groups": 3, "top_groups": 3}, TWO, (3, 3)),  # no limit, so no group has to fit a node
        ({"groups": "8", "top_groups": 4}, TWO, (8, 4)),
    ],
)
def test_groups_belong_to_the_model_and_the_mesh_bounds_them(
    given: dict[str, int | str], mesh: MeshSpec, groups: tuple[int, int]
) -> None:
    routing = dataclasses.replace(RoutingConfig(), **given)
    router = router_config(routing, 24, mesh)
    assert (router.groups, router.top_groups) == groups


def test_auto_values_are_filled_in() -> None:
    mesh = mesh_spec(config(*TWO_NODES).mesh)
    assert (mesh.ep, mesh.dp_shard, mesh.edp) == (4, 4, 1)
    assert mesh_spec(config(*TWO_NODES, "mesh.ep='2'").mesh).ep == 2


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [([], 4), (TWO_NODES, 1), ([*TWO_NODES, "data.micro_batch_size=1"], 4), (["data.micro_batch_size=16"], 1)],
)
def test_accumulation_is_derived(overrides: list[str], steps: int) -> None:
    given = config(*overrides)
    assert accumulation_steps(given, mesh_spec(given.mesh)) == steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":", slice(None, None)),
        ("1:", slice(1, None)),
        (" 1 : 3 ", slice(1, 3)),
        ("[1:3]", slice(1, 3)),
        ("::2", slice(None, None, 2)),
        ("-1:", slice(-1, None)),
    ],
)
def test_site_slice(text: str, expected: slice) -> None:
    assert site_slice(text) == expected


@pytest.mark.parametrize("text", ["", "1", "a:b", "1:2:3:4", "::0", "1.5:"])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a Python slice over the matched sites"):
        site_slice(text)
