"""Recording a forward: the model is left as it was, and the dataflow is complete."""

from __future__ import annotations

import operator
import re
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.capture import call_with, in_mode, record, seed_generators
from moecompile.errors import CaptureError
from moecompile.match.ffn import GraphView, find_ffns
from tests.tiny import Gated, TinyGPT, UpDown, ids, tokens


class Noisy(nn.Module):
    """Everything that a forward may disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.ffn = nn.BatchNorm1d(8), nn.Dropout(0.5), UpDown()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.replaced: Tensor
        self.norm.eval()  # flags differ within the model

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.replaced = self.replaced + 1
        torch.rand(3)
        return self.ffn(self.drop(self.norm(x)))


def test_a_seed_gives_what_torchs_own_gives_and_formats_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    with torch.random.fork_rng(devices=[]):
        monkeypatch.setattr(traceback, "format_stack", None)  # else it is called for each accelerator
        seed_generators(3)
        assert torch.equal(torch.rand(4), wanted)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = Noisy()
    model.drop.train(training)
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    identities = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    random_state = torch.get_rng_state()
    record(model, tokens())
    assert {name: module.training for name, module in model.named_modules()} == flags
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name: id(t) for name, t in now.items()} == identities
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = UpDown()

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("too hot")


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model = Breaks()
    message = "the model cannot be run on the example: ValueError: too hot"
    with pytest.raises(CaptureError, match=re.escape(message)):
        record(model, tokens())
    assert model.training
    assert hooks(model) == 0


def test_a_wrong_example_says_so() -> None:
    with pytest.raises(
        CaptureError, match=r"cannot be run on the example: TypeError: .*unexpected keyword argument 'y'"
    ):
        record(UpDown(), {"y": tokens()})
    with pytest.raises(
        CaptureError, match=r"cannot be run on the example: RuntimeError: .*shapes cannot be multiplied"
    ):
        record(UpDown(), tokens(d_model=9))


def test_in_mode_restores_after_an_error() -> None:
    model = Noisy()
    with pytest.raises(KeyError), in_mode(model, training=True):
        assert model.norm.training
        model.calls += 1
        raise KeyError
    assert not model.norm.training
    assert model.calls == 0


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Gated()

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.ffn(x if shift is None else x + shift)


@pytest.mark.parametrize(
    "example",
    [
        tokens(),
        (tokens(),),
        (tokens(), None),
        (tokens(), tokens()),
        {"x": tokens()},
        {"x": tokens(), "shift": tokens()},
    ],
    ids=["tensor", "tuple", "tuple with None", "two tensors", "keywords", "two keywords"],
)
def test_the_three_forms_of_an_example(example: object) -> None:
    model = Options()
    recording = record(model, example)
    matches, _ = find_ffns(GraphView(recording.graph, model))
    assert [match.kind for match in matches] == ["gated"]
    assert call_with(model, example).shape == (6, 8)


def test_every_module_and_its_first_call_is_noted() -> None:
    model = TinyGPT()
    recording = record(model, ids())
    assert set(recording.calls) == {name for name, m in model.named_modules() if not isinstance(m, nn.ModuleList)}
    assert recording.calls["blocks.1.mlp"].args[0].shape == (2, 5, 16)
    assert recording.calls["blocks.1.mlp"].kwargs == {}


def test_nodes_know_their_owner() -> None:
    recording = record(TinyGPT(layers=1), ids())
    owners = {node.meta["owner"] for node in recording.graph.nodes if node.op == "call_function"}
    assert {"blocks.0", "blocks.0.qkv", "blocks.0.mlp.1", "head", "embed"} <= owners


# -- in-place writes -------------------------------------------------------------------------------------------------


class Writes(nn.Module):
    """The hidden value is changed in place between the linears."""

    def __init__(self, write: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.up, self.down, self.write = nn.Linear(8, 16), nn.Linear(16, 8), write

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        self.write(h)
        return self.down(F.relu(h))


def _set_item(h: Tensor) -> None:
    h[:, 0] = 1.0


def _set_from_sum(h: Tensor) -> None:
    h[:, 0] = h.sum(1)


WRITES = {
    "setitem": _set_item,
    "setitem of a sum": _set_from_sum,
    "copy to a view": lambda h: h[:, :4].copy_(torch.zeros(4)),
    "fill": lambda h: h[:, 2].fill_(3.0),
    "cumsum": lambda h: h.cumsum_(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_between_the_linears_are_no_ffn(name: str) -> None:
    """Such a write mixes entries or hides a producer: nothing may be rewritten."""
    model = Writes(WRITES[name])
    matches, misses = find_ffns(GraphView(record(model, tokens()).graph, model))
    assert matches == []
    assert len(misses) == 1


def test_setitem_is_the_producer_of_its_target() -> None:
    graph = record(Writes(_set_item), tokens()).graph
    (write,) = (node for node in graph.nodes if node.op == "call_function" and node.target is Tensor.__setitem__)
    assert [user.target for user in write.users] == [F.relu]


def test_items_of_several_outputs_are_told_apart() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return b - a

    graph = record(Halves(), tokens()).graph
    last = list(graph.nodes)[-1]
    assert [(arg.target, arg.args[1]) for arg in last.args] == [(operator.getitem, 1), (operator.getitem, 0)]


# -- the meta device -------------------------------------------------------------------------------------------------


class ByValue(nn.Module):
    """What it does depends on values."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return x[(ids > 0).nonzero()[:, 0]]


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(8, 8), ByValue()
        self.inner.register_parameter("weight", nn.Parameter(torch.ones(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.inner(self.up(x), torch.ones(6, dtype=torch.int64, device=x.device)))


def test_opaque_modules_do_not_run_on_the_meta_device() -> None:
    model, x = Around().to("meta"), tokens().to("meta")
    with pytest.raises(CaptureError):
        record(model, x)
    recording = record(model, x, opaque=lambda module: isinstance(module, ByValue))
    assert [argument.shape for argument in recording.calls["inner"].args] == [(6, 8), (6,)]
    assert "forward" not in vars(model.inner)
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(x)


def test_opaque_modules_run_where_there_are_values() -> None:
    recording = record(Around(), tokens(), opaque=lambda module: isinstance(module, ByValue))
    assert "nonzero" in {getattr(node.target, "__name__", "") for node in recording.graph.nodes}
