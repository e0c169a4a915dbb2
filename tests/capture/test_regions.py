"""A traced region is called in the same way and computes the same, in training and in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.capture import ModuleCall, record, trace_again, trace_region
from moecompile.errors import CaptureError
from tests.tiny import UpDown, tokens


def traced(module: nn.Module, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
    """`module` traced from a call with these arguments."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.region = module

        def forward(self) -> Tensor:
            return self.region(*args, **kwargs)

    return trace_region(module, record(Parent(), ()).calls["region"])


class Base(nn.Module):
    """An FFN whose `act` and `forward` are overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def act(self, h: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class OptionalMask(Base):
    """Moshi's trap: with a proxy for `mask`, `is None` is false and the wrong branch is traced silently."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.up(x)
        if mask is not None:
            h = h * mask
        return self.down(F.relu(h))


@pytest.mark.parametrize("call", [{}, {"mask": None}])
def test_an_argument_that_was_none_stays_none(call: dict[str, None]) -> None:
    module = OptionalMask()
    graph_module = traced(module, tokens(), **call)
    x = tokens(seed=1)
    for arguments in ((x,), (x, None)):
        assert torch.equal(graph_module(*arguments), module(*arguments))
    assert torch.equal(graph_module(x=x, mask=None), module(x))


def test_another_value_for_it_raises_instead_of_being_ignored() -> None:
    graph_module = traced(OptionalMask(), tokens())
    with pytest.raises(AssertionError, match="mask was None when the model was captured"):
        graph_module(tokens(), torch.zeros(16))


def test_an_argument_that_was_a_tensor_is_a_placeholder() -> None:
    module = OptionalMask()
    graph_module = traced(module, tokens(), torch.ones(16))
    mask = torch.rand(16)
    assert torch.equal(graph_module(tokens(), mask), module(tokens(), mask))


class KeywordOnly(Base):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def test_keyword_only_arguments() -> None:
    module = KeywordOnly()
    assert torch.equal(traced(module, tokens(), mask=None)(tokens(), mask=None), module(tokens()))
    mask = torch.rand(8)
    assert torch.equal(traced(module, tokens(), mask=torch.ones(8))(tokens(), mask=mask), module(tokens(), mask=mask))


class Scaled(Base):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(x * scale)


@pytest.mark.parametrize("recorded", [(), (3.0,)])
def test_a_number_that_is_only_computed_with_stays_an_argument(recorded: tuple[float, ...]) -> None:
    module = Scaled()
    graph_module = traced(module, tokens(), *recorded)
    for given in ((), (2.0,), (0.5,)):
        assert torch.equal(graph_module(tokens(), *given), module(tokens(), *given))


class Switched(Base):
    def forward(self, x: Tensor, residual: bool = False) -> Tensor:
        return super().forward(x) + x if residual else super().forward(x)


def test_a_switch_that_python_decides_by_keeps_its_value() -> None:
    graph_module = traced(Switched(), tokens())
    graph_module(tokens(), False)
    with pytest.raises(AssertionError, match="residual was False when the model was captured"):
        graph_module(tokens(), True)


class Extras(Base):
    def forward(self, x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        return super().forward(x)


def test_extra_arguments_are_taken_and_left_as_the_module_does() -> None:
    module, x = Extras(), tokens()
    for graph_module in (traced(module, x), traced(module, x, y=x), traced(module, x, x, x)):
        for args, kwargs in (((x,), {}), ((x,), {"z": x}), ((x, x), {"y": None})):
            assert torch.equal(graph_module(*args, **kwargs), module(*args, **kwargs))


class BranchOnValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_python_that_depends_on_values_is_refused() -> None:
    with pytest.raises(
        CaptureError, match="cannot be traced: TraceError: symbolically traced variables cannot be used"
    ):
        traced(BranchOnValue(), tokens())


class BranchOnTraining(Base):
    def act(self, h: Tensor) -> Tensor:
        return F.relu(h) * (2.0 if self.training else 1.0)


class AlwaysDrops(Base):
    """Monte Carlo dropout: its rate does not depend on the mode."""

    def act(self, h: Tensor) -> Tensor:
        return F.dropout(F.relu(h), 0.5, training=True)


class RandomSlope(Base):
    def act(self, h: Tensor) -> Tensor:
        return F.rrelu(h, training=self.training)


class CountsOnce(Base):
    """Computes something else when it runs the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def act(self, h: Tensor) -> Tensor:
        self.runs += 1
        return F.relu(h) * self.runs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [BranchOnTraining, AlwaysDrops, RandomSlope, CountsOnce])
def test_what_a_graph_cannot_follow_is_refused(kind: Callable[[], nn.Module], training: bool) -> None:
    with pytest.raises(CaptureError, match=r"does not compute the same as the module in (training|evaluation) mode"):
        traced(kind().train(training), tokens())


class WithoutGradients(Base):
    def act(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return F.relu(h)


class Mirror(torch.autograd.Function):
    """x forward, minus the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return -gradients[0]


class Swish(torch.autograd.Function):
    """What autograd computes, but keeps less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        s = torch.sigmoid(ctx.saved_tensors[0])
        return gradients[0] * s * (1 + ctx.saved_tensors[0] * (1 - s))


class Reversed(Base):
    def act(self, h: Tensor) -> Tensor:
        return F.relu(Mirror.apply(h))


class OwnBackward(Base):
    def act(self, h: Tensor) -> Tensor:
        return Swish.apply(h)


@pytest.mark.parametrize("kind", [WithoutGradients, Reversed])
def test_other_gradients_are_refused(kind: Callable[[], nn.Module]) -> None:
    with pytest.raises(CaptureError, match="does not have the gradients of the module"):
        traced(kind(), tokens())


def test_a_backward_that_is_written_by_hand_is_not() -> None:
    traced(OwnBackward(), tokens())


class FunctionalDropout(Base):
    def act(self, h: Tensor) -> Tensor:
        return F.dropout(F.relu(F.dropout(h, 0.25, self.training)), training=self.training)


class ModuleDropout(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def act(self, h: Tensor) -> Tensor:
        return self.drop(F.relu(h))


@pytest.mark.parametrize("captured_in", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [FunctionalDropout, ModuleDropout])
def test_dropout_follows_train_and_eval_after_the_capture(kind: Callable[[], nn.Module], captured_in: bool) -> None:
    module = kind().train(captured_in)
    graph_module = traced(module, tokens())
    assert graph_module.training == captured_in
    for mode in (True, False, True):
        module.train(mode), graph_module.train(mode)
        outputs = []
        for each in (module, graph_module):
            torch.manual_seed(0)
            outputs.append(each(tokens()))
        assert torch.equal(*outputs)
    torch.manual_seed(1)
    assert not torch.equal(graph_module(tokens()), outputs[0])  # it does drop


def test_weights_are_shared_and_flags_and_random_state_untouched() -> None:
    module = FunctionalDropout()
    module.up.eval()
    state = torch.get_rng_state()
    graph_module = traced(module, tokens())
    assert graph_module.up.weight is module.up.weight
    assert module.training
    assert not module.up.training
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_do_not_move_while_the_graph_is_checked() -> None:
    class Counting(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.mean.add_(x.mean(0))
            return super().forward(x)

    module = Counting()
    traced(module, tokens())
    assert module.mean.abs().max() == 0


def test_hooks_of_the_region_are_not_traced_into_the_graph() -> None:
    module, calls = UpDown(), []
    module.register_forward_hook(lambda *_: calls.append(1))
    graph_module = traced(module, tokens())
    calls.clear()
    graph_module(tokens())
    assert calls == []


# -- the same graph for regions of equal structure -------------------------------------------------------------------


class Limited(Base):
    """A limit that a trace holds as a constant."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def act(self, h: Tensor) -> Tensor:
        return F.relu(h).clamp(max=self.limit)


def call(*args: Tensor) -> ModuleCall:
    return ModuleCall(args, {})


def test_a_trace_is_used_again_with_the_other_modules_weights() -> None:
    first, second = FunctionalDropout(), FunctionalDropout()
    x = tokens()
    traced = trace_region(first, call(x))
    again = trace_again(traced, second, call(x))
    assert again.up.weight is second.up.weight
    assert torch.equal(again.eval()(x), second.eval()(x))
    assert not torch.equal(again(x), first.eval()(x))
    assert [node.target for node in again.graph.nodes] == [node.target for node in traced.graph.nodes]
    again.train()
    torch.manual_seed(0)
    assert not torch.equal(again(x), second(x))  # the dropout that tracing has added is one of its own and drops


def test_a_trace_that_does_not_fit_is_refused() -> None:
    traced = trace_region(Limited(0.01), call(tokens()))
    with pytest.raises(CaptureError, match="does not compute the same as the module in evaluation mode"):
        trace_again(traced, Limited(0.5), call(tokens()))
