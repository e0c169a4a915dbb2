"""Formats numbers and lists of module paths for display."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_MIN_STRIDED = 3  # {0..4..2} is easier to read than {0,2,4}, {0..2..2} is not

NOT_COMPARED = "not compared: "
"""Start of the reasons why step 0 was not compared; other reasons say why it need not be equal."""


def bytes_text(count: float) -> str:
    """Bytes with a binary unit and three digits: `1.23 KiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def seconds_text(seconds: float) -> str:
    """`19.2 s`, `3.41 ms`, `12 us`."""
    if seconds >= 1:
        return f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def count_text(count: float) -> str:
    """A large count with three digits: `671B` for 671 billion."""
    return _scaled(count, 1000, ("", "K", "M", "B", "T")).replace(" ", "")


def traffic_text(bytes_by_link: Mapping[str, float], per: str = "token and layer") -> str:
    """Formats the bytes of a `plan.Traffic`, given as a mapping, as in result.json."""
    intra, inter = (bytes_text(bytes_by_link[link]) for link in ("intra_node", "inter_node"))
    return f"{intra} intra-node, {inter} inter-node per {per}"


def lookups_text(forward: float, share: float) -> str:
    """Formats what a rank sends for lookups in embedding tables."""
    return f"{bytes_text(forward)} per rank and micro-batch in forward; {share:.1%} of the rows that tokens read differ"


def step0_text(result: Mapping[str, Any], same: str = "the model before") -> str | None:
    """What `result` says of step 0, behind these words: `equals the model before within 6.0e-08`, or why it need not.

    Args:
        result: the content of result.json. same: what it is compared with.
    """
    diff, reason = result.get("step0_max_abs_diff"), result.get("step0_reason")
    others, by_regions = result.get("step0_promised_max_abs_diff"), result.get("step0_regions_only")
    grown = "layer by layer, and their outputs differ by {:.1e}: rounding may send a token to other experts"
    if diff is not None:
        return f"equals {same} " + (grown if by_regions else "within {:.1e}").format(diff)
    if reason is None or reason.startswith(NOT_COMPARED):
        return reason
    text = f"need not equal {same}: {reason}"
    if others is None:
        return text
    return f"{text}; with the other layers alone it does, " + (grown if by_regions else "within {:.1e}").format(others)


def plural(count: int, noun: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def unsuffixed(text: str) -> str:
    """`text` with the numbers in names (`layers.3`, `silu_3`) replaced by #, to group similar messages."""
    return re.sub(r"(?<=[._])\d+", "#", text)


def fold_paths(items: Iterable[tuple[str, Hashable]]) -> list[tuple[str, list[int]]]:
    """Joins module paths that differ in one number and have equal keys: `model.layers.{0..5}.mlp`.

    Args:
        items: (path, key), in the order in which they are shown.

    Returns:
        (folded path, positions of its items), in order of first appearance.
    """
    members: defaultdict[Hashable, list[tuple[int, list[str]]]] = defaultdict(list)
    for position, (path, key) in enumerate(items):
        parts = re.split(r"(\d+)", path)  # text at even indices, numbers at odd ones
        members[tuple(parts[::2]), key].append((position, parts))
    folded = [row for group in members.values() for row in _fold_group(group)]
    return sorted(folded, key=lambda row: row[1][0])


def _fold_group(group: list[tuple[int, list[str]]]) -> list[tuple[str, list[int]]]:
    """Folds paths of one pattern over the number that varies most."""
    indices = range(1, len(group[0][1]), 2)
    varying = max(indices, key=lambda i: len({parts[i] for _, parts in group}), default=None)
    if varying is None:
        return [("".join(parts), [position]) for position, parts in group]
    rows: defaultdict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for position, parts in group:
        rows["".join(parts[:varying]), "".join(parts[varying + 1 :])].append((int(parts[varying]), position))
    return [
        (before + _range_text([number for number, _ in row]) + after, [position for _, position in row])
        for (before, after), row in rows.items()
    ]


def _range_text(numbers: Sequence[int]) -> str:
    """`7`, `{0..5}`, `{0..10..2}` or `{0,3..5}`, in the syntax of shells."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) >= _MIN_STRIDED and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{{{numbers[0]}..{numbers[-1]}..{step}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs) + "}"


def _scaled(count: float, base: int, units: Sequence[str]) -> str:
    value, unit = float(count), units[0]
    for larger in units[1:]:
        if abs(value) < base - 0.5:
            break
        value, unit = value / base, larger
    digits = 0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f} {unit}".rstrip()
