"""The seams for other back ends, in one process: the form of the assignments, whole models, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import fx

import moecompile
from moecompile.errors import ConfigError, MoecompileError
from moecompile.ops.backend import by_row
from moecompile.ops.expert_ffn import RaggedRows
from moecompile.passes.base import experts_calls
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4, Gated, UpDown, ids, max_diff, plan_for, text, tokens

DISPATCH = "dispatch.backend=tests.backends:once_per_rank"
EXPERTS = "experts.backend=tests.backends:one_by_one"
EP2 = [*COPY4, "mesh.ranks_per_node=2"]


@pytest.mark.parametrize("seed", range(5))
def test_assignments_of_each_row(seed: int) -> None:
    """Rows with none, some and all of three experts."""
    generator = torch.Generator().manual_seed(seed)
    chosen_EV = torch.rand(3, 6, generator=generator) < 0.5
    expert_R, source_R = chosen_EV.nonzero(as_tuple=True)
    order = torch.argsort(expert_R * 10 + torch.rand(expert_R.shape, generator=generator))  # any order within an expert
    weights_R = torch.rand(expert_R.shape, generator=generator, dtype=torch.float64).requires_grad_()
    ids_VK, weights_VK = by_row(RaggedRows(torch.empty(6, 0), source_R[order], weights_R, chosen_EV.sum(1)), 3)
    found = [
        {(int(i), float(w)) for i, w in zip(ids, weights, strict=True) if i >= 0}
        for ids, weights in zip(ids_VK, weights_VK.detach(), strict=True)
    ]
    wanted: list[set[tuple[int, float]]] = [set() for _ in range(6)]
    for expert, row, weight in zip(expert_R, source_R[order], weights_R.detach(), strict=True):
        wanted[int(row)].add((int(expert), float(weight)))
    assert found == wanted
    assert (weights_VK[ids_VK < 0] == 0).all()
    (weights_VK * (1 + ids_VK)).sum().backward()
    assert weights_R.grad is not None and torch.equal(weights_R.grad, 1.0 + expert_R)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("mixtral", EXPERTS), ("qwen3_moe", "experts.backend=docs.examples.experts_one_by_one:one_by_one")],
)
def test_existing_experts_by_a_back_end(name: str, backend: str) -> None:
    """Logits and every gradient equal those of transformers."""
    reference, model = (moe_model(name).double() for _ in range(2))
    model.load_state_dict(reference.state_dict())
    inputs = moe_inputs(name, ids())
    moecompile.compile_model(model, [backend], example=inputs)
    assert [
        call.kwargs["backend"] for m in model.modules() if isinstance(m, fx.GraphModule) for call in experts_calls(m)
    ]
    logits = [each(**inputs).logits for each in (reference, model)]
    for each in logits:
        each.square().mean().backward()
    assert max_diff(*logits) <= 1e-10
    for path, weight in reference.named_parameters():
        grad = model.get_parameter(path).grad
        assert weight.grad is not None and grad is not None and max_diff(weight.grad, grad) <= 1e-10, path


def test_the_graph_shows_the_back_ends() -> None:
    model = moecompile.compile_model(Gated(), [*EP2, DISPATCH, EXPERTS], example=tokens(), until="lower")
    assert text(model) == EXPECTED


EXPECTED = """\
%0 = placeholder x
%1 = moecompile.flatten_tokens(%0)
%2 = router[Router](%0)
%3 = getitem(%2, 0)
%4 = getitem(%2, 1)
%5 = dispatch_tokens(%1, %4, %3, 4, 'tests.backends:once_per_rank', 'ep')
%6 = getitem(%5, 0)
%7 = getitem(%5, 1)
%8 = getitem(%5, 2)
%9 = getitem(%5, 3)
%10 = moecompile.sort_assignments(%7, %8, 2, False)
%11 = getitem(%10, 0)
%12 = getitem(%10, 1)
%13 = getitem(%10, 3)
%14 = experts[Experts](%6, %13, source_R=%12, weights_R=%11, backend='tests.backends:one_by_one', max_per_token=2)
%15 = combine_tokens(%14, %9, %1, 'tests.backends:once_per_rank', 'ep')
%16 = moecompile.unflatten_tokens(%15, %0)
output(%16)
"""


REFUSED = {
    "no name": (["dispatch.backend=deep_ep"], "dispatch.backend=deep_ep: must be module:name."),
    "not there": (["dispatch.backend=nowhere:x"], "dispatch.backend=nowhere:x: cannot be imported: ModuleNotFoundError"),
    "no such name": (["experts.backend=tests.backends:x"], "experts.backend=tests.backends:x: cannot be imported: Attr"),
    "no methods": (["dispatch.backend=tests.backends:one_by_one"], "dispatch.backend=tests.backends:one_by_one: has no dispatch and no dispatch_again"),
    "no function": (["experts.backend=tests.backends:not_callable"], "experts.backend=tests.backends:not_callable: has no __call__"),
    "rows per expert": ([DISPATCH, "dispatch.kind=flat"], "dispatch.kind=flat: dispatch.backend=tests.backends:once_per_rank sends a token once to a rank"),
    "all tokens": ([DISPATCH, "dispatch.kind=allgather"], "dispatch.kind=allgather: dispatch.backend="),
    "in flight": ([DISPATCH, "dispatch.overlap=shared"], "dispatch.overlap=shared: dispatch.backend=tests.backends:once_per_rank has no start"),
    "experts of flat": ([EXPERTS, "dispatch.kind=flat"], "experts.backend=tests.backends:one_by_one: computes SwiGLU experts without biases"),
    "experts in flight": ([EXPERTS, "dispatch.overlap=shared"], "dispatch.overlap=shared: experts.backend="),
    "experts lent": ([EXPERTS, "dispatch.balance=lend"], "dispatch.balance=lend: experts.backend="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_back_end_cannot_do_is_said(name: str) -> None:
    overrides, message = REFUSED[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        moecompile.compile_model(Gated(), [*EP2, *overrides], example=tokens(), until="lower")


def test_other_experts_than_swiglu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^experts\.backend=.*: computes SwiGLU experts without biases"):
        plan_for(UpDown(), [*COPY4, EXPERTS])


def test_a_result_of_another_shape_is_refused() -> None:
    model = moecompile.compile_model(Gated(), [*COPY4, "experts.backend=tests.backends:transposed"], example=tokens())
    with pytest.raises(MoecompileError, match=r"experts\.backend=tests\.backends:transposed: returned \(8, "):
        model(tokens())
