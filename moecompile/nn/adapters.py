"""Low-rank adapters (LoRA): the weights of those of experts, first values, and which parameters are trained.

    weight         with adapters                     names of the adapters
    linear W_OI    W + s B_Or A_rI                   of peft: `PATH.lora_A.default.weight`
    stack W_EOI    W_e + s B_EOr[e] A_ErI[e]         `EXPERTS.lora_A.WEIGHT`, and lora_B

The adapters of experts have the experts as first dim, so they are sharded, reduced and saved as the experts are. peft
stores them in two dims and orders these differently (moecompile.export.adapters).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moecompile.nn.own_router import OwnRouter
from moecompile.nn.placement import expert_orders, global_rows
from moecompile.routing import is_of_router
from moecompile.torch_private import local_block, local_part

_ADAPTER = re.compile(r"(^|\.)lora_(?P<side>[AB])\.")


def side_of(name: str) -> str | None:
    """`A` or `B` if the parameter is a matrix of an adapter."""
    match = _ADAPTER.search(name)
    return match["side"] if match else None


def expert_adapters(
    module: nn.Module, weights: Sequence[str], rank: int, *, transposed: bool
) -> dict[str, nn.Parameter]:
    """Uninitialized adapters of stacked weights: `lora_A.NAME` (E, rank, d_in) and `lora_B.NAME` (E, d_out, rank).

    Args:
        module: the model's experts. transposed: whether its weights are (E, d_in, d_out), else (E, d_out, d_in).
    """
    new: dict[str, nn.Parameter] = {}
    for name in weights:
        weight = module.get_parameter(name)
        num_experts, d_out, d_in = weight.shape
        if transposed:
            d_in, d_out = d_out, d_in
        dtype = wide(weight.dtype)
        new[f"lora_A.{name}"] = nn.Parameter(weight.new_zeros(num_experts, rank, d_in, dtype=dtype))
        new[f"lora_B.{name}"] = nn.Parameter(weight.new_zeros(num_experts, d_out, rank, dtype=dtype))
    return new


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of adapters of weights in `dtype`: at least fp32, as in peft, or small steps would be lost in bf16."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Fills all adapters as peft does: A uniform in +-1 / sqrt(d_in), B zero, so that the model computes as before.

    The values depend only on the seed, the name and the expert, so they are the same on every mesh. A rank fills its
    part. Does nothing on the meta device.
    """
    orders = expert_orders(model)
    for name, parameter in model.named_parameters():
        local = local_part(parameter)
        if (side := side_of(name)) is None or local.is_meta:
            continue
        if side == "B":
            local.zero_()
            continue
        held = local_block(parameter)
        if parameter.ndim == 3:
            for row, expert in zip(local, global_rows(parameter, orders.get(name)), strict=True):
                row.copy_(_uniform(parameter.shape[1:], f"{seed} {name} {expert}")[held[1:]])
        else:
            local.copy_(_uniform(parameter.shape, f"{seed} {name}")[held])


def _uniform(shape: torch.Size, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * drawn - 1) / math.sqrt(shape[-1])


def train_only_adapters(model: nn.Module, routers: Sequence[nn.Module]) -> None:
    """Freezes everything but adapters and the given routers."""
    kept = {parameter for router in routers for parameter in router.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(side_of(name) is not None or parameter in kept)


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The output head of a transformers model, if it has one."""
    output = getattr(model, "get_output_embeddings", None)
    head = output() if output is not None else None
    return [] if head is None else [head]


def own_router(
    block: nn.Module, experts: nn.Module, num_experts: int, source: str | None = None
) -> list[tuple[str, nn.Module]]:
    """(path in the block, module) of the model's own router: it has one row per expert, is not in the experts, and is
    where the logits come from, if one such module is.

    Args:
        source: path in the block of the module that returns them; None: what `experts` read, once they are rewritten.
    """
    inside, reader, found = set(experts.modules()), getattr(experts, "own_router", None), list[tuple[str, nn.Module]]()
    for path, module in block.named_modules():
        rows = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 2}
        if path and module not in inside and num_experts in rows and side_of(f"{path}.") is None:
            found.append((path, module))
    if source is None and isinstance(reader, OwnRouter):
        source = reader.source[0]
    known = [each for each in found if source is not None and is_of_router(each[0], source)]
    return known or found
