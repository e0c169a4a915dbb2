"""Autocast rules: expert matmuls run in the autocast dtype, like every linear; routing weights and sums keep theirs.

Without a rule, autocast would apply *inside* the op: a matmul in `unpermute` would sum in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_lib = torch.library.Library("moecompile", "FRAGMENT")


def _in_autocast_dtype(name: str, device_type: str, products: tuple[int, ...]) -> Callable[..., Any]:
    """A rule that casts the arguments at the places `products`, which the op multiplies."""

    def cast(factor: Any) -> Any:
        if isinstance(factor, list):
            return [cast(each) for each in factor]
        return factor if factor.dtype == torch.float64 else factor.to(torch.get_autocast_dtype(device_type))

    def rule(*args: Any) -> Any:
        given = [cast(a) if i in products else a for i, a in enumerate(args)]
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.moecompile, name)(*given)

    return rule


# Op -> places of its rows and weights.
_PRODUCTS = {
    "grouped_mm": (0, 1),
    "expert_ffn": (0, 4, 5),
    "unpermute": (),
}
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name, _places in _PRODUCTS.items():
        _lib.impl(_name, _in_autocast_dtype(_name, _device_type, _places), _key)
