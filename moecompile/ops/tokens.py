"""Shape and counting ops around the router.

Legend: T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moecompile.torch_private import in_backward

_lib = torch.library.Library("moecompile", "FRAGMENT")
_lib.define("flatten_tokens(Tensor(a) x) -> Tensor(a)")
_lib.define("unflatten_tokens(Tensor y, Tensor like) -> Tensor")
_lib.define("router_logits(Tensor x, Tensor weight) -> Tensor")


def _flatten_tokens(x: Tensor) -> Tensor:
    """(..., D) -> (T, D): a view where the strides allow it."""
    return x.reshape(-1, x.shape[-1])


def _unflatten_tokens(y_TD: Tensor, like: Tensor) -> Tensor:
    """(T, D) -> the leading shape of `like`."""
    # As torch's own linear: nobody else reads y, so the result is no view (FSDP cannot hook the gradient of a view).
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y_TD.contiguous(), like.shape)
    return shaped


def _router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in at least fp32, also under autocast, (T, E)."""
    wide, device_type = torch.promote_types(weight_ED.dtype, torch.float32), x_TD.device.type
    if not torch.amp.is_autocast_available(device_type):  # meta
        return F.linear(x_TD.to(wide), weight_ED.to(wide))
    with torch.autocast(device_type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide))


# Composites: autograd and fake tensors see the torch functions inside.
_lib.impl("flatten_tokens", _flatten_tokens, "CompositeImplicitAutograd")
_lib.impl("unflatten_tokens", _unflatten_tokens, "CompositeImplicitAutograd")
_lib.impl("router_logits", _router_logits, "CompositeImplicitAutograd")


@torch.library.custom_op("moecompile::count_load", mutates_args=("load_E",))
def count_load(load_E: Tensor, ids_TK: Tensor) -> None:
    """Adds the number of tokens that chose each expert to `load_E`, in place.

    Nothing is added while autograd runs, so that a recomputed forward (activation checkpointing) is not counted twice.
    """
    if not in_backward():
        load_E.add_(expert_counts(ids_TK, load_E.numel()).to(load_E.dtype))


@count_load.register_fake
def _(load_E: Tensor, ids_TK: Tensor) -> None:
    return None


def expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert id occurs, (E,) int64. `bincount` would read its result's size back to the host."""
    flat = ids.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
