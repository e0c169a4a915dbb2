"""Muon for hidden matrices and AdamW for all other weights, in one optimizer, on weights of any mesh.

For a matrix W with gradient G, momentum M and a group's learning rate lr (Jordan 2024; `torch.optim.Muon` for weights
that one rank has whole):

    M <- m M + (1 - m) G,   U = m M + (1 - m) G (Nesterov) or M
    W <- (1 - lr decay) W - lr scale NS(U)

NS needs the whole matrix: of a shard it is something else. So momentum and U are made on shards, U is brought together
matrix by matrix, orthogonalized by one rank, and its parts return. So are experts, one by one,
where FSDP cuts within them; where it cuts between them, each is orthogonalized on the rank that has it. Gate and up of
one weight are orthogonalized apart (moecompile.nn.matrices). Weights of AdamW are stepped by torch's own function on
their shards (moecompile.runtime.moments).

NS is Newton-Schulz, the orthogonal factor, approximately: U S V^T becomes U S' V^T with every entry of S' near 1, by
`steps` times X -> a X + (b X X^T + c (X X^T)^2) X. Each matrix is scaled by its own Frobenius norm before, so that
every singular value is at most 1.

Legend: O d_out, I d_in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moecompile.nn.matrices import Layout
from moecompile.ops.traffic import optimizer_traffic
from moecompile.runtime.moments import MOMENTUM, Keeping, KeepsItsState, wide
from moecompile.torch_private import local_part

# -- brings matrices of which every rank has a part to one rank each, and their new values back ---------------------
#
# Algorithm:
#   1. The axes over which a matrix is cut are read from its DTensor: FSDP's, and within the part that this leaves, tp.
#      The axis ep has whole experts, and so has each rank of a stack that FSDP cuts between experts.
#   2. Matrices with the same axes are taken in rounds, as many as there are ranks in the axes: each gets one, so all
#      ranks work, and a rank holds one whole matrix at a time.
#   3. Axis by axis, one all-to-all brings the parts of each matrix to the rank that gets it.
#   4. That rank computes; then the axes in reverse order bring back to each rank its part of the result.
# A rank sends (n - 1) / n of its parts there and (n - 1) / n of its results back, with n ranks in an axis.

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
    optimizer_traffic.add(group, [number * like.element_size() for number in to])
    flat = iter(received.split([size for of in sizes for size in of]))
    return [[next(flat).view(shape) for shape in of] for of in shapes]


# -- Muon -----------------------------------------------------------------------------------------------------------

_STACKED = 3  # dims


class Muon(KeepsItsState):
    """Muon and AdamW.

    Args:
        groups: torch's parameter groups, each with `kind`: `muon` or `adamw`, and what may differ from the defaults.
        layouts: where the matrices of each weight of a Muon group are.
        lr, weight_decay: of both. betas, eps: of AdamW. momentum, nesterov, scale, steps, coefficients: of Muon, as in
            `optimizer.muon`. precision: of Newton-Schulz, `fp32` (or that of wider weights) or `bf16`.
        keeping: how momentum, moments and narrow weights are kept.

    State of a Muon weight: `momentum_buffer`; of an AdamW weight: `step`, `exp_avg`, `exp_avg_sq`, as torch names them.
    All ranks must call `step` with gradients of the same weights.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], layouts: Mapping[nn.Parameter, Layout], *, lr: float = 1e-3,
        weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, momentum: float = 0.95,
        nesterov: bool = True, scale: str = "match_rms_adamw", steps: int = 5,
        coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), precision: str = "fp32",
        keeping: Keeping | None = None,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "momentum": momentum, "scale": scale,
            "nesterov": nesterov, "steps": steps, "coefficients": coefficients, "precision": precision,
        }  # fmt: skip
        super().__init__(list(groups), defaults)
        self._layouts, self.keeping = dict(layouts), keeping or Keeping()

    def advance(self, given: Sequence[tuple[dict[str, Any], list[nn.Parameter]]]) -> None:
        """Brings matrices together, orthogonalizes their updates and steps them; AdamW steps the others."""
        of_muon: list[tuple[nn.Parameter, dict[str, Any], list[Part]]] = []
        for group, parameters in given:
            if group["kind"] == "adamw":
                self.keeping.adamw(parameters, [self.state[parameter] for parameter in parameters], group)
            else:
                of_muon += [(parameter, group, self._parts(parameter, group)) for parameter in parameters]
        compute_whole([part for _, _, parts in of_muon for part in parts])
        for parameter, group, parts in of_muon:
            self.keeping.change(parameter, self.state[parameter], partial(_decayed_step, group=group, parts=parts))

    def _parts(self, parameter: nn.Parameter, group: dict[str, Any]) -> list[Part]:
        """The update of this rank's shard before it is orthogonalized, one part for each expert if these are cut; the
        momentum is moved.
        """
        state, grad, rate = self.state[parameter], local_part(parameter.grad), 1 - group["momentum"]  # type: ignore[arg-type]
        if not state:
            self.keeping.add(state, parameter, (MOMENTUM,))
        momentum = self.keeping.moment_of(parameter, MOMENTUM, state)
        moved = momentum.read_all(grad.shape)
        moved.lerp_(grad.to(moved.dtype), rate)
        momentum.write_all(moved)
        update = moved.lerp(grad.to(moved.dtype), rate) if group["nesterov"] else moved
        dtype = torch.bfloat16 if group["precision"] == "bf16" else wide(parameter.dtype)
        cuts = cuts_of(parameter, is_stack=parameter.ndim == _STACKED)
        compute = partial(_orthogonal, layout=self._layouts[parameter], like=parameter, group=group)
        pieces = update.to(dtype).unbind() if cuts and parameter.ndim == _STACKED else [update.to(dtype)]
        return [Part(local=piece, cuts=cuts, compute=compute) for piece in pieces]


def _decayed_step(weight: Tensor, *, group: Mapping[str, Any], parts: Sequence[Part]) -> None:
    """Steps this rank's part of a weight, whose results are orthogonalized."""
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    for piece, part in zip([weight] if len(parts) == 1 else weight, parts, strict=True):
        piece.add_(part.local.view_as(piece).to(weight.dtype), alpha=-group["lr"])


def _orthogonal(whole: Tensor, *, layout: Layout, like: Tensor, group: dict[str, Any]) -> Tensor:
    """Whole matrices as they lie in the weight `like` -> scale NS(matrices)."""
    num_experts = whole.shape[0] * layout.joined // like.shape[0]
    out = torch.empty_like(whole)
    matrices = layout.matrices(whole, num_experts)
    found = orthogonalized(matrices, group["steps"], group["coefficients"], whole.dtype)
    layout.matrices(out, num_experts).copy_(found.mul_(scale_of(group["scale"], *matrices.shape[-2:])))
    return out


def scale_of(kind: str, d_out: int, d_in: int) -> float:
    """`optimizer.muon.scale` of a matrix."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return math.sqrt(max(1.0, d_out / d_in))


_EPS = 1e-7  # as in torch.optim.Muon: a matrix of zeros stays one


def orthogonalized(matrices: Tensor, steps: int, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(..., O, I) -> the same shape, of `dtype`, in which the products are computed too."""
    a, b, c = coefficients
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the smaller square
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
