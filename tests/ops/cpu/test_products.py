"""Products of experts with few rows: our kernel against float64, where it is used, and what else computes them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.ops.cpu import native, products
from moecompile.ops.cpu.blocks import Block
from moecompile.ops.cpu.products import Products, faster_wide, suits_kernel

K, N = 128, 192
COUNTS = [[1], [6], [7, 0, 13], [0, 0, 5], [2, 1, 3, 4, 5, 12, 11, 0, 9, 0], [0, 0], [37, 64]]
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # of the largest entry


@pytest.fixture(params=["0", "1"], ids=["narrow", "wide"])
def width_of_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both ways to multiply bf16."""
    monkeypatch.setenv("MOECOMPILE_WIDE_PRODUCTS", request.param)
    faster_wide.cache_clear()
    yield
    faster_wide.cache_clear()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled functions that run; on any processor that can run them, in one thread."""
    kernels = native.kernels()
    if kernels is None or not kernels.has_products:
        pytest.skip("no C++ compiler or no AVX512")
    found: list[str] = []
    run = native.Kernels.__call__

    def seen(self: native.Kernels, name: str, *arguments: Tensor | int) -> None:
        found.append(name)
        run(self, name, *arguments)

    monkeypatch.setattr(native.Kernels, "__call__", seen)
    monkeypatch.setattr(products, "has_tiles", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return found


def factors(counts: list[int], dtype: torch.dtype) -> tuple[Block, Tensor, Tensor, Tensor, Tensor]:
    """Block of the experts from 1 on, rows (M, K) and (M, N), weights (1 + E, N, K) and (1 + E, K, N) of which the first
    are NaN.
    """
    generator = torch.Generator().manual_seed(len(counts))
    block = Block(0, sum(counts), 1, counts)
    rows = (torch.randn(block.end, width, generator=generator).to(dtype) for width in (K, N))
    weights = [torch.randn(1 + len(counts), *shape, generator=generator).to(dtype) for shape in ((N, K), (K, N))]
    for weight in weights:
        weight[0] = float("nan")
    return block, *rows, *weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_kernel_computes_the_three_products(
    counts: list[int], dtype: torch.dtype, width_of_products: None, called: list[str]
) -> None:
    block, a, b, weight_ENK, weight_EKN = factors(counts, dtype)
    products = Products(torch.empty(0, dtype=dtype))
    inside = torch.full((block.end + 2, N), float("nan"), dtype=dtype)  # what is beside the result stays
    out = inside[1:-1]
    grad = torch.full_like(weight_EKN, float("nan"))
    wanted_rows = [x.double() @ w.double().t() for x, w in zip(a.split(counts), weight_ENK[1:], strict=True)]
    products.transposed(block, a, weight_ENK, out)
    assert close(out, torch.cat(wanted_rows), dtype)
    products.straight(block, a, weight_EKN, out.fill_(float("nan")))
    wanted_rows = [x.double() @ w.double() for x, w in zip(a.split(counts), weight_EKN[1:], strict=True)]
    assert close(out, torch.cat(wanted_rows), dtype)
    assert inside[[0, -1]].isnan().all()
    products.gradient(block, a, b, grad)
    pairs = zip(a.split(counts), b.split(counts), strict=True)
    assert close(grad[1:], torch.stack([x.double().t() @ y.double() for x, y in pairs]), dtype)
    assert grad[0].isnan().all()
    if block.end:
        suffix = {torch.float32: "f32", torch.bfloat16: "bf16_wide" if faster_wide() else "bf16"}[dtype]
        assert called == [f"{name}_{suffix}" for name in ("product_transposed", "product", "product_gradient")]
    assert not grad[[1 + i for i, count in enumerate(counts) if not count]].any()


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    if not wanted.numel():
        return got.shape == wanted.shape
    return bool((got.double() - wanted).abs().max() <= EPSILON[dtype] * max(float(wanted.abs().max()), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_where_it_is(dtype: torch.dtype, width_of_products: None, called: list[str]) -> None:
    block, a, b, weight_ENK, weight_EKN = factors([5, 8], dtype)
    a[6, 3] = float("nan")
    out, grad = torch.empty(13, N, dtype=dtype), torch.empty_like(weight_EKN)
    for product, weight in (
        (Products(torch.empty(0, dtype=dtype)).transposed, weight_ENK),
        (Products(torch.empty(0, dtype=dtype)).straight, weight_EKN),
    ):
        product(block, a, weight, out)
        assert out.isnan().any(1).nonzero().flatten().tolist() == [6] and out[6].isnan().all()
    Products(torch.empty(0, dtype=dtype)).gradient(block, a, b, grad.zero_())
    assert grad.isnan().any(2).nonzero().tolist() == [[2, 3]] and grad[2, 3].isnan().all()
    assert len(called) == 3
    a[6, 3], b[4, 5] = 0.0, float("inf")  # the last of five rows: it has no neighbour
    Products(torch.empty(0, dtype=dtype)).gradient(block, a, b, grad)
    assert grad[1, :, 5].isinf().all() and grad.isfinite().sum() == grad.numel() - K


def test_rows_that_do_not_follow_each_other_are_left_to_torch(called: list[str]) -> None:
    block, a, _, weight_ENK, _ = factors([5, 8], torch.float32)
    strided = torch.empty(13, 2 * K)[:, ::2].copy_(a)
    wanted, out = torch.empty(13, N), torch.empty(13, N)
    Products(torch.empty(0)).transposed(block, a, weight_ENK, wanted)
    Products(torch.empty(0)).transposed(block, strided, weight_ENK, out)
    assert called == ["product_transposed_f32"]
    assert torch.allclose(out, wanted, atol=1e-4)


def test_one_busy_expert_among_idle_ones_has_many_rows(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "processor", lambda: "GenuineIntel")
    for busy in (128, 129):
        block, a, _, weight_ENK, _ = factors([0, busy, 0, 0], torch.float32)
        out = torch.empty(busy, N)
        Products(torch.empty(0)).transposed(block, a, weight_ENK, out)
        assert torch.allclose(out, a @ weight_ENK[2].t(), atol=1e-4)
    assert called == ["product_transposed_f32"]


def test_where_it_is_used(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(128)

    def suits(tensor: Tensor, num_rows: int, num_experts: int, *widths: int) -> bool:
        return suits_kernel(num_rows, num_experts, widths, tensor)

    monkeypatch.setattr(products, "processor", lambda: "GenuineIntel")
    assert suits(like, 8 * 128, 8, 512, 256)
    assert not suits(like, 8 * 129, 8, 512, 256)
    assert not suits(like, 8, 8, 512, 260)
    assert not suits(like, 8, 8, 8192, 64)  # does not fit the cache
    assert not suits(like, 0, 8, 512, 256)
    assert not suits(like.double(), 8, 8, 512, 256)
    assert not suits(like.to("meta"), 8, 8, 512, 256)
    monkeypatch.setattr(products, "processor", lambda: "AuthenticAMD")
    assert suits(like, 8 * 500, 8, 512, 256)
    assert not suits(like.bfloat16(), 8 * 500, 8, 512, 256)
    monkeypatch.setattr(products, "has_tiles", lambda: True)
    assert not suits(like.bfloat16(), 8 * 17, 8, 512, 256)
    assert suits(like, 8, 8, 512, 256)
    assert not suits_kernel(8, 8, (512, 256), like, like.bfloat16())
    assert not suits(like[1:], 8, 8, 512, 256)  # not aligned
    assert not suits(like[::2], 8, 8, 512, 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not suits(like, 8, 8, 512, 256)


MISTAKES = {
    "another type": lambda w: (w.bfloat16(), [4, 4]),
    "another width": lambda w: (w[:, :, :64].contiguous(), [4, 4]),
    "too few experts": lambda w: (w, [4, 2, 2]),
    "too many rows": lambda w: (w, [4, 4000]),
    "too few rows": lambda w: (w, [4, 3]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("whole", [False, True], ids=["block", "op"])
def test_factors_that_do_not_fit_never_reach_the_kernel(mistake: str, whole: bool, called: list[str]) -> None:
    rows = torch.randn(8, K)
    weight, counts = MISTAKES[mistake](torch.randn(2, N, K))
    with pytest.raises((RuntimeError, ValueError)):
        if whole:
            torch.ops.moecompile.grouped_mm(rows, [weight], torch.tensor(counts), None, 0)
        else:
            Products(torch.empty(0)).transposed(Block(0, 8, 0, counts), rows, weight, torch.empty(8, N))
    assert called == []


@pytest.mark.parametrize("columns", [512, 1024])
def test_one_product_by_torch(columns: int, width_of_products: None) -> None:
    """Whether widened or not, the product is that of the numbers given, rounded once."""
    generator = torch.Generator().manual_seed(0)
    product = Products(torch.empty(0, dtype=torch.bfloat16)).by_torch
    for rows in (1, 23, 24, 100):
        a, b = (torch.randn(*size, generator=generator).bfloat16() for size in ((rows, 64), (columns, 64)))
        out = torch.empty(rows, columns, dtype=torch.bfloat16)
        product(a, b.t(), out, rows)
        wanted = a.double() @ b.double().t()
        assert (out.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_the_processor_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOECOMPILE_WIDE_PRODUCTS", raising=False)
    times = iter([1.0, 2.0, 1.0, 1.1])  # widened, as it is
    monkeypatch.setattr("moecompile.ops.cpu.products._seconds", lambda f: next(times))
    for faster in (True, False):
        faster_wide.cache_clear()
        assert faster_wide() is faster
        assert faster_wide() is faster
    faster_wide.cache_clear()
