"""Sites of a recorded model: equal regions share a trace, and what the config asks for decides what is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.capture import record
from moecompile.errors import PlanError
from moecompile.match import sites
from moecompile.match.experts import groups_of, structure
from moecompile.match.sites import capture_regions
from moecompile.mesh import MeshSpec
from moecompile.passes.prove import unproven
from moecompile.plan import ExpertsSite
from moecompile.planner.existing import most_nodes
from tests.tiny import Gated, TinyGPT, UpDown, ids, max_diff, tiny_llama, tokens


class Limited(UpDown):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).clamp(max=self.limit))


def traces(model: nn.Module, example: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many regions were traced, and not made from another trace."""
    count = 0
    real = sites.trace_region

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return real(*args)

    monkeypatch.setattr(sites, "trace_region", counting)
    captured = capture_regions(record(model, example), unproven)
    for fqn, region in captured.regions.items():
        call = record(model, example).calls[fqn]
        assert torch.equal(region.graph(*call.args), model.get_submodule(fqn)(*call.args))
        assert all(parameter.is_meta for parameter in region.shown().parameters())
    return count


def test_layers_of_equal_structure_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces(TinyGPT(layers=4).eval(), ids(), monkeypatch) == 1
    assert traces(tiny_llama(), {"input_ids": ids()}, monkeypatch) == 1


def test_other_shapes_classes_or_numbers_get_a_trace_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Gated(), Gated(), UpDown(), Gated(d_ff=24), Limited(0.2), Limited(0.3), Limited(0.2))
    assert traces(model, tokens(), monkeypatch) == 5


def test_a_number_of_a_layer_is_its_own_whatever_its_name_and_without_values_too() -> None:
    """On the meta device a trace is used again without a comparison of values."""

    class Scaled(UpDown):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self._scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)) * self._scale)

    model = nn.Sequential(Scaled(1.0), Scaled(0.5)).to("meta")
    captured = capture_regions(record(model, tokens().to("meta")), unproven)
    products = [
        node for region in captured.regions.values() for node in region.graph.graph.nodes if "mul" in str(node.target)
    ]
    assert [node.args[1] for node in products] == [1.0, 0.5]


def test_structure_knows_plain_values_and_the_identity_of_others() -> None:
    assert structure(Limited(0.2)) == structure(Limited(0.2)) != structure(Limited(0.3))
    shared = [1]
    first, second, third = Gated(), Gated(), Gated()
    first.table = second.table = shared
    third.table = [1]
    assert structure(first) == structure(second) != structure(third)


class Router(nn.Module):
    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"num_group": 8, "topk_group": 4}, (8, 4)),
        ({"n_group": 8, "topk_group": 3}, (8, 3)),
        ({"num_group": 8, "topk_group": 8}, (1, 1)),
        ({"num_group": 1, "topk_group": 1}, (1, 1)),
        ({"num_group": 8, "topk_group": 3, "topk_method": "greedy"}, (1, 1)),
        ({"num_group": None, "topk_group": None}, (1, 1)),
        ({}, (1, 1)),
    ],
)
def test_groups_are_read_from_the_router(attributes: dict[str, object], expected: tuple[int, int]) -> None:
    block = nn.Module()
    block.experts, block.gate = nn.Linear(2, 2), Router(**attributes)
    assert groups_of(block, block.experts) == expected


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "open_groups", "nodes", "expected"),
    [
        (256, 8, 8, 4, 8, 4),  # one group a node
        (256, 8, 8, 4, 4, 4),  # two groups a node
        (256, 8, 8, 4, 2, 2),
        (256, 8, 8, 4, 16, 8),  # a group on two nodes, but only eight experts
        (256, 2, 8, 4, 8, 2),  # two experts reach two nodes
        (24, 12, 3, 2, 4, 4),  # groups of 8 on nodes of 6: 0..1, 1..2, 2..3, and two of them cover all
        (24, 12, 3, 1, 4, 2),
        (30, 10, 3, 1, 5, 3),  # groups of 10 on nodes of 6: the middle one covers three
        (30, 10, 3, 2, 5, 4),
        (8, 2, 1, 1, 4, 2),  # without groups
        (8, 8, 1, 1, 1, 1),
    ],
)
def test_the_most_nodes_that_a_token_reaches(
    experts: int, top_k: int, groups: int, open_groups: int, nodes: int, expected: int
) -> None:
    site = ExpertsSite(
        fqn="experts", d_model=8, d_ff=8, num_experts=experts, top_k=top_k, groups=groups, top_groups=open_groups,
        activation="silu", index=0,
    )  # fmt: skip
    assert most_nodes(site, MeshSpec(num_nodes=nodes, ranks_per_node=1, ep=nodes)) == expected
    assert _by_trying(site, nodes) == expected


def _by_trying(site: ExpertsSite, nodes: int) -> int:
    """All choices of open groups."""
    from itertools import combinations

    size, per_node = site.num_experts // site.groups, site.num_experts // nodes
    covered = (
        {expert // per_node for group in chosen for expert in range(group * size, (group + 1) * size)}
        for chosen in combinations(range(site.groups), site.top_groups)
    )
    return min(site.top_k, max(len(found) for found in covered))


def test_a_site_says_what_form_it_has() -> None:
    with pytest.raises(PlanError, match=r"^experts\.form=loose: must be stacked or modules\. Match the model\.$"):
        ExpertsSite(fqn="experts", form="loose", d_model=8, d_ff=8, num_experts=4, top_k=2, activation="silu", index=0)


def test_the_model_is_left_as_it_was() -> None:
    model = TinyGPT()
    wanted = model.eval()(ids())
    capture_regions(record(model, ids()), unproven)
    assert max_diff(model(ids()), wanted) == 0
