"""The fused experts against a loop over rows in float64, with and without the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.ops import expert_ffn
from moecompile.ops.cpu import native
from moecompile.ops.cpu.blocks import _padded_length
from moecompile.ops.cpu.products import faster_wide

op = torch.ops.moecompile
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # relative to the largest entry


@pytest.fixture(params=["narrow", "wide", "tiles"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ways to multiply bf16 on processors that are unlike this one."""
    monkeypatch.setenv("MOECOMPILE_WIDE_PRODUCTS", "1" if request.param == "wide" else "0")
    monkeypatch.setattr("moecompile.ops.cpu.products.has_tiles", lambda: request.param == "tiles")
    faster_wide.cache_clear()
    yield
    faster_wide.cache_clear()


def case(dtype: torch.dtype, num_tokens: int, num_experts: int, d_model: int, d_expert: int) -> list[Tensor]:
    """x_TD, weights_TK, gate_up_EGD, down_EDF; ids_TK never choose the last expert."""
    generator = torch.Generator().manual_seed(num_tokens)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    ids = torch.rand(num_tokens, num_experts - 1, generator=generator).topk(2).indices
    return [
        values(num_tokens, d_model).to(dtype).requires_grad_(),
        values(num_tokens, 2).abs().to(wide).requires_grad_(),
        values(num_experts, 2 * d_expert, d_model).mul(0.3).to(dtype).requires_grad_(),
        values(num_experts, d_model, d_expert).mul(0.3).to(dtype).requires_grad_(),
        ids,
    ]


def row_by_row(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """The definition."""
    gate, up = torch.einsum("td,tkgd->tkg", x, gate_up[ids]).chunk(2, -1)
    return torch.einsum("tkf,tkdf->td", weights.unsqueeze(2) * F.silu(gate) * up, down[ids])


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a.double() - b).abs().max() <= tolerance * b.abs().max()) if b.numel() else True


# Lengths below a tile, of whole tiles, with padding; widths that are and are not multiples of a tile; widths and
# lengths for the kernel of few rows.
@pytest.mark.parametrize(
    "sizes",
    [(1, 4, 16, 32), (40, 4, 16, 16), (600, 4, 32, 16), (50, 9, 24, 20), (1100, 3, 16, 48), (50, 9, 64, 128),
     (130, 4, 192, 64)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_every_gradient(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], kernels: None, products: None
) -> None:
    *values, ids = case(dtype, *sizes)
    x, weights, gate_up, down = values
    reference = [value.detach().double().requires_grad_() for value in values]
    wanted = row_by_row(*reference, ids)
    direction = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted_grads = torch.autograd.grad(wanted, reference, direction.double())
    weights_R, source, _, counts = op.sort_assignments(ids, weights, gate_up.shape[0])
    with_empty_slot = torch.cat((counts, counts.new_zeros(1)))
    stacks = [list(weight.split([weight.shape[0] - 2, 2])) for weight in (gate_up, down)]  # two experts are borrowed
    for given in ((counts, [gate_up], [down]), (with_empty_slot, *stacks)):
        out = op.expert_ffn(x, source, weights_R, *given, None)[0]
        grads = torch.autograd.grad(out, values, direction, retain_graph=True)
        assert out.dtype == dtype
        assert [
            close(a.detach(), b, TOLERANCE[dtype]) for a, b in zip((out, *grads), (wanted, *wanted_grads), strict=True)
        ] == [True] * 5
        assert not grads[2][-1].any() and not grads[3][-1].any()  # the last expert: zero, not missing


def test_no_token_at_all(kernels: None) -> None:
    *values, ids = case(torch.bfloat16, 0, 4, 16, 16)
    x, weights, gate_up, down = values
    weights_R, source, _, counts = op.sort_assignments(ids, weights, 4)
    op.expert_ffn(x, source, weights_R, counts, [gate_up], [down], None)[0].sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_stays_one(dtype: torch.dtype, kernels: None) -> None:
    *values, ids = case(dtype, 40, 4, 16, 16)
    x, weights, gate_up, down = (value.detach().clone() for value in values)
    x[7, 3] = float("nan")
    weights_R, source, _, counts = op.sort_assignments(ids, weights, 4)
    out = op.expert_ffn(x, source, weights_R, counts, [gate_up], [down], None)[0]
    assert out[7].isnan().all()
    assert not torch.cat((out[:7], out[8:])).isnan().any()


@pytest.mark.parametrize("gate", [-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0])
def test_large_gates_do_not_overflow(gate: float, kernels: None) -> None:
    x = torch.tensor([[gate, 1.0]], requires_grad=True)  # gate = x[0], up = x[1]
    eye = torch.eye(2).unsqueeze(0)
    down = torch.ones(1, 2, 1)
    out = op.expert_ffn(x, torch.tensor([0]), torch.ones(1), torch.tensor([1]), [eye], [down], None)[0]
    out[0, 0].backward()
    wide = x.detach().double().requires_grad_()
    wanted = F.silu(wide[0, 0]) * wide[0, 1]
    wanted.backward()
    assert torch.allclose(out[0, 0].double(), wanted, rtol=1e-6, atol=1e-30)
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-30)


def _activations(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """What `activate` and `activate_backward` write, without a kernel of ours."""
    generator = torch.Generator().manual_seed(rows)
    gate_up, dh = (torch.randn(rows, n, generator=generator).to(dtype) for n in (2 * width, width))
    weights, hidden, again = torch.rand(rows, generator=generator), torch.empty_like(dh), torch.empty_like(dh)
    grad, grad_weights = torch.empty_like(gate_up), torch.empty_like(weights)
    expert_ffn.activate(gate_up, weights, hidden)
    expert_ffn.activate_backward(gate_up, weights, dh, grad, again, grad_weights)
    return [hidden, again, grad, grad_weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_at_a_time_are_all_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernel = _activations(37, 24, dtype)
    monkeypatch.setattr(expert_ffn, "_kernels_for", lambda *_: None)
    whole = _activations(37, 24, dtype)
    monkeypatch.setattr(expert_ffn, "PIECE", 5 * 48)
    assert all(map(torch.equal, _activations(37, 24, dtype), whole))
    assert all(close(a, b.double(), TOLERANCE[dtype]) for a, b in zip(whole, with_kernel, strict=True))


@pytest.mark.slow
def test_what_a_gpu_compiles_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for the CPU: sizes are dynamic, and what is read and what is written is not confused."""
    monkeypatch.setattr(expert_ffn, "_kernels_for", lambda *_: None)
    sizes = [
        (37, 24, torch.float32),
        (64, 24, torch.bfloat16),
        (1, 8, torch.float32),
        (0, 8, torch.float32),
        (5, 8, torch.float32),
    ]
    wanted = [_activations(*each) for each in sizes]
    compiled = tuple(torch.compile(function, dynamic=True, fullgraph=True) for function in expert_ffn._FUNCTIONS)
    monkeypatch.setattr(expert_ffn, "_fused", lambda device: compiled)
    for each, of in zip(sizes, wanted, strict=True):
        assert all(close(a, b.double(), TOLERANCE[each[2]]) for a, b in zip(_activations(*each), of, strict=True)), each


def test_fake_tensors_do_not_try_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no speed; what they found would be kept for the real ones."""
    monkeypatch.delenv("MOECOMPILE_WIDE_PRODUCTS", raising=False)
    faster_wide.cache_clear()
    *values, ids = case(torch.bfloat16, 600, 4, 32, 16)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        x, weights, gate_up, down = (mode.from_tensor(value) for value in values)
        weights_R, source, _, counts = op.sort_assignments(mode.from_tensor(ids), weights, 4)
        out = op.expert_ffn(x, source, weights_R, counts, [gate_up], [down], None)[0]
    assert out.shape == values[0].shape
    assert faster_wide.cache_info().currsize == 0


def test_only_few_lengths_and_little_padding() -> None:
    counts = range(1, 5000)
    lengths = [_padded_length(count) for count in counts]
    assert all(0 <= length - count <= count / 16 for count, length in zip(counts, lengths, strict=True))
    assert len(set(lengths)) < 280


def test_a_library_is_built_once_and_again_for_another_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.kernels.cache_clear()
    if native.kernels() is None:
        pytest.skip("there is no C++ compiler")
    folder = native.Path(str(tmp_path)) / "moecompile"
    first = list(folder.glob("*.so"))
    native.kernels.cache_clear()
    assert native.kernels() is not None
    assert list(folder.glob("*.so")) == first
    assert len(first) == 1
    native.kernels.cache_clear()


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    native.kernels.cache_clear()
    assert native.kernels() is None
    native.kernels.cache_clear()
