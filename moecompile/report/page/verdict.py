"""(1) The verdict: loss, step-0 receipt, certificate; predicted beside measured for bytes, memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moecompile.report.page.document import Section, escape, note, table
from moecompile.report.page.read import Run
from moecompile.report.text import bytes_text, count_text, plural, seconds_text, step0_text

Row = tuple[str, str, str, str]
_MEMORY = ("weights", "grads", "optimizer", "activations")


def section(run: Run) -> Section:
    """The section; every task has one."""
    lines = "".join(f'<p class="big">{line}</p>' for line in _lines(run))
    parts = [lines]
    rows = [*_bytes(run), *_memory(run), *_time(run)]
    if any(row[2] for row in rows):
        parts.append(table(("", "predicted", "measured", "measured - predicted"), rows))
        if run.profile:
            parts.append(note(
                "Bytes: forward exchanges of all training steps. Memory: weights, gradients and optimizer state are "
                "those of the fullest rank after the last step; activations are what its forward kept for backward. "
                "Predicted weights and gradients also have room for a layer that is gathered. "
                "For CPU ranks the predicted time is a rough guess."
            ))  # fmt: skip
    elif rows:
        parts.append(table(("", "predicted"), [row[:2] for row in rows]))
    if run.checks:
        parts.append(_checks(run))
    return Section(name="verdict", title="Verdict", parts=parts)


def _lines(run: Run) -> Iterator[str]:
    result = run.result
    if not result:
        steps = max((row.get("step", 0) for row in run.rows), default=0)
        goal = (
            run.config.get("trainer", {}).get("max_steps") if isinstance(run.config.get("trainer"), Mapping) else None
        )
        yield f"no result yet{f': step {steps:.0f} of {goal}' if goal and run.task == 'train' else ''}"
        return
    good = result.get("status") == "ok"
    state = "ok" if good else f"failed: {result.get('error') or 'a check failed'}"
    yield f'<span class="{"good" if good else "bad"}">{escape(state)}</span>, {result["seconds"]:.1f} s'
    if result.get("loss_last") is not None:
        yield escape(f"loss {result['loss_first']:.4f} → {result['loss_last']:.4f} in {plural(result['steps'], 'step')}"
                     f", validation {result['val_loss']:.4f} nats per token")  # fmt: skip
    if (step0 := step0_text(result)) is not None:
        yield escape(f"step 0 {step0}")
    if run.checks:
        passed = sum(bool(check.get("passed")) for check in run.checks)
        yield escape(f"certificate: {passed} of {plural(len(run.checks), 'check')} passed")
    if run.plan is not None and run.plan.estimate is not None:
        estimate = run.plan.estimate
        size = f"{count_text(estimate.params_total)} parameters, a token uses {count_text(estimate.params_active)}"
        yield f"{plural(len(run.plan.layers), 'MoE layer')} on {plural(run.plan.mesh.world_size, 'rank')}; {size}"


def _bytes(run: Run) -> Iterator[Row]:
    measured = run.result.get("bytes_per_token_per_layer") if run.task == "train" else None
    if run.plan is None or run.plan.estimate is None:
        return
    predicted = run.plan.estimate.bytes_per_token_per_layer
    for key, label in (("intra_node", "within nodes"), ("inter_node", "across nodes")):
        yield _row(
            f"bytes {label}, per token and layer", getattr(predicted, key), (measured or {}).get(key), bytes_text
        )


def _memory(run: Run) -> Iterator[Row]:
    if run.plan is None or run.plan.estimate is None:
        return
    predicted, measured = run.plan.estimate.memory_bytes_per_rank, run.profile.get("memory", {})
    for kind in _MEMORY:
        found = max(measured[kind]) if measured.get(kind) else None
        yield _row(f"memory: {kind}", getattr(predicted, kind), found, bytes_text)
    yield _row("memory: rows of the dispatch", predicted.dispatch, None, bytes_text)
    yield _row("memory in all, fullest rank", predicted.total, None, bytes_text)


def _time(run: Run) -> Iterator[Row]:
    if "step_seconds" not in run.forecast:
        return
    yield _row("time of a step", run.forecast["step_seconds"], run.profile.get("step_seconds"), seconds_text)


def _row(label: str, predicted: float, measured: float | None, text: Any) -> Row:
    if measured is None:
        return (label, text(predicted), "", "")
    apart = f"{100 * (measured / predicted - 1):+.1f}%" if predicted else "0%" if not measured else "-"
    return (label, text(predicted), text(measured), apart)


def _checks(run: Run) -> str:
    keys = list(dict.fromkeys(key for check in run.checks for key in check))
    rows = [[_cell(check.get(key)) for key in keys] for check in run.checks]
    return table([key.replace("_", " ") for key in keys], rows, numbers=False)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
