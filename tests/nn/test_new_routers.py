"""Scores, norms and hashes of the routers of 2025 and 2026 equal transformers' own modules in float64.

Those modules cast to fp32 inside; here their casts go to float64, so that the comparison is exact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moecompile.errors import MoecompileError
from moecompile.nn import Router
from tests.tiny import a_router, tokens

EXPERTS, TOP_K, TOKENS, D, VOCAB = 16, 4, 64, 8, 50
F64 = torch.float64
SIZES = {
    "hidden_size": D, "num_experts_per_tok": TOP_K, "num_local_experts": EXPERTS, "num_experts": EXPERTS,
    "top_k_experts": TOP_K, "vocab_size": VOCAB, "rms_norm_eps": 1e-6,
}  # fmt: skip
IDS = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))


class Wide(TorchFunctionMode):
    """Casts to fp32 are casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        swapped = {name: F64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **swapped)


def theirs(family: str, name: str, **settings: Any) -> nn.Module:
    source = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module: nn.Module = getattr(source, name)(SimpleNamespace(**SIZES, **settings))
    return module.double()


def deepseek_v4(ours: Router) -> Callable[[Tensor], Tensor]:
    module = theirs("deepseek_v4", "DeepseekV4TopKRouter", scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
    module.load_state_dict({"weight": ours.weight, "e_score_correction_bias": ours.correction_bias})
    return lambda x: table(*module(x)[1:])


def deepseek_v4_hash(ours: Router) -> Callable[[Tensor], Tensor]:
    module = theirs("deepseek_v4", "DeepseekV4HashRouter", scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
    by_id = torch.ops.moecompile.hashed_ids(torch.arange(VOCAB), EXPERTS, TOP_K, ours.layer)
    module.load_state_dict({"weight": ours.weight, "tid2eid": by_id})
    return lambda x: table(*module(x, IDS)[1:])


def cohere2_moe(ours: Router) -> Callable[[Tensor], Tensor]:
    module = theirs(
        "cohere2_moe", "Cohere2MoeTopKRouter", expert_selection_fn="sigmoid", norm_topk_prob=ours.config.normalize
    )
    module.load_state_dict({"weight": ours.weight})
    return lambda x: table(*module(x)[1:])


def llama4(ours: Router) -> Callable[[Tensor], Tensor]:
    module = theirs("llama4", "Llama4Router")
    module.load_state_dict({"weight": ours.weight})
    return lambda x: module(x)[0]


def gemma4(ours: Router) -> Callable[[Tensor], Tensor]:
    module = theirs("gemma4", "Gemma4TextRouter")
    module.load_state_dict(
        {"proj.weight": ours.weight, "scale": ours.norm_scale, "per_expert_scale": ours.expert_scale}
    )
    return lambda x: table(*module(x)[1:])


CASES: dict[str, tuple[Callable[[Router], Callable[[Tensor], Tensor]], dict[str, Any]]] = {
    "deepseek_v4": (deepseek_v4, {"score": "sqrt_softplus", "scale": 1.5}),
    "deepseek_v4 hash": (deepseek_v4_hash, {"score": "sqrt_softplus", "scale": 1.5, "choice": "hash"}),
    "cohere2_moe": (cohere2_moe, {"score": "sigmoid_after_topk"}),
    "cohere2_moe not normalised": (cohere2_moe, {"score": "sigmoid_after_topk", "normalize": False}),
    "llama4": (llama4, {"score": "sigmoid_after_topk", "normalize": False}),
    "gemma4": (gemma4, {"norm": True, "expert_scale": True}),
}


def table(weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    return torch.zeros(TOKENS, EXPERTS, dtype=F64).scatter(1, ids_TK, weights_TK)


@torch.no_grad()
def router(options: dict[str, Any]) -> Router:
    made, generator = a_router(D, EXPERTS, top_k=TOP_K, dtype=F64, **options), torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    if made.config.score == "sqrt_softplus":
        made.correction_bias.copy_(torch.randn(EXPERTS, generator=generator, dtype=F64) * 0.2)
    return made


@pytest.mark.parametrize("name", CASES)
def test_same_weights_and_gradients(name: str) -> None:
    make, options = CASES[name]
    ours, results = router(options), []
    other = make(ours)
    for call in (lambda x: table(*ours(x, None, IDS)), other):
        ours.zero_grad()
        x = tokens(TOKENS, dtype=F64).requires_grad_()
        with Wide():
            weights_TE = call(x)
        (weights_TE * torch.arange(1, EXPERTS + 1)).square().sum().backward()
        module = ours if call is not other else _module(other)
        grads = sorted((grad.detach() for p in module.parameters() if (grad := p.grad) is not None), key=torch.numel)
        assert len(grads) == len(list(ours.parameters()))
        results.append([weights_TE.detach(), x.grad, *grads])
    for one, wanted in zip(*results, strict=True):
        assert one.dtype == wanted.dtype == F64
        assert float(wanted.abs().max()) > 0
        assert (one - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def _module(call: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module that a call of `theirs` closes over."""
    (cell,) = (c for c in call.__closure__ or () if isinstance(c.cell_contents, nn.Module))
    module: nn.Module = cell.cell_contents
    return module


def test_a_hash_ignores_scores_and_layers_differ() -> None:
    routers = [router({"choice": "hash"}) for _ in range(2)]
    routers[1].layer = 1
    chosen = [made(tokens(TOKENS, seed=seed, dtype=F64), None, IDS)[1] for made in routers for seed in (0, 1)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    with pytest.raises(MoecompileError, match=r"needs token ids: call the model with input_ids"):
        routers[0](tokens(TOKENS, dtype=F64))


def test_sqrt_softplus_has_a_gradient_where_it_underflows() -> None:
    ours = a_router(D, EXPERTS, top_k=TOP_K, score="sqrt_softplus", normalize=False)
    nn.init.constant_(ours.weight, -100.0)
    ours(torch.ones(3, D))[0].sum().backward()
    assert ours.weight.grad is not None
    assert ours.weight.grad.isfinite().all()
