"""transformers' Mixtral block: the plain loop, grouped_mm, and its own expert parallelism by all-to-all."""

from __future__ import annotations

import torch
from layer import HIDDEN
from torch import Tensor, nn

from side_by_side.common import Place, Size, Weights, grad


def mixtral_block(size: Size, weights: Weights, implementation: str) -> nn.Module:
    """MixtralSparseMoeBlock with these weights, in their dtype."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=size.width, num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )  # fmt: skip
    config._experts_implementation = implementation
    block: nn.Module = MixtralSparseMoeBlock(config).to(weights.router_ED.dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights.router_ED)
        block.experts.gate_up_proj.copy_(weights.gate_up_EHD)
        block.experts.down_proj.copy_(weights.down_EDF)
    return block


class TransformersLayer:
    """implementation: `eager` or `grouped_mm`, of the experts."""

    def __init__(self, size: Size, weights: Weights, place: Place, implementation: str) -> None:
        self.module = mixtral_block(size, weights, implementation)
        if place.ranks > 1:
            _exchange(self.module)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD)
        return out

    def gradients(self) -> Weights:
        experts = self.module.experts
        return Weights(grad(self.module.gate.weight), grad(experts.gate_up_proj), grad(experts.down_proj))


def _exchange(block: nn.Module) -> None:
    """What `DistributedConfig(ep_implementation="all_to_all")` does to each block of a model, FSDP left out."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    plan = {
        "experts.gate_up_proj": "grouped_gemm",
        "experts.down_proj": "grouped_gemm",
        "experts": "ep_dispatch_experts",
    }
    apply_expert_parallelism(block, mesh["ep"], mesh["tp"], plan, "all_to_all")
