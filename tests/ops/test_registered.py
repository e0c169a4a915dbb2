"""Every registered op passes torch's own checks: schema, autograd registration, fake kernel, AOT dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import MoecompileError
from moecompile.verify.narrow_rows import nearest

op = torch.ops.moecompile
F64, I64 = torch.float64, torch.int64

IDS_TK = torch.tensor([[2, 0], [2, 1], [0, 2]])  # expert 3 gets nothing
ORDER_R = torch.tensor([1, 4, 3, 0, 2, 5])  # by expert: 0: (t0,s1), (t2,s0); 1: (t1,s1); 2: (t0,s0), (t1,s0), (t2,s1)
COUNTS_E = torch.tensor([2, 1, 3, 0])
DROPPED_TK = torch.tensor([[2, 4], [4, 4], [0, 2]])  # 4 is nobody: token 1 has no expert
REAL_T = torch.tensor([True, False, True])
KEPT_R = torch.tensor([4, 0, 5])
SOURCE_R = torch.tensor([0, 2, 1, 0, 1, 2])
KEY = torch.tensor([1, 2, 3, 4])
LOOKUP = torch.tensor([[[3]], [[3]]])  # table_2r1: three rows are asked for


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


SAVED = [values(3, 4).detach(), SOURCE_R, COUNTS_E, values(6, 6).detach(), SOURCE_R.to(torch.int32), values(6).detach()]


def two_stacks() -> tuple[list[Tensor], list[Tensor]]:
    """Of two own experts, and of two borrowed ones."""
    return [values(2, 6, 4), values(2, 6, 4, seed=1)], [values(2, 4, 3), values(2, 4, 3, seed=1)]


def table(sent: list[int], received: list[int]) -> Tensor:
    """table_2rn of one rank."""
    return torch.tensor([[sent], [received]])


# op -> arguments; a callable gets the name of a process group of one rank. What follows a colon names a case of the op.
SAMPLES: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "flatten_tokens": lambda _: (values(2, 3, 4),),
    "unflatten_tokens": lambda _: (values(6, 4), values(2, 3, 4)),
    "router_logits": lambda _: (values(3, 4), values(5, 4)),
    "router_logits: bias": lambda _: (values(2, 3, 4), values(5, 4), values(5)),
    "count_routing": lambda _: (
        torch.zeros(4, dtype=I64), torch.zeros(2, dtype=I64), torch.zeros(3, dtype=F64), IDS_TK, DROPPED_TK,
        values(3, 4).detach().softmax(1),
    ),
    "count_routing: without entropy": lambda _: (
        torch.zeros(4, dtype=I64), torch.zeros(1, dtype=I64), torch.zeros(3, dtype=F64), IDS_TK, IDS_TK, None,
    ),
    "count_routing: padding": lambda _: (
        torch.zeros(4, dtype=I64), torch.zeros(2, dtype=I64), torch.zeros(3, dtype=F64), IDS_TK, DROPPED_TK,
        values(3, 4).detach().softmax(1), REAL_T,
    ),
    "within_capacity: padding": lambda _: (IDS_TK, values(3, 2).detach(), 4, 0.5, "score", REAL_T),
    "expert_choice: padding": lambda _: (values(6, 4).detach(), 2, 1.0, torch.arange(6) != 2),
    "within_capacity": lambda _: (IDS_TK, values(3, 2).detach(), 4, 0.5, "position"),
    "within_capacity: by score": lambda _: (IDS_TK, values(3, 2).detach(), 4, 0.5, "score"),
    "expert_choice": lambda _: (values(6, 4).detach(), 2, 1.0),
    "keyed_uniform": lambda _: (values(3, 4).detach(), KEY),
    "place_ids": lambda _: (DROPPED_TK, [2, 0, 3, 1]),
    "hashed_ids": lambda _: (torch.tensor([5, 0, 5, 30_000]), 8, 3, 1),
    "count_required_bias": lambda _: (
        torch.zeros(4, 10, dtype=torch.int32), values(3, 4).detach().sigmoid(), values(4).detach(), 2,
    ),
    "count_required_bias: padding": lambda _: (
        torch.zeros(4, 10, dtype=torch.int32), values(3, 4).detach().sigmoid(), values(4).detach(), 2, REAL_T,
    ),
    "workload_scores": lambda _: (torch.rand(3, 4, dtype=F64), KEY, "zipf", 1.0),
    "workload_scores: drift": lambda _: (torch.rand(3, 4, dtype=F64), KEY, "drift", 1.0),
    "workload_scores: hot": lambda _: (torch.rand(3, 4, dtype=F64), KEY, "hot", 1.0),
    "balanced_ids": lambda _: (values(8, 8).detach(), 3, 4, 2),
    "permute": lambda _: (values(3, 4), IDS_TK, 4),
    "permute: dropped": lambda _: (values(3, 4), DROPPED_TK, 4, False),
    "permute: counted": lambda _: (values(3, 4), DROPPED_TK, 4, False, torch.tensor([[[2], [1]], [[0], [0]]])),
    "sum_slots": lambda _: (values(6, 4).detach(), ORDER_R, 3, 2),
    "sum_slots: dropped": lambda _: (values(3, 4).detach(), KEPT_R, 3, 2),
    "unpermute": lambda _: (values(6, 4), ORDER_R, values(3, 2)),
    "unpermute: dropped": lambda _: (values(3, 4), KEPT_R, values(3, 2)),
    "unpermute_backward": lambda _: (values(3, 4).detach(), values(6, 4).detach(), ORDER_R, values(3, 2).detach()),
    "unpermute_backward: dropped": lambda _: (
        values(3, 4).detach(), values(3, 4).detach(), KEPT_R, values(3, 2).detach(),
    ),
    "regroup": lambda _: (values(6, 4), torch.tensor([[1, 2], [0, 3]])),
    "ungroup": lambda _: (values(6, 4), ORDER_R),
    "grouped_mm": lambda _: (values(6, 4), [values(4, 5, 4)], COUNTS_E, None, 0),
    "grouped_mm: borrowed": lambda _: (values(6, 4), [values(2, 5, 4), values(2, 5, 4, seed=1)], COUNTS_E, None, 0),
    "grouped_mm: nothing borrowed": lambda _: (
        values(3, 4), [values(2, 5, 4), values(2, 5, 4, seed=1)], torch.tensor([2, 1, 0, 0]), None, 0,
    ),
    "grouped_mm_input_grad": lambda _: (values(6, 5).detach(), [values(4, 5, 4).detach()], COUNTS_E),
    "grouped_mm_input_grad: borrowed": lambda _: (values(6, 5).detach(), [values(2, 5, 4).detach()] * 2, COUNTS_E),
    "grouped_mm_weight_grad": lambda _: (
        values(6, 5).detach(), values(6, 4).detach(), [values(4, 5, 4).detach()], COUNTS_E,
    ),
    "grouped_mm_weight_grad: borrowed": lambda _: (
        values(6, 5).detach(), values(6, 4).detach(), [values(2, 5, 4).detach()] * 2, COUNTS_E,
    ),
    "expert_ffn": lambda _: (values(3, 4), SOURCE_R, values(6), COUNTS_E, [values(4, 6, 4)], [values(4, 4, 3)], None),
    "expert_ffn: borrowed": lambda _: (values(3, 4), SOURCE_R, values(6), COUNTS_E, *two_stacks(), None),
    "expert_ffn: nothing borrowed": lambda _: (
        values(3, 4), SOURCE_R, values(6), torch.tensor([2, 4, 0, 0]), *two_stacks(), None,
    ),
    "expert_ffn_backward": lambda _: (values(3, 4).detach(), SAVED, [values(4, 6, 4).detach()], [values(4, 4, 3).detach()]),
    "expert_ffn_backward: borrowed": lambda _: (
        values(3, 4).detach(), SAVED, [values(2, 6, 4).detach()] * 2, [values(2, 4, 3).detach()] * 2,
    ),
    "expert_ffn_weight_grad": lambda _: ([values(3, 4).detach(), values(6, 3).detach(), *SAVED] * 2,),
    "grouped_mm_weight_grads": lambda _: (
        [values(6, 5).detach()] * 2, [values(6, 4).detach(), values(6, 4, seed=1).detach()], [COUNTS_E, COUNTS_E.flip(0)],
    ),
    "collect_gradients": lambda _: ([values(4, 6, 4), values(4, 4, 3)],),
    "sort_assignments": lambda _: (IDS_TK, values(3, 2), 4),
    "sort_assignments: dropped": lambda _: (DROPPED_TK, values(3, 2), 4, False),
    "sort_received": lambda _: (values(4), torch.tensor([1, 2, 1, 4], dtype=torch.int16), 3),
    "sort_gathered": lambda _: (
        values(3, 2), IDS_TK.to(torch.int16), torch.tensor([[3, 3, 0]]), torch.tensor([[[3, 3, 0]]] * 2), 2,
    ),
    "local_experts": lambda _: (values(6, 4), 3),
    "gather_counts": lambda axis: (COUNTS_E, axis),
    "to_slots": lambda _: (DROPPED_TK, torch.tensor([[1, 0, 2, 0], [0, 1, 7, 0]]), torch.tensor(0), 1, 1, 0, 0),
    "lend_experts": lambda axis: ([values(4, 3, 2), values(4, 5)], torch.tensor([[2, 0, 4]]), axis),
    "return_gradients": lambda axis: (
        [values(2, 3, 2).detach(), values(2, 5).detach()], 4, torch.tensor([[2, 0, 4]]), axis,
    ),
    "expert_bias": lambda _: (values(4, 5), COUNTS_E, values(6, 4).detach()),
    "sum_experts": lambda _: (values(6, 5).detach(), COUNTS_E),
    "count_experts": lambda _: (DROPPED_TK, 4),
    "count_rows": lambda _: (IDS_TK, 4, 2),
    "sum_rows": lambda _: (values(5, 4).detach(), torch.tensor([0, 2, 0, 1, 2]), 3),
    "expand_rows": lambda _: (values(2, 4), values(4), torch.tensor([1, 2, 1, 4], dtype=torch.int16), 3),
    "reduce_rows": lambda _: (values(4, 4), values(4), torch.tensor([0, 1, 0, 1]), values(2, 4).detach()),
    "combine_rows": lambda _: (values(4, 4), torch.tensor([0, 2, 0, 1]), values(3, 4).detach()),
    "count_hops": lambda _: (IDS_TK, 4, 2, 2),
    "onward_counts": lambda _: (torch.tensor([[9, 9, 1, 2, 3, 4], [9, 9, 5, 6, 7, 8]]),),
    "read_tables": lambda _: tuple(torch.arange(n).view(2, -1) for n in (12, 12, 4, 4)),
    "pack_rows": lambda _: (
        values(3, 4), values(3, 2), torch.tensor([5, 0, 5, 2, 1, 4]), 4, 2, torch.tensor([[[3, 3], [3, 3]]] * 2),
    ),
    "count_gathered": lambda _: (IDS_TK, 4, 2),
    "own_tokens": lambda _: (IDS_TK, torch.tensor([[[3, 1, 0], [5, 1, 2]]] * 2), 4),
    "pad_tokens": lambda _: (
        values(3, 4), values(3, 2), IDS_TK, torch.tensor([0, 2]), torch.tensor([[[2, 1, 0], [5, 1, 2]]] * 2),
    ),
    "own_block": lambda _: (values(3, 4).detach(), torch.tensor([0, 2]), 5),
    "spread_tokens": lambda _: (values(5, 4), torch.tensor([0, 2]), values(3, 4).detach()),
    "take_local": lambda _: (
        values(3, 4), values(3, 2), IDS_TK.to(torch.int16), torch.tensor([[3, 3, 0]]), torch.tensor([[[3, 3, 0]]] * 2), 2,
    ),
    "wire_cast": lambda _: (values(3, 4), torch.float64),
    "wire_uncast": lambda _: (values(3, 4), values(2, 4).detach()),
    "send_counts": lambda axis: (torch.tensor([3, 1]), axis),
    "all_gather": lambda axis: (values(3, 4), axis),
    "reduce_scatter": lambda axis: (values(3, 4), axis),
    "gather_assignments": lambda axis: (values(3, 2), IDS_TK.to(torch.int16), axis),
    "exchange_counts": lambda axis: (torch.tensor([3, 1]), axis),
    "cut_tokens": lambda axis: (values(3, 4), values(3, 2), IDS_TK, axis),
    "join_tokens": lambda axis: (values(3, 4), values(3, 4).detach(), axis),
    "gather_slices": lambda axis: (values(3, 4).detach(), 3, axis),
    "take_slice": lambda axis: (values(3, 4).detach(), 3, axis),
    "sum_ranks": lambda axis: (values(2, 3, 4), axis),
    "exchange_dims": lambda axis: (values(2, 4, 3, 5), 1, 2, axis),
    "join_positions": lambda axis: (values(2, 3, 4), axis),
    "own_positions": lambda axis: (values(2, 3, 4).detach(), axis),
    "join_columns": lambda axis: (values(2, 3, 4), axis),
    "cut_columns": lambda axis: (values(2, 3, 4), axis),
    "all_to_all": lambda axis: (values(4, 4), table([4], [4]), 0, False, axis),
    "unique_ids": lambda _: (torch.tensor([[3, 1], [3, 0]]), 5),
    "send_ids": lambda axis: (torch.tensor([0, 1, 3]), 5, axis),
    "read_rows": lambda _: (values(5, 2), torch.tensor([3, 1, 3]), 1),
    "read_rows: every row": lambda _: (values(5, 2), torch.tensor([[3, 1], [3, 0]]), -1),
    "row_gradients": lambda _: (values(3, 2).detach(), torch.tensor([3, 1, 3]), 5, 1),
    "rows_to_step": lambda _: (torch.tensor([1, 4]), torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=F64)),
    "table_gradient": lambda _: (values(3, 2).detach(), torch.tensor([3, 1, 3]), 5, 1),
    "return_rows": lambda axis: (values(3, 2), LOOKUP, torch.tensor([[2, 1], [2, 0]]), F64, axis),
    "send_row_gradients": lambda axis: (values(4, 2).detach(), LOOKUP, torch.tensor([2, 1, 2, 0]), axis),
    "split_tokens": lambda _: (values(5, 4), 3),
    "counts_of_chunk": lambda _: (torch.arange(12).view(2, 6), 1, 3),
    "join_counts": lambda _: ([torch.arange(4), torch.arange(4)], 2),
    "exchange_assignments": lambda axis: (
        values(3), torch.tensor([1, 2, 5], dtype=torch.int16), table([1, 3], [1, 3]), 1, axis,
    ),
}  # fmt: skip


SAMPLES["expert_ffn_input_grad"] = SAMPLES["expert_ffn_backward"]


def op_of(name: str) -> str:
    return name.partition(":")[0]


def test_every_op_has_a_sample() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("moecompile::")
    }
    assert registered == {op_of(name) for name in SAMPLES} | HALVES


# One half alone has no result that could be checked: a ticket is good for one wait.
HALVES = {
    "all_to_all_start", "all_to_all_wait", "exchange_assignments_start", "exchange_assignments_wait", "gradient_start",
    "gradient_wait",
}  # fmt: skip


@pytest.mark.parametrize("whole", ["all_to_all", "exchange_assignments"])
def test_two_halves_are_the_whole(whole: str, axis: str) -> None:
    start, wait = getattr(op, f"{whole}_start"), getattr(op, f"{whole}_wait")
    num_sent = 2 if whole == "exchange_assignments" else 1

    def halves(*arguments: Any) -> Any:
        token, ticket = start(*arguments)
        assert token.shape == arguments[0].shape and set(token.stride()) == {0} and ticket.device.type == "cpu"
        return wait(token, ticket, *arguments[num_sent:])

    arguments = SAMPLES[whole](axis)
    got, wanted = halves(*arguments), getattr(op, whole)(*arguments)
    for a, b in zip(got, wanted, strict=True) if num_sent == 2 else [(got, wanted)]:
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    torch.autograd.gradcheck(lambda *each: halves(*each)[0] if num_sent == 2 else halves(*each), arguments)


def test_rows_in_eight_bits_in_two_halves_are_the_whole(axis: str) -> None:
    (rows, *where), ways = SAMPLES["all_to_all"](axis), {"narrow": "fp8", "narrow_gradient": "fp8_128"}
    torch.library.opcheck(op.all_to_all.default, (rows, *where), ways)

    def halves(rows: Tensor) -> Tensor:
        token, ticket = op.all_to_all_start(rows, *where, **ways)
        return op.all_to_all_wait(token, ticket, *where, **ways)

    found = []
    for whole in (halves, lambda rows: op.all_to_all(rows, *where, **ways)):
        leaf = rows.detach().requires_grad_()
        out = whole(leaf)
        gradient = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
        out.backward(gradient)
        found.append((out, leaf.grad))
        assert torch.equal(out, nearest(rows, "fp8")) and not torch.equal(out, rows)
        assert torch.equal(leaf.grad, nearest(gradient, "fp8_128"))
    assert all(map(torch.equal, *found))


def test_a_ticket_is_good_for_one_wait(axis: str) -> None:
    arguments = SAMPLES["all_to_all"](axis)
    token, ticket = op.all_to_all_start(*arguments)
    op.all_to_all_wait(token, ticket, *arguments[1:])
    with pytest.raises(MoecompileError, match=r"exchange \d+ is not in flight: each start has one wait"):
        op.all_to_all_wait(token, ticket, *arguments[1:])


@pytest.mark.parametrize("name", SAMPLES)
def test_torch_checks(name: str, axis: str) -> None:
    torch.library.opcheck(getattr(op, op_of(name)).default, SAMPLES[name](axis))


DIFFERENTIABLE = [
    "flatten_tokens", "unflatten_tokens", "router_logits", "router_logits: bias", "permute", "permute: dropped",
    "unpermute", "permute: counted", "unpermute: dropped", "regroup", "ungroup", "grouped_mm",
    "expert_bias", "pack_rows", "expand_rows", "reduce_rows", "combine_rows", "all_to_all", "exchange_assignments",
    "pad_tokens", "spread_tokens", "take_local", "wire_cast", "wire_uncast", "all_gather", "reduce_scatter",
    "gather_assignments", "expert_ffn", "sort_assignments", "sort_assignments: dropped", "sort_received",
    "sort_gathered", "cut_tokens", "join_tokens", "sum_ranks", "join_columns", "cut_columns",
    "grouped_mm: borrowed", "grouped_mm: nothing borrowed", "expert_ffn: borrowed", "expert_ffn: nothing borrowed",
    "local_experts", "read_rows: every row", "return_rows",
]  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name: str, axis: str) -> None:
    leaves, spec = tree_flatten(SAMPLES[name](axis))  # `gradcheck` takes no list of tensors

    def floating(*leaves: Any) -> tuple[Tensor, ...]:
        out = getattr(op, op_of(name))(*tree_unflatten(leaves, spec))
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(t for t in outputs if t.is_floating_point() and t.requires_grad)

    torch.autograd.gradcheck(floating, leaves)


def test_gradients_of_borrowed_experts_come_home(axis: str) -> None:
    """A list of tensors is something that `gradcheck` does not take; expert 2 is lent twice."""
    table = torch.tensor([[2, 0, 2, 4]])

    def borrowed(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(op.lend_experts(list(weights), table, axis))

    weights = values(4, 3, 2), values(4, 5)
    assert torch.equal(borrowed(*weights)[1], weights[1][[2, 0, 2]])
    torch.autograd.gradcheck(borrowed, weights)


def test_without_a_loan_nothing_travels_and_no_gradient_is_added(axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed, "all_to_all_single")
    weights = values(4, 3, 2), values(4, 5)
    borrowed = op.lend_experts(list(weights), torch.tensor([[4, 4]]), axis)
    assert [tuple(weight.shape) for weight in borrowed] == [(0, 3, 2), (0, 5)]
    torch.autograd.backward([weight.sum() for weight in borrowed])
    assert weights[0].grad is None and weights[1].grad is None


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_outputs_that_are_indices_have_no_gradient(name: str, axis: str) -> None:
    out = getattr(op, op_of(name))(*SAMPLES[name](axis))
    for tensor in out if isinstance(out, tuple) else (out,):
        # expert_ffn also returns what its backward needs.
        keeps = name.startswith("expert_ffn")
        assert tensor.requires_grad == (tensor.is_floating_point() and (not keeps or tensor is out[0]))
