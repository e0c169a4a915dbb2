"""Rooflines of single kernels: where the priors of the constants of products come from.

Each class is fitted to b200_kernels.json as

    time = operations / (peak * share) + bytes / (bandwidth * factor) + calls * t

with positive coefficients, by least squares in logarithms.
"""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
from numpy.typing import NDArray

from forecast.runs import PUBLISHED

PEAK, BANDWIDTH = 2250e12, 8e12
BF16, FP32 = 2, 4
BACKWARD = 2.5  # operations of attention's backward, in forwards
_SOFT, _ROUNDS = 0.1, 200


def kernel_fits() -> dict[str, dict[str, float]]:
    """Class -> share of the peak, factor of the bandwidth, fixed time, and errors."""
    tables = json.loads((PUBLISHED / "b200_kernels.json").read_text(encoding="utf-8"))["op"]
    rows = {
        "products": [_product(key) for key in tables["matmul"]["accurate_efficient_factor"]],
        "grouped products": [_grouped(key) for key in tables["group_matmul"]["accurate_efficient_factor"]],
        "attention forward": [_attention(key, 1.0) for key in tables["sdp_fwd"]["accurate_efficient_factor"]],
        "attention backward": [_attention(key, BACKWARD) for key in tables["sdp_bwd"]["accurate_efficient_factor"]],
    }
    reached = dict(zip(rows, (tables[key] for key in ("matmul", "group_matmul", "sdp_fwd", "sdp_bwd")), strict=True))
    return {
        name: _fit(rows[name], list(reached[name]["accurate_efficient_factor"].values()), name.startswith("attention"))
        for name in rows
    }


@cache
def kernel_shares() -> dict[str, float]:
    """Constant -> share of a B200's data-sheet peak that its class of kernels reaches."""
    fits = kernel_fits()
    forward, backward = (fits[f"attention {way}"]["share"] for way in ("forward", "backward"))
    return {
        "dense": fits["products"]["share"],
        "grouped": fits["grouped products"]["share"],
        "core": (1 + BACKWARD) / (1 / forward + BACKWARD / backward),
    }


def _numbers(key: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=([\w.]+)", key))


def _product(key: str) -> tuple[float, float, float]:
    """Operations, bytes, calls."""
    said = _numbers(key)
    b, m, k, n = (int(said[name]) for name in ("b", "m", "k", "n"))
    written = (FP32 if said["out_dtype"] == "fp32" else BF16) * (2 if said["accumulate"] == "True" else 1)
    return 2.0 * b * m * k * n, b * (BF16 * (m * k + k * n) + written * m * n), 1.0


def _grouped(key: str) -> tuple[float, float, float]:
    said = _numbers(key)
    groups, m, n, k = (int(said[name]) for name in ("ng", "M", "N", "K"))
    flops = 2.0 * groups * m * n * k
    if said["stage"] != "bwd_grad_w":
        return flops, groups * BF16 * (m * n + m * k + n * k), groups
    written = (FP32 if said["main_grad_dtype"] == "fp32" else BF16) * (2 if said["accumulate"] == "True" else 1)
    return flops, groups * (BF16 * (m * n + m * k) + written * n * k), groups


def _attention(key: str, times: float) -> tuple[float, float, float]:
    said = _numbers(key)
    batch, seq, heads = int(said["batch"]), int(said["seq_len"]), int(said["head_num"])
    widths, kv = int(said["qk_head_dim"]) + int(said["v_head_dim"]), int(said["kv_head_num"])
    return 2.0 * batch * heads * seq**2 * widths * times, batch * seq * (heads + kv) * widths * BF16 * times, 1.0


def _fit(rows: list[tuple[float, float, float]], reached: list[float], causal: bool) -> dict[str, float]:
    counted = np.array(rows)
    seconds = counted[:, 0] / PEAK / np.array(reached)  # the file counts all pairs of tokens
    half = 2.0 if causal else 1.0
    columns = counted / np.array([PEAK * half, BANDWIDTH, 1e6])
    x = np.log(np.maximum(np.linalg.lstsq(columns / seconds[:, None], np.ones(len(rows)), rcond=None)[0], 1e-9))
    for _ in range(_ROUNDS):
        predicted = columns @ np.exp(x)
        wrong, slope = np.log(predicted / seconds), columns * np.exp(x) / predicted[:, None]
        weight = 1 / np.sqrt(1 + (wrong / _SOFT) ** 2)
        x = x - _step(slope * weight[:, None], wrong * weight)
    off = 100 * np.abs(columns @ np.exp(x) / seconds - 1)
    share, factor, fixed = np.exp(x)
    return {
        "share": round(float(1 / share), 3), "bandwidth": round(min(99.0, float(1 / factor)), 2),
        "fixed_us": round(float(fixed), 2), "median": round(float(np.median(off)), 1), "kernels": len(rows),
    }  # fmt: skip


def _step(slope: NDArray[np.float64], wrong: NDArray[np.float64]) -> NDArray[np.float64]:
    damped = np.vstack([slope, 1e-3 * np.eye(slope.shape[1])])
    result: NDArray[np.float64] = np.linalg.lstsq(
        damped, np.concatenate([wrong, np.zeros(slope.shape[1])]), rcond=None
    )[0]
    return result
