"""rewrite in its own notation: Before graph, Expected graph."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.errors import PassError
from moecompile.match.linears import common_owner
from moecompile.match.regions import Region
from moecompile.nn import Experts, Router, SharedExperts
from moecompile.passes.rewrite import Rewrite
from moecompile.plan import LayerPlan
from moecompile.routing import BalanceSpec, RouterConfig
from tests.tiny import (
    COPY4,
    PLAIN_ROUTING,
    Gated,
    UpDown,
    config,
    max_diff,
    only_region,
    passed,
    plan_for,
    text,
    tokens,
    trace,
)


def rewrite(module: nn.Module, overrides: Sequence[str] = COPY4) -> tuple[fx.GraphModule, fx.GraphModule, LayerPlan]:
    """(before, after, layer) of the module's only FFN."""
    region = only_region(module)
    (layer,) = plan_for(module, overrides).layers
    return region.graph, passed(region, layer, Rewrite()).graph, layer


def as_region(graph_module: fx.GraphModule) -> Region:
    """A graph that is no longer what was matched, for what contracts say of it."""
    return only_region(Gated()).with_graph(graph_module)


class InALayer(nn.Module):
    """A residual layer whose FFN has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.Linear(8, 8), UpDown()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_gated() -> None:
    before, after, _ = rewrite(Gated())
    assert text(before) == (
        "%0 = placeholder x\n"
        "%1 = gate[Linear](%0)\n"
        "%2 = silu(%1, inplace=False)\n"
        "%3 = up[Linear](%0)\n"
        "%4 = mul(%2, %3)\n"
        "%5 = down[Linear](%4)\n"
        "output(%5)\n"
    )
    assert text(after) == (
        "%0 = placeholder x\n"
        "%1 = moecompile.flatten_tokens(%0)\n"
        "%2 = router[Router](%0)\n"
        "%3 = getitem(%2, 0)\n"
        "%4 = getitem(%2, 1)\n"
        "%5 = moecompile.permute(%1, %4, 4)\n"
        "%6 = getitem(%5, 0)\n"
        "%7 = getitem(%5, 1)\n"
        "%8 = getitem(%5, 2)\n"
        "%9 = experts[Experts](%6, %8)\n"
        "%10 = moecompile.unpermute(%9, %7, %3)\n"
        "%11 = moecompile.unflatten_tokens(%10, %0)\n"
        "output(%11)\n"
    )
    assert text(after.experts.activation) == (
        "%0 = placeholder gate\n%1 = placeholder up\n%2 = silu(%0, inplace=False)\n%3 = mul(%2, %1)\noutput(%3)\n"
    )


def test_values_have_names_for_people() -> None:
    _, after, _ = rewrite(Gated())
    assert [node.name for node in after.graph.nodes][1:12] == [
        "flatten_tokens", "router", "weights", "ids", "permute", "rows", "order", "counts", "experts", "unpermute",
        "unflatten_tokens",
    ]  # fmt: skip


def test_shared_experts_beside_the_routed_ones_in_a_layer() -> None:
    overrides = [
        "experts.init=virtual_group", "experts.granularity=4", "experts.num_shared=1", "experts.num_routed=6",
        "routing.top_k=3",
    ]  # fmt: skip
    before, after, _ = rewrite(InALayer(), overrides)
    assert text(before) == (
        "%0 = placeholder x\n"
        "%1 = norm[Linear](%0)\n"
        "%2 = mlp.up[Linear](%1)\n"
        "%3 = relu(%2, inplace=False)\n"
        "%4 = mlp.down[Linear](%3)\n"
        "%5 = add(%0, %4)\n"
        "output(%5)\n"
    )
    assert text(after) == (
        "%0 = placeholder x\n"
        "%1 = norm[Linear](%0)\n"
        "%2 = moecompile.flatten_tokens(%1)\n"
        "%3 = mlp.router[Router](%1)\n"
        "%4 = getitem(%3, 0)\n"
        "%5 = getitem(%3, 1)\n"
        "%6 = mlp.shared_experts[SharedExperts](%1)\n"
        "%7 = moecompile.permute(%2, %5, 6)\n"
        "%8 = getitem(%7, 0)\n"
        "%9 = getitem(%7, 1)\n"
        "%10 = getitem(%7, 2)\n"
        "%11 = mlp.experts[Experts](%8, %10)\n"
        "%12 = moecompile.unpermute(%11, %9, %4)\n"
        "%13 = moecompile.unflatten_tokens(%12, %1)\n"
        "%14 = aten.add.Tensor(%13, %6)\n"
        "%15 = add(%0, %14)\n"
        "output(%15)\n"
    )


def test_the_input_keeps_its_graph_its_code_and_its_weights() -> None:
    region = only_region(Gated())
    before = region.graph
    (layer,) = plan_for(Gated()).layers
    graph, code = text(before), before.code
    state = {name: value.clone() for name, value in before.state_dict().items()}
    wanted = before(tokens())
    passed(region, layer, Rewrite())
    assert (text(before), before.code) == (graph, code)
    assert all(torch.equal(before.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(before(tokens()), wanted)


def test_modules_have_the_planned_sizes() -> None:
    overrides = [
        "experts.init=random", "experts.granularity=4", "experts.num_shared=2", "experts.num_routed=8", "routing.top_k=3",
        "routing.score=sigmoid", "routing.scale=2.5", "routing.normalize=false", "routing.groups=4",
        "routing.top_groups=2", "routing.group_score=max",
    ]  # fmt: skip
    _, after, _ = rewrite(UpDown(), overrides)
    router, experts, shared = after.router, after.experts, after.shared_experts
    assert isinstance(router, Router)
    assert isinstance(experts, Experts)
    assert isinstance(shared, SharedExperts)
    assert router.num_experts == 8
    assert router.config == RouterConfig(
        top_k=3, score="sigmoid", normalize=False, scale=2.5, groups=4, top_groups=2, group_score="max"
    )
    shapes = {name: tuple(p.shape) for name, p in after.named_parameters()}
    assert shapes == {
        "router.weight": (8, 8), "experts.up_proj": (8, 4, 8), "experts.up_proj_bias": (8, 4),
        "experts.down_proj": (8, 8, 4), "experts.down_proj_bias": (8, 8), "shared_experts.up_proj.weight": (8, 8),
        "shared_experts.up_proj.bias": (8,), "shared_experts.down_proj.weight": (8, 8),
        "shared_experts.down_proj.bias": (8,),
    }  # fmt: skip


def test_the_router_gets_every_setting_of_the_plan() -> None:
    overrides = [
        *COPY4, "routing.bias=true", "routing.capacity_factor=1.5", "routing.drop=score", "routing.jitter=0.1",
        "routing.workload=zipf", "routing.skew=0.5", "balance.rule=bias", "balance.rate=0.25",
        "balance.update=proportional", "mesh.num_nodes=2", "mesh.ranks_per_node=2", "experts.num_shared=1",
        "experts.shared_gate=true",
    ]  # fmt: skip
    _, after, _ = rewrite(Gated(), overrides)
    router = after.router
    assert router.bias is not None
    assert router.config == RouterConfig(
        **PLAIN_ROUTING, bias=True, capacity_factor=1.5, drop="score", jitter=0.1, workload="zipf", skew=0.5
    )
    assert (router.balance, router.meter.num_nodes) == (BalanceSpec(rule="bias", rate=0.25, update="proportional"), 2)
    assert after.shared_experts.gate_weight.shape == (1, 8)
    losses = {"micro_batch": 0.1, "z": 0.01}
    (layer,) = plan_for(Gated()).layers
    layer = dataclasses.replace(layer, balance=dataclasses.replace(layer.balance, **losses))
    assert passed(only_region(Gated()), layer, Rewrite()).graph.router.losses == losses


DROPPING = {
    "capacity": ["routing.capacity_factor=1.0"],
    "expert choice": ["routing.choice=expert", "routing.normalize=false"],
}


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("dispatch", ["flat", "dedup"])
def test_where_assignments_are_dropped_the_graph_says_so(name: str, dispatch: str) -> None:
    overrides = [*COPY4, *DROPPING[name], "mesh.ranks_per_node=2", f"dispatch.kind={dispatch}"]
    _, after, _ = rewrite(Gated(), overrides)
    assert "moecompile.permute(%1, %4, 4, False)" in text(after)
    lowered = text(moecompile.transform(trace(Gated()), config(*overrides)))
    assert ("moecompile.permute(%1, %4, 4, False, " in lowered) == (
        dispatch == "flat"
    )  # with the table of the exchange


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_keep_the_dtype_and_the_router_is_at_least_fp32(dtype: torch.dtype) -> None:
    _, after, _ = rewrite(Gated().to(dtype))
    assert after.experts.down_proj.dtype == dtype
    assert after.router.weight.dtype == torch.promote_types(dtype, torch.float32)


def test_on_the_meta_device_nothing_is_filled() -> None:
    _, after, _ = rewrite(Gated().to("meta"))
    assert all(p.is_meta for p in after.parameters())


class OwnWeights(nn.Module):
    """An FFN whose weights are parameters of the layer itself, beside one that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8, 16))
        self.gain, self.router = nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(F.linear(F.relu(F.linear(x, self.up)), self.down)) * self.gain


def test_dense_weights_are_gone_whatever_held_them() -> None:
    _, after, _ = rewrite(OwnWeights())
    assert set(dict(after.named_parameters())) == {
        "gain", "router.weight", "router.bias", "router_1.weight", "experts.up_proj", "experts.down_proj",
    }  # fmt: skip
    assert isinstance(after.router_1, Router)  # the name `router` was taken


class OwnPermute(nn.Module):
    """torch's permute is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = UpDown()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x.permute(0, 1)).permute(0, 1)


def test_the_permute_of_torch_is_not_ours() -> None:
    model = OwnPermute()
    _, after, _ = rewrite(model)
    assert max_diff(after(tokens()), model(tokens())) <= 1e-5


class InPlace(nn.Module):
    """In-place methods whose results nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = UpDown()

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2.0
        h.add_(1.0)
        out = self.ffn(h)
        out.mul_(3.0)
        return out


@pytest.mark.parametrize("mesh", [[], ["mesh.ranks_per_node=2"]], ids=["local", "lowered"])
def test_in_place_writes_around_the_ffn_survive(mesh: list[str]) -> None:
    model = InPlace()
    _, after, _ = rewrite(model)
    assert max_diff(after(tokens()), model(tokens())) <= 1e-5
    lowered = moecompile.transform(trace(model), config(*COPY4, *mesh))
    methods = [node.target for node in lowered.graph.nodes if node.op == "call_method"]
    assert methods == ["add_", "mul_"]


class WritesItsInput(nn.Module):
    """The input is changed in place after the up projection has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        h = self.up(x)
        x.mul_(2.0)
        return self.down(F.relu(h)) + x


def test_the_experts_read_the_input_when_the_ffn_did() -> None:
    model = WritesItsInput()
    _, after, _ = rewrite(model)
    assert max_diff(after(tokens()), model(tokens())) <= 1e-5


def test_flags_of_modules_that_stay_are_kept_and_new_ones_follow_the_region() -> None:
    model = InALayer()
    model.norm.eval()
    _, after, _ = rewrite(model)
    assert after.training
    assert after.mlp.router.training
    assert after.mlp.experts.activation.training
    assert not model.norm.training
    _, after, _ = rewrite(InALayer().eval())
    assert not after.mlp.router.training


def test_the_activation_is_a_copy_with_dropout_that_follows_the_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 8))
    _, after, _ = rewrite(model)
    (dropout,) = (m for m in after.modules() if isinstance(m, nn.Dropout))
    assert dropout is not model[1]
    assert not torch.equal(after(tokens()), after(tokens()))
    after.eval()
    assert torch.equal(after(tokens()), after(tokens()))


def test_the_seed_and_the_site_draw_the_router() -> None:
    def weight(seed: int, index: int) -> Tensor:
        (layer,) = plan_for(Gated()).layers
        layer = dataclasses.replace(layer, site=dataclasses.replace(layer.site, index=index))
        return passed(only_region(Gated()), layer, Rewrite(seed=seed)).graph.router.weight

    assert torch.equal(weight(1, 0), weight(1, 0))
    assert not torch.equal(weight(1, 0), weight(2, 0))
    assert not torch.equal(weight(1, 0), weight(1, 1))


def test_the_global_random_state_is_not_moved() -> None:
    overrides = ["experts.init=random", "experts.num_shared=1"]
    (layer,) = plan_for(UpDown(), [*COPY4, *overrides]).layers
    region, state = only_region(UpDown()), torch.get_rng_state()
    passed(region, layer, Rewrite())
    assert torch.equal(torch.get_rng_state(), state)


# -- contract --------------------------------------------------------------------------------------------------------


def test_rewriting_twice_is_refused() -> None:
    _, after, layer = rewrite(Gated())
    message = "pass rewrite, the graph: the graph is rewritten already, it holds ['flatten_tokens', 'permute', "
    message += "'unpermute', 'unflatten_tokens']"
    with pytest.raises(PassError, match=re.escape(message)):
        Rewrite().requires(as_region(after), [layer])


@pytest.mark.parametrize(
    ("op", "message"), [("permute", "0 permute nodes for 1 layers"), ("unpermute", "0 unpermute nodes for 1 layers")]
)
def test_a_graph_that_lost_a_node_is_noticed(op: str, message: str) -> None:
    _, after, layer = rewrite(Gated())
    (node,) = (n for n in after.graph.nodes if n.name == op)
    if op == "permute":  # the experts read the tokens as they are
        for user in list(node.users):
            user.replace_all_uses_with(node.args[0])
            after.graph.erase_node(user)
    else:
        node.replace_all_uses_with(node.args[0])
    after.graph.erase_node(node)
    with pytest.raises(PassError, match=message):
        Rewrite().ensures(as_region(after), as_region(after), [layer])


def test_experts_that_are_missing_are_noticed() -> None:
    _, after, layer = rewrite(Gated())
    after.experts = nn.Identity()
    with pytest.raises(PassError, match="0 experts calls, planned are 1"):
        Rewrite().ensures(as_region(after), as_region(after), [layer])


@pytest.mark.parametrize(
    ("paths", "owner"),
    [
        (["mlp.up.weight", "mlp.down.weight"], "mlp"),
        (["a.b.up.weight", "a.c.down.weight"], "a"),
        (["up.weight", "down.weight"], ""),
        (["w1", "w2"], ""),
        (["a.w1", "a.w2"], "a"),
        (["a.b.weight"], "a.b"),
        (["a.weight", "ab.weight"], ""),
    ],
)
def test_common_owner(paths: list[str], owner: str) -> None:
    assert common_owner(paths) == owner
