"""What takes a layer's place stays an instance of its class, with its attributes and the parts that it does not use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import moecompile
from moecompile.capture.keep import layers_of
from moecompile.pipeline import compile_with_report
from tests.tiny import COPY4, config, max_diff, tokens

COPY = config(*COPY4, "balance.rule=none")


class Output(nn.Module):
    """Half of a split FFN, with a norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(16, 8), nn.LayerNorm(8)
        self.adapters = nn.ModuleDict({"a": nn.Linear(8, 8)})

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dense(h) + x)


class Wrapping(nn.Module):
    """Wraps the forward of its subclasses, as layers of transformers do for gradient checkpointing."""

    wrapped = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        def wrapper(self: Wrapping, *args: Any) -> Any:
            if type(self).forward is not wrapper:
                return forward(self, *args)
            Wrapping.wrapped += 1
            return checkpoint(forward, self, *args, use_reentrant=False)

        cls.forward = wrapper


class Layer(Wrapping):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self._private = "full", [1, 2]
        self.up, self.output, self.unused = nn.Linear(8, 16), Output(), nn.Linear(3, 3)
        self.register_buffer("table", torch.ones(8), persistent=False)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.up(x)), x * self.table)

    def twice(self, x: Tensor) -> Tensor:
        return self(self(x))


def compiled() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()), tokens()
    wanted = model(x)
    moecompile.compile_model(model, COPY, example=x)
    return model, wanted


def test_class_attributes_and_methods_stay() -> None:
    model, wanted = compiled()
    assert max_diff(model(tokens()), wanted) <= 1e-5
    for layer in model:
        assert isinstance(layer, Layer) and isinstance(layer, fx.GraphModule)
        assert type(layer).__mro__[1].__name__ == "Layer"
        assert (layer.kind, layer._private) == ("full", [1, 2])
        assert isinstance(layer.output, Output) and list(layer.output.adapters.keys()) == ["a"]
    assert torch.equal(model[0].twice(tokens()), model[0](model[0](tokens())))


def test_names_of_what_stays_and_nothing_else() -> None:
    model, _ = compiled()
    names = {name for name in model[0].state_dict() if not name.startswith(("router", "experts"))}
    assert names == {
        "scale", "unused.weight", "unused.bias", "output.norm.weight", "output.norm.bias", "output.adapters.a.weight",
        "output.adapters.a.bias",
    }  # fmt: skip


def test_a_copy_is_as_good_as_the_original() -> None:
    model, wanted = compiled()
    model[0].set_later = "by the user"
    twin = copy.deepcopy(model)
    assert isinstance(twin[0], Layer) and twin[0].set_later == "by the user" and twin[0].kind == "full"
    assert list(twin.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        twin[0].output.norm.bias.add_(1.0)
    assert max_diff(model(tokens()), wanted) <= 1e-5
    assert max_diff(twin(tokens()), wanted) > 1e-3


def test_the_original_class_still_wraps_the_forward() -> None:
    model, _ = compiled()
    before = Wrapping.wrapped
    model(tokens()).sum().backward()
    assert Wrapping.wrapped == before + 2
    assert model[0].experts.up_proj.grad is not None


def test_hooks_of_the_layer_stay() -> None:
    model, calls = nn.Sequential(Layer()), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    moecompile.compile_model(model, COPY, example=tokens())
    calls.clear()
    model(tokens())
    assert calls == [1]


def test_a_region_inside_a_region() -> None:
    """The outer layer calls the inner one; each is replaced, and the outer one calls what stands in its place."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    class Outer(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.inner(x)

    model, x = nn.Sequential(Outer()), tokens()
    wanted = model(x)
    found = compile_with_report(model, COPY, example=x)
    assert {site.fqn: site.status for site in found.sites} == {"0": "rewritten", "0.inner": "rewritten"}
    assert max_diff(model(x), wanted) <= 1e-5
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.skipif(torch.__version__ < "2.13", reason="dynamo does not trace a module that is set inside a checkpoint")
def test_it_compiles_without_a_break() -> None:
    model, _ = compiled()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model[0], backend="eager", fullgraph=True)(tokens())
    assert max_diff(got, model[0](tokens())) <= 1e-6


def test_layers_are_those_of_a_list_or_of_a_dict_that_is_used_as_one() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def tower() -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList(block() for _ in range(2))
        return made

    def model(inside: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Embedding(2, 2), nn.Sequential(inside))

    in_dict, towers = nn.ModuleDict({"a": block(), "b/c": block()}), nn.ModuleDict({"a": tower(), "b": tower()})
    parts = nn.ModuleDict({"embedding": nn.Embedding(2, 2), "h": nn.ModuleList([block()]), "norm": nn.LayerNorm(2)})
    linears = nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})
    assert list(layers_of(model(in_dict))) == list(in_dict.values())
    assert list(layers_of(model(towers))) == [*towers["a"].layers, *towers["b"].layers]
    assert list(layers_of(model(parts))) == list(parts["h"])
    assert list(layers_of(model(linears))) == []
