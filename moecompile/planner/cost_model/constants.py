"""The constants of the time model: what each means, its prior, where that comes from, and how far a fit may move it.

A prior is a value before any run of a whole model was looked at. `b200_kernels.json` are products and attention that
were measured one by one; its fit is in benchmarks/forecast/kernels.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moecompile.errors import ConfigError
from moecompile.libyaml import load_yaml

_UNITS = {"1": "", "us": " us"}
CALIBRATION = Path(__file__).with_name("calibration.yaml")


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One constant. spread: standard deviation of its logarithm that a fit assumes. low, high: physical bounds. source:
    of the prior.
    """

    name: str
    meaning: str
    prior: float
    spread: float
    low: float
    high: float
    source: str
    unit: str = "1"


_KERNELS = "b200_kernels.json, over the share of an H100's watts per operation that a B200 has, to the prior of power"
_ESTIMATE = "estimate"
CONSTANTS = (
    Constant(
        name="dense", meaning="share of the sustained peak that dense products reach", prior=0.64, spread=0.15,
        low=0.4, high=1.0, source=_KERNELS,
    ),
    Constant(
        name="grouped", meaning="share of the sustained peak that products of many experts reach", prior=0.70,
        spread=0.2, low=0.3, high=1.0, source=_KERNELS,
    ),
    Constant(
        name="core", meaning="share of the sustained bf16 peak that attention reaches", prior=0.61, spread=0.2,
        low=0.3, high=0.9, source=_KERNELS,
    ),
    Constant(
        name="scan", meaning="share of the sustained bf16 peak that scans reach", prior=0.04, spread=0.5, low=0.005,
        high=0.5, source=f"{_ESTIMATE}: state-space kernels in fp32 are far from the peak",
    ),
    Constant(
        name="narrowing", meaning="share of the doubled rate that is left each time the bits of a number are halved",
        prior=0.75, spread=0.2, low=0.4, high=1.0, source=f"{_ESTIMATE}: products of quantized blocks",
    ),
    Constant(
        name="power", meaning="exponent of a GPU's watts per peak operation, over an H100's, in its sustained rate",
        prior=0.5, spread=0.4, low=0.05, high=1.5,
        source=f"{_ESTIMATE}: between 1/3 (frequency at a given power, voltage proportional to it) and 1",
    ),
    Constant(
        name="passes", meaning="memory passes outside products, of those that counts.py counts", prior=1.0, spread=0.3,
        low=0.3, high=3.0, source="the count itself",
    ),
    Constant(
        name="group", meaning="fixed time of the product of one expert", prior=2.7, spread=0.5, low=0.1, high=20.0,
        source="b200_kernels.json", unit="us",
    ),
    Constant(
        name="gap", meaning="time between two kernels on the GPU", prior=2.0, spread=0.5, low=0.1, high=15.0,
        source=f"{_ESTIMATE}: the end of one grid and the start of the next", unit="us",
    ),
    Constant(
        name="launch", meaning="host time per kernel that Python launches", prior=15.0, spread=0.5, low=3.0, high=80.0,
        source=f"{_ESTIMATE}: an eager operation with autograd and a module around it", unit="us",
    ),
    Constant(
        name="exposed", meaning="share of an exchange that stays visible when it is overlapped", prior=0.3, spread=0.5,
        low=0.02, high=1.0,
        source="two published claims: 36.6% hidden, and 5 of 35 points left; the geometric mean of .63 and .14",
    ),
    Constant(
        name="reduction", meaning="share of reduced gradients, gathered weights, stages and context that stays visible",
        prior=0.5, spread=0.5, low=0.02, high=1.0, source=f"{_ESTIMATE}: half of it hides behind backward",
    ),
    Constant(
        name="load", meaning="rows of the fullest rank over the mean, with a trained router", prior=1.4, spread=0.2,
        low=1.0, high=3.0, source=_ESTIMATE,
    ),
    Constant(
        name="straggler", meaning="share of a step lost for each doubling of GPUs beyond 8", prior=0.01, spread=0.7,
        low=0.0005, high=0.1, source=_ESTIMATE,
    ),
)  # fmt: skip

PRIORS: Mapping[str, float] = {constant.name: constant.prior for constant in CONSTANTS}


def checked(values: Mapping[str, Any], where: str) -> dict[str, float]:
    """`values` if they are all constants, each within its bounds.

    Raises:
        ConfigError: one is missing, unknown, not a number or out of bounds.
    """
    if unknown := sorted(set(values) - set(PRIORS)):
        raise ConfigError(f"{where}.{unknown[0]}", values[unknown[0]], "is not a constant of the model", "Remove it")
    for constant in CONSTANTS:
        path, value = f"{where}.{constant.name}", values.get(constant.name)
        if not isinstance(value, int | float) or not constant.low <= value <= constant.high:
            rule = f"must be a number from {constant.low:g} to {constant.high:g}{_UNITS[constant.unit]}"
            raise ConfigError(path, value, rule, "Calibrate again: python benchmarks/foresight.py fit")
    return {name: float(value) for name, value in values.items()}


@cache
def calibrated(path: Path = CALIBRATION) -> Mapping[str, float]:
    """The fitted constants.

    Raises:
        ConfigError: the file is damaged.
    """
    with path.open(encoding="utf-8") as file:
        return checked(load_yaml(file.read())["constants"], path.name)
