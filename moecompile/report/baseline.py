"""Was it worth it: an MoE beside the dense model that was trained on the same data. Needs no torch.

Algorithm:
  1. A budget is the smaller one of what the two have spent in all their steps: steps, model FLOPs (as the plan counts
     them: per token, forward and backward), or time (at the measured speed).
  2. With it each of them got to some step.
  3. Compare their losses there: validation losses where both were validated at that step, and training losses, means
     over the last tenth of the steps until then.
  4. The lowest training loss that both reach, and the FLOPs of the dense model over those of the MoE until there.
  5. Over runs that differ in the seed alone: the mean and Student's t interval of 95 %, of differences within each run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, sqrt
from statistics import fmean, stdev
from typing import Any

from moecompile.report.text import count_text

Curve = Sequence[tuple[float, float]]
"""(step, loss) of each row of metrics, in order."""
_WINDOW = 0.1
NOISE = 1.0
"""Percent of a loss within which no difference is seen: one run has one seed, and three seeds of one config are up to
0.9% apart (docs/understand/balance.md)."""
_CALLED = {-1: "worth it", 0: "no difference seen", 1: "not worth it"}


@dataclass(frozen=True)
class Curves:
    """training, validation: of one of the two models; empty if a training loss is not finite."""

    training: Curve = field(default_factory=tuple)
    validation: Curve = field(default_factory=tuple)


def curves(rows: Sequence[Mapping[str, float]]) -> Curves:
    """The losses of rows of metrics."""
    training, validation = (
        tuple((row["step"], row[key]) for row in rows if "step" in row and key in row) for key in ("loss", "val_loss")
    )
    return Curves(training, validation) if all(isfinite(loss) for _, loss in training) else Curves()


def compare(result: Mapping[str, Any], ours: Curves, dense: Curves) -> list[dict[str, Any]]:
    """One entry for each budget: `at` (steps, FLOPs, time), `steps`, `loss` (training), each of the MoE and the dense
    model, and `val_loss` where it is known.

    Args:
        result: result.json of a run with a baseline. A budget that is not known is left out.
    """
    other, found = result["baseline"], []
    costs = {  # of a step, of both
        "steps": (1.0, 1.0),
        "FLOPs": (result.get("flops_per_token"), other.get("flops_per_token")),
        "time": tuple(1 / speed if (speed := each.get("tokens_per_second")) else None for each in (result, other)),
    }
    for at, (own_cost, other_cost) in costs.items():
        if not own_cost or not other_cost:
            continue
        budget = min(result["steps"] * own_cost, other["steps"] * other_cost)  # Step 1
        steps = (budget / own_cost, budget / other_cost)  # Step 2
        both = [*zip((ours, dense), steps, strict=True)]  # Step 3
        losses = [_loss_at(of.training, step) for of, step in both]
        if None not in losses:
            entry = {"at": at, "steps": [round(step) for step in steps], "loss": losses}
            validated = [_validated_at(of.validation, step) for of, step in both]
            found.append(entry if None in validated else {**entry, "val_loss": validated})
    return found


def flops_for_same_loss(result: Mapping[str, Any], ours: Curves, dense: Curves) -> float | None:
    """Step 4; more than 1: the dense model needs more. None: not known, or a first loss is not above that loss."""
    own_cost, other_cost = (each.get("flops_per_token") for each in (result, result["baseline"]))
    if not (own_cost and other_cost and ours.training and dense.training):
        return None
    means = [
        [(step, mean) for step, _ in of.training if (mean := _loss_at(of.training, step)) is not None]
        for of in (ours, dense)
    ]
    reached = max(min(loss for _, loss in rows) for rows in means)
    own, other = (_first(rows, reached) for rows in means)
    return None if own is None or other is None else float(other * other_cost / (own * own_cost))


def _first(rows: Curve, loss: float) -> float | None:
    """The step at which a curve first comes down to `loss`, on a straight line between two rows."""
    around = ((a, b) for a, b in pairwise(rows) if a[1] > loss >= b[1])
    return next((x + (y - loss) / (y - y2) * (x2 - x) for (x, y), (x2, y2) in around), None)


def _loss_at(rows: Curve, step: float) -> float | None:
    """The mean over the last tenth of the steps until `step`; between two rows a straight line; None: before them."""
    window = [loss for at, loss in rows if (1 - _WINDOW) * step <= at <= step + 0.5]
    if window:
        return sum(window) / len(window)
    around = ((a, b) for a, b in pairwise(rows) if a[0] <= step <= b[0])
    return next((y + (step - x) / (x2 - x) * (y2 - y) for (x, y), (x2, y2) in around), None)


def _validated_at(rows: Curve, step: float) -> float | None:
    """The validation loss at `step`, rounded; None: it was not validated there."""
    return next((loss for at, loss in rows if at == round(step) and isfinite(loss)), None)


def verdict(result: Mapping[str, Any]) -> str | None:
    """One sentence; None: nothing could be compared."""
    compared = result.get("baseline", {}).get("compared")
    if not compared:
        return None
    called: dict[str, list[str]] = {}
    for each in sorted(compared, key=lambda each: each["at"] != "FLOPs"):  # FLOPs first
        share = _share(each)[1]
        side = 0 if abs(share) <= NOISE else 1 if share > 0 else -1
        called.setdefault(_CALLED[side], []).append(each["at"])
    head = "; ".join(word if len(called) == 1 else f"{word} at equal {_listed(at)}" for word, at in called.items())
    head += f" (within {NOISE:g}%, as one seed differs from another)" if _CALLED[0] in called else ""
    return (
        f"beside the dense model: {head}.{''.join(f' {text};' for text in _in_numbers(result, compared)).rstrip(';')}"
    )


def _share(each: Mapping[str, Any]) -> tuple[str, float]:
    """Of an entry of `compared`: which loss, and how far that of the MoE lies from the dense model's, in percent."""
    kind, (ours, dense) = ("validation", each["val_loss"]) if "val_loss" in each else ("training", each["loss"])
    return kind, 100 * (ours / dense - 1)


def _in_numbers(result: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    by_budget = {each["at"]: _share(each) for each in compared}
    if "FLOPs" in by_budget:
        kind, share = by_budget["FLOPs"]
        yield f"At equal FLOPs its {kind} loss is {_than(share)}"
        if kind == "training" and by_budget["steps"][0] == "validation":
            yield f"at equal steps its validation loss is {_than(by_budget['steps'][1])}"
    if (needs := result["baseline"].get("flops_for_same_loss")) is not None:
        yield f"for the same loss the dense model needs {needs:.2f} x the FLOPs"
    theirs, own = (each.get("tokens_per_second") for each in (result["baseline"], result))
    if theirs and own:
        yield f"a token takes {theirs / own:.2f} x the time"


def _than(share: float) -> str:
    return f"{abs(share):.1f}% {'lower' if share < 0 else 'higher'}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def baseline_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, of the MoE, of the dense model)."""
    dense = result["baseline"]
    for name, key, style in _LINES:
        if result.get(key) is not None and dense.get(key) is not None:
            texts = [count_text(x[key]) if style == "count" else format(x[key], style) for x in (result, dense)]
            yield name.format(**result), texts[0], texts[1]
    steps = sorted({result["steps"], dense.get("steps", result["steps"])})
    last = f"validation, nats per token, step {' and '.join(map(str, steps))}"
    if result.get("val_loss") is not None and dense.get("val_loss") is not None:
        yield last, f"{result['val_loss']:.4f}", f"{dense['val_loss']:.4f}"
    for each in dense.get("compared", ()):
        ours, theirs = each["steps"]
        at = f"at equal {each['at']}{'' if ours == theirs else f' (steps {ours} and {theirs})'}"
        for key, kind in (("val_loss", "validation"), ("loss", "training")):
            if key in each:
                yield f"{kind} loss {at}", f"{each[key][0]:.4f}", f"{each[key][1]:.4f}"


_LINES = (
    ("parameters", "params_total", "count"),
    ("a token uses", "params_active", "count"),
    ("FLOPs per token", "flops_per_token", ".3g"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("validation, nats per token, step 0", "val_loss_first", ".4f"),
)


# -- over seeds ------------------------------------------------------------------------------------------------------

_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452,
)  # fmt: skip
"""Student's t at 97.5 %, of 1 to 29 degrees of freedom."""
SEEDS = range(2, len(_T) + 2)
"""Numbers of runs for which there is an interval."""


def over_seeds(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Step 5, for results that differ in the seed alone, in a sentence; None: too few or too many, or no losses."""
    losses = [result["val_loss"] for result in results if result.get("val_loss") is not None]
    if len(results) not in SEEDS or len(losses) != len(results):
        return None
    words = [f"validation loss {_mean(losses, '.4f')} nats per token"]
    shares = [_share(each) for result in results for each in _compared(result) if each["at"] == "FLOPs"]
    if len(shares) == len(results) and len(kinds := {kind for kind, _ in shares}) == 1:
        found = [share for _, share in shares]
        than, sign = ("lower", -1) if fmean(found) < 0 else ("higher", 1)
        text = _mean([sign * share for share in found], ".1f")
        words.append(f"at equal FLOPs its {kinds.pop()} loss is {text} % {than} than the dense model's")
    needs = [need for result in results if (need := result.get("baseline", {}).get("flops_for_same_loss")) is not None]
    if len(needs) == len(results):
        words.append(f"the dense model needs {_mean(needs, '.2f')} x the FLOPs for the same loss")
    return "; ".join(words)


def _compared(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = result.get("baseline", {}).get("compared", ())
    return found


def _mean(values: Sequence[float], style: str) -> str:
    """The mean and half of its interval."""
    half = _T[len(values) - 2] * stdev(values) / sqrt(len(values))
    return f"{fmean(values):{style}} +- {half:{style}}"
