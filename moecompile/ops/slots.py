"""Expert ids to slots, and the exchange that brings borrowed experts to theirs (moecompile.ops.lending).

Legend: T tokens, K top-k, E experts, e experts per rank, r ranks of the EP group, n slots for borrowed experts on each,
m experts that this rank borrows now.

NOTE on the exchange of experts:
  1. `borrowed_rn`, int64 on the CPU, has the expert in each slot, E for none. It is the same on all ranks, so each one
     knows what it sends and receives. If no expert is lent, nothing is sent in forward or backward.
  2. All weights of an expert travel in one message, as bytes, from the rank that owns it.
  3. In backward the gradients return the same way. The owner adds them, in at least fp32, to the gradient of its own
     rows: autograd sums both before FSDP reduces the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moecompile.ops.exchange import exchange_rows, fake_axis_size, gather_blocks, group_of
from moecompile.ops.host import finish_read, start_read
from moecompile.ops.lending import assign, shares, slots_of
from moecompile.torch_private import local_part

_lib = torch.library.Library("moecompile", "FRAGMENT")
_lib.define("local_experts(Tensor(a) weight, int num_local) -> Tensor(a)")


def _local_experts(weight: Tensor, num_local: int) -> Tensor:
    """The rank's part of a weight, (e, ...)."""
    local = local_part(weight)
    return local if local.shape[0] == num_local else local.unflatten(0, (num_local, -1))


# A composite: autograd and fake tensors see the torch functions inside.
_lib.impl("local_experts", _local_experts, "CompositeImplicitAutograd")


@torch.library.custom_op("moecompile::gather_counts", mutates_args=())
def gather_counts(counts_E: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """The counts of all ranks, (r, E) int64, and this rank's place among them, int64."""
    rank = torch.full((), group_of(axis).rank(), dtype=torch.int64, device=counts_E.device)
    return gather_blocks(counts_E.unsqueeze(0), axis), rank


@gather_counts.register_fake
def _(counts_E: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    return counts_E.new_empty(fake_axis_size(axis), counts_E.shape[0]), counts_E.new_empty(())


@torch.library.custom_op("moecompile::to_slots", mutates_args=())
def to_slots(
    ids_TK: Tensor, counts_rE: Tensor, rank: Tensor, slots: int, nodes: int, near: int, far: int
) -> tuple[Tensor, Tensor]:
    """Decides what is lent, and maps expert ids to slots; a dropped assignment, id E, becomes r (e + n).

    Args:
        counts_rE, rank: from `gather_counts`. slots, nodes, near, far: as for `assign`.

    Returns:
        slots_TK int64, borrowed_rn int64 on the CPU.
    """
    num_ranks, num_experts = counts_rE.shape
    borrowed_rn, rows_rn, _ = assign(counts_rE, slots, nodes, near, far)
    borrowed_host = start_read(borrowed_rn.clone())
    share_Er = shares(counts_rE, borrowed_rn, rows_rn, rank, nodes).flatten()
    num_rows = ids_TK.numel()
    repeats = torch.cat((share_Er, (num_rows - share_Er.sum()).view(1)))
    dropped = share_Er.new_full((1,), num_experts + num_ranks * slots)
    slot = torch.cat((slots_of(borrowed_rn, num_experts).flatten(), dropped))
    order_R = torch.argsort(ids_TK.reshape(-1), stable=True)
    slots_R = slot.repeat_interleave(repeats, output_size=num_rows)
    return torch.empty_like(slots_R).scatter_(0, order_R, slots_R).view(ids_TK.shape), borrowed_host


@to_slots.register_fake
def _(
    ids_TK: Tensor, counts_rE: Tensor, rank: Tensor, slots: int, nodes: int, near: int, far: int
) -> tuple[Tensor, Tensor]:
    borrowed_rn = torch.empty(counts_rE.shape[0], slots, dtype=torch.int64, device="cpu")
    return ids_TK.new_empty(ids_TK.shape), borrowed_rn


@torch.library.custom_op("moecompile::lend_experts", mutates_args=())
def lend_experts(weights: list[Tensor], borrowed_rn: Tensor, axis: str) -> list[Tensor]:
    """Weights of the local experts, (e, ...) each -> of the m experts that this rank borrows, (m, ...)."""
    loans = _Loans(borrowed_rn, weights[0].shape[0], axis)
    arrived = loans.exchange([_picked(weight, loans.sent) for weight in weights])
    place = [loans.received.index(slot) for slot in range(len(loans.received))]
    return [_picked(part, place) for part in arrived]


@lend_experts.register_fake
def _(weights: list[Tensor], borrowed_rn: Tensor, axis: str) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return [weight.new_empty(size, *weight.shape[1:]) for weight in weights]


@torch.library.custom_op("moecompile::return_gradients", mutates_args=())
def return_gradients(grads: list[Tensor], num_local: int, borrowed_rn: Tensor, axis: str) -> list[Tensor]:
    """Gradients of borrowed experts, (m, ...) each -> of the local ones, (e, ...): their sums at the owner, or zero."""
    summed = _returned(grads, num_local, borrowed_rn, axis)
    return [
        grad.new_zeros(num_local, *grad.shape[1:]) if total is None else total
        for grad, total in zip(grads, summed, strict=True)
    ]


@return_gradients.register_fake
def _(grads: list[Tensor], num_local: int, borrowed_rn: Tensor, axis: str) -> list[Tensor]:
    return [grad.new_empty(num_local, *grad.shape[1:]) for grad in grads]


def _returned(grads: Sequence[Tensor], num_local: int, borrowed_rn: Tensor, axis: str) -> list[Tensor | None]:
    """None for each on a rank that lends nothing: adding zero to the gradients of all its experts would take time."""
    loans = _Loans(borrowed_rn, num_local, axis)
    arrived = loans.exchange([_picked(grad, loans.received) for grad in grads], back=True)
    return [loans.by_owner(part) if loans.sent else None for part in arrived]


def _lend_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, borrowed_rn, ctx.axis = inputs
    ctx.num_local = weights[0].shape[0]
    ctx.save_for_backward(borrowed_rn)


def _lend_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, None, None]:
    (borrowed_rn,) = ctx.saved_tensors
    # A subclass is a stand-in without values, in a graph that is being compiled.
    send = _returned if type(borrowed_rn) is Tensor else torch.ops.moecompile.return_gradients
    return send(list(grads), ctx.num_local, borrowed_rn, ctx.axis), None, None


lend_experts.register_autograd(_lend_backward, setup_context=_lend_setup)


def _picked(weight: Tensor, places: list[int]) -> Tensor:
    """A copy of the experts at these places."""
    return weight.index_select(0, torch.tensor(places, dtype=torch.int64).to(weight.device, non_blocking=True))


class _Loans:
    """What this rank sends and receives.

    sent: local experts, by destination. received: slots, by source; the slots in use are the first ones.
    """

    def __init__(self, borrowed_rn: Tensor, num_local: int, axis: str) -> None:
        self.num_local, self.axis = num_local, axis
        borrowed, rank = finish_read(borrowed_rn).tolist(), group_of(axis).rank()
        owned = [range(i * num_local, (i + 1) * num_local) for i in range(len(borrowed))]
        sent = [[expert - owned[rank].start for expert in row if expert in owned[rank]] for row in borrowed]
        received = [[slot for slot, expert in enumerate(borrowed[rank]) if expert in of_peer] for of_peer in owned]
        self.sent, self.sent_splits = [*chain(*sent)], [*map(len, sent)]
        self.received, self.received_splits = [*chain(*received)], [*map(len, received)]
        self.is_none = all(expert >= owned[-1].stop for row in borrowed for expert in row)

    def exchange(self, parts: Sequence[Tensor], back: bool = False) -> list[Tensor]:
        """One message for the experts of all `parts`, (experts, ...) each: as they arrive. Without a loan none."""
        if self.is_none:
            return [part.new_empty(part.shape) for part in parts]
        there, here = self.sent_splits, self.received_splits
        shapes = [part.shape[1:] for part in parts]
        widths = [shape.numel() * part.element_size() for shape, part in zip(shapes, parts, strict=True)]
        as_bytes = (
            part.contiguous().view(-1).view(torch.uint8).view(len(part), width)
            for part, width in zip(parts, widths, strict=True)
        )
        arrived = exchange_rows(torch.cat([*as_bytes], dim=1), *((here, there) if back else (there, here)), self.axis)
        columns = arrived.split(widths, dim=1)
        return [
            column.contiguous().view(-1).view(part.dtype).view(len(arrived), *shape)
            for column, part, shape in zip(columns, parts, shapes, strict=True)
        ]

    def by_owner(self, part: Tensor) -> Tensor:
        """Gradients of the experts `sent`, added up in at least fp32, among zeros for the others: (e, ...)."""
        wide = torch.promote_types(part.dtype, torch.float32)
        total = part.new_zeros(self.num_local, *part.shape[1:])
        for expert in set(self.sent):
            first, *more = (part[i].to(wide) for i, lent in enumerate(self.sent) if lent == expert)
            total[expert].copy_(sum(more, start=first))
        return total
