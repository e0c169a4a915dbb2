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
from moecompile.match.ffn import FFNMatch, GraphView, NearMiss, find_ffns
from tests.tiny import COPY4, Gated, TinyGPT, UpDown, config, ids, max_diff, text, tokens, trace

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
        self.scale, self.slope = nn.Parameter(torch.randn(FF)), nn.Parameter(torch.tensor(0.3))
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


def rms_norm(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


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
    "learned scale": ("up_down", "relu, mul", lambda: Linears(lambda m, x: m.b(F.relu(m.a(x)) * m.scale), UP, DOWN)),
    "a norm inside": (
        "up_down", "", lambda: nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.LayerNorm(FF), nn.Linear(FF, D))
    ),
    "a norm inside, by hand": (
        "gated", "", lambda: Linears(lambda m, x: m.c(rms_norm(F.silu(m.a(x)) * m.b(x)) * m.scale), UP, UP, DOWN)
    ),
    "learned in its branches": (
        "up_down", "",
        lambda: Linears(lambda m, x: m.b(torch.where((h := m.a(x)) > 0, h * h, torch.expm1(h) * m.slope)), UP, DOWN),
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


class Products(nn.Module):
    """`x @ w` and its like; w1 is stored as (out, in), w2 as (in, out)."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(FF, D)), nn.Parameter(torch.randn(FF))
        self.w2, self.b2 = nn.Parameter(torch.randn(FF, D)), nn.Parameter(torch.randn(D))
        self.compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


PRODUCTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "T": lambda m, x: F.relu(x @ m.w1.T) @ m.w2,
    "t and matmul": lambda m, x: torch.matmul(torch.relu(torch.mm(x, m.w1.t())), m.w2),
    "transpose and bias": lambda m, x: F.gelu(x @ m.w1.transpose(0, 1) + m.b1) @ m.w2 + m.b2,
    "addmm": lambda m, x: torch.addmm(m.b2, F.relu(torch.addmm(m.b1, x, m.w1.T)), m.w2),
    "linear of a transposed weight": lambda m, x: F.linear(F.relu(F.linear(x, m.w1, m.b1)), m.w2.T),
}
FUSED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "chunk": lambda m, x: m.b(F.silu((h := m.a(x).chunk(2, dim=-1))[0]) * h[1]),
    "torch.chunk, up first": lambda m, x: m.b((h := torch.chunk(m.a(x), 2, -1))[0] * F.silu(h[1])),
    "split": lambda m, x: m.b(F.silu((h := m.a(x).split(FF, dim=-1))[0]) * h[1]),
    "split by widths": lambda m, x: m.b(F.silu((h := torch.split(m.a(x), [FF, FF], -1))[0]) * h[1]),
    "slices": lambda m, x: m.b(F.silu((h := m.a(x))[..., :FF]) * h[..., FF:]),
    "every second": lambda m, x: m.b(F.silu((h := m.a(x))[..., ::2]) * h[..., 1::2]),
    "narrow": lambda m, x: m.b(F.silu((h := m.a(x)).narrow(-1, 0, FF)) * h.narrow(-1, FF, FF)),
}
VIEWED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "two of F": lambda m, x: m.b(F.silu((h := m.a(x).view(*x.shape[:-1], 2, -1))[..., 0, :]) * h[..., 1, :]),
    "F of two": lambda m, x: m.b(F.silu((h := m.a(x).unflatten(-1, (-1, 2)))[..., 0]) * h[..., 1]),
}


@BOTH
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_parameters_are_linears(
    name: str, find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]
) -> None:
    model = Products(PRODUCTS[name])
    ((match,), misses) = find(model)
    assert misses == []
    assert (match.kind, match.ins[0].weight, match.down.weight) == ("up_down", "w1", "w2")
    assert [linear.transposed for linear in (*match.ins, match.down)] == [False, True]
    assert torch.equal(match.ins[0].weight_of(model), model.w1)
    assert torch.equal(match.down.weight_of(model), model.w2.T)


@pytest.mark.parametrize("name", PRODUCTS)
def test_and_are_rewritten(name: str) -> None:
    model = Products(PRODUCTS[name])
    rewritten = moecompile.transform(trace(model), config(*COPY4))
    assert len(moecompile.plan_of(rewritten).layers) == 1
    assert max_diff(rewritten(tokens()), model(tokens())) <= 2e-4
    assert {name for name, _ in rewritten.named_parameters() if name.startswith(("w", "b"))} == set()


def fused(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    return Linears(forward, (D, 2 * FF), DOWN).eval()


@BOTH
@pytest.mark.parametrize("name", FUSED)
def test_halves_of_one_linear_are_gate_and_up(
    name: str, find: Callable[..., tuple[list[FFNMatch], list[NearMiss]]]
) -> None:
    model = fused(FUSED[name])
    ((match,), misses) = find(model)
    assert (match.kind, match.activation, misses) == ("gated", "silu, mul", [])
    gate, up = (linear.weight_of(model) for linear in match.ins)
    x = tokens()
    with torch.no_grad():
        wanted = F.silu(x @ gate.T + match.ins[0].bias_of(model)) * (x @ up.T + match.ins[1].bias_of(model))
        assert max_diff(model(x), wanted @ model.b.weight.T + model.b.bias) <= 1e-5


@pytest.mark.parametrize("forward", [*FUSED.values(), *VIEWED.values()], ids=[*FUSED, *VIEWED])
def test_and_rewriting_them_changes_nothing_at_first(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """A view tells what it does by its shape: in a recorded model, not in a graph without shapes."""
    model, x = fused(forward), tokens()
    wanted = model(x)
    result = moecompile.compile_model(model, config(*COPY4), example=x)
    assert moecompile.plan_of(result).layers[0].site.kind == "gated"
    assert max_diff(result(x), wanted) <= 1e-5
    longer = tokens(9, seed=1)
    assert max_diff(result(longer), model(longer)) <= 1e-5  # a model that is a region itself is left alone
    assert "a" not in dict(result.named_children())


class Conv1D(nn.Module):
    """transformers' linear with a transposed weight: flattens, multiplies, unflattens."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.size()[:-1], self.d_out)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


def test_a_linear_that_flattens_its_input_and_unflattens_its_output() -> None:
    """The graph before, and the graph after: no view of the FFN is left, and any number of tokens fits."""
    model = nn.Sequential(Conv1D(D, FF), nn.GELU(), Conv1D(FF, D))
    x = tokens().view(2, 3, D)
    wanted = model(x)
    result = moecompile.compile_model(model, config(*COPY4), example=x, until="rewrite")
    assert (
        text(result)
        == """\
%0 = placeholder input
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = moecompile.permute(%1, %4, 4)
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = getitem(%5, 2)
%9 = experts[Experts](%6, %8)
%10 = moecompile.unpermute(%9, %7, %3)
%11 = moecompile.unflatten_tokens(%10, %0)
output(%11)
"""
    )
    assert max_diff(result(x), wanted) <= 1e-4
    assert max_diff(result(tokens(7).view(7, 1, D)), model(tokens(7).view(7, 1, D))) <= 1e-4


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


def _uses_a_third(m: nn.Module, x: Tensor) -> Tensor:
    gate, up, rest = m.a(x).chunk(3, dim=-1)
    return m.b(F.silu(gate) * up) * rest.sum()


def _writes_in_place(m: nn.Module, x: Tensor) -> Tensor:
    """What GatedDeltaNet does: rows of one tensor are written after each other."""
    out = torch.zeros_like(m.a(x))
    out[0:1] = m.a(x)[:1]
    return m.b(F.silu(out))


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
    "gated by the input": (
        "the activation also depends on ", lambda: Linears(lambda m, x: m.b(F.silu(m.a(x)) * x), (D, D), (D, D))
    ),
    "a third of a linear that nobody reads": (
        "the activation does not read every row of a.weight exactly once",
        lambda: Linears(lambda m, x: m.b(F.silu((h := m.a(x).chunk(3, dim=-1))[0]) * h[1]), (D, 3 * FF), DOWN),
    ),
    "rows that are read twice": (
        "the activation does not read every row of a.weight exactly once",
        lambda: Linears(lambda m, x: m.b(F.silu((h := m.a(x))[..., :FF]) * h[..., FF // 2 : -FF // 2]), (D, 2 * FF), DOWN),
    ),
    "a third of a linear that is used elsewhere": (
        "the activation does not read every row of a.weight", lambda: Linears(_uses_a_third, (D, 3 * FF), DOWN)
    ),
    "halves along the tokens": (
        "the activation depends on getitem",
        lambda: Linears(lambda m, x: m.b(F.silu((h := m.a(x).chunk(2, dim=0))[0]) * h[1]), UP, DOWN),
    ),
    "lora": ("the linears before the activation have different inputs", LoRA),
    "tied": ("its weight first.up.weight is also used by ", Tied),
    "tied head": ("its weight ffn.up.weight is also used by ", TiedHead),
}  # fmt: skip


def test_a_number_that_the_activation_learns_and_others_use() -> None:
    model = Linears(lambda m, x: m.b(F.relu(m.a(x)) * m.slope) * m.slope, UP, DOWN)
    matches, misses = in_fx(model)
    assert matches == []
    assert misses[0].reason == "its weight slope is also used by mul_1"


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


def test_a_value_that_is_written_in_place_is_no_linears() -> None:
    matches, misses = in_recording(Linears(_writes_in_place, UP, DOWN))
    assert matches == []
    assert misses[0].reason.startswith("the activation depends on __setitem__")


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unsqueeze(0) for layer in (m.a, m.b, m.c))
    return m.d(F.scaled_dot_product_attention(q, k, v).squeeze(0))


NO_FFN: dict[str, Callable[[], nn.Module]] = {
    "attention output": lambda: Linears(attention, (D, D), (D, D), (D, D), (D, D)),
    "a norm between two linears": lambda: nn.Sequential(nn.Linear(D, FF), nn.RMSNorm(FF), nn.Linear(FF, D)),
    "a norm by hand between two linears": lambda: Linears(lambda m, x: m.b(rms_norm(m.a(x)) * m.scale), UP, DOWN),
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
