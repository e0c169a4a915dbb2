"""What is an FFN and what is none, by dataflow: in graphs from fx, and in recorded forwards."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moecompile
from moecompile.capture import record
from moecompile.passes.match import FFNMatch, GraphView, NearMiss, find_ffns
from tests.models import COPY4, Gated, TinyGPT, UpDown, config, ids, max_diff, tokens, trace

D, FF = 8, 16


class Linears(nn.Module):
    """Linears named a, b, c, ... with these (in, out) widths; `forward` is given as a function."""

    def __init__(
        self, forward: Callable[[nn.Module, Tensor], Tensor], *widths: tuple[int, int], bias: bool = True
    ) -> None:
        super().__init__()
        for name, (d_in, d_out) in zip("abcdef", widths, strict=False):
            self.add_module(name, nn.Linear(d_in, d_out, bias=bias))
        self.drop, self.act = nn.Dropout(0.1), nn.SiLU()
        self.scale = nn.Parameter(torch.ones(FF))
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


UP, DOWN = (D, FF), (FF, D)


def in_fx(model: nn.Module) -> tuple[list[FFNMatch], list[NearMiss]]:
    graph_module = fx.symbolic_trace(model)
    return find_ffns(GraphView(graph_module.graph, graph_module))


def in_recording(model: nn.Module) -> tuple[list[FFNMatch], list[NearMiss]]:
    return find_ffns(GraphView(record(model, tokens()).graph, model))


BOTH = pytest.mark.parametrize("find", [in_fx, in_recording], ids=["fx", "recorded"])


# -- FFNs ------------------------------------------------------------------------------------------------------------


def gelu_by_hand(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


class Functional(nn.Module):
    """Parameters of its own, and F.linear in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(FF, D)), nn.Parameter(torch.randn(FF))
        self.w2 = nn.Parameter(torch.randn(D, FF))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, weight=self.w1, bias=self.b1)
        return F.linear(input=F.gelu(h, approximate="tanh"), weight=self.w2)


class HalfFunctional(UpDown):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.linear(x, self.up.weight, self.up.bias).relu())


FFNS: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {
    "up-down": ("up_down", "relu", UpDown),
    "no bias": ("up_down", "relu", lambda: UpDown(bias=False)),
    "gated": ("gated", "silu, mul", Gated),
    "gate second": ("gated", "silu, mul", lambda: Linears(lambda m, x: m.c(m.b(x) * F.silu(m.a(x))), UP, UP, DOWN)),
    "bilinear sigmoid": (
        "gated", "sigmoid, mul", lambda: Linears(lambda m, x: m.c(torch.sigmoid(m.a(x)) * m.b(x)), UP, UP, DOWN)
    ),
    "tanh gelu by hand": (
        "up_down", "mul, pow, add, tanh", lambda: Linears(lambda m, x: m.b(gelu_by_hand(m.a(x))), UP, DOWN)
    ),
    "erf gelu by hand": (
        "up_down", "",
        lambda: Linears(lambda m, x: m.b((h := m.a(x)) * 0.5 * (1.0 + torch.erf(h / 2**0.5))), UP, DOWN),
    ),
    "quick gelu": (
        "up_down", "mul, sigmoid", lambda: Linears(lambda m, x: m.b((h := m.a(x)) * torch.sigmoid(1.702 * h)), UP, DOWN)
    ),
    "squared relu": ("up_down", "relu, square", lambda: Linears(lambda m, x: m.b(F.relu(m.a(x)).square()), UP, DOWN)),
    "squared relu as a product": (
        "up_down", "relu, mul", lambda: Linears(lambda m, x: m.b((r := torch.relu(m.a(x))) * r), UP, DOWN)
    ),
    "square alone": ("up_down", "mul", lambda: Linears(lambda m, x: m.b((h := m.a(x)) * h), UP, DOWN)),
    "dropout module inside": (
        "up_down", "", lambda: Linears(lambda m, x: m.b(m.drop(m.act(m.a(x)))), UP, DOWN)
    ),
    "functional dropout inside": (
        "up_down", "dropout, relu",
        lambda: Linears(lambda m, x: m.b(F.relu(F.dropout(m.a(x), 0.1, m.training))), UP, DOWN),
    ),
    "activation in fp32": (
        "gated", "", lambda: Linears(lambda m, x: m.c((F.silu((g := m.a(x)).float()) * m.b(x)).to(g.dtype)), UP, UP, DOWN)
    ),
    "clamped": (
        "gated", "clamp, silu, mul",
        lambda: Linears(lambda m, x: m.c(F.silu(m.a(x).clamp(max=7.0)) * m.b(x).clamp(-7.0, 7.0)), UP, UP, DOWN),
    ),
    "shifted and scaled": (
        "gated", "", lambda: Linears(lambda m, x: m.c(F.silu(m.a(x)) * (m.b(x) + 1.0) * 0.5), UP, UP, DOWN)
    ),
    "sequential": ("up_down", "", lambda: nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D))),
    "sequential with dropout": (
        "up_down", "", lambda: nn.Sequential(nn.Linear(D, FF), nn.Mish(), nn.Dropout(), nn.Linear(FF, D, bias=False))
    ),
    "functional with parameters": ("up_down", "gelu", Functional),
    "half functional": ("up_down", "relu", HalfFunctional),
    "in-place activation": (
        "up_down", "relu", lambda: Linears(lambda m, x: m.b(F.relu(m.a(x), inplace=True)), UP, DOWN)
    ),
    "as narrow as it gets": ("up_down", "relu", lambda: UpDown(d_ff=D // 2)),
    "a norm before and a residual after": (
        "up_down", "relu", lambda: Linears(lambda m, x: x + m.b(F.relu(m.a(F.layer_norm(x, (D,))))), UP, DOWN)
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", FFNS)
def test_an_ffn_is_found(name: str, find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]) -> None:
    kind, activation, build = FFNS[name]
    matches, misses = find(build())
    assert misses == []
    (match,) = matches
    assert match.kind == kind
    assert len(match.ins) == (2 if kind == "gated" else 1)
    assert match.down.d_out == D
    if activation:
        assert match.activation == activation


@pytest.mark.parametrize("name", FFNS)
def test_and_rewriting_it_changes_nothing_at_first(name: str) -> None:
    model = FFNS[name][2]().eval()
    rewritten = moecompile.transform(trace(model), config(*COPY4))
    assert len(moecompile.plan_of(rewritten).layers) == 1
    assert max_diff(rewritten(tokens()), model(tokens())) <= 1e-5
    assert not any("linear" in str(node.target) for node in rewritten.graph.nodes if node.op == "call_function")


@BOTH
def test_the_gate_comes_first(find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]) -> None:
    for model, names in ((Gated(), ["gate.weight", "up.weight"]), (FFNS["gate second"][2](), ["a.weight", "b.weight"])):
        ((match,), _) = find(model)
        assert [linear.weight for linear in match.ins] == names


def test_biases_are_read() -> None:
    ((match,), _) = in_fx(Functional())
    assert (match.ins[0].weight, match.ins[0].bias, match.down.weight, match.down.bias) == ("w1", "b1", "w2", None)
    assert (match.ins[0].d_in, match.ins[0].d_out, match.down.d_in, match.down.d_out) == (D, FF, FF, D)


def test_sites_are_in_model_order_and_disjoint() -> None:
    model = TinyGPT(layers=3)
    matches, misses = find_ffns(GraphView(record(model, ids()).graph, model))
    assert [match.down.weight for match in matches] == [f"blocks.{i}.mlp.3.weight" for i in range(3)]
    assert misses == []
    nodes = [node for match in matches for node in match.nodes]
    assert len(nodes) == len(set(nodes))


def test_an_ffn_that_runs_twice_is_one_site_of_a_model() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = UpDown()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x + self.ffn(x))

    matches, misses = in_recording(Twice())
    assert (len(matches), misses) == (1, [])


# -- near misses -----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A linear with an adapter inside: replacing it would lose the adapter."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.lora_a, self.lora_b = nn.Linear(d_in, 2, bias=False), nn.Linear(2, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_b(self.lora_a(x))


class LoRA(UpDown):
    def __init__(self) -> None:
        super().__init__()
        self.up = LoRALinear(D, FF)


class Tied(nn.Module):
    """Two FFNs over the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = UpDown(bias=False), UpDown(bias=False)
        self.second.up.weight, self.second.down.weight = self.first.up.weight, self.first.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


class TiedHead(nn.Module):
    """The up projection is also used as a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = UpDown(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.ffn(x), self.ffn.up.weight)


def _uses_hidden(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.b(h) + h.sum()


NEAR_MISSES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "language model head": (
        "width in is 8 but width out is 50", lambda: Linears(lambda m, x: m.b(F.gelu(m.a(x))), (D, D), (D, 50))
    ),
    "adapter": (
        "a bottleneck of 2 in 8 is an adapter, not an FFN", lambda: Linears(lambda m, x: m.b(F.relu(m.a(x))), (D, 2), (2, D))
    ),
    "hidden value used elsewhere": (
        "the value of relu is also used elsewhere", lambda: Linears(_uses_hidden, UP, DOWN)
    ),
    "different inputs": (
        "the linears before the activation have different inputs",
        lambda: Linears(lambda m, x: m.c(F.silu(m.a(x)) * m.b(x + 1)), UP, UP, DOWN),
    ),
    "three linears": (
        "3 linears feed the activation, at most 2 are supported",
        lambda: Linears(lambda m, x: m.d(F.silu(m.a(x)) * m.b(x) * m.c(x)), UP, UP, UP, DOWN),
    ),
    "learned scale": (
        "the activation also depends on scale", lambda: Linears(lambda m, x: m.b(F.relu(m.a(x)) * m.scale), UP, DOWN)
    ),
    "norm inside": (
        "the activation also depends on mean",
        lambda: Linears(lambda m, x: m.b((h := F.relu(m.a(x))) * torch.rsqrt(h.square().mean(-1, keepdim=True))), UP, DOWN),
    ),
    "gated by the input": (
        "the activation also depends on ", lambda: Linears(lambda m, x: m.b(F.silu(m.a(x)) * x), (D, D), (D, D))
    ),
    "fused gate and up": (
        "the activation depends on getitem",
        lambda: Linears(lambda m, x: m.b(F.silu((h := m.a(x).chunk(2, dim=-1))[0]) * h[1]), (D, 2 * FF), DOWN),
    ),
    "lora": ("the linears before the activation have different inputs", LoRA),
    "tied": ("its weight first.up.weight is also used by ", Tied),
    "tied head": ("its weight ffn.up.weight is also used by ", TiedHead),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_gives_its_reason(name: str, find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]) -> None:
    reason, build = NEAR_MISSES[name]
    matches, misses = find(build())
    assert matches == []
    assert any(miss.reason.startswith(reason) for miss in misses), misses


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_and_it_is_left_alone(name: str) -> None:
    graph_module = trace(NEAR_MISSES[name][1]())
    same = moecompile.transform(graph_module, config(*COPY4))
    assert moecompile.plan_of(same).layers == ()
    assert torch.equal(same(tokens()), graph_module(tokens()))


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unsqueeze(0) for layer in (m.a, m.b, m.c))
    return m.d(F.scaled_dot_product_attention(q, k, v).squeeze(0))


NO_FFN: dict[str, Callable[[], nn.Module]] = {
    "attention output": lambda: Linears(attention, (D, D), (D, D), (D, D), (D, D)),
    "two linears without an activation": lambda: Linears(lambda m, x: m.b(m.a(x)), UP, DOWN),
    "product of two linears": lambda: Linears(lambda m, x: m.c(m.a(x) * m.b(x)), UP, UP, DOWN),
    "a convolution": lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.ReLU(), nn.Linear(D, D)),
}


@BOTH
@pytest.mark.parametrize("name", NO_FFN)
def test_what_does_not_even_look_like_one(
    name: str, find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]
) -> None:
    matches, _ = find(NO_FFN[name]())
    assert matches == []


@BOTH
def test_linears_in_a_row_are_claimed_once(find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]) -> None:
    """l0 relu l1 relu l2, all of one width: (l0, l1) is an FFN, and l1 cannot begin another one."""
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
    matches, misses = find(model)
    assert [match.down.weight for match in matches] == ["2.weight"]
    assert misses == [NearMiss("4.weight", "2.weight is the last linear of another FFN")]


def test_an_ffn_that_runs_twice_in_one_graph_is_refused() -> None:
    """Only one of the two would be replaced, and the weights would be tied no more."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = UpDown()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x + self.ffn(x))

    matches, misses = in_fx(Twice())
    assert matches == []
    assert misses[0].reason == "its weight ffn.up.weight is also used by ffn_up_1"


def test_a_parametrized_linear_is_none() -> None:
    """Its weight is computed anew in every forward: experts would freeze it."""
    model = UpDown()
    nn.utils.parametrizations.weight_norm(model.up)
    for find in (in_fx, in_recording):
        assert find(model)[0] == []
