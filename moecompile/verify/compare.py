"""Compares two sets of tensors by name. Pure functions without communication."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest entry of `wanted`; 0 if both are zero everywhere."""
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    return difference / scale if scale else difference


def worst(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over all tensors, and the name of its tensor.

    Raises:
        KeyError: a tensor is on one side only, such as a missing gradient.
    """
    if lost := sorted(got.keys() ^ wanted.keys()):
        raise KeyError(f"on one side only: {lost}")
    return max((relative_error(got[name], wanted[name]), name) for name in wanted)
