"""Fits the constants to runs: least squares in logarithms, robust, with priors and bounds.

Minimizes, over the logarithm x of each constant,

    sum over runs of w rho(log predicted / measured) / NOISE^2  +  sum over constants of ((x - prior) / spread)^2,
    rho(r) = 2 SOFT^2 (sqrt(1 + (r / SOFT)^2) - 1)              linear for errors far beyond SOFT

by Levenberg and Marquardt's method, iteratively reweighted; a constant at a bound that wants to leave is held there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moecompile.planner.cost_model.constants import CONSTANTS, PRIORS, Constant

SOFT, NOISE = 0.08, 0.10
_STEP, _ENOUGH, _ROUNDS, _TRIES = 1e-4, 1e-5, 60, 12

Vector = NDArray[np.float64]
Predict = Callable[[Mapping[str, float]], Sequence[float]]


def fit(
    predict: Predict,
    measured: Sequence[float],
    weights: Sequence[float] | None = None,
    free: Sequence[str] | None = None,
) -> dict[str, float]:
    """The constants.

    Args:
        predict: constants -> the prediction of each run, positive. measured: the same, measured. weights: of runs.
        free: names of constants to fit (None: all); the others keep their priors.
    """
    chosen = [constant for constant in CONSTANTS if free is None or constant.name in free]
    problem = _Problem(
        predict, np.log(measured), np.ones(len(measured)) if weights is None else np.array(weights), chosen
    )
    x = problem.prior
    residuals, damping = problem.residuals(x), 1e-2
    cost = problem.cost(residuals, x)
    for _ in range(_ROUNDS):
        step = problem.step(x, residuals)
        for _ in range(_TRIES):
            moved = np.clip(x - step(damping), problem.low, problem.high)
            after = problem.residuals(moved)
            if (new_cost := problem.cost(after, moved)) < cost:
                break
            damping *= 4
        else:
            break
        gained, x, residuals, cost = cost - new_cost, moved, after, new_cost
        damping = max(damping / 5, 1e-7)
        if gained < _ENOUGH * cost:
            break
    return problem.constants(x)


class _Problem:
    """Residuals, cost and steps."""

    def __init__(self, predict: Predict, target: Vector, weights: Vector, chosen: Sequence[Constant]) -> None:
        self.predict, self.target, self.weights, self.chosen = predict, target, weights, chosen
        self.prior: Vector = np.log([constant.prior for constant in chosen])
        self.low: Vector = np.log([constant.low for constant in chosen])
        self.high: Vector = np.log([constant.high for constant in chosen])
        self.spread: Vector = np.array([constant.spread for constant in chosen])

    def constants(self, x: Vector) -> dict[str, float]:
        """All constants at `x`."""
        return {**PRIORS, **{constant.name: float(np.exp(v)) for constant, v in zip(self.chosen, x, strict=True)}}

    def residuals(self, x: Vector) -> Vector:
        """log predicted / measured of each run."""
        result: Vector = np.log(self.predict(self.constants(x))) - self.target
        return result

    def cost(self, residuals: Vector, x: Vector) -> float:
        """What is minimized."""
        robust = 2 * SOFT**2 * (np.sqrt(1 + (residuals / SOFT) ** 2) - 1)
        return float((self.weights * robust).sum() / NOISE**2 + (((x - self.prior) / self.spread) ** 2).sum())

    def step(self, x: Vector, residuals: Vector) -> Callable[[float], Vector]:
        """Damping -> step at `x`; to be subtracted."""
        jacobian = np.stack([(self.residuals(x + _STEP * e) - residuals) / _STEP for e in np.eye(len(x))], 1)
        weight = np.sqrt(self.weights / np.sqrt(1 + (residuals / SOFT) ** 2)) / NOISE
        rows = np.vstack([jacobian * weight[:, None], np.diag(1 / self.spread)])
        wrong = np.concatenate([residuals * weight, (x - self.prior) / self.spread])
        hessian, gradient = rows.T @ rows, rows.T @ wrong
        held = ((x <= self.low + 1e-9) & (gradient > 0)) | ((x >= self.high - 1e-9) & (gradient < 0))
        free = np.flatnonzero(~held)
        inner = hessian[np.ix_(free, free)]

        def damped(damping: float) -> Vector:
            result = np.zeros_like(x)
            result[free] = np.linalg.solve(inner + damping * np.diag(np.diag(inner)), gradient[free])
            return result

        return damped
