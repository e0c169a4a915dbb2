"""Linears and embeddings of which each rank of a TP group has a part: the styles of transformers' `tp_plan`.

A module keeps its class as a base, its name and its parameters, which are DTensors on the `tp` axis; only its forward
changes. Between them, values are replicated (the same on every rank, with the same whole gradient) or split by columns
(heads, hidden units).

    colwise                 replicated -> columns       weight split by outputs, bias too
    rowwise                 columns -> replicated       weight split by inputs; the bias is added once, after the sum
    colwise_gather_output   replicated -> replicated    colwise, and columns are gathered (`colwise_rep`)
    rowwise_split_input     replicated -> replicated    rowwise on this rank's columns of the input (`rowwise_rep`)
    embedding_rowwise       ids -> replicated           weight split by ids: a rank's rows, and zero for the other ids
    mla_kv_a_proj           replicated -> replicated    whole weight; its rotary part goes to each rank's heads
    replicated_with_grad_allreduce                      whole weight on values split by heads
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.ops.slices import spread
from moecompile.torch_private import local_part, own_parameters

moe = torch.ops.moecompile
SPLIT_DIMS: dict[str, dict[str, int]] = {
    "colwise": {"weight": 0, "bias": 0},
    "colwise_gather_output": {"weight": 0, "bias": 0},
    "colwise_rep": {"weight": 0, "bias": 0},
    "rowwise": {"weight": 1},
    "rowwise_split_input": {"weight": 1},
    "rowwise_rep": {"weight": 1},
    "embedding_rowwise": {"weight": 0},
    "mla_kv_a_proj": {},
    "replicated_with_grad_allreduce": {},
}
"""Style -> parameters that are split, and along which dim."""


class _Split(nn.Module):
    tp_axis: str  # name of the process group
    weight: Tensor
    bias: Tensor | None


class _Colwise(_Split):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else local_part(self.bias)
        return F.linear(spread(x, self.tp_axis), local_part(self.weight), bias)


class _ColwiseGathered(_Colwise):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = moe.join_columns(super().forward(x), self.tp_axis)
        return out


class _Rowwise(_Split):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = moe.sum_ranks(F.linear(x, local_part(self.weight)), self.tp_axis)
        return out if self.bias is None else out + self.bias


class _RowwiseCut(_Rowwise):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(moe.cut_columns(x, self.tp_axis))


class _EmbeddingRows(_Split):
    """Of a class that may scale what it looks up (Gemma): its own forward runs on this rank's rows."""

    tp_first: int
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        whole, padding, rows = own_parameters(self)["weight"], self.padding_idx, local_part(self.weight)
        local = ids - self.tp_first
        is_here = (local >= 0) & (local < rows.shape[0])
        here = padding is not None and 0 <= padding - self.tp_first < rows.shape[0]
        own_parameters(self)["weight"] = rows  # type: ignore[assignment]
        self.padding_idx = padding - self.tp_first if here else None  # type: ignore[operator]
        try:
            found: Tensor = super().forward(local.where(is_here, 0))
        finally:
            own_parameters(self)["weight"], self.padding_idx = whole, padding
        out: Tensor = moe.sum_ranks(found * is_here.unsqueeze(-1).to(found.dtype), self.tp_axis)
        return out


class _LatentKeys(_Split):
    """kv_a_proj_with_mqa of latent attention: its last columns, the rotary key, go to this rank's heads directly."""

    tp_rotary: int

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        latent, rotary = out.split([out.shape[-1] - self.tp_rotary, self.tp_rotary], dim=-1)
        return torch.cat((latent, spread(rotary, self.tp_axis)), dim=-1)


_FORWARDS: dict[str, type[_Split]] = {
    "colwise": _Colwise, "colwise_gather_output": _ColwiseGathered, "colwise_rep": _ColwiseGathered,
    "rowwise": _Rowwise, "rowwise_split_input": _RowwiseCut, "rowwise_rep": _RowwiseCut,
    "embedding_rowwise": _EmbeddingRows, "mla_kv_a_proj": _LatentKeys,
}  # fmt: skip


def split_module(module: nn.Module, style: str, tp: DeviceMesh, split: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives `module` the forward of `style`, and its parameters their part on this rank, in place.

    Args:
        style: of `SPLIT_DIMS`. tp: the axis; its process group is named in the forwards.
        split: whole parameter -> its DTensor, of modules that were split before: tied weights stay tied.
    """
    for name, dim in SPLIT_DIMS[style].items():
        whole = own_parameters(module).get(name)
        if whole is not None and not isinstance(whole, DTensor):
            if whole not in split:
                split[whole] = _part(whole, tp, dim)
            own_parameters(module)[name] = split[whole]
    forward = _FORWARDS.get(style)
    if forward is None:
        return
    kind = type(module)
    module.__class__ = type(f"{forward.__name__.strip('_')}{kind.__name__}", (forward, kind), {})
    vars(module)["tp_axis"] = tp.get_group().group_name
    if style == "embedding_rowwise":
        vars(module)["tp_first"] = tp.get_local_rank() * own_parameters(module)["weight"].shape[0] // tp.size()  # type: ignore[union-attr]


def _part(whole: nn.Parameter, tp: DeviceMesh, dim: int) -> nn.Parameter:
    """This rank's slice of the whole weight that it already has; nothing is broadcast."""
    local = whole.detach().chunk(tp.size(), dim)[tp.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return nn.Parameter(DTensor.from_local(local, tp, [Shard(dim)], run_check=False), requires_grad=whole.requires_grad)
