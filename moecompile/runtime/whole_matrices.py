"""Brings matrices of which every rank has a part to one rank each, and their new values back.

Algorithm:
  1. The axes over which a matrix is cut are read from its DTensor: FSDP's, and within the part that this leaves, tp.
     The axis ep has whole experts, and so has each rank of a stack that FSDP cuts between experts.
  2. Matrices with the same axes are taken in rounds, as many as there are ranks in the axes: each rank gets one, so all
     ranks work, and a rank holds one whole matrix at a time.
  3. Axis by axis, one all-to-all brings the parts of each matrix to the rank that gets it.
  4. That rank computes; then the axes in reverse order bring back to each rank its part of the result.
A rank sends (n - 1) / n of its parts there and (n - 1) / n of its results back, with n ranks in an axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecompile.ops.traffic import optimizer_traffic

_WHOLE = ("ep",)  # axes whose ranks have different experts


@dataclass(frozen=True, kw_only=True)
class Cut:
    """An axis over which a tensor is cut. shape: of the tensor that its ranks have together. dim: the one that is cut,
    in equal parts except at the end, as `Tensor.chunk` does.
    """

    group: dist.ProcessGroup
    size: int
    dim: int
    shape: tuple[int, ...]

    def part(self, rank: int) -> tuple[int, ...]:
        """The shape of the part of a rank of the group."""
        length = self.shape[self.dim]
        step = -(-length // self.size)
        mine = max(0, min(step, length - rank * step))
        return (*self.shape[: self.dim], mine, *self.shape[self.dim + 1 :])


@dataclass(kw_only=True)
class Part:
    """This rank's part of one or more whole matrices.

    local: the values, which are replaced by the results. cuts: axes, in the order in which they are joined.
    compute: whole matrices -> as many, of the same shape.
    """

    local: Tensor
    cuts: tuple[Cut, ...]
    compute: Callable[[Tensor], Tensor]


def cuts_of(parameter: Tensor, *, is_stack: bool) -> tuple[Cut, ...]:
    """The axes over which the matrices of a parameter are cut; none if each rank has whole ones (step 1).

    Args:
        is_stack: whether its first dim counts experts; the cuts are then those of one expert's matrix.
    """
    if not isinstance(parameter, DTensor):
        return ()
    mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names or ()
    shape, cuts = list(parameter.shape), list[Cut]()
    # FSDP cuts what tp (or ep) has left of a weight, and its axes come first.
    for i, placement in reversed(list(enumerate(parameter.placements))):
        if placement.is_replicate() or mesh.size(i) == 1:
            continue
        dim, size = int(placement.dim), mesh.size(i)  # type: ignore[attr-defined]
        if names[i] not in _WHOLE:
            cuts.append(Cut(group=mesh.get_group(i), size=size, dim=dim, shape=tuple(shape)))
            shape[dim] = cuts[-1].part(mesh.get_local_rank(i))[dim]
        else:
            shape[dim] //= size
    cuts.reverse()
    if is_stack:
        return tuple(replace(cut, dim=cut.dim - 1, shape=cut.shape[1:]) for cut in cuts if cut.dim > 0)
    return tuple(cuts)


def compute_whole(parts: Sequence[Part]) -> None:
    """Replaces each part by its part of the result. All ranks give the same matrices in the same order (step 2)."""
    by_axes: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        if part.cuts:
            by_axes.setdefault(tuple(cut.group.group_name for cut in part.cuts), []).append(part)
        elif part.local.numel():
            part.local = part.compute(part.local)
    for alike in by_axes.values():
        in_a_round = math.prod(cut.size for cut in alike[0].cuts)
        alike.sort(key=lambda part: -math.prod(part.cuts[-1].shape))  # stable: the same on every rank
        for first in range(0, len(alike), in_a_round):
            _round(alike[first : first + in_a_round])


def _round(parts: Sequence[Part], level: int = 0, numbers: Sequence[int] | None = None) -> None:
    """Steps 3 and 4, from the axis `level` on. numbers: of the parts within the round, which say who gets a matrix."""
    if level == len(parts[0].cuts):
        for part in parts:
            part.local = part.compute(part.local)
        return
    numbers = range(len(parts)) if numbers is None else numbers
    cuts = [part.cuts[level] for part in parts]
    before = math.prod(cut.size for cut in parts[0].cuts[:level])
    owned: list[list[int]] = [[] for _ in range(cuts[0].size)]
    for i, number in enumerate(numbers):
        owned[number // before % cuts[0].size].append(i)
    ranks, group = range(cuts[0].size), cuts[0].group
    me = dist.get_rank(group)
    pieces = _exchange(  # Step 3
        [[parts[i].local for i in owned[rank]] for rank in ranks],
        [[cuts[i].part(rank) for i in owned[me]] for rank in ranks], group, parts[0].local,
    )  # fmt: skip
    held = [
        Part(local=torch.cat(of_ranks, cuts[i].dim), cuts=parts[i].cuts, compute=parts[i].compute)
        for i, *of_ranks in zip(owned[me], *pieces, strict=True)
    ]
    if held:
        _round(held, level + 1, [numbers[i] for i in owned[me]])
    results = _exchange(  # Step 4
        [[_piece(part.local, cuts[i], rank) for i, part in zip(owned[me], held, strict=True)] for rank in ranks],
        [[cuts[i].part(me) for i in owned[rank]] for rank in ranks], group, parts[0].local,
    )  # fmt: skip
    for mine, of_rank in zip(owned, results, strict=True):
        for i, result in zip(mine, of_rank, strict=True):
            parts[i].local = result


def _piece(whole: Tensor, cut: Cut, rank: int) -> Tensor:
    """The part of a rank."""
    start = min(-(-cut.shape[cut.dim] // cut.size) * rank, cut.shape[cut.dim])
    return whole.narrow(cut.dim, start, cut.part(rank)[cut.dim])


def _exchange(
    sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], group: dist.ProcessGroup, like: Tensor
) -> list[list[Tensor]]:
    """Sends `sent[r]` to each rank r of the group; returns what each rank r has sent to this one, of `shapes[r]`."""
    to = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    sizes = [[math.prod(shape) for shape in of] for of in shapes]
    parts = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    buffer = torch.cat(parts) if parts else like.new_empty(0)
    received = like.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, buffer, [sum(of) for of in sizes], to, group=group)
    optimizer_traffic.add(group.group_name, group, [number * like.element_size() for number in to])
    flat = iter(received.split([size for of in sizes for size in of]))
    return [[next(flat).view(shape) for shape in of] for of in shapes]
