"""Muon in one process: a plain loop over whole matrices, which shares no arithmetic with moecompile.runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moecompile.nn.matrices import Layout, hidden_matrices
from moecompile.runtime.weight_groups import weight_groups
from moecompile.schema import MuonConfig, MuonScale, OptimizerConfig, OptimizerKind

_STACKED = 3  # dims


def plain_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """torch's AdamW with one group per weight, and the loop for the matrices of Muon."""
    settings: list[dict[str, Any]] = []
    for group in weight_groups(model, config):
        settings += [
            {"params": [weight], "lr": group.lr, "weight_decay": group.weight_decay, "is_muons": group.kind == "muon"}
            for weight in group.weights
        ]
    betas = (config.betas[0], config.betas[1])
    if config.kind is OptimizerKind.adamw:
        return AdamW(settings, betas=betas, eps=config.eps)
    by_name = hidden_matrices(model)
    layouts = {weight: by_name[name] for name, weight in model.named_parameters() if name in by_name}
    return _PlainMuon(settings, layouts, config.muon, AdamW(_others(settings), betas=betas, eps=config.eps))


def _others(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(group) for group in settings if not group["is_muons"]]


class _PlainMuon(Optimizer):
    def __init__(
        self, groups: list[dict[str, Any]], layouts: Mapping[nn.Parameter, Layout], muon: MuonConfig, others: Optimizer
    ) -> None:
        super().__init__(groups, {})
        self.layouts, self.muon, self.others = layouts, muon, others
        self.momentum: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; learning rates are those of the groups, which a schedule changes."""
        rest = iter(self.others.param_groups)
        for group in self.param_groups:
            (weight,) = group["params"]
            if not group["is_muons"]:
                next(rest)["lr"] = group["lr"]
            elif weight.grad is not None:
                self._matrices(weight, group)
        self.others.step()

    def _matrices(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        muon = self.muon
        assert weight.grad is not None
        old = self.momentum.get(weight, torch.zeros_like(weight))
        self.momentum[weight] = moved = muon.momentum * old + (1 - muon.momentum) * weight.grad
        update = muon.momentum * moved + (1 - muon.momentum) * weight.grad if muon.nesterov else moved
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        layout = self.layouts[weight]
        for target, matrix in zip(_each(weight, layout), _each(update, layout), strict=True):
            rows, columns = matrix.shape
            scale = 0.2 * max(rows, columns) ** 0.5 if muon.scale is MuonScale.match_rms_adamw else 1.0
            if muon.scale is MuonScale.original and rows > columns:
                scale = (rows / columns) ** 0.5
            target -= group["lr"] * scale * _iterated(matrix, muon)


def _each(weight: Tensor, layout: Layout) -> Iterator[Tensor]:
    """The matrices of a weight one after another, (d_out, d_in)."""
    experts = weight.chunk(layout.joined) if layout.joined else weight if weight.ndim == _STACKED else [weight]
    for expert in experts:
        matrix = expert.T if layout.transposed else expert
        for part in range(layout.parts):
            width = matrix.shape[0] // layout.parts
            yield matrix[part :: layout.parts] if layout.interleaved else matrix[part * width : (part + 1) * width]


def _iterated(matrix: Tensor, muon: MuonConfig) -> Tensor:
    """Newton-Schulz with the Gram matrix of the columns, whatever the shape."""
    a, b, c = muon.coefficients
    x: Tensor = matrix / max(float(matrix.square().sum()) ** 0.5, 1e-7)
    for _ in range(muon.steps):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x
