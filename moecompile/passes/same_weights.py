"""Checks that all ranks start from the same weights: sharding slices local weights and broadcasts nothing.

Algorithm:
  1. Names, shapes and dtypes must agree on all ranks, or the hashes could not be compared.
  2. One hash per tensor: arrange its bytes as rows of 64-bit words, and add up the row sums, each times an odd number
     of its own (all modulo 2^64). It costs one read of the weights.
  3. For every tensor the largest and the smallest hash over ranks must be equal; else name the first that differs.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.errors import PlanError
from moecompile.torch_private import device_of

_ROWS = 1024
_NAMED = 4  # the message names at most this many ranks
_FIX = "Set one seed before the model is built on every rank (lightning.seed_everything), or load the same checkpoint"


@torch.no_grad()
def check_same_weights(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compares parameters and buffers of the state dict across the ranks of `group`.

    Skips shards and tensors on the meta device.

    Raises:
        PlanError: names the first tensor that differs, and the ranks; the same error on every rank.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    whole = {
        name: tensor.detach()
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta
    }
    device = next((tensor.device for tensor in whole.values() if not tensor.is_cpu), device_of(group))
    forms = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in whole.items()]
    if different := ranks_that_differ("\n".join(forms), group):  # Step 1
        raise PlanError("model", type(model).__name__, f"ranks {different} have other weights by name or shape", _FIX)
    if not whole:
        return
    hashes = torch.stack([tensor_hash(tensor).to(device) for tensor in whole.values()])  # Step 2
    if differs := _differing(hashes, group):  # Step 3
        ranks = _ranks(hashes[differs[0]], group)
        more = f" and {len(differs) - 1} more" if len(differs) > 1 else ""
        rule = f"does not have the values of rank 0 on rank {ranks}{more}"
        raise PlanError("model", list(whole)[differs[0]], f"ranks start from different weights: {rule}", _FIX)


def ranks_that_differ(text: str, group: dist.ProcessGroup | None = None) -> str:
    """The ranks of `group` whose `text` is not that of its first rank: `1, 3`; empty if all have the same.

    No rank receives what all others have, unless they differ.
    """
    digest = torch.tensor([_digest(text)], device=device_of(group))
    return _ranks(digest[0], group) if _differing(digest, group) else ""


def tensor_hash(tensor: Tensor) -> Tensor:
    """A hash (0-dim int64) of a tensor's bytes, on its device."""
    data = tensor.contiguous().reshape(-1)
    if data.stride() != (1,) or data.storage_offset() * data.element_size() % 8:
        data = torch.empty(data.shape, dtype=data.dtype, device=data.device).copy_(data)
    data = data.view(torch.uint8)
    whole = data.numel() // (8 * _ROWS) * (8 * _ROWS)
    sums = data[:whole].view(torch.int64).view(_ROWS, -1).sum(1) if whole else data.new_zeros(0, dtype=torch.int64)
    sums = torch.cat((sums, data[whole:].long()))
    odd = 2 * torch.arange(1, sums.numel() + 1, device=sums.device) * 0x61C8864680B583EB + 1
    return (sums * odd).sum()


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _differing(hashes: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    """Where ranks have different hashes."""
    extremes = torch.cat((hashes, ~hashes))  # ~x reverses the order, so one MAX gives both extremes
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes[: len(hashes)], ~extremes[len(hashes) :]
    differs: list[int] = (largest != smallest).nonzero().flatten().tolist()
    return differs


def _ranks(value: Tensor, group: dist.ProcessGroup | None) -> str:
    """The ranks whose value differs from that of rank 0: `1, 3`; empty if none does."""
    every = value.new_empty(dist.get_world_size(group))
    dist.all_gather_into_tensor(every, value.reshape(1), group=group)
    ranks = (every != every[0]).nonzero().flatten().tolist()
    return ", ".join(map(str, ranks[:_NAMED])) + (", ..." if len(ranks) > _NAMED else "")
