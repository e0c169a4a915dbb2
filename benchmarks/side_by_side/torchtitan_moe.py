"""torchtitan's MoE: sort, torch._grouped_mm, all-to-all. Its experts always compute in bf16."""

from __future__ import annotations

import warnings

import torch
from layer import HIDDEN
from torch import Tensor

from side_by_side.common import Place, Size, Weights, grad


class TorchtitanLayer:
    """The layer of torchtitan's Mixtral-like models: softmax, normalised top-k, no load balancing."""

    def __init__(self, size: Size, weights: Weights, place: Place) -> None:
        from torchtitan.distributed.utils import set_spmd_backend
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
        from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

        set_spmd_backend("default")  # the other one checks types of every tensor
        # The router asks for fp32 autocast, which a CPU does not have: its product stays in bf16.
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        dispatcher = AllToAllTokenDispatcher if place.ranks > 1 else LocalTokenDispatcher
        experts, width = size.experts, size.width
        config = MoE.Config(
            num_experts=experts,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(
                    dim=HIDDEN, hidden_dim=width, num_experts=experts // place.ranks
                ),
                token_dispatcher=dispatcher.Config(num_experts=experts, top_k=size.top_k),
            ),
            router=TokenChoiceTopKRouter.Config(
                num_experts=experts, top_k=size.top_k, score_func="softmax", route_norm=True,
                gate=Linear.Config(in_features=HIDDEN, out_features=experts),
            ),
            load_balance_coeff=None,
        )  # fmt: skip
        self.module = config.build().to(torch.bfloat16)
        self._experts = self.module.routed_experts.inner_experts
        gate_up = place.mine(weights.gate_up_EHD)
        with torch.no_grad():
            self.module.router.gate.weight.copy_(weights.router_ED)
            self._experts.w1_EFD.copy_(gate_up[:, :width])
            self._experts.w3_EFD.copy_(gate_up[:, width:])
            self._experts.w2_EDF.copy_(place.mine(weights.down_EDF))
        if place.ranks > 1:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh("cpu", (place.ranks,), mesh_dim_names=("ep",))
            self.module.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD)
        return out

    def gradients(self) -> Weights:
        gate_up = torch.cat([grad(self._experts.w1_EFD), grad(self._experts.w3_EFD)], dim=1)
        return Weights(grad(self.module.router.gate.weight), gate_up, grad(self._experts.w2_EDF))
