"""A tiny model of the tests of the strategy, and weights that routing tells apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moecompile.nn import Experts, Router


class Classifier(nn.Module):
    """An ordinary model with an FFN in each of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def spread(model: nn.Module) -> nn.Module:
    """Independently random experts and routers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (Experts, Router)):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model
