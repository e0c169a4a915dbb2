"""Is Megatron-Core's MoE layer over ranks what a layer of twenty lines computes? Needs `make peers`."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

import moecompile

WIDTH, HIDDEN, EXPERTS, TOP_K = 16, 24, 4, 2


class Block(nn.Module):
    """Softmax after top-k, SwiGLU experts, written without any dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, 1)
        logits_TE = x_TD @ self.router.T
        top_TK, ids_TK = logits_TE.topk(TOP_K)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, ids_TK, top_TK.softmax(-1))
        out_TD = torch.zeros_like(x_TD)
        for expert in range(EXPERTS):
            gate, up = (x_TD @ self.gate_up[expert].T).chunk(2, -1)
            out_TD = out_TD + weights_TE[:, expert, None] * ((F.silu(gate) * up) @ self.down[expert].T)
        return out_TD.view_as(x)


class Layer(nn.Module):
    """Megatron's layer, which wants (sequence, batch, hidden)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.transpose(0, 1).contiguous())[0]
        return out.transpose(0, 1)


def parallelize(block: Block, mesh: DeviceMesh) -> moecompile.Parallel:
    """The all-gather dispatcher and SequentialMLP, the combination that needs no GPU, with the block's weights."""
    layer = _megatron(mesh.size())
    experts = list(layer.experts.local_experts)
    first = mesh.get_local_rank() * len(experts)
    with torch.no_grad():
        layer.router.weight.copy_(block.router)
        for number, expert in enumerate(experts, first):
            expert.linear_fc1.weight.copy_(block.gate_up[number])
            expert.linear_fc2.weight.copy_(block.down[number])

    def clip(norm: float) -> Tensor:
        squares = torch.stack([p.grad.square().sum() for p in layer.experts.parameters()]).sum()
        dist.all_reduce(squares)
        total = (squares + layer.router.weight.grad.square().sum()).sqrt()
        nn.utils.clip_grads_with_norm_(layer.parameters(), norm, total)
        return total

    return moecompile.Parallel(
        module=Layer(layer), finish=lambda targets: dist.all_reduce(layer.router.weight.grad), clip=clip
    )


def _megatron(ranks: int) -> Any:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment] # where it makes its buffers
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
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=4, num_moe_experts=EXPERTS, moe_router_topk=TOP_K,
        moe_ffn_hidden_size=HIDDEN, ffn_hidden_size=HIDDEN, expert_model_parallel_size=ranks,
        moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="none", moe_router_dtype="fp32",
        gated_linear_unit=True, activation_func=F.silu, bias_activation_fusion=False, add_bias_linear=False,
        params_dtype=torch.float32, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        perform_initialization=False,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    return MoELayer(config, getattr(spec, "submodules", None) or spec.keywords["submodules"])


def batch(number: int) -> dict[str, Tensor]:
    """Hidden states, and labels of which `certify` masks some."""
    x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(number))
    return {"x": x, "labels": torch.zeros(2, 12, dtype=torch.long)}


def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A sum over the places that are not masked."""
    return (module(batch["x"]).square().sum(-1) * (batch["labels"] == 0)).sum()


if __name__ == "__main__":
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print(
        moecompile.certify(
            Block, parallelize, batch, {"ep": ranks}, loss=loss, reduction="sum", dtype=torch.float32
        ).check()
    )
