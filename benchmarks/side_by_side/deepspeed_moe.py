"""DeepSpeed's MoE without drops: every expert gets as many rows as the fullest one, the rest is padding."""

from __future__ import annotations

import contextlib
import io
import logging

import torch
from layer import HIDDEN, Dense
from torch import Tensor

from side_by_side.common import Place, Size, Weights, grad


class DeepSpeedLayer:
    """The experts are modules of ours: a SwiGLU with gate and up as one linear, the fastest form here."""

    def __init__(self, size: Size, weights: Weights, place: Place) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it builds
            import deepspeed
            from deepspeed.moe.layer import MoE

            deepspeed.init_distributed("gloo", verbose=False)
            self.module = MoE(
                HIDDEN, Dense(size.width), size.experts, ep_size=place.ranks, k=size.top_k, drop_tokens=False,
                use_rts=False, top2_2nd_expert_sampling=False,
            ).to(torch.bfloat16)  # fmt: skip
            self.module.set_deepspeed_parallelism()
        self._gate = self.module.deepspeed_moe.gate.wg
        self._experts = self.module.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            self._gate.weight.copy_(weights.router_ED)
            pairs = zip(place.mine(weights.gate_up_EHD), place.mine(weights.down_EDF), strict=True)
            for expert, (gate_up, down) in zip(self._experts, pairs, strict=True):
                expert.gate_up.weight.copy_(gate_up)
                expert.down.weight.copy_(down)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD)[0]
        return out

    def gradients(self) -> Weights:
        gate_up = torch.stack([grad(expert.gate_up.weight) for expert in self._experts])
        down = torch.stack([grad(expert.down.weight) for expert in self._experts])
        return Weights(grad(self._gate.weight), gate_up, down)
