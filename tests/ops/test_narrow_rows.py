"""Rows as bytes: each number is the nearest of e4m3 times its block's scale, whichever function makes the bytes."""

from __future__ import annotations

from math import log10

import pytest
import torch
from torch import Tensor

from moecompile.ops import narrow_rows
from moecompile.ops.cpu.native import kernels
from moecompile.ops.narrow_rows import pack, unpack_rows
from moecompile.row_formats import ROW_FORMATS
from moecompile.verify.narrow_rows import nearest

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
formats = pytest.mark.parametrize("name", ROW_FORMATS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def rows(width: int, dtype: torch.dtype) -> Tensor:
    """Sizes over sixty decades, ties, the largest numbers, zeros of both signs, and what is too small."""
    generator = torch.Generator().manual_seed(width)
    drawn = torch.randn(60, width, generator=generator, dtype=torch.float64)
    drawn *= 10.0 ** torch.arange(-30, 30)[:, None]
    mixed = drawn.abs().sqrt() * drawn.sign()
    ties = torch.randint(-57, 58, (40, width), generator=generator) * 2.0 ** torch.arange(-20, 20)[:, None] / 2
    edges = torch.tensor([448.0, 464.0, 224.0, 449.0, 2.0**-9, 2.0**-10, 0.0, -0.0, 1e-42, 3e38])[:, None]
    return torch.cat((drawn, mixed, ties.double(), edges.expand(-1, width), torch.eye(4, width))).to(dtype)


def received(given: Tensor, name: str) -> Tensor:
    return unpack_rows(pack(given, name), name, like=given)


@formats
@dtypes
@pytest.mark.parametrize("width", [1, 31, 32, 33, 128, 200])
def test_each_number_is_the_nearest_one(name: str, dtype: torch.dtype, width: int) -> None:
    given = rows(width, dtype)
    packed = pack(given, name)
    assert packed.dtype == torch.uint8 and packed.shape == (len(given), ROW_FORMATS[name].row_bytes(width))
    got = unpack_rows(packed, name, like=given)
    assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, nearest(given, name, dtype))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [31, 200])
def test_the_kernel_makes_the_bytes_of_torchs_functions(
    name: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels() is None:
        pytest.skip("no C++ compiler")
    given = rows(width, dtype)
    by_kernel, back = pack(given, name), received(given, name)
    monkeypatch.setattr(narrow_rows, "kernels", lambda: None)
    assert torch.equal(pack(given, name), by_kernel) and torch.equal(received(given, name), back)


@formats
@dtypes
@pytest.mark.parametrize("native", [True, False])
def test_a_block_with_a_number_that_is_not_finite_is_nan(
    name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(narrow_rows, "kernels", lambda: None)
    block = ROW_FORMATS[name].block
    given = torch.ones(4, 2 * block, dtype=dtype)
    given[0, 3], given[1, block], given[2, 2 * block - 1] = torch.nan, torch.inf, -torch.inf
    lost = received(given, name).isnan().view(4, 2, block)
    assert lost.all(2).tolist() == [[True, False], [False, True], [False, True], [False, False]]
    assert torch.equal(lost.any(2), lost.all(2))


@formats
@dtypes
def test_no_rows(name: str, dtype: torch.dtype) -> None:
    assert received(torch.empty(0, 40, dtype=dtype), name).shape == (0, 40)


@dtypes
def test_a_power_of_two_rounds_once(dtype: torch.dtype) -> None:
    """So a second hop, or a second wire, changes nothing more."""
    once = received(rows(200, dtype), "fp8")
    assert torch.equal(received(once, "fp8"), once)


def decibels(given: Tensor, got: Tensor) -> float:
    return 10 * log10(given.double().square().sum() / (given.double() - got.double()).square().sum())


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12, 1e6])
@formats
def test_the_error_is_that_of_four_bits_at_any_size(name: str, size: float) -> None:
    given = (size * torch.randn(200, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert decibels(given, received(given, name)) > 31


def test_a_scale_that_cuts_the_largest_numbers_off_is_worse() -> None:
    """docs/understand/dispatch.md: 31.5 dB, and 30.6 with the scale of the standard, by which up to 512 becomes 448."""
    given = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    blocks = given.view(-1, 32)
    power = torch.exp2(blocks.abs().amax(1, keepdim=True).log2().floor() - 8)
    cut = ((blocks / power).clamp(-448, 448).to(torch.float8_e4m3fn).float() * power).view_as(given)
    assert decibels(given, received(given, "fp8")) == pytest.approx(31.5, abs=0.05)
    assert decibels(given, cut) == pytest.approx(30.65, abs=0.05)


def test_a_format_that_is_not_known_raises() -> None:
    with pytest.raises(KeyError):
        pack(torch.ones(1, 4), "fp7")


@pytest.mark.slow
def test_what_a_gpu_compiles_makes_the_same_bytes() -> None:
    """Compiled for the CPU here."""
    compiled = torch.compile(narrow_rows._pack, dynamic=True), torch.compile(narrow_rows._unpack, dynamic=True)
    for form in ROW_FORMATS.values():
        for width in (33, 128):
            given = rows(width, torch.bfloat16)
            packed = compiled[0](given, form)
            assert torch.equal(packed, narrow_rows._pack(given, form))
            got = compiled[1](packed, form, width, torch.bfloat16)
            assert torch.equal(got, narrow_rows._unpack(packed, form, width, torch.bfloat16))
