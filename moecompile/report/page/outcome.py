"""What the run came to, and how it was started.

(1) The verdict: loss, step-0 receipt, certificate; predicted beside measured for bytes, memory and time.
(8) Loss, learning rate, norm of the gradient and speed over the steps; text that the model wrote, the last one first.
(9) Memory by kind, reductions, command, versions, and what differs from another run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moecompile.plan import FITS, IF_EVEN, TOO_LARGE
from moecompile.report.baseline import baseline_rows, verdict
from moecompile.report.page.document import Chart, Section, chart, details, escape, lines, note, table
from moecompile.report.page.read import Run, flatten, read_config
from moecompile.report.text import bytes_text, count_text, plural, seconds_text, step0_text
from moecompile.rundir import OVERRIDES, RESOLVED, SAMPLES, read_samples
from moecompile.version import versions

# -- (1) verdict -------------------------------------------------------------------------------------------------------


Row = tuple[str, str, str, str]
THIS_MACHINE = "this_machine"  # of bench/machine.py
_MEMORY = ("weights", "grads", "optimizer", "activations")


def verdict_section(run: Run) -> Section:
    """The section; every task has one."""
    lines = "".join(f'<p class="big">{line}</p>' for line in _lines(run))
    parts = [lines]
    rows = [*_bytes(run), *_memory_rows(run), *_time(run)]
    if any(row[2] for row in rows):
        parts.append(table(("", "predicted", "measured", "measured - predicted"), rows))
        if run.profile:
            parts.append(note(
                "Bytes: forward exchanges of all training steps. Memory: weights, gradients and optimizer state are "
                "those of the fullest rank after the last step; activations are what its forward kept for backward. "
                "Predicted weights and gradients also have room for a layer that is gathered. "
                + _about_time(run)
            ))  # fmt: skip
    elif rows:
        parts.append(table(("", "predicted"), [row[:2] for row in rows]))
    if run.checks:
        parts.append(_checks(run))
    if "baseline" in run.result:
        parts.append(table(("", "MoE", "dense"), list(baseline_rows(run.result))))
        parts.append(note(
            "A model that is taken at an earlier step than its last one has a higher learning rate there than at the "
            "end: with trainer.baseline=dense_flops both end at equal FLOPs. One seed each; training losses are means "
            "over the last tenth of the steps until then."
        ))  # fmt: skip
    return Section(name="verdict", title="Verdict", parts=parts)


def _about_time(run: Run) -> str:
    if run.forecast.get("hardware") == THIS_MACHINE:
        return "The time is predicted for this machine, of which the first run has measured the speed in a few seconds."
    return "For CPU ranks the predicted time is a rough guess."


def _lines(run: Run) -> Iterator[str]:
    result = run.result
    if not result:
        steps = max((row.get("step", 0) for row in run.rows), default=0)
        goal = (
            run.config.get("trainer", {}).get("max_steps") if isinstance(run.config.get("trainer"), Mapping) else None
        )
        yield f"no result yet{f': step {steps:.0f} of {goal}' if goal and run.task == 'train' else ''}"
        return
    status = str(result.get("status"))
    state = f"failed: {result.get('error') or 'a check failed'}" if status == "failed" else status
    yield f'<span class="{"good" if status == "ok" else "bad"}">{escape(state)}</span>, {result["seconds"]:.1f} s'
    for text in result.get("warnings", ()):
        yield f'<span class="bad">warning</span> {escape(text)}'
    if result.get("loss_last") is not None:
        trained = plural(result["steps"], "step")
        yield f"loss {_loss(result, 'loss_first')} → {_loss(result, 'loss_last')} in {trained}"
        yield f"validation {_loss(result, 'val_loss_first')} → {_loss(result, 'val_loss')} nats per token"
    if result.get("max_violation_bound_mean_last") is not None:
        mean, most = result["max_violation_mean_last"], result["max_violation_bound_mean_last"]
        yield escape(f"balance: MaxVio {mean:.3f} of at most {most:.3f}, mean over layers and the last tenth of steps")
    if (worth := verdict(result)) is not None:
        yield escape(worth)
    if (step0 := step0_text(result)) is not None:
        yield escape(f"step 0 {step0}")
    if run.checks:
        passed = sum(bool(check.get("passed")) for check in run.checks)
        yield escape(f"certificate: {passed} of {plural(len(run.checks), 'check')} passed")
    if run.plan is not None and run.plan.estimate is not None:
        estimate = run.plan.estimate
        size = f"{count_text(estimate.params_total)} parameters, a token uses {count_text(estimate.params_active)}"
        yield f"{plural(len(run.plan.layers), 'MoE layer')} on {plural(run.plan.mesh.world_size, 'rank')}; {size}"


def _loss(result: Mapping[str, Any], name: str) -> str:
    return "-" if result.get(name) is None else f"{result[name]:.4f}"


def _bytes(run: Run) -> Iterator[Row]:
    measured = run.result.get("bytes_per_token_per_layer") if run.task == "train" else None
    if run.plan is None or run.plan.estimate is None:
        return
    predicted = run.plan.estimate.bytes_per_token_per_layer
    for key, label in (("intra_node", "within nodes"), ("inter_node", "across nodes")):
        yield _row(
            f"bytes {label}, per token and layer", getattr(predicted, key), (measured or {}).get(key), bytes_text
        )


def _memory_rows(run: Run) -> Iterator[Row]:
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


# -- (8) curves --------------------------------------------------------------------------------------------------------


_STEP = "optimizer step"


def curves_section(run: Run) -> Section | None:
    """The section; None: no row was logged."""
    curves = {name: (steps, values) for name, steps, values in run.columns("")}
    if "loss" not in curves:
        return None
    kinds = {"loss": "training", "val_loss": "validation"}
    ours = [(label, *curves[key]) for key, label in kinds.items() if key in curves]
    theirs = []
    for key, label in kinds.items():
        found = [(row["step"], row[key]) for row in run.dense_rows if key in row and "step" in row]
        if found:
            theirs.append((f"dense model, {label}", [step for step, _ in found], [value for _, value in found]))
    named = [*ours, *theirs]
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
    costs = [each.get("flops_per_token") for each in (run.result, run.result.get("baseline", {}))]
    if theirs and all(costs):
        tokens = run.config["data"]["global_batch_size"] * run.config["data"]["seq_len"]
        both = zip((ours, theirs), costs, strict=True)
        over = [
            (label, [tokens * cost * step for step in steps], values)
            for curves_of, cost in both
            for label, steps, values in curves_of
        ]
        axis = "model FLOPs, forward and backward, as the plan counts them"
        parts.append(lines("loss-flops", over, axis, "nats per token", title={"text": "Loss over FLOPs"}))
    for key, title, unit in (
        ("learning_rate", "Learning rate", "of the first group of weights"),
        ("grad_norm", "Norm of the gradient, before clipping", ""),
        ("tokens_per_second", "Speed", "tokens/s on all ranks"),
    ):
        if key in curves:
            parts.append(lines(key, [(title, *curves[key])], _STEP, unit, title={"text": title}))
    return Section(name="curves", title="Loss and learning rate", parts=parts)


# -- (8) samples -------------------------------------------------------------------------------------------------------


_MOST = 20  # rows of the table


def samples_section(run: Run) -> Section | None:
    """The section; None: nothing was written."""
    path = run.folder / SAMPLES
    if run.task != "train" or not path.is_file():
        return None
    rows = read_samples(path)
    if not rows:
        return None
    rows.sort(key=lambda row: -row["step"])
    shown = table(
        ("step", "given", "written"), [(r["step"], r["prompt"], r["text"]) for r in rows[:_MOST]], numbers=False
    )
    of_chats = (run.config.get("data") or {}).get("kind") == "sft"
    given = "Answers to prompts of chats that were held out" if of_chats else "From beginnings of validation texts"
    text = f"{given}, one token after another at temperature 0.8. "
    text += f"All samples are in {SAMPLES}; trainer.sample_interval says when they are taken."
    return Section(name="samples", title="Samples of text", parts=[shown, note(text)])


# -- (9) setup ---------------------------------------------------------------------------------------------------------


def setup_section(run: Run) -> Section:
    """The section; every task has one."""
    parts: list[str | Chart] = []
    if run.plan is not None and run.plan.estimate is not None:
        parts += _memory_bars(run)
    if run.plan is not None and run.plan.reductions:
        rows = [
            [r.parameters, *(" ".join(axes) or "-" for axes in (r.replicated_over, r.sharded_over, r.sum_over))]
            for r in run.plan.reductions
        ]
        head = ("gradients of", "replicated over", "sharded over", "summed over")
        parts += ["<h3>Gradients</h3>", table(head, rows, numbers=False)]
    parts += ["<h3>Command</h3>", f"<pre>{escape(_command(run))}</pre>"]
    found = run.result.get("versions") or versions()
    parts += ["<h3>Versions</h3>", table(("", "version"), found.items(), numbers=False)]
    parts += _difference(run)
    if run.config:
        flat = flatten(run.config)
        parts.append(details("The whole config", table(("key", "value"), flat.items(), numbers=False)))
    return Section(name="setup", title="Memory, command and config", parts=parts)


def _memory_bars(run: Run) -> list[str | Chart]:
    """Bars of the predicted bytes by kind, and of the measured ones beside them."""
    import plotly.graph_objects as go

    assert run.plan is not None and run.plan.estimate is not None
    estimate = run.plan.estimate
    predicted = asdict(estimate.memory_bytes_per_rank)
    measured = {kind: max(values) for kind, values in run.profile.get("memory", {}).items() if values}
    traces = []
    for kind, count in predicted.items():
        bars = [("predicted", count)] + ([("measured", measured[kind])] if kind in measured else [])
        traces.append(go.Bar(
            name=kind, y=[label for label, _ in bars], x=[value / 2**20 for _, value in bars], orientation="h",
            hovertemplate="%{y} " + kind + "<br>%{x:.2f} MiB<extra></extra>",
        ))  # fmt: skip
    layout = {"barmode": "stack", "title": {"text": "Memory of the fullest rank"}, "xaxis": {"title": {"text": "MiB"}}}
    parts: list[str | Chart] = [chart("memory", traces, layout, height=280 if measured else 240)]
    if estimate.assumes is not None:
        limit = bytes_text(estimate.assumes.memory_bytes)
        fits = {FITS: "fits into", IF_EVEN: "fits, only if the load is even, into", TOO_LARGE: "does not fit into"}
        needed = bytes_text(estimate.memory_bytes_per_rank.total)
        parts.append(note(f"{needed} {fits[estimate.fits]} {limit} ({estimate.assumes.hardware})."))
    return parts


def _command(run: Run) -> str:
    path = run.folder / OVERRIDES
    words = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return shlex.join(["python", "-m", "moecompile", *(word for word in words if word)])


def _difference(run: Run) -> Iterator[str]:
    """What differs from the run of `compare`, else from the latest other run beside this one."""
    other = _other(run)
    theirs = flatten(read_config(other)) if other is not None else {}
    if other is None or not theirs:
        return
    ours = flatten(run.config)
    keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key, "-") != theirs.get(key, "-")]
    yield f"<h3>Config, beside {escape(other)}</h3>"
    if keys:
        rows = [(key, ours.get(key, "-"), theirs.get(key, "-")) for key in keys]
        yield table(("key", "this run", "the other run"), rows, numbers=False)
    else:
        yield note("Every value is the same.")


def _other(run: Run) -> Path | None:
    given = run.config.get("compare")
    if given:
        path = Path(str(given))
        return path if path.is_dir() else path.parent
    folder = run.folder.absolute()
    beside = [path for path in folder.parent.iterdir() if path != folder and (path / RESOLVED).is_file()]
    return max(beside, key=lambda path: (path / RESOLVED).stat().st_mtime, default=None)
