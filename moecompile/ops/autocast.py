"""Autocast rules: expert matmuls run in the autocast dtype, like every linear; routing weights and sums keep theirs.

Without a rule, autocast would apply *inside* the op: a matmul in `unpermute` would sum in bf16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_lib = torch.library.Library("moecompile", "FRAGMENT")


def _grouped_mm(device_type: str) -> Callable[..., Tensor]:
    def rule(
        rows_RD: Tensor, weight_EFD: Tensor, counts_E: Tensor, token: Tensor | None = None, index: int = 0
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        rows_RD, weight_EFD = (t if t.dtype == torch.float64 else t.to(dtype) for t in (rows_RD, weight_EFD))
        with torch.autocast(device_type, enabled=False):
            out: Tensor = torch.ops.moecompile.grouped_mm(rows_RD, weight_EFD, counts_E, token, index)
        return out

    return rule


def _unpermute(device_type: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def rule(rows_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
        with torch.autocast(device_type, enabled=False):
            out: Tensor = torch.ops.moecompile.unpermute(rows_RD, order_R, weights_TK)
        return out

    return rule


def _expert_ffn(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    def rule(
        x_VD: Tensor, source_R: Tensor, weights_R: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor,
        token: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = torch.get_autocast_dtype(device_type)
        x_VD, gate_up_EGD, down_EDF = (
            t if t.dtype == torch.float64 else t.to(dtype) for t in (x_VD, gate_up_EGD, down_EDF)
        )
        with torch.autocast(device_type, enabled=False):
            out: tuple[Tensor, ...] = torch.ops.moecompile.expert_ffn(
                x_VD, source_R, weights_R, counts_E, gate_up_EGD, down_EDF, token
            )
        return out

    return rule


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _lib.impl("grouped_mm", _grouped_mm(_device_type), _key)
    _lib.impl("expert_ffn", _expert_ffn(_device_type), _key)
    _lib.impl("unpermute", _unpermute(_device_type), _key)
