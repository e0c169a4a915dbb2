"""The tables of docs/assets/foresight.md and the plot, from the stored scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def tables(result: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    return (
        "\n\n".join(
            [
                "<!-- Written by benchmarks/foresight.py. -->",
                "### Errors of tokens/s\n\n" + _errors(result),
                "### Leaving out one system, or one model\n\n" + _left(result),
                "### Runs that nothing was fitted to\n\n" + _others(result),
                "### Constants\n\n" + _constants(result),
                "### Without parts of the model\n\n" + _ablation(result),
                "### Single kernels\n\n" + _kernels(result),
                "### Parameters and operations\n\n" + _counts(result),
            ]
        )
        + "\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _row(name: str, scores: Mapping[str, Any]) -> list[object]:
    return [name, scores["runs"], scores["median"], scores["p90"], scores["worst"]]


_SCORES = ("", "runs", "median, %", "90th percentile, %", "worst, %")


def _errors(result: Mapping[str, Any]) -> str:
    names = {
        "held out": "held out: the groups that the model was made without",
        "each fold in turn": "each third of the groups in turn",
        "fitted to": "the runs that the constants of the first line were fitted to",
        "priors alone": "priors alone, nothing fitted",
    }
    rows = [_row(text, result["splits"][name]) for name, text in names.items()]
    rows.append(_row("the shipped constants, on the runs that they were fitted to", result["calibrated on all"]))
    rows.append(_row("the same, one vote per distinct config", result["one vote per config"]))
    return _table(_SCORES, rows)


def _left(result: Mapping[str, Any]) -> str:
    rows = [
        _row(f"without {name}" if name != "all" else f"**all {kind}**", scores)
        for kind in ("systems", "models")
        for name, scores in result[kind].items()
    ]
    return _table(_SCORES, rows)


def _others(result: Mapping[str, Any]) -> str:
    v3, steps, layouts = result["deepseek_v3"], result["simumax"], result["pairs"]
    both = layouts["layouts and software"]
    rows = [
        ["DeepSeek-V3, 2,048 H800, a step", f"{v3['published_s']} s", f"{v3['predicted_s']} s ({v3['percent']:+}%)"],
        [
            "SimuMax's twelve steps on eight B200",
            f"their own model: median {steps['theirs']['median']}%",
            f"median {steps['ours']['median']}%, worst {steps['ours']['worst']}%",
        ],
        [
            "pairs of layouts, more than 5% apart",
            f"{layouts['layouts']['pairs']} pairs",
            f"{layouts['layouts']['percent']}% ordered right",
        ],
        ["pairs that differ in layout or software", f"{both['pairs']} pairs", f"{both['percent']}% ordered right"],
    ]
    return _table(("", "published", "predicted"), rows)


def _constants(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"`{c['name']}`",
            c["meaning"],
            c["unit"],
            c["prior"],
            c["fitted"],
            f"{c['bounds'][0]:g} to {c['bounds'][1]:g}",
            c["source"],
        ]
        for c in result["constants"]
    ]
    return _table(("", "meaning", "unit", "prior", "fitted", "bounds", "source of the prior"), rows)


def _ablation(result: Mapping[str, Any]) -> str:
    return _table(_SCORES, [_row(name, scores) for name, scores in result["ablation"].items()])


def _kernels(result: Mapping[str, Any]) -> str:
    rows = [
        [name, k["kernels"], k["share"], k["bandwidth"], k["fixed_us"], k["median"]]
        for name, k in result["kernels"].items()
    ]
    return _table(
        ("on a B200", "kernels", "share of the peak", "factor of the memory bandwidth", "fixed, us", "median error, %"),
        rows,
    )


def _counts(result: Mapping[str, Any]) -> str:
    return _table(
        ("", "published", "counted", "difference, %"),
        [[c["what"], c["published"], c["ours"], c["percent"]] for c in result["counts"]],
    )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Predicted against published tokens/s per GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 6))
    for system in sorted({run["group"].split("|")[1] for run in result["runs"]}):
        runs = [run for run in result["runs"] if run["group"].endswith(f"|{system}")]
        axes.scatter([r["measured"] for r in runs], [r["predicted"] for r in runs], s=18, label=system)
    ends = [400, 50_000]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(
        ends, [0.8 * e for e in ends], [1.25 * e for e in ends], color="grey", alpha=0.15, label="within 25%"
    )
    axes.set(xscale="log", yscale="log", xlabel="published tokens/s per GPU", ylabel="predicted tokens/s per GPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
