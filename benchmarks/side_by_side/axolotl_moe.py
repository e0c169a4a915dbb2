"""Axolotl's expert parallelism over torch's own all-to-all: a token goes to each rank once, optionally in chunks."""

from __future__ import annotations

from torch import Tensor, nn

from side_by_side.common import Place, Size, Weights, grad
from side_by_side.hugging_face import mixtral_block


class AxolotlLayer:
    """transformers' block with the experts' forward that axolotl's plugin registers. chunks: a number."""

    def __init__(self, size: Size, weights: Weights, place: Place, chunks: str = "1") -> None:
        import torch.distributed as dist
        from axolotl.integrations.expert_parallel import experts_fn, torch_dispatch

        self._settings, self._chunks = experts_fn, int(chunks)
        experts_fn.register_all()
        experts_fn.set_backend("torch")
        experts_fn.set_local_implementation("grouped_mm")
        torch_dispatch.set_ep_group(dist.group.WORLD)
        self.module = mixtral_block(size, weights, experts_fn.EXPERT_PARALLEL)
        _cut(self.module.experts, place)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        self._settings.set_dispatch_chunks(self._chunks)  # one setting of the process, and several of these layers
        out: Tensor = self.module(x_1TD)
        return out

    def gradients(self) -> Weights:
        experts = self.module.experts
        return Weights(grad(self.module.gate.weight), grad(experts.gate_up_proj), grad(experts.down_proj))


def _cut(experts: nn.Module, place: Place) -> None:
    """As `shard_expert_weights`, which scatters from rank 0 over CUDA."""
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(place.mine(experts.get_parameter(name).detach()).clone()))
    everywhere = int(experts.num_experts)
    experts.num_experts_global, experts.num_experts = everywhere, everywhere // place.ranks
    experts.num_local_experts = experts.num_experts
