"""Does every layer compute what transformers' plain loop computes?

The reference runs in float32 on the same bf16 weights and rows. Layers round the router's product differently (bf16 or
fp32), so a token whose k-th and next expert are nearly tied may go elsewhere; such tokens are left out: of eight times
as many random rows those with the clearest choice are taken. What remains is rounding.
"""

from __future__ import annotations

import torch
from layer import HIDDEN
from torch import Tensor

from side_by_side.common import Layer, Place, Size, Weights
from side_by_side.hugging_face import TransformersLayer

TOLERANCE = 2e-2  # of the largest entry, bf16
TOKENS = 512


class Reference:
    """Rows of all ranks, and what the plain loop makes of them."""

    def __init__(self, size: Size, weights: Weights, place: Place) -> None:
        wide = Weights(*(tensor.float() for tensor in weights.named().values()))
        tokens = min(size.tokens, TOKENS)
        rows = [_clear_rows(wide.router_ED, size.top_k, tokens, seed) for seed in range(place.ranks)]
        directions = [_draw(tokens, 1000 + seed) for seed in range(place.ranks)]
        layer = TransformersLayer(size, wide, Place(), "eager")
        x = torch.cat(rows, 1).float().requires_grad_()
        out = layer(x)
        out.backward(torch.cat(directions, 1).float())
        found = layer.gradients()
        mine = slice(place.rank * tokens, (place.rank + 1) * tokens)
        self.x, self.direction = rows[place.rank], directions[place.rank]
        assert x.grad is not None
        self.wanted = {"output": out.detach()[:, mine], "input": x.grad[:, mine]}
        self.wanted |= {"gate_up": place.mine(found.gate_up_EHD), "down": place.mine(found.down_EDF)}
        self.wanted["router"] = found.router_ED if place.ranks == 1 else self._local_router(layer)

    def _local_router(self, layer: TransformersLayer) -> Tensor:
        """Routers are copies: what a rank has before any reduction is the gradient of its own rows."""
        layer.module.zero_grad(set_to_none=True)
        layer(self.x.float()).backward(self.direction.float())
        return layer.gradients().router_ED

    def errors(self, layer: Layer) -> dict[str, float]:
        """Largest error of the output and of each gradient, relative to its largest entry."""
        layer.module.zero_grad(set_to_none=True)
        x = self.x.clone().requires_grad_()
        out = layer(x)
        out.backward(self.direction)
        assert x.grad is not None
        got = {"output": out.detach(), "input": x.grad} | layer.gradients().named()
        return {
            name: float((got[name].float() - wanted).abs().max() / wanted.abs().max())
            for name, wanted in self.wanted.items()
        }


def require(name: str, errors: dict[str, float]) -> None:
    """Ends the program if a layer does not compute the same."""
    if not max(errors.values()) <= TOLERANCE:  # also if one is not a number
        raise SystemExit(f"{name} does not compute what transformers' plain loop computes: relative errors {errors}")


def _draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _clear_rows(router_ED: Tensor, top_k: int, tokens: int, seed: int) -> Tensor:
    rows = _draw(8 * tokens, seed)
    if top_k == len(router_ED):
        return rows[:, :tokens]
    best = (rows[0].float() @ router_ED.T).topk(top_k + 1, dim=-1).values
    return rows[:, (best[:, -2] - best[:, -1]).topk(tokens).indices.sort().values]
