"""Ops in graphs: one node each, through copies, pickles, re-traces, fake tensors and autocast."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import moecompile
from moecompile.nn import Experts, Router
from moecompile.passes.base import count_ops
from moecompile.pipeline import compile_model
from tests.tiny import COPY4, Gated, UpDown, config, max_diff, randomize, text, tokens, trace

op = torch.ops.moecompile


class EveryOp(nn.Module):
    """The forward ops of both dispatches, on an axis."""

    def forward(self, x: Tensor, ids_TK: Tensor, weights_TK: Tensor, weight_EFD: Tensor, bias_EF: Tensor) -> Tensor:
        tokens_TD = op.flatten_tokens(x)
        rows, order, counts = op.permute(tokens_TD, ids_TK, 4)
        received, table = op.exchange_counts(counts, "ep")
        landed = op.all_to_all(rows, table, -1, False, "ep")
        grouped, back, counts_e = op.regroup(landed, received)
        out = op.grouped_mm(grouped, [weight_EFD], counts_e, None, 0) + op.expert_bias(bias_EF, counts_e, grouped)
        flat = op.unpermute(op.all_to_all(op.ungroup(out, back), table, -1, True, "ep"), order, weights_TK)
        codes, sizes = op.count_rows(ids_TK, 4, 2)
        _, table = op.exchange_counts(sizes, "ep")
        packed, tokens_U, weights, codes, _ = op.pack_rows(tokens_TD, weights_TK, codes, 4, 2, table)
        landed = op.all_to_all(packed, table, 0, False, "ep")
        weights, codes = op.exchange_assignments(weights, codes, table, 1, "ep")
        copies, weights, source, _, counts_e = op.expand_rows(landed, weights, codes, 2)
        partial = op.reduce_rows(op.grouped_mm(copies, [weight_EFD], counts_e, None, 0), weights, source, landed)
        dedup = op.combine_rows(op.all_to_all(partial, table, 0, True, "ep"), tokens_U, tokens_TD)
        return op.unflatten_tokens(flat + dedup, x)


def test_symbolic_trace_leaves_one_node_per_op() -> None:
    ops = count_ops(fx.symbolic_trace(EveryOp()))
    ours = {name: number for name, number in ops.items() if name not in ("getitem", "add")}
    assert ours == {
        "flatten_tokens": 1, "permute": 1, "exchange_counts": 2, "all_to_all": 4, "regroup": 1, "grouped_mm": 2,
        "expert_bias": 1, "ungroup": 1, "unpermute": 1, "count_rows": 1, "pack_rows": 1, "exchange_assignments": 1,
        "expand_rows": 1, "reduce_rows": 1, "combine_rows": 1, "unflatten_tokens": 1,
    }  # fmt: skip


def compiled(ffn: nn.Module) -> fx.GraphModule:
    graph_module = moecompile.transform(trace(ffn), config(*COPY4))
    randomize(graph_module)
    return graph_module


@pytest.mark.parametrize("ffn", [Gated(), UpDown()], ids=["gated", "up_down"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "retrace"])
def test_round_trips_compute_the_same(ffn: nn.Module, how: str) -> None:
    graph_module = compiled(ffn).eval()
    way = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda g: pickle.loads(pickle.dumps(g)),
        "retrace": fx.symbolic_trace,
    }[how]
    other = way(graph_module)
    assert torch.equal(other(tokens()), graph_module(tokens()))
    if how == "retrace":
        wanted = {"expert_ffn": 1} if isinstance(ffn, Gated) else {"grouped_mm": 2}
        assert count_ops(other) & Counter(wanted) == Counter(wanted)  # modules were inlined, down to the ops
    else:
        assert text(other) == text(graph_module)
        assert moecompile.plan_of(other) == moecompile.plan_of(graph_module)
        assert {name for name, _ in other.named_parameters()} == {name for name, _ in graph_module.named_parameters()}


def test_a_copy_has_weights_of_its_own() -> None:
    graph_module = compiled(UpDown())
    other = copy.deepcopy(graph_module)
    with torch.no_grad():
        other.experts.up_proj.zero_()
    assert graph_module.experts.up_proj.abs().max() > 0


@pytest.mark.parametrize("kind", ["flat", "dedup"])
def test_lowered_graphs_survive_copies_and_pickles(kind: str) -> None:
    overrides = [*COPY4, "mesh.ranks_per_node=2", f"dispatch.kind={kind}"]
    graph_module = moecompile.transform(trace(Gated()), config(*overrides))
    for other in (copy.deepcopy(graph_module), pickle.loads(pickle.dumps(graph_module))):
        assert text(other) == text(graph_module)
        other.graph.lint()


def test_fake_tensors_give_shapes_without_computing() -> None:
    graph_module = compiled(Gated())
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        out = graph_module(mode.from_tensor(tokens().view(2, 3, 8)))
    assert out.shape == (2, 3, 8)


def test_a_region_compiles_without_breaks() -> None:
    graph_module = compiled(Gated())
    fast = torch.compile(graph_module, backend="aot_eager", fullgraph=True)
    x = tokens().requires_grad_()
    fast(x).sum().backward()
    got, x.grad = x.grad, None
    graph_module(x).sum().backward()
    assert torch.allclose(got, x.grad, atol=1e-6)


# -- autocast --------------------------------------------------------------------------------------------------------


def test_under_autocast_experts_run_in_bf16_as_linears_do() -> None:
    dense, x = Gated(bias=True), tokens()
    graph_module = moecompile.transform(trace(dense), config(*COPY4))
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = dense(x), graph_module(x)
        from_bf16 = graph_module(x.bfloat16())
    assert got.dtype == wanted.dtype == from_bf16.dtype == torch.bfloat16
    assert max_diff(got, wanted) <= 2 * torch.finfo(torch.bfloat16).eps * float(wanted.detach().abs().max())


def test_gradients_under_autocast_reach_fp32_weights() -> None:
    graph_module = moecompile.transform(trace(UpDown()), config(*COPY4))
    with torch.autocast("cpu", torch.bfloat16):
        graph_module(tokens()).float().sum().backward()
    for name, parameter in graph_module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name


def test_routing_weights_are_applied_in_fp32_under_autocast() -> None:
    rows, order, weights = torch.randn(12, 8), torch.randperm(12), torch.rand(6, 2)
    wanted = op.unpermute(rows, order, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op.unpermute(rows, order, weights), wanted)


def test_float64_stays_float64_under_autocast() -> None:
    graph_module = moecompile.transform(trace(UpDown().double()), config(*COPY4))
    x = tokens(dtype=torch.float64)
    wanted = graph_module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graph_module(x), wanted)


def test_modules_are_leaves_for_capture_but_not_for_fx() -> None:
    """The planned layers are call_module nodes, so that printing a graph shows router and experts."""
    model = nn.Sequential(UpDown())
    compile_model(model, config(*COPY4), example=tokens())
    called = [node.target for node in model[0].graph.nodes if node.op == "call_module"]
    assert [type(model[0].get_submodule(path)) for path in called] == [Router, Experts]
