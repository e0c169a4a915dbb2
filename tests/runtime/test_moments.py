"""Moments in bf16 and codes, and bf16 weights, against plain loops and torchao; no step runs away."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.runtime.codes import Coded, tables, values_of
from moecompile.runtime.moments import Keeping, _hashed
from moecompile.runtime.weight_groups import make_optimizer
from moecompile.schema import MOMENTS, Bf16Weights, StateKind, block_of, check_moments

LR, DECAY, STEPS = 0.01, 0.1, 6
SHAPES = {
    "long": (40, 512),
    "odd": (64, 1408),
    "wide": (16, 6, 96),
    "short rows": (512, 24),
    "small": (16, 64),
    "v": (64,),
}
BLOCKS = {"long": 256, "odd": 176, "wide": 96, "short rows": None, "small": None, "v": None}


class Weights(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float32)
            self.register_parameter(name.replace(" ", "_"), nn.Parameter(value.to(dtype)))


def gradients(model: nn.Module, step: int) -> None:
    """Some rows have none in some steps, as embeddings and experts do."""
    generator = torch.Generator().manual_seed(step + 1)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 10.0 ** (step % 3 - 2)
        grad[step % 3 :: 3] = 0
        parameter.grad = grad.to(parameter.dtype)


def stepped(*settings: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Weights(dtype)
    optimizer = make_optimizer(model, [f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", *settings])
    for step in range(STEPS):
        gradients(model, step)
        optimizer.step()
    return model, optimizer


def nearest(values: Tensor, table: Tensor, block: int, lowest: int) -> Tensor:
    """What codes give back: of every block divided by its largest number, the nearest number of the table."""
    blocks = values.reshape(-1, block)
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    codes = ((blocks / scales)[..., None] - table).abs().argmin(-1).clamp(min=lowest)
    return (table[codes] * scales).reshape(values.shape)


def looped(rounded: Any) -> nn.Module:
    """torch's AdamW, not fused, whose moments are rounded after each step."""
    model = Weights()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": DECAY * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(STEPS):
        gradients(model, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                value = optimizer.state[parameter][moment]
                value.copy_(rounded(name.replace("_", " "), value, signed))
    return model


def test_bf16_moments_are_rounded_after_each_step() -> None:
    wanted, (got, optimizer) = looped(lambda name, value, signed: value.bfloat16()), stepped("optimizer.state=bf16")
    for name, weight in wanted.named_parameters():
        torch.testing.assert_close(got.get_parameter(name), weight, rtol=0, atol=2e-4, msg=name)  # a few flips
        assert (got.get_parameter(name) - weight).abs().double().mean() <= 1e-7
    assert {v.dtype for state in optimizer.state.values() for k, v in state.items() if k != "step"} == {torch.bfloat16}


def test_codes_are_of_blocks_of_rows() -> None:
    def rounded(name: str, value: Tensor, signed: bool) -> Tensor:
        block = BLOCKS[name]
        return value if block is None else nearest(value, values_of(signed), block, 0 if signed else 1)

    wanted, (got, optimizer) = looped(rounded), stepped("optimizer.state=int8")
    for name, weight in wanted.named_parameters():
        difference = (got.get_parameter(name) - weight).abs().double()
        assert difference.mean() <= 1e-5, name  # a number in the middle of two codes may get the other one
        state, block = optimizer.state[got.get_parameter(name)], BLOCKS[name.replace("_", " ")]
        assert block == block_of(weight.shape, weight.shape[-1])
        bytes_ = sum(value.nbytes for key, value in state.items() if key != "step")
        assert bytes_ == 2 * weight.numel() * (4 if block is None else 1 + 4 / block)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_torchaos(signed: bool) -> None:
    """Bit for bit: random numbers, those in the middle between two codes, and their neighbours."""
    kind = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    generator, number = torch.Generator().manual_seed(0), 2**18
    table = kind.zeros((256,), signed, 256).qmap
    assert torch.equal(values_of(signed), table)
    at = torch.randint(0, 255, (number,), generator=generator)
    middle = table[at] + (table[at + 1] - table[at]) * 0.5
    random = torch.randn(number, generator=generator) * 10 ** (-8 * torch.rand(number, generator=generator))
    for values in (random, middle, *(torch.nextafter(middle, torch.tensor(to)) for to in (-2.0, 2.0))):
        given = values.clone() if signed else values.abs()
        given.view(-1, 256)[1:, 0] = 1.0  # the scale is one, but for a block
        theirs = kind.zeros((number,), signed, 256)
        theirs.copy_(given)
        ours = Coded(
            codes=torch.zeros(number, dtype=torch.uint8), scales=torch.zeros(number // 256),
            tables=tables(signed, torch.device("cpu")),
        )  # fmt: skip
        ours.write(given)
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scale)
        assert torch.equal(ours.read(), theirs.dequantize())


@pytest.mark.parametrize("state", ["bf16", "int8"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_what_has_had_a_gradient_once_does_not_run_away(state: str, size: float) -> None:
    """An expert without tokens: with a code of zero for a small second moment, one number moves by 80,000 times lr."""
    model = nn.Linear(1024, 64, bias=False)
    optimizer = make_optimizer(model, [f"optimizer.state={state}", "optimizer.weight_decay=0", f"optimizer.lr={LR}"])
    for step in range(4):
        before = model.weight.detach().clone()
        grad = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0)) * size
        model.weight.grad = grad if step == 0 else torch.zeros_like(grad)
        optimizer.step()
        assert (model.weight - before).abs().max() <= 1.01 * LR


def test_a_number_that_is_not_finite_stays_so() -> None:
    model = nn.Linear(512, 16, bias=False)
    optimizer = make_optimizer(model, ["optimizer.state=int8"])
    model.weight.grad = torch.zeros_like(model.weight)
    model.weight.grad[0, 3] = torch.nan
    for _ in range(2):
        optimizer.step()
        assert model.weight[0, 3].isnan() and model.weight[1:].isfinite().all()


def test_small_steps_reach_bf16_weights() -> None:
    """Steps of 1e-3 of a bf16 number's distance to the next: lost, kept by a master, and right on average."""
    moved = {}
    for kind in Bf16Weights:
        model = nn.Linear(256, 256, bias=False).bfloat16()
        nn.init.ones_(model.weight)
        settings = [f"optimizer.bf16_weights={kind.value}", "optimizer.weight_decay=0", "optimizer.lr=1e-5"]
        optimizer = make_optimizer(model, settings)
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        moved[kind] = float(1 - model.weight.detach().double().mean())
        if kind is Bf16Weights.master:
            copy = optimizer.state[model.weight]["master"]
            assert copy.dtype == torch.float32 and float(1 - copy.double().mean()) == pytest.approx(1e-3, rel=2e-3)
    assert moved[Bf16Weights.nearest] == moved[Bf16Weights.master] == 0.0  # half of the distance to the next is 0.002
    assert moved[Bf16Weights.stochastic] == pytest.approx(1e-3, rel=0.05)


def test_random_numbers_are_even_and_of_name_place_and_step() -> None:
    places, step = torch.arange(2**16), torch.tensor(3.0)
    draws = _hashed(places, 7, step)
    assert int(draws.min()) >= 0 and int(draws.max()) < 2**16
    assert float(draws.double().mean()) == pytest.approx(2**15, rel=0.01)
    bits = torch.stack([(draws >> i) & 1 for i in range(16)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 0.02
    for others in (_hashed(places + 1, 7, step), _hashed(places, 8, step), _hashed(places, 7, step + 1)):
        assert float((others == draws).double().mean()) < 1e-3
        both = torch.stack([others.double(), draws.double()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


@pytest.mark.parametrize("settings", [("optimizer.state=int8",), ("optimizer=muon", "optimizer.state=bf16")])
def test_state_is_loaded_as_it_was(settings: tuple[str, ...]) -> None:
    _, optimizer = stepped(*settings)
    _, again = stepped(*settings)
    again.load_state_dict(optimizer.state_dict())
    for mine, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert {name: value.dtype for name, value in mine.items()} == {name: v.dtype for name, v in theirs.items()}
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())
        assert all(mine[name] is not value for name, value in theirs.items())


REFUSED = [
    (("optimizer.state=bf16", "optimizer.betas=[0.9,0.999]"), "optimizer.betas[1]=0.999"),
    (("optimizer=muon", "optimizer.state=bf16", "optimizer.muon.momentum=0.997"), "optimizer.muon.momentum=0.997"),
    (("optimizer.state=int8", "adapters=lora"), "optimizer.state=int8: saves nothing with adapters"),
]


@pytest.mark.parametrize(("overrides", "text"), REFUSED)
def test_what_cannot_be_combined(overrides: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_moments(compose_config(overrides))
    assert str(error.value).startswith(text)


def test_only_bf16_weights_have_masters() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.bf16_weights=master: no trained weight is stored in bf16"):
        make_optimizer(nn.Linear(4, 4), ["optimizer.bf16_weights=master"])


def test_the_slowest_decay_of_bf16() -> None:
    """Just slower than allowed, some numbers are rounded back to what they were; at the limit none is."""
    values = torch.linspace(1, 2, 129)[:-1].bfloat16()
    slowest = MOMENTS[StateKind.bf16].slowest
    assert (values.float() * slowest).bfloat16().lt(values).all()
    assert (values.float() * math.nextafter(slowest + 1e-3, 1)).bfloat16().eq(values).any()
    assert Keeping().is_torchs
