"""Lending: which rank computes which rows of a hot expert, decided from the counts of one micro-batch.

A rank has a slot for each of its own experts, and a few in which it can borrow an expert of another rank. Every rank of
an EP group has the counts of all of them, computes the same assignment from them, and needs no further message.

Legend: T tokens, K top-k, E experts, e experts per rank, r ranks of the EP group, n slots for borrowed experts on each,
G candidates. Of r (e + n) slots in all, slot j (e + n) + i is the i-th one on rank j, its own experts first.

NOTE on the assignment. All numbers are integers, so that every rank gets the same on any processor.
  1. Each of G candidates has a target, the most rows that a rank should compute. Targets go from the mean to the
     rows of the fullest rank, and are closer to each other near the mean.
  2. Ranks above the target give rows away, of their largest experts first; ranks below it take rows. In each round the
     rows to give lie on a line, largest piece first, and the room to take lies on the same line, largest room first.
     Each rank takes the piece of which it gets most. So it borrows at most one expert a round. Every target has another
     candidate in which the i-th largest room simply takes the i-th largest piece: better if slots are few.
  3. On several nodes there are candidates that match pieces and room of the same node first.
  4. The price of a candidate is the rows of its fullest rank, plus the price of a loan for every expert that the
     busiest rank sends or receives. A loan costs as many rows as could be computed while its weights and their
     gradients are on the wire. The cheapest candidate is taken if it saves one row of `LEAST_GAIN`; else nothing is
     lent.
  5. Each rank sends rows of a lent expert to its own slot first, then to slots on its node, then to the others.

Rows are counted before they are sent, one for each (token, expert): what experts compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moecompile.ops.exchange import exchange_rows, fake_axis_size, gather_blocks, group_of
from moecompile.ops.host import finish_read, start_read
from moecompile.torch_private import local_part

NUM_TARGETS = 8
LEAST_GAIN = 50  # one row of fifty; less is not worth a message
_FAR = 2**40  # between the parts of a line that must not meet; beyond every number of rows


def assign(counts_rE: Tensor, slots: int, nodes: int, near: int, far: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loans of one micro-batch.

    Args:
        counts_rE: rows of each rank of the EP group for each expert, int64. Ranks of a node are consecutive.
        slots: for borrowed experts, on each rank. nodes: that the EP group spans.
        near, far: price of a loan in rows, within a node and across nodes.

    Returns:
        borrowed_rn: the expert in each slot for borrowed experts, E: none, which come last; rows_rn: its rows there.
        excess: rows of the fullest rank beyond the mean (rounded up); 0 if slots suffice and loans pay. All int64.
    """
    num_ranks, num_experts = counts_rE.shape
    per_rank = num_experts // num_ranks
    totals_E = counts_rE.sum(0)
    load_r = totals_E.view(num_ranks, per_rank).sum(1)
    state = _Candidates(totals_E, load_r, slots, nodes)
    for number in range(slots if nodes == 1 else 2 * slots):
        state.round(near_first=nodes > 1 and number < slots)
    state.merge()
    return state.cheapest(near, far)


class _Candidates:
    """All candidates at once (steps 1 to 4)."""

    def __init__(self, totals_E: Tensor, load_r: Tensor, slots: int, nodes: int) -> None:
        self.num_ranks, self.num_experts, device = load_r.shape[0], totals_E.shape[0], totals_E.device
        self.mean, self.most = -(-load_r.sum() // self.num_ranks), load_r.max()
        steps_G = torch.arange(NUM_TARGETS, device=device) ** 2
        self.target_G1 = (self.mean + (self.most - self.mean) * steps_G // NUM_TARGETS**2).unsqueeze(1)
        variants = 3 if nodes > 1 else 2  # in pairs, on a line, on a line by node
        num = variants * NUM_TARGETS
        variant_G1 = (torch.arange(num, device=device) // NUM_TARGETS).unsqueeze(1)
        self.target_G1 = self.target_G1.repeat(variants, 1)
        self.in_pairs_G11, self.by_node_G1 = (variant_G1 == 0).unsqueeze(2), (variant_G1 == 2).long()
        self.owner_E = torch.arange(self.num_experts, device=device) // (self.num_experts // self.num_ranks)
        self.node_r = torch.arange(self.num_ranks, device=device) // (self.num_ranks // nodes)
        self.left_GE, self.load_Gr = totals_E.repeat(num, 1), load_r.repeat(num, 1)
        self.used_Gr = torch.zeros_like(self.load_Gr)
        self.borrowed_Grn = torch.full((num, self.num_ranks, slots), self.num_experts, device=device)
        self.rows_Grn = torch.zeros_like(self.borrowed_Grn)
        self.slots = slots

    def round(self, near_first: bool) -> None:
        """Step 2, in which candidates with a preference match within nodes only if `near_first`."""
        piece_GE = self._pieces()
        room_Gr = (self.target_G1 - self.load_Gr).clamp_min(0).masked_fill_(self.used_Gr >= self.slots, 0)
        far_G1 = self.by_node_G1 * _FAR if near_first else torch.zeros_like(self.by_node_G1)
        start_GE, place_GE = _on_a_line(piece_GE, far_G1 * self.node_r[self.owner_E])
        start_Gr, place_Gr = _on_a_line(room_Gr, far_G1 * self.node_r)
        end = torch.minimum((start_Gr + room_Gr).unsqueeze(2), (start_GE + piece_GE).unsqueeze(1))
        shared_GrE = end - torch.maximum(start_Gr.unsqueeze(2), start_GE.unsqueeze(1))
        both_GrE = torch.minimum(room_Gr.unsqueeze(2), piece_GE.unsqueeze(1))
        paired_GrE = both_GrE * (place_Gr.unsqueeze(2) == place_GE.unsqueeze(1))
        taken_Gr, expert_Gr = torch.where(self.in_pairs_G11, paired_GrE, shared_GrE).max(2)
        taken_Gr = taken_Gr.clamp_min(0)
        self.left_GE.scatter_add_(1, expert_Gr, -taken_Gr)
        self.load_Gr += taken_Gr
        self.load_Gr.scatter_add_(1, self.owner_E[expert_Gr], -taken_Gr)
        place_Gr1 = self.used_Gr.clamp_max(self.slots - 1).unsqueeze(2)
        takes_Gr1 = (taken_Gr > 0).unsqueeze(2)
        for there, new_Gr in ((self.borrowed_Grn, expert_Gr), (self.rows_Grn, taken_Gr)):
            old_Gr1 = there.gather(2, place_Gr1)
            there.scatter_(2, place_Gr1, torch.where(takes_Gr1, new_Gr.unsqueeze(2), old_Gr1))
        self.used_Gr += takes_Gr1.squeeze(2)

    def _pieces(self) -> Tensor:
        """Rows of each expert that its rank gives away, (G, E): what is above the target, of its largest experts."""
        over_Gr1 = (self.load_Gr - self.target_G1).clamp_min(0).unsqueeze(2)
        left_Gre = self.left_GE.view(-1, self.num_ranks, self.num_experts // self.num_ranks)
        sorted_Gre, order_Gre = left_Gre.sort(dim=2, descending=True, stable=True)
        before_Gre = sorted_Gre.cumsum(2) - sorted_Gre
        piece_Gre = torch.minimum(sorted_Gre, (over_Gr1 - before_Gre).clamp_min(0))
        return torch.empty_like(piece_Gre).scatter_(2, order_Gre, piece_Gre).flatten(1)

    def merge(self) -> None:
        """An expert that a rank took in two rounds needs one slot."""
        for later in range(1, self.slots):
            for first in range(later):
                same_Gr = self.borrowed_Grn[..., later] == self.borrowed_Grn[..., first]
                self.rows_Grn[..., first] += self.rows_Grn[..., later] * same_Gr
                self.rows_Grn[..., later].masked_fill_(same_Gr, 0)
                self.borrowed_Grn[..., later].masked_fill_(same_Gr, self.num_experts)

    def cheapest(self, near: int, far: int) -> tuple[Tensor, Tensor, Tensor]:
        """Step 4: what `assign` returns."""
        most_G = self.load_Gr.max(1).values
        price_G = most_G
        is_lent_Grn = self.rows_Grn > 0
        owner_Grn = self.owner_E[self.borrowed_Grn.clamp_max(self.num_experts - 1)]
        is_far_Grn = self.node_r[owner_Grn] != self.node_r.view(1, -1, 1)
        for price, of_link_Grn in ((near, is_lent_Grn & ~is_far_Grn), (far, is_lent_Grn & is_far_Grn)):
            received_Gr = of_link_Grn.sum(2)
            sent_Gr = torch.zeros_like(received_Gr).scatter_add_(1, owner_Grn.flatten(1), of_link_Grn.flatten(1).long())
            price_G = price_G + price * torch.maximum(received_Gr, sent_Gr).max(1).values
        best = price_G.argmin(keepdim=True)
        pays = (self.most - price_G[best]) * LEAST_GAIN > self.most
        borrowed_rn, rows_rn = (there.index_select(0, best).squeeze(0) for there in (self.borrowed_Grn, self.rows_Grn))
        order_rn = (rows_rn == 0).long().argsort(dim=1, stable=True)
        borrowed_rn, rows_rn = borrowed_rn.gather(1, order_rn), rows_rn.gather(1, order_rn)
        excess = torch.where(pays, most_G[best], self.most).squeeze() - self.mean
        return borrowed_rn.masked_fill(~pays, self.num_experts), rows_rn.masked_fill(~pays, 0), excess


def _on_a_line(size_GN: Tensor, offset_GN: Tensor) -> tuple[Tensor, Tensor]:
    """Where each piece starts, and which one it is, if pieces lie on a line, the largest first, by offset."""
    order_GN = (offset_GN - size_GN).argsort(dim=1, stable=True)
    sorted_GN, at_GN = size_GN.gather(1, order_GN), offset_GN.gather(1, order_GN)
    start_GN = sorted_GN.cumsum(1) - sorted_GN
    # A part of the line begins at its offset, whatever was before.
    first_GN = torch.ones_like(at_GN, dtype=torch.bool)
    first_GN[:, 1:] = at_GN[:, 1:] != at_GN[:, :-1]
    base_GN = torch.where(first_GN, start_GN, 0).cummax(1).values
    start_GN = torch.empty_like(start_GN).scatter_(1, order_GN, start_GN - base_GN + at_GN)
    return start_GN, order_GN.argsort(1)


def shares(counts_rE: Tensor, borrowed_rn: Tensor, rows_rn: Tensor, rank: Tensor, nodes: int) -> Tensor:
    """Rows of each expert that one rank sends to each rank, (E, r) int64 (step 5).

    Args:
        counts_rE, nodes: as for `assign`, which returned borrowed_rn and rows_rn. rank: int64, in the EP group.
    """
    num_ranks, num_experts = counts_rE.shape
    ranks = torch.arange(num_ranks, device=counts_rE.device)
    supply_Er = counts_rE.t().clone()
    place = (borrowed_rn * num_ranks + ranks.unsqueeze(1)).flatten()
    demand_Er = counts_rE.new_zeros(num_experts + 1, num_ranks).view(-1).scatter_add_(0, place, rows_rn.flatten())
    demand_Er = demand_Er.view(-1, num_ranks)[:num_experts]
    owner_E1 = (torch.arange(num_experts, device=ranks.device) // (num_experts // num_ranks)).unsqueeze(1)
    kept_E1 = (supply_Er.sum(1) - demand_Er.sum(1)).unsqueeze(1)
    demand_Er = demand_Er.scatter_add(1, owner_E1, kept_E1)
    is_me_r = ranks == rank
    found_Er = torch.zeros_like(supply_Er)
    for parts in dict.fromkeys((num_ranks, nodes, 1)):  # of itself, of the node, of all
        sent_Er, supply_Er, demand_Er = _matched(supply_Er, demand_Er, is_me_r, parts)
        found_Er += sent_Er
    return found_Er


def _matched(supply_Er: Tensor, demand_Er: Tensor, is_me_r: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that this rank sends to ranks of its part, in rank order; supply and demand that are left everywhere."""
    supply_EPL, demand_EPL = (x_Er.unflatten(1, (parts, -1)) for x_Er in (supply_Er, demand_Er))
    is_me_PL = is_me_r.view(parts, -1)
    both_EP1 = torch.minimum(supply_EPL.sum(2, keepdim=True), demand_EPL.sum(2, keepdim=True))
    start_EPL, at_EPL = (x_EPL.cumsum(2) - x_EPL for x_EPL in (supply_EPL, demand_EPL))
    given_EPL = torch.minimum(supply_EPL, (both_EP1 - start_EPL).clamp_min(0))
    taken_EPL = torch.minimum(demand_EPL, (both_EP1 - at_EPL).clamp_min(0))
    first_EP1, mine_EP1 = ((x_EPL * is_me_PL).sum(2, keepdim=True) for x_EPL in (start_EPL, given_EPL))
    last_EPL = torch.minimum(first_EP1 + mine_EP1, at_EPL + taken_EPL)
    sent_EPL = (last_EPL - torch.maximum(first_EP1, at_EPL)).clamp_min(0) * is_me_PL.any(1, keepdim=True)
    return sent_EPL.flatten(1), supply_Er - given_EPL.flatten(1), demand_Er - taken_EPL.flatten(1)


def slots_of(borrowed_rn: Tensor, num_experts: int) -> Tensor:
    """The slot of each expert on each rank, (E, r) int64; 0 on a rank that does not have the expert."""
    num_ranks, slots = borrowed_rn.shape
    per_rank, device = num_experts // num_ranks, borrowed_rn.device
    first_r1 = torch.arange(num_ranks, device=device).unsqueeze(1) * (per_rank + slots)
    place = (borrowed_rn * num_ranks + torch.arange(num_ranks, device=device).unsqueeze(1)).flatten()
    lent_rn = first_r1 + per_rank + torch.arange(slots, device=device)
    slots_Er = borrowed_rn.new_zeros(num_experts + 1, num_ranks).view(-1).scatter_(0, place, lent_rn.flatten())
    slots_Er = slots_Er.view(-1, num_ranks)[:num_experts]
    owner_E1 = (torch.arange(num_experts, device=device) // per_rank).unsqueeze(1)
    own_E1 = (first_r1 + torch.arange(per_rank, device=device)).view(-1, 1)
    return slots_Er.scatter(1, owner_E1, own_E1)


# -- expert ids to slots, and the exchange that brings borrowed experts to theirs -----------------------------------
#
# Legend: T tokens, K top-k, E experts, e experts per rank, r ranks of the EP group, n slots for borrowed experts on
# each, m experts that this rank borrows now.
#
# NOTE on the exchange of experts:
#   1. `borrowed_rn`, int64 on the CPU, has the expert in each slot, E for none. It is the same on all ranks, so each
#      one knows what it sends and receives. If no expert is lent, nothing is sent in forward or backward.
#   2. All weights of an expert travel in one message, as bytes, from the rank that owns it.
#   3. In backward the gradients return the same way. The owner adds them, in at least fp32, to the gradient of its own
#      rows: autograd sums both before FSDP reduces the weight's gradient.

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
