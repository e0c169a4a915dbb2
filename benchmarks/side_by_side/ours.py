"""moecompile's rewrite of transformers' Mixtral block, on one rank or with the experts over several."""

from __future__ import annotations

import torch
from layer import HIDDEN
from torch import Tensor, nn

from side_by_side.common import Place, Size, Weights, grad
from side_by_side.hugging_face import mixtral_block


class MoecompileLayer:
    """dispatch: `flat`, `dedup`, `hierarchical`, `allgather` or `auto`; one rank has no exchange."""

    def __init__(self, size: Size, weights: Weights, place: Place, dispatch: str = "auto") -> None:
        from moecompile import compile_model

        block = mixtral_block(size, weights, "eager")
        overrides = [f"mesh.num_nodes={place.nodes}", f"mesh.ranks_per_node={place.ranks // place.nodes}"]
        overrides += ["data.micro_batch_size=1"]
        overrides += [f"data.seq_len={size.tokens}", f"data.global_batch_size={place.ranks}"]
        overrides += [f"dispatch={dispatch}"] if place.ranks > 1 else []
        example = torch.zeros(1, 4, HIDDEN, dtype=weights.router_ED.dtype)
        self.module = compile_model(block, overrides, example=example)
        if place.ranks > 1:
            _bind(self.module, place)
        names = dict(self.module.named_parameters())
        self._gate, self._gate_up, self._down = (
            names[name] for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        )

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD)
        return out

    def gradients(self) -> Weights:
        return Weights(grad(self._gate), grad(self._gate_up), grad(self._down))


def _bind(module: nn.Module, place: Place) -> None:
    """What `until="shard"` does, without FSDP2, which no peer has here either."""
    from torch.distributed.tensor import DTensor, Shard

    from moecompile import device_mesh_of, plan_of
    from moecompile.passes.shard import bind_axes, expert_parameters

    mesh = device_mesh_of(plan_of(module).mesh, "cpu")
    bind_axes(module, mesh, place.nodes)
    for owner, name in expert_parameters(module):
        local = place.mine(owner.get_parameter(name).detach()).clone()
        setattr(owner, name, nn.Parameter(DTensor.from_local(local, mesh["ep"], [Shard(0)], run_check=False)))
