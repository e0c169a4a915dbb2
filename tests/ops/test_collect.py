"""Weight gradients of experts, collected over chunks, against a loop over rows in float64 that knows no chunks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import MoecompileError
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts, MatrixExperts
from moecompile.ops.cpu.products import faster_wide

op = torch.ops.moecompile
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-2}  # relative to the largest entry
# Rows of each expert in each chunk: none in a chunk, none at all, for all at once and for blocks, with padding.
COUNTS = {
    "few": [[2, 0, 3, 0], [0, 0, 0, 0], [1, 4, 0, 0]],
    "some": [[150, 0, 40, 0], [0, 130, 33, 0]],
    "many": [[300, 20, 0, 0], [0, 0, 0, 0], [250, 7, 0, 0], [1, 0, 700, 0]],
    "one": [[200, 300, 0, 10]],
}


class SwiGLU(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Job:
    """Chunks of rows and weights of four experts. `run` is ours, `plain` loops over experts and has no chunks."""

    def __init__(self, counts: list[list[int]], dtype: torch.dtype, d_model: int = 64, d_expert: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()

        self.counts, self.dtype = counts, dtype
        self.experts = Experts(d_model, d_expert, 4, gated=True, activation=SwiGLU(), dtype=dtype)
        self.experts.gate_up_proj = nn.Parameter(values(4, 2 * d_expert, d_model).detach())
        self.experts.down_proj = nn.Parameter(values(4, d_model, d_expert).detach())
        wide = torch.promote_types(dtype, torch.float32)
        sizes = [sum(each) for each in counts]
        self.xs = [values(size, d_model) for size in sizes]
        self.weights = [values(size).detach().to(wide).requires_grad_() for size in sizes]
        self.grads = [values(size, d_model).detach() for size in sizes]
        self.leaves = [*self.experts.parameters(), *self.xs, *self.weights]

    def outputs(self, fused: bool, *, collect: bool = True) -> list[Tensor]:
        token = self.experts.grad_token() if collect else None
        found = []
        for x, weights, counts in zip(self.xs, self.weights, self.counts, strict=True):
            counts_E = torch.tensor(counts)
            if fused:
                source = torch.arange(x.shape[0]).flip(0)  # rows in another order than the input's
                sums = {"source_R": source, "weights_R": weights}
                found.append(self.experts(x.flip(0), counts_E, **sums, grad_token=token))
            else:
                found.append(self.experts(x, counts_E, grad_token=token) * weights.unsqueeze(1).to(x.dtype))
        return found

    def run(self, fused: bool) -> list[Tensor]:
        outputs = self.outputs(fused)
        grads = [grad.flip(0) for grad in self.grads] if fused else self.grads
        torch.autograd.backward(outputs, grads)
        return self.taken()

    def taken(self) -> list[Tensor]:
        found = [leaf.grad.clone() for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        return found

    def plain(self) -> list[Tensor]:
        """Gradients of `leaves`."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        gate_up, down, *rest = leaves
        xs, weights = rest[: len(self.xs)], rest[len(self.xs) :]
        total = gate_up.sum() * 0 + down.sum() * 0
        for x, weight, counts, grad in zip(xs, weights, self.counts, self.grads, strict=True):
            expert = [e for e, count in enumerate(counts) for _ in range(count)]
            for e in set(expert):
                mine = torch.tensor([i for i, other in enumerate(expert) if other == e])
                gate, up = (x[mine] @ gate_up[e].T).chunk(2, 1)
                y = (F.silu(gate) * up * weight[mine].unsqueeze(1)) @ down[e].T
                total = total + (y * grad[mine].double()).sum()
        return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0
        for a, b in zip(got, wanted, strict=True)
    ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_gradient(dtype: torch.dtype, counts: str, fused: bool, kernels: None) -> None:
    job = Job(COUNTS[counts], dtype)
    got, wanted = job.run(fused), job.plain()
    assert [a.dtype for a in got] == [leaf.dtype for leaf in job.leaves]
    assert max(errors(got, wanted)) <= TOLERANCE[dtype]
    assert not got[0][3].any() or counts == "one"  # an expert without rows: zero, not missing


@pytest.mark.parametrize("wide", ["0", "1"])
def test_padded_rows_add_nothing(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_WIDE_PRODUCTS", wide)
    faster_wide.cache_clear()
    job = Job([[333, 1, 47, 0], [70, 513, 0, 3]], torch.bfloat16)
    assert max(errors(job.run(fused=True), job.plain())) <= TOLERANCE[torch.bfloat16]
    faster_wide.cache_clear()


class Ops(TorchDispatchMode):
    """Names of our ops in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moecompile":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fused", "inputs", "weights"),
    [(True, ["expert_ffn_input_grad"] * 2, ["expert_ffn_weight_grad"]),
     (False, ["grouped_mm_input_grad"] * 4, ["grouped_mm_weight_grads"] * 2)],
)  # fmt: skip
def test_weight_gradients_are_computed_once_and_last(fused: bool, inputs: list[str], weights: list[str]) -> None:
    job = Job([[3, 1, 0, 2], [2, 2, 2, 2]], torch.float64)
    reached = []
    for parameter in job.experts.parameters():
        parameter.register_post_accumulate_grad_hook(reached.append)
    outputs = job.outputs(fused)
    with Ops() as ops_:
        torch.autograd.backward(outputs, job.grads)
    named = [name for name in ops_.names if name.startswith(("expert_ffn", "grouped_mm"))]
    assert named[: len(inputs)] == inputs
    assert list(dict.fromkeys(named)) == [*dict.fromkeys(inputs), *dict.fromkeys(weights)]
    assert len(reached) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_weights_cost_no_product(fused: bool) -> None:
    job = Job(COUNTS["few"], torch.float64)
    job.experts.requires_grad_(False)
    with Ops() as ops_:
        torch.autograd.backward(job.outputs(fused), job.grads)
    assert not [name for name in ops_.names if "weight_grad" in name or name.endswith("ffn_backward")]
    assert all(x.grad is not None for x in job.xs) and job.experts.down_proj.grad is None
    job.experts.down_proj.requires_grad_()
    torch.autograd.backward(job.outputs(fused), job.grads)
    assert job.experts.gate_up_proj.grad is None and job.experts.down_proj.grad is not None


@pytest.mark.parametrize("fused", [True, False])
def test_a_backward_for_other_inputs_leaves_nothing_behind(fused: bool) -> None:
    job = Job(COUNTS["few"], torch.float64)
    wanted = job.run(fused)
    outputs = job.outputs(fused)
    grads = [grad.flip(0) for grad in job.grads] if fused else job.grads
    with Ops() as ops_:
        torch.autograd.grad(outputs, job.xs, grads, retain_graph=True)
    assert not [name for name in ops_.names if "weight_grad" in name]
    torch.autograd.backward(outputs, grads, retain_graph=True)
    assert all(map(torch.equal, job.taken(), wanted))
    torch.autograd.backward(outputs[:1], grads[:1])  # and one of a single chunk has that chunk's alone
    single = Job(COUNTS["few"], torch.float64)
    single.grads[1:] = [torch.zeros_like(grad) for grad in single.grads[1:]]
    assert max(errors([job.experts.gate_up_proj.grad], single.plain()[:1])) <= 1e-13


def test_each_forward_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulation over micro-batches, and weights that are used twice before one backward; copies share nothing."""
    job = Job(COUNTS["some"], torch.float64)
    wanted = job.run(True)
    twin = copy.deepcopy(job)
    loss = sum((y * grad.flip(0)).sum() for _ in range(2) for y, grad in zip(job.outputs(True), job.grads, strict=True))
    loss.backward()
    job.outputs(True)
    torch.autograd.backward(job.outputs(True), [grad.flip(0) for grad in job.grads])
    assert max(errors(job.taken(), [3 * grad for grad in wanted])) <= 1e-13
    assert all(map(torch.equal, twin.run(True), wanted))


@pytest.mark.parametrize("fused", [True, False])
def test_checkpointing_changes_nothing(fused: bool) -> None:
    job = Job(COUNTS["few"], torch.float64)
    wanted = job.run(fused)
    for reentrant in (False, True):
        outputs = checkpoint(lambda *_: tuple(job.outputs(fused)), *job.xs, use_reentrant=reentrant)
        torch.autograd.backward(outputs, [grad.flip(0) for grad in job.grads] if fused else job.grads)
        assert all(map(torch.equal, job.taken(), wanted))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fused", [True, False])
def test_compiled_graphs_are_whole(backend: str, fused: bool) -> None:
    warnings.simplefilter("error", UserWarning)
    torch._dynamo.reset()
    job = Job([[3, 1, 0, 2], [2, 2, 2, 2]], torch.float64)
    wanted = job.run(fused)
    outputs = torch.compile(lambda: job.outputs(fused), fullgraph=True, backend=backend)
    for _ in range(2):
        torch.autograd.backward(outputs(), [grad.flip(0) for grad in job.grads] if fused else job.grads)
        assert max(errors(job.taken(), wanted)) <= 1e-13


def test_a_token_from_elsewhere_is_refused() -> None:
    job = Job(COUNTS["few"], torch.float64)
    with pytest.raises(MoecompileError, match="the token of experts must come from collect_gradients, in the same"):
        job.experts(job.xs[0], torch.tensor(COUNTS["few"][0]), grad_token=torch.zeros((), requires_grad=True))


def test_under_autocast_gradients_keep_the_dtype_of_the_weights() -> None:
    job = Job(COUNTS["some"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = job.outputs(True)
    torch.autograd.backward([y.float() for y in outputs], [grad.flip(0) for grad in job.grads])
    got, wanted = job.taken(), job.plain()
    assert {grad.dtype for grad in got} == {torch.float32}
    assert max(errors(got, wanted)) <= TOLERANCE[torch.bfloat16]


# -- experts that a model has ----------------------------------------------------------------------------------------


class Own(nn.Module):
    """The activation of gpt-oss, or another one by name."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(1.7 * gate)


class Glu(nn.Module):
    activation_fn = staticmethod(F.silu)


def _biased(x: Tensor, weights: list[Tensor], e: int) -> Tensor:
    gate_up, gate_up_bias, down, down_bias = weights
    return Own()._apply_gate(x @ gate_up[e] + gate_up_bias[e]) @ down[e] + down_bias[e]


def _matrices(x: Tensor, weights: list[Tensor], e: int) -> Tensor:
    gate, up, down = (weight.view(4, -1, weight.shape[1])[e] for weight in weights)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down


BIASED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
EXISTING: dict[str, tuple[ExistingExperts, list[tuple[int, ...]], Callable[..., Tensor]]] = {
    "transposed with biases": (
        ExistingExperts(4, Own(), BIASED, transposed=True), [(4, 6, 10), (4, 10), (4, 5, 6), (4, 6)], _biased,
    ),
    "matrices": (MatrixExperts(4, Glu(), ("w1", "v1", "w2")), [(20, 6)] * 3, _matrices),
}  # fmt: skip


@pytest.mark.parametrize("form", EXISTING)
def test_experts_that_a_model_has(form: str) -> None:
    experts, shapes, plain = EXISTING[form]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    counts = COUNTS["few"]
    xs = [torch.randn(sum(each), 6, generator=generator, dtype=torch.float64).requires_grad_() for each in counts]
    token = experts.grad_token(*weights)
    ys = [experts(x, torch.tensor(each), *weights, grad_token=token) for x, each in zip(xs, counts, strict=True)]
    wanted = [
        torch.cat([plain(part, weights, e) for e, part in enumerate(x.split(each))])
        for x, each in zip(xs, counts, strict=True)
    ]
    for got, y in zip(ys, wanted, strict=True):
        assert torch.allclose(got, y, atol=1e-12)
    got_grads, plain_grads = (
        torch.autograd.grad(sum(y.square().sum() for y in each), [*weights, *xs]) for each in (ys, wanted)
    )
    assert max(errors(list(got_grads), list(plain_grads))) <= 1e-12
