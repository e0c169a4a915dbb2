"""Was it worth it: an MoE beside the dense model that was trained on the same data. Needs no torch.

Algorithm:
  1. A budget is the smaller one of what the two have spent in all their steps: steps, model FLOPs (as the plan counts
     them: per token, forward and backward), or time (at the measured speed).
  2. With it each of them got to some step.
  3. Compare their training losses there: means over the last tenth of the steps until then.
  4. The lowest loss that both reach, and the FLOPs of the dense model over those of the MoE until there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

from moecompile.report.text import count_text

Curve = Sequence[tuple[float, float]]
"""(step, training loss) of each row of metrics, in order."""
_WINDOW = 0.1


def curve(rows: Sequence[Mapping[str, float]]) -> Curve:
    """The training loss of rows of metrics."""
    found = [(row["step"], row["loss"]) for row in rows if "step" in row and "loss" in row]
    return found if all(isfinite(loss) for _, loss in found) else []  # one that diverged is not compared


def compare(result: Mapping[str, Any], ours: Curve, dense: Curve) -> list[dict[str, Any]]:
    """One entry for each budget: `at` (steps, FLOPs, time), `steps` and `loss`, each of the MoE and the dense model.

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
        losses = [_loss_at(rows, step) for rows, step in zip((ours, dense), steps, strict=True)]  # Step 3
        if None not in losses:
            found.append({"at": at, "steps": [round(step) for step in steps], "loss": losses})
    return found


def flops_for_same_loss(result: Mapping[str, Any], ours: Curve, dense: Curve) -> float | None:
    """Step 4; more than 1: the dense model needs more. None: not known, or a first loss is not above that loss."""
    own_cost, other_cost = (each.get("flops_per_token") for each in (result, result["baseline"]))
    if not (own_cost and other_cost and ours and dense):
        return None
    means = [[(step, mean) for step, _ in rows if (mean := _loss_at(rows, step)) is not None] for rows in (ours, dense)]
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


def verdict(result: Mapping[str, Any]) -> str | None:
    """One sentence; None: nothing could be compared."""
    compared = result.get("baseline", {}).get("compared")
    if not compared:
        return None
    won, lost = (
        [each["at"] for each in compared if (each["loss"][0] < each["loss"][1]) == is_lower]
        for is_lower in (True, False)
    )
    head = f"worth it at equal {_listed(won)}, not at equal {_listed(lost)}"
    head = "worth it" if not lost else "not worth it" if not won else head
    return (
        f"beside the dense model: {head}.{''.join(f' {text};' for text in _in_numbers(result, compared)).rstrip(';')}"
    )


def _in_numbers(result: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for ours, dense in (each["loss"] for each in compared if each["at"] == "FLOPs"):
        share = 100 * (ours / dense - 1)
        yield f"At equal FLOPs its training loss is {abs(share):.1f}% {'lower' if share < 0 else 'higher'}"
    if (needs := result["baseline"].get("flops_for_same_loss")) is not None:
        yield f"for the same loss the dense model needs {needs:.2f} x the FLOPs"
    theirs, own = (each.get("tokens_per_second") for each in (result["baseline"], result))
    if theirs and own:
        yield f"a token takes {theirs / own:.2f} x the time"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def baseline_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, of the MoE, of the dense model)."""
    dense = result["baseline"]
    for name, key, style in _LINES:
        if result.get(key) is not None and dense.get(key) is not None:
            texts = [count_text(x[key]) if style == "count" else format(x[key], style) for x in (result, dense)]
            yield name.format(**result), texts[0], texts[1]
    for each in dense.get("compared", ()):
        steps = "" if each["at"] == "steps" else f" (steps {each['steps'][0]} and {each['steps'][1]})"
        yield f"training loss at equal {each['at']}{steps}", f"{each['loss'][0]:.4f}", f"{each['loss'][1]:.4f}"


_LINES = (
    ("parameters", "params_total", "count"),
    ("a token uses", "params_active", "count"),
    ("FLOPs per token", "flops_per_token", ".3g"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("validation, nats per token, step 0", "val_loss_first", ".4f"),
    ("validation, nats per token, step {steps}", "val_loss", ".4f"),
)
