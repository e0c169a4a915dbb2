"""Hooks that a rewrite would lose are refused by name; those on the module that is replaced go over to its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.pipeline import Compilation, compile_with_report
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4, TinyGPT, config, ids, max_diff, tiny_llama

MLP = "model.layers.1.mlp"
Prepare = Callable[[nn.Module], Any]


def doubled(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return out * 2


def own_forward(module: nn.Module) -> None:
    """As accelerate and others wrap single modules."""
    before = module.forward
    module.forward = lambda *args: before(*args) * 2


LOST: dict[str, tuple[str, str, Prepare]] = {
    "forward": ("gate_proj", "a forward hook", lambda m: m.register_forward_hook(doubled)),
    "observing": ("up_proj", "a forward hook", lambda m: m.register_forward_hook(lambda *_: None)),
    "activation": ("act_fn", "a forward hook", lambda m: m.register_forward_hook(doubled)),
    "pre": ("down_proj", "a forward pre-hook", lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,))),
    "backward": ("down_proj", "a backward hook", lambda m: m.register_full_backward_hook(lambda *_: None)),
    "gradient": ("up_proj", "a gradient hook on its weight", lambda m: m.weight.register_hook(lambda grad: grad * 2)),
    "accumulated": (
        "up_proj", "a gradient hook on its weight",
        lambda m: m.weight.register_post_accumulate_grad_hook(lambda _: None),
    ),
    "state dict": ("up_proj", "a state-dict hook", lambda m: m.register_state_dict_post_hook(lambda *_: None)),
    "instance": ("gate_proj", "a forward of its own", own_forward),
}  # fmt: skip


def compiled_llama(prepare: Prepare) -> tuple[nn.Module, Tensor, Compilation]:
    """A Llama, its logits as prepared, and what became of it."""
    model, x = tiny_llama().eval(), {"input_ids": ids(vocab=61)}
    prepare(model)
    with torch.no_grad():
        before = model(**x).logits
    return model, before, compile_with_report(model, config(*COPY4), example=x)


@pytest.mark.parametrize("kind", LOST)
def test_hooks_inside_an_ffn_are_refused_by_name(kind: str) -> None:
    name, words, prepare = LOST[kind]
    with pytest.warns(UserWarning, match=rf"^{MLP} stays as it is: {MLP}\.{name} has {words}, which would not run"):
        model, before, compiled = compiled_llama(lambda m: prepare(m.get_submodule(f"{MLP}.{name}")))
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["model.layers.0.mlp"]
    (refused,) = [site for site in compiled.sites if site.fqn == MLP]
    assert f"{name} has {words}" in refused.reason
    with torch.no_grad():
        assert max_diff(model(input_ids=ids(vocab=61)).logits, before) < 1e-5


def test_hooks_on_the_ffn_itself_are_kept() -> None:
    """Also those that change what it gives; removing them works as before."""
    handles: list[Any] = []
    seen: list[tuple[int, ...]] = []

    def prepare(model: nn.Module) -> None:
        mlp = model.get_submodule(MLP)
        handles.append(mlp.register_forward_hook(doubled))
        mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))

    model, before, compiled = compiled_llama(prepare)
    assert len(compiled.plan.layers) == 2
    seen.clear()
    with torch.no_grad():
        assert max_diff(model(input_ids=ids(vocab=61)).logits, before) < 1e-5
        assert seen == [(2, 5, 32)]
        handles[0].remove()
        assert max_diff(model(input_ids=ids(vocab=61)).logits, before) > 1e-4


def test_a_module_inside_a_traced_layer_counts_too() -> None:
    """The FFN of OPT lies open in its layer, whose Python is traced; the modules that are only called there do not."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32)).eval()
    layers, x = model.model.decoder.layers, {"input_ids": ids(vocab=61)}
    layers[0].self_attn.register_forward_hook(lambda *_: None)
    layers[1].fc1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="fc1 has a forward hook"):
        compiled = compile_with_report(model, config(*COPY4), example=x)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["model.decoder.layers.0"]


def test_the_place_of_a_module_with_a_forward_of_its_own_is_not_taken() -> None:
    model = TinyGPT(layers=2).eval()
    own_forward(model.blocks[1].mlp)
    before = model(ids())
    compiled = compile_with_report(model, config(*COPY4), example=ids())
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["blocks.0.mlp"]
    assert any("a forward of its own" in site.reason for site in compiled.sites)
    assert max_diff(model(ids()), before) < 1e-5


class Raw(nn.Module):
    """Its weights are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(64, 16) * 0.1), nn.Parameter(torch.randn(16, 64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.up)), self.down)


def test_gradient_hooks_on_weights_of_the_ffn_itself_are_refused_by_name() -> None:
    """Hooks of the module go over to its graph, those of its weights would not."""
    model = TinyGPT(layers=2)
    for block in model.blocks:
        block.mlp = Raw()
    model.blocks[1].mlp.up.register_hook(lambda grad: grad * 0)
    words = "blocks.1.mlp has a gradient hook on its up, which would not run any more"
    with pytest.warns(UserWarning, match=f"^blocks.1.mlp stays as it is: {words}"):
        compiled = compile_with_report(model, config(*COPY4), example=ids())
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["blocks.0.mlp"]


@pytest.mark.parametrize(
    ("architecture", "inside"),
    [("mixtral", "act_fn"), ("switch_transformers", "expert_0.wi")],
    ids=["stack", "modules"],
)
def test_hooks_inside_experts_are_refused_by_name(architecture: str, inside: str) -> None:
    model, x = moe_model(architecture).eval(), moe_inputs(architecture, ids())
    path = next(name for name, _ in model.named_modules() if name.endswith(f"experts.{inside}"))
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=f"{path} has a forward hook"):
        compiled = compile_with_report(model, config(), example=x)
    experts = path.removesuffix(f".{inside}")
    assert compiled.plan.layers
    assert experts not in [layer.site.fqn for layer in compiled.plan.layers]


def test_hooks_on_experts_themselves_are_kept() -> None:
    model, x = moe_model("mixtral").eval(), moe_inputs("mixtral", ids())
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    experts.register_forward_hook(doubled)
    with torch.no_grad():
        before = model(**x).logits
        compiled = compile_with_report(model, config(), example=x)
        assert max_diff(model(**x).logits, before) < 1e-5
    assert len(compiled.plan.layers) == 2
