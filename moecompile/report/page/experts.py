"""What the experts were given.

(4) The load of each over the steps: a map with a slider, dead experts, MaxVio and entropy.
(7) Which experts see which tokens, which are chosen together, and what the layer before tells of a choice, read from
the routes of the last steps (`routes_sample.npz`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moecompile.load_history import NO_EXPERT, LoadHistory
from moecompile.report.heatmap import chosen_steps, load_ratios, short_names
from moecompile.report.page.document import Chart, Section, chart, details, heat, lines, note, table
from moecompile.report.page.read import Run
from moecompile.rundir import ROUTES

# -- (4) load ----------------------------------------------------------------------------------------------------------


MAX_STEPS = 50
"""Steps in the map, evenly spaced; a run of 1,000 steps of 61 layers with 256 experts is 0.8 MB."""
_LIMIT = 2  # colours end at a quarter and at four times the mean
_LOADS = {-2: "¼ or less", -1: "½", 0: "even", 1: "2 x", 2: "4 x or more"}
_FEW = 12  # layers with a line of their own


def load_section(run: Run) -> Section | None:
    """The section; None: no load was logged."""
    if run.history is None:
        return None
    history, names = run.history, short_names(run.history.layers)
    parts: list[str | Chart] = [
        _load_map(history, names),
        note(
            "Tokens that chose the expert over the mean of its layer, on all ranks together, before any are dropped. "
            "The neutral colour is even load. The scale is logarithmic: half of the mean is as far from even as twice "
            "the mean."
        ),
        _dead(history, names),
    ]
    bounds = [value for _, _, values in run.columns("max_violation_bound") for value in values]
    most = f"; at most {max(bounds):.2f}" if bounds else ""
    for prefix, title, unit in (
        ("max_violation/", "MaxVio", f"fullest expert over the mean, minus 1{most}"),
        ("entropy/", "Entropy of the router", "nats per token"),
        ("drop_rate/", "Dropped assignments", "share"),
    ):
        curves = list(run.columns(prefix))
        if curves and any(value for _, _, values in curves for value in values):
            shown = short_names([name for name, _, _ in curves])
            parts.append(
                _per_layer(
                    prefix.strip("/"), title, unit, [(n, c[1], c[2]) for n, c in zip(shown, curves, strict=True)]
                )
            )
    return Section(name="load", title="Load of the experts", parts=parts)


def quantized(ratios: NDArray[np.float64]) -> NDArray[np.uint8]:
    """One byte per load: 0 no such expert, 1 no tokens, else 2 + 253 (log2(ratio) + 4) / 8, clipped; 2.2% a step."""
    missing = np.isnan(ratios)
    logs = np.log2(np.where(missing | (ratios <= 0), 1.0, ratios))
    scaled = 2 + np.clip(np.rint(253 * (logs + 4) / 8), 0, 253)
    found: NDArray[np.uint8] = np.where(missing, 0, np.where(ratios <= 0, 1, scaled)).astype(np.uint8)
    return found


def _load_map(history: LoadHistory, names: list[str]) -> Chart:
    chosen = chosen_steps(len(history.steps), MAX_STEPS)
    cube = np.stack([quantized(load_ratios(history.loads[i])) for i in chosen])
    num_steps, rows, columns = cube.shape
    slider = {
        "active": num_steps - 1, "pad": {"t": 50}, "currentvalue": {"prefix": "step "},
        "steps": [
            {"label": str(history.steps[i]), "value": str(place), "method": "skip"} for place, i in enumerate(chosen)
        ],
    }  # fmt: skip
    bar = {"title": {"text": "load"}, "tickvals": list(_LOADS), "ticktext": list(_LOADS.values()), "thickness": 12}
    layout: dict[str, Any] = {
        "title": {"text": "Layers x experts"},
        "xaxis": {"title": {"text": "expert"}},
        "yaxis": {"title": {"text": "layer"}, "autorange": "reversed", "type": "category"},
        "sliders": [slider],
        "coloraxis": {"cmin": -_LIMIT, "cmax": _LIMIT, "colorbar": bar},
        "meta": {"scale": {"coloraxis": "diverging"}},
    }
    trace = heat(
        None, x=range(columns), y=names, hover="layer %{y}, expert %{x}<br>%{customdata:.2f} x the mean of its layer"
    )
    stored = {
        "steps": num_steps, "rows": rows, "columns": columns, "limit": _LIMIT,
        "content": base64.b64encode(cube.tobytes()).decode(),
    }  # fmt: skip
    return chart("load-map", [trace], layout, height=260 + min(max(20 * rows, 100), 700), cube=stored)


def _dead(history: LoadHistory, names: list[str]) -> Chart | str:
    """Experts without a token in a logged step, by layer."""
    dead = np.stack([((load != NO_EXPERT) & (load == 0)).sum(1) for load in history.loads])
    if not dead.any():
        return note("No expert was without tokens in a logged step.")
    return _per_layer("dead", "Dead experts", "experts without a token in the step",
                      [(name, history.steps, dead[:, i].tolist()) for i, name in enumerate(names)])  # fmt: skip


def _per_layer(name: str, title: str, unit: str, curves: list[Any]) -> Chart:
    """A line per layer; with many layers, the mean and the highest and lowest of them."""
    if len(curves) > _FEW:
        steps = curves[0][1]
        values = np.array([found for _, _, found in curves if len(found) == len(steps)])
        curves = [(label, steps, of(values, axis=0).tolist()) for label, of in
                  (("highest layer", np.max), ("mean of layers", np.mean), ("lowest layer", np.min))]  # fmt: skip
    else:
        curves = [(f"layer {label}", steps, values) for label, steps, values in curves]
    return lines(f"by-layer-{name}", curves, "optimizer step", unit, title={"text": title})


# -- (7) tokens --------------------------------------------------------------------------------------------------------


MAX_LAYERS, NUM_TOKENS = 8, 32
_LEAST = 200  # tokens from which something is said
_LIFTS = _LOADS | {0: "as expected"}
Ids = NDArray[np.int64]


def tokens_section(run: Run) -> Section | None:
    """The section; None: no routes, or too few tokens."""
    if run.task != "train":
        return None
    try:
        with (run.folder / ROUTES).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            tokens, ids = file["tokens"].astype(np.int64), file["ids"].astype(np.int64)
            layers, experts = short_names(file["layers"].tolist()), file["num_experts"].tolist()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    if len(tokens) < _LEAST:
        return None
    shown = chosen_steps(len(layers), MAX_LAYERS)
    names, frequent = [layers[i] for i in shown], most_frequent(tokens)
    texts = _texts(run.folder / "tokenizer.json", frequent)
    special = [token_lift(tokens, ids[:, i], experts[i], frequent) for i in shown]
    together = [coactivation(ids[:, i], experts[i]) for i in shown]
    hover = "expert %{y}, token %{x}<br>%{customdata:.2f} x its share of all choices"
    parts: list[str | Chart] = [
        _by_layer("specialisation", "Experts x frequent tokens", special, names, texts, hover, "token"),
        note(f"How often the token chooses the expert, over how often all do; the last {len(tokens):,} tokens."),
        *_tables(tokens, ids, experts, shown, names, run.folder / "tokenizer.json"),
        _by_layer(
            "coactivation", "Experts chosen together", together, names, [str(e) for e in range(max(experts))],
            "experts %{y} and %{x}<br>%{customdata:.2f} x as often as by chance", "expert",
        ),
    ]  # fmt: skip
    if len(layers) > 1:
        parts += _predictable(ids, experts, layers)
    return Section(name="tokens", title="Experts and tokens", parts=parts)


def most_frequent(tokens: Ids, count: int = NUM_TOKENS) -> Ids:
    """Ids of the most frequent tokens, in order."""
    found, counts = np.unique(tokens, return_counts=True)
    return found[np.argsort(-counts, kind="stable")[:count]]


def token_lift(tokens: Ids, ids: Ids, experts: int, chosen: Ids) -> NDArray[np.float64]:
    """(E, V) share of the choices of a token that go to an expert, over the expert's share of all choices.

    ids: (T, K), -1 for none.
    """
    overall = _shares(_counts(ids, experts))
    of_token = np.stack([_shares(_counts(ids[tokens == token], experts)) for token in chosen], 1)
    return np.where(overall[:, None] > 0, of_token / np.maximum(overall[:, None], 1e-12), np.nan)


def coactivation(ids: Ids, experts: int) -> NDArray[np.float64]:
    """(E, E) how often two experts are chosen by one token, over that if they were independent; NaN on the diagonal."""
    chosen = _one_hot(ids, experts)
    both = chosen.T @ chosen / len(ids)
    alone = np.diag(both).copy()
    expected = alone[:, None] * alone[None, :]
    lift = np.where(expected > 0, both / np.maximum(expected, 1e-12), np.nan)
    np.fill_diagonal(lift, np.nan)
    return lift


def predictability(before: Ids, ids: Ids, experts_before: int, experts: int) -> tuple[float, float]:
    """Share of the second half's choices that are predicted, and that popularity alone predicts.

    The first half says how often each expert follows each expert of the layer before. For a token of the second half
    these shares are summed over its experts there, and the top K are predicted.
    """
    half, top_k = len(ids) // 2, ids.shape[1]
    earlier, later = _one_hot(before, experts_before), _one_hot(ids, experts)
    follows = earlier[:half].T @ later[:half]
    follows /= np.maximum(earlier[:half].sum(0)[:, None], 1)
    popular = later[:half].mean(0)
    scores = earlier[half:] @ follows + 1e-9 * popular
    actual = later[half:]
    chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k] if top_k < experts else None
    hits = actual.sum() if chosen is None else np.take_along_axis(actual, chosen, 1).sum()
    most = np.argsort(-popular)[:top_k]
    total = max(1.0, float(actual.sum()))
    return float(hits) / total, float(actual[:, most].sum()) / total


def _one_hot(ids: Ids, experts: int) -> NDArray[np.float64]:
    found = np.zeros((len(ids), experts + 1))
    np.put_along_axis(found, np.where(ids < 0, experts, ids), 1.0, 1)
    return found[:, :experts]


def _counts(ids: Ids, experts: int) -> NDArray[np.float64]:
    return np.bincount(ids[ids >= 0], minlength=experts).astype(float)


def _shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = counts / max(1.0, counts.sum())
    return found


def _by_layer(
    name: str, title: str, values: list[NDArray[np.float64]], layers: list[str], x: list[str], hover: str, axis: str
) -> Chart:
    """A map with a slider over layers, on a logarithmic scale around 1."""
    rows, columns = max(v.shape[0] for v in values), max(v.shape[1] for v in values)
    cube = np.stack([quantized(_padded(v, rows, columns)) for v in values])
    steps = [{"label": label, "value": str(place), "method": "skip"} for place, label in enumerate(layers)]
    bar = {"tickvals": list(_LIFTS), "ticktext": list(_LIFTS.values()), "thickness": 12}
    layout: dict[str, Any] = {
        "title": {"text": title},
        "xaxis": {"title": {"text": axis}, "type": "category"},
        "yaxis": {"title": {"text": "expert"}, "type": "category", "autorange": "reversed"},
        "sliders": [
            {"active": len(layers) - 1, "pad": {"t": 70}, "currentvalue": {"prefix": "layer "}, "steps": steps}
        ],
        "coloraxis": {"cmin": -2, "cmax": 2, "colorbar": bar},
        "meta": {"scale": {"coloraxis": "diverging"}},
    }
    stored = {"steps": len(cube), "rows": rows, "columns": columns, "limit": 2,
              "content": base64.b64encode(cube.tobytes()).decode()}  # fmt: skip
    trace = heat(None, x=x, y=[str(e) for e in range(rows)], hover=hover)
    return chart(name, [trace], layout, height=300 + min(max(14 * rows, 120), 640), cube=stored)


def _padded(values: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    found = np.full((rows, columns), np.nan)
    found[: values.shape[0], : values.shape[1]] = values
    return found


def _tables(
    tokens: Ids, ids: Ids, experts: list[int], shown: list[int], names: list[str], tokenizer: Path
) -> Iterator[str]:
    """For each layer, the tokens that most often choose an expert more than others do."""
    found, counts = np.unique(tokens, return_counts=True)
    common = found[counts >= max(5, len(tokens) // 2000)]
    texts = dict(zip(common.tolist(), _texts(tokenizer, common), strict=True))
    for i, name in zip(shown, names, strict=True):
        if experts[i] > 64 or not len(common):
            continue
        lift = token_lift(tokens, ids[:, i], experts[i], common)
        share = _shares(_counts(ids[:, i], experts[i]))
        rows = []
        for expert in range(experts[i]):
            best = np.argsort(-np.nan_to_num(lift[expert]), kind="stable")[:8]
            said = ", ".join(f"{texts[int(common[b])]} {lift[expert, b]:.1f}x" for b in best if lift[expert, b] > 1)
            rows.append((expert, f"{100 * share[expert]:.1f}%", said))
        head = ("expert", "of all choices", "tokens that choose it more often than others do")
        yield details(f"Layer {name}: the tokens of each expert", table(head, rows, numbers=False))


def _predictable(ids: Ids, experts: list[int], layers: list[str]) -> Iterator[Chart | str]:
    import plotly.graph_objects as go

    pairs = [predictability(ids[:, i - 1], ids[:, i], experts[i - 1], experts[i]) for i in range(1, len(layers))]
    x = [f"layer {name}" for name in layers[1:]]
    traces = [
        go.Bar(name="from the experts of the layer before", x=x, y=[100 * a for a, _ in pairs]),
        go.Bar(name="from popularity alone", x=x, y=[100 * b for _, b in pairs]),
    ]
    layout = {
        "title": {"text": "Predictable choices"},
        "yaxis": {"title": {"text": "% of choices"}},
        "barmode": "group",
    }
    yield chart("predictability", traces, layout)
    yield note("Learned on the first half of the tokens, counted on the second.")


def _texts(path: Path, tokens: Ids) -> list[str]:
    """Tokens as text, in quotes; ids, if there is no tokenizer."""
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises plain exceptions
        return [str(token) for token in tokens.tolist()]
    found = [repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens.tolist()]
    return [
        text if found.count(text) == 1 else f"{text} ({token})"
        for text, token in zip(found, tokens.tolist(), strict=True)
    ]
