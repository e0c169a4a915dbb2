"""The tables, the stored JSON and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from side_by_side.models import GROUPED, PARALLEL
from side_by_side.registry import LIMIT, is_ours, is_peer

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """What decides bf16 speed on a CPU."""
    words = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    flags = {flag: flag in words for flag in ("amx_bf16", "avx512_bf16")}
    return {"isa": torch.backends.cpu.get_cpu_capability(), **flags}


def store(path: Path, key: str, found: dict[str, Any]) -> dict[str, Any]:
    """Replaces one part of the JSON file; what is stored, which has four digits."""
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[key] = rounded(found)
    path.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return dict(everything[key])


def rounded(value: Any) -> Any:
    """Every float to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


# What was aimed at: CPU time of the fastest peer, with several ranks; tokens of transformers' fast experts.
TIME_AIM, SPEED_AIM = 0.8, 1.25
LAYERS = (
    ("cpu_ms", "CPU ms", ".1f"), ("wall_ms", "wall ms", ".1f"), ("x_limit", "x limit", ".2f"),
    ("ours_x", "ours x", ".2f"), ("kept_mib", "kept MiB", ".1f"), ("peak_mib", "peak MiB", ".1f"),
    ("sent_mib", "sent MiB", ".2f"), ("error", "error", ".4f"),
)  # fmt: skip
MODELS = (
    ("cpu_ms", "CPU ms", ".0f"), ("optimizer_ms", "of it AdamW", ".0f"), ("wall_ms", "wall ms", ".0f"),
    ("tokens_per_cpu_second", "tokens/CPU s", ".0f"), ("tokens_per_second", "tokens/s", ".0f"),
    ("x_peer", "x grouped_mm", ".2f"), ("sent_mib", "sent MiB", ".1f"), ("logits", "logits", ".1e"),
    ("step", "step", ".1e"),
)  # fmt: skip
Columns = tuple[tuple[str, str, str], ...]


def table(rows: list[Row]) -> str:
    """A Markdown table, one line a layer and size."""
    full = [
        row | {"size": row["size"].replace(",", ", "), "error": max(row["errors"].values()) if row["errors"] else None}
        for row in rows
    ]
    return _markdown(full, (("size", "experts, top-k, width, tokens", ""), ("layer", "layer", ""), *LAYERS))


def models_table(rows: list[Row]) -> str:
    """A Markdown table, one line a model."""
    peers = {row["family"]: row["cpu_ms"] for row in rows if row["model"] in (GROUPED, PARALLEL)}
    none = {"logits": None, "step": None}
    full = [
        none | row | row["errors"] | {"x_peer": peers[row["family"]] / row["cpu_ms"] if peers else None} for row in rows
    ]
    return _markdown(full, (("family", "family", ""), ("model", "model", ""), *MODELS))


def _markdown(rows: list[Row], known: Columns) -> str:
    shown = [column for column in known if column[0] in rows[0]]
    lines = ["| " + " | ".join(head for _, head, _ in shown) + " |", "|---" * len(shown) + "|"]
    for row in rows:
        cells = ["" if row[key] is None else format(row[key], spec) for key, _, spec in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layers_page(found: dict[str, Any]) -> str:
    """What docs/understand/peers.md shows of stored layers: the table, what follows from it, the conditions."""
    lines = [f"* {line}" for line in verdicts(found["rows"])]
    return "\n".join([table(found["rows"]), "", *lines, "", conditions(found)]) + "\n"


def models_page(found: dict[str, Any]) -> str:
    """What docs/understand/peers.md shows of stored models."""
    lines = [f"* {line}" for line in models_verdicts(found["rows"])]
    return "\n".join([models_table(found["rows"]), "", *lines, "", conditions(found)]) + "\n"


def conditions(found: dict[str, Any]) -> str:
    """Versions, processor, rounds and what was left out, as a sentence."""
    packages = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    known = found["machine"]
    extras = [name for flag, name in (("avx512_bf16", "avx512_bf16"), ("amx_bf16", "AMX")) if known.get(flag)]
    processor = " and ".join([known["isa"], *extras]) + ("" if known["amx_bf16"] else ", without AMX")
    text = f"{packages}; a CPU with {processor};"
    text += f" {max(row['rounds'] for row in found['rows'])} rounds."
    if found.get("link_mbit"):
        return " ".join(
            [
                text,
                f"A link of {found['link_mbit']:,} Mbit/s.",
                *(f"Left out: {name}." for name in found.get("missing", ())),
            ]
        )
    if found.get("namespace", "own") != "own":
        text += " Bytes are whatever crossed this machine's loopback: a network namespace needs root."
    return " ".join([text, *(f"Left out: {name}." for name in found.get("missing", ()))])


def verdicts(rows: list[Row]) -> list[str]:
    """For each size: our fastest layer against the fastest peer, and the fewest bytes of both."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        here = [row for row in rows if row["size"] == size]
        ours = [row for row in here if is_ours(row["layer"])]
        peers = [row for row in here if is_peer(row["layer"])]
        if not ours or not peers:
            continue
        best, peer = (min(group, key=lambda row: row["cpu_ms"]) for group in (ours, peers))
        taken = best["cpu_ms"] / peer["cpu_ms"]
        line = f"{size}: {best['layer']} takes {taken:.2f} x the CPU time of {peer['layer']}"
        if "sent_mib" in best:
            few, fewest = (min(group, key=lambda row: row["sent_mib"]) for group in (ours, peers))
            share = few["sent_mib"] / fewest["sent_mib"]
            line += f" ({_aim(taken <= TIME_AIM, f'at most {TIME_AIM}')})"
            line += f"; {few['layer']} sends {share:.2f} x the bytes of {fewest['layer']}"
            line += f" ({_aim(share <= 1, 'at most 1')})"
        lines.append(line)
    return lines


def models_verdicts(rows: list[Row]) -> list[str]:
    """For each family: our fastest model against transformers' own fast one."""
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        here = {row["model"]: row["tokens_per_cpu_second"] for row in rows if row["family"] == family}
        ours = max((name for name in here if is_ours(name)), key=here.__getitem__)
        for peer in here.keys() & {GROUPED, PARALLEL}:
            times = here[ours] / here[peer]
            aim = _aim(times >= SPEED_AIM, f"at least {SPEED_AIM}")
            line = f"{family}: {ours} trains {times:.2f} x the tokens of {peer} in a CPU second ({aim})"
            if LIMIT in here:
                line += f"; with dense FFNs of the activated FLOPs it would be {here[LIMIT] / here[peer]:.2f} x"
            lines.append(line)
    return lines


def _aim(met: bool, aim: str) -> str:
    return f"aim: {aim}, {'met' if met else 'missed'}"


def draw(rows: list[Row], path: Path) -> None:
    """CPU time relative to the limit, a group of bars for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = [name for name in dict.fromkeys(row["layer"] for row in rows) if name != LIMIT]
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = {row["size"]: row["x_limit"] for row in rows if row["layer"] == name}
        places = [sizes.index(size) + (i - (len(names) - 1) / 2) * width for size in found]
        bars = axes.bar(places, list(found.values()), width, label=name, hatch="//" if is_ours(name) else None)
        axes.bar_label(bars, fmt="%.3g", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(sizes)), [f"E{e} top-{k}\nF {f}, T {t}" for e, k, f, t in (s.split(",") for s in sizes)])
    axes.set_yscale("log")
    axes.set_ylabel("CPU time / dense FFN")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
