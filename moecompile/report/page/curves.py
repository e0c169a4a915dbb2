"""(8) Loss, learning rate, norm of the gradient and speed over the steps."""

from __future__ import annotations

from moecompile.report.page.charts import lines
from moecompile.report.page.document import Chart, Section, note
from moecompile.report.page.read import Run

_STEP = "optimizer step"


def section(run: Run) -> Section | None:
    """The section; None: no row was logged."""
    curves = {name: (steps, values) for name, steps, values in run.columns("")}
    if "loss" not in curves:
        return None
    named = [
        (label, *curves[key]) for key, label in (("loss", "training"), ("val_loss", "validation")) if key in curves
    ]
    entropy = run.result.get("unigram_entropy")
    marks = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": entropy,
            "y1": entropy,
            "line": {"dash": "dot", "width": 1},
        }
    ] * (entropy is not None)
    parts: list[str | Chart] = [
        lines("loss", named, _STEP, "nats per token", title={"text": "Loss"}, shapes=marks),
    ]
    if entropy is not None:
        parts.append(note(f"The dotted line is {entropy:.3f}, what the frequencies of tokens alone reach."))
    for key, title, unit in (
        ("learning_rate", "Learning rate", "of the first group of weights"),
        ("grad_norm", "Norm of the gradient, before clipping", ""),
        ("tokens_per_second", "Speed", "tokens/s on all ranks"),
    ):
        if key in curves:
            parts.append(lines(key, [(title, *curves[key])], _STEP, unit, title={"text": title}))
    return Section(name="curves", title="Loss and learning rate", parts=parts)
