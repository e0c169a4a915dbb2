"""Megatron-Core's MoELayer: all-gather dispatcher and SequentialMLP, the combination that needs no GPU."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from layer import HIDDEN
from torch import Tensor
from torch.nn import functional as F

from side_by_side.common import Place, Size, Weights, grad


class MegatronLayer:
    """Softmax after top-k, router in fp32, no load balancing; the activation as Megatron fuses it."""

    def __init__(self, size: Size, weights: Weights, place: Place) -> None:
        self.module = _module(size, place)
        with torch.no_grad():
            self.module.router.weight.copy_(weights.router_ED)
            pairs = zip(place.mine(weights.gate_up_EHD), place.mine(weights.down_EDF), strict=True)
            for expert, (gate_up, down) in zip(self.module.experts.local_experts, pairs, strict=True):
                expert.linear_fc1.weight.copy_(gate_up)
                expert.linear_fc2.weight.copy_(down)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD.transpose(0, 1))[0]  # it wants (sequence, batch, hidden)
        return out.transpose(0, 1)

    def gradients(self) -> Weights:
        experts = self.module.experts.local_experts
        gate_up = torch.stack([grad(expert.linear_fc1.weight) for expert in experts])
        down = torch.stack([grad(expert.linear_fc2.weight) for expert in experts])
        return Weights(grad(self.module.router.weight), gate_up, down)


def _module(size: Size, place: Place) -> Any:
    torch.cuda.current_device = lambda: torch.device("cpu")  # where it makes its buffers
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names each GPU package that is not there
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe import moe_utils
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not hasattr(moe_utils, "te_general_gemm"):  # read without Transformer Engine, but not defined
            moe_utils.te_general_gemm = None
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=place.ranks)
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=8, num_moe_experts=size.experts,
            moe_router_topk=size.top_k, moe_ffn_hidden_size=size.width, ffn_hidden_size=size.width,
            expert_model_parallel_size=place.ranks, moe_token_dispatcher_type="allgather",
            moe_router_load_balancing_type="none", moe_router_dtype="fp32", gated_linear_unit=True,
            activation_func=F.silu, bias_activation_fusion=True, add_bias_linear=False, bf16=True,
            params_dtype=torch.bfloat16, use_cpu_initialization=True, gradient_accumulation_fusion=False,
            perform_initialization=False,
        )  # fmt: skip
        spec = get_moe_module_spec(use_te=False, num_experts=size.experts, moe_grouped_gemm=False)
        submodules = getattr(spec, "submodules", None) or spec.keywords["submodules"]  # 0.16, 0.19
        return MoELayer(config, submodules)
