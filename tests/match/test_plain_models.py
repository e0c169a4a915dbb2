"""Models that are no transformers' models: torch's own layers, a GPT with its FFN inline, torchvision's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.pipeline import compile_with_report
from moecompile.verify import worst
from tests.tiny import COPY4, TinyGPT, config, ids, max_diff, randomize

COPY = config(*COPY4)
SIZES = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}


class InlineGPT(nn.Module):
    """Everything in one forward: two layers whose linears are in lists, dropout by function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(16, 32) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(32, 16) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for qkv, up, down in zip(self.qkv, self.up, self.down, strict=True):
            q, k, v = qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + down(F.dropout(F.gelu(up(x)), 0.0, self.training))
        return self.head(x)


def hidden(length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(seed))


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(**SIZES, **options)


PLAIN: dict[str, tuple[int, Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "encoder layer": (1, layer, lambda n: (hidden(n),)),
    "encoder layer, norm first": (1, lambda: layer(norm_first=True, activation="gelu"), lambda n: (hidden(n),)),
    "encoder layer with a mask": (1, layer, lambda n: (hidden(n), torch.zeros(n, n))),
    "encoder": (2, lambda: nn.TransformerEncoder(layer(), 2), lambda n: (hidden(n),)),
    "decoder layer": (1, lambda: nn.TransformerDecoderLayer(**SIZES), lambda n: (hidden(n), hidden(3, seed=1))),
    "transformer": (
        4,
        lambda: nn.Transformer(**SIZES, num_encoder_layers=2, num_decoder_layers=2),
        lambda n: (hidden(n), hidden(3, seed=1)),
    ),
    "GPT": (2, TinyGPT, lambda n: (ids(length=n),)),
    "GPT in one module": (2, InlineGPT, lambda n: (ids(length=n),)),
}


def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def outputs_and_grads(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(*inputs)
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", PLAIN)
def test_its_ffns_become_experts_and_nothing_else_changes(name: str) -> None:
    count, build, inputs = PLAIN[name]
    model = no_dropout(build())
    randomize(model)
    before = copy.deepcopy(model)
    compiled = compile_with_report(model, COPY, example=inputs(5))
    assert [site.status for site in compiled.sites] == ["rewritten"] * count, compiled.sites
    assert compiled.step0.max_abs_diff <= 1e-4
    model = compiled.model
    for length in (5, 7):
        assert max_diff(model.eval()(*inputs(length)), before.eval()(*inputs(length))) <= 1e-4
        wanted, wanted_grads = outputs_and_grads(before.train(), inputs(length))
        got, grads = outputs_and_grads(model.train(), inputs(length))
        assert max_diff(got, wanted) <= 1e-4
        both = wanted_grads.keys() & grads.keys()
        assert {n.rpartition(".")[0].rpartition(".")[2] for n in wanted_grads.keys() - both} <= {
            "linear1", "linear2", "0", "1", "3",
        }  # fmt: skip
        assert worst({n: grads[n] for n in both}, {n: wanted_grads[n] for n in both})[0] <= 1e-4


def test_dropout_keeps_its_rate_and_follows_the_mode() -> None:
    """torch's layer has three: after attention, inside the FFN, after it. Only the one inside moves."""
    model, x = nn.Sequential(layer(dropout=0.5)), hidden()
    before = copy.deepcopy(model)
    compile_with_report(model, COPY, example=x)
    inside = [m for m in model[0].experts.activation.modules() if isinstance(m, nn.Dropout)]
    assert [dropout.p for dropout in inside] == [0.5]
    assert max_diff(model.eval()(x), before.eval()(x)) <= 1e-5
    assert not inside[0].training
    model.train()
    assert inside[0].training
    h = torch.ones(1000, 32)
    dropped = model[0].experts.activation(h)
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    assert dropped.max() == 2.0


# -- torchvision -------------------------------------------------------------------------------------------------------


def vision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    if name == "vit":
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
        )
    if name == "swin":
        return models.SwinTransformer(
            patch_size=[4, 4], embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=[4, 4], num_classes=10
        )
    return models.MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[16], block_layers=[1], head_dim=8,
        stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "count"), [("vit", 2), ("swin", 3), ("maxvit", 2)])
def test_models_of_torchvision(name: str, count: int) -> None:
    model = vision(name).eval()
    randomize(model, std=0.1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = model(images)
    compiled = compile_with_report(model, COPY, example=images)
    assert sum(site.status == "rewritten" for site in compiled.sites) == count, compiled.sites
    assert max_diff(model(images), wanted) <= 1e-4
    assert max_diff(model(images[:1]), wanted[:1]) <= 1e-4
