"""Prints passes, sites, checks and the final summary on the console. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from moecompile.plan import EXCHANGE_OPS
from moecompile.report.tables import path_text, path_width, plain_grid, plain_table
from moecompile.report.text import fold_paths, plural, step0_text, traffic_text, unsuffixed

if TYPE_CHECKING:
    from moecompile.passes.run import PassRecord

_STATUS_STYLE = {"ok": "green", "rewritten": "green", "failed": "bold red", "not_matched": "yellow"}


def print_passes(records: Sequence[PassRecord], console: Console) -> None:
    """Prints one numbered line per pass: `5  lower  0.02 s  12 -> 19 nodes  +3 all_to_all, ...`."""
    grid = plain_grid()
    for number, record in enumerate(records, start=1):
        grid.add_row(
            Text(str(number)),
            Text(record.name, style="bold"),
            Text(f"{record.seconds:.2f} s", style="dim", no_wrap=True),
            Text(_nodes_text(record), no_wrap=True),
            Text(_added_text(record)),
        )
    console.print()
    console.print(grid)


def _nodes_text(record: PassRecord) -> str:
    if record.nodes_before in (0, record.nodes_after):
        return plural(record.nodes_after, "node")
    return f"{record.nodes_before} -> {record.nodes_after} nodes"


def _added_text(record: PassRecord) -> str:
    """Added ops, exchanges first, then the detail. Tuple unpacking is left out."""
    names = sorted((n for n in record.added if n != "getitem"), key=lambda name: (name not in EXCHANGE_OPS, name))
    added = ", ".join(f"+{record.added[name]} {name}" for name in names) if record.nodes_before else ""
    detail = f"({record.detail})" if added and record.detail else record.detail
    return " ".join(filter(None, (added, detail)))


def print_sites(sites: Sequence[Mapping[str, str]], console: Console) -> None:
    """Prints every FFN that was matched, and each near miss with its reason.

    Args:
        sites: {fqn, kind, where, status, reason}, the `sites` of result.json.
    """
    table = plain_table("site", "kind", "status", "reason")
    keys = [(s["fqn"] or s["where"], (s["kind"], s["status"], unsuffixed(s["reason"]))) for s in sites]
    for path, positions in fold_paths(keys):
        site = sites[positions[0]]
        table.add_row(
            path_text(path, len(positions), path_width(console)),
            Text(site["kind"]),
            Text(site["status"].replace("_", " "), style=_STATUS_STYLE.get(site["status"], "")),
            Text(site["reason"]),
        )
    console.print()
    console.print(table)


def print_weight_groups(groups: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints which weights have which optimizer and settings.

    Args:
        groups: {optimizer, weights, parameters, lr, weight_decay, match}, the `weight_groups` of result.json.
    """
    table = plain_table("optimizer", "weights", "parameters", "peak lr", "decay", "match")
    for group in groups:
        numbers = (
            f"{group['weights']:,}",
            f"{group['parameters']:,}",
            f"{group['lr']:g}",
            f"{group['weight_decay']:g}",
        )
        table.add_row(Text(group["optimizer"]), *map(Text, numbers), Text(group["match"] or "the rest"))
    console.print()
    console.print(table)


def print_checks(checks: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints one row per check: what was compared, the error, the tolerance.

    Args:
        checks: {name, max_abs_err, tolerance, passed, where}, the `checks` of result.json.
    """
    table = plain_table("check", "error", "tolerance", "", "worst in")
    for check in checks:
        passed = check["passed"]
        table.add_row(
            Text(check["name"]),
            Text(f"{check['max_abs_err']:.1e}" if check["max_abs_err"] else "0"),
            Text(f"{check['tolerance']:.0e}" if check["tolerance"] else "0"),
            Text("ok" if passed else "FAILED", style=_STATUS_STYLE["ok" if passed else "failed"]),
            Text(check["where"], style="dim"),
        )
    console.print()
    console.print(table)


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Prints the final summary of a training run; values that the run did not measure are left out.

    Args:
        result: the content of result.json.
    """
    recipe, status = str(result["recipe"]), str(result["status"])
    console.print()
    console.print(
        Text.assemble((recipe, "bold"), (f"  {status}", _STATUS_STYLE.get(status, "")), f"  {result['seconds']:.1f} s")
    )
    lines = []
    shown = {**result, "step0": step0_text(result)}
    for name, needed, text_of in _RESULT_LINES:
        values = [shown.get(key) for key in needed]
        if None not in values:
            lines.append((name, text_of(*values)))
    grid = plain_grid()
    for name, text in lines:
        if name not in _PATHS:
            grid.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    console.print(grid)
    width = max((len(name) for name, _ in lines), default=0) + 2
    for name, text in lines:
        if name in _PATHS:  # in one line, to be copied
            console.print(Text.assemble((name.ljust(width), "dim"), text), soft_wrap=True)


def print_data(result: Mapping[str, Any], console: Console) -> None:
    """Prints what is in a corpus or in chats; nothing for one text.

    Args:
        result: keys of result.json that begin with `data_`.
    """
    if "data_files" not in result:
        return
    count = {name.removeprefix("data_"): value for name, value in result.items()}
    parts = [plural(count["files"], "file")]
    if count["skipped"]:
        parts[0] += f" ({count['skipped']:,} of other kinds not read)"
    if "documents" in count:
        parts += [f"{count['documents']:,} documents", f"{count['tokens']:,} tokens"]
    else:
        share = count["supervised"] / max(1, count["tokens"])
        parts += [f"{count['records']:,} records", f"{count['left_out']:,} left out (no target)"]
        parts += [f"{count['truncated']:,} truncated", f"{count['tokens']:,} tokens"]
        parts += [f"{count['supervised']:,} supervised ({share:.1%})"]
        parts += [f"{count['rows']:,} rows, {count['fill']:.1%} full"]
    console.print()
    console.print(Text(f"data  {', '.join(parts)}"), soft_wrap=True)


# Last lines of `print_result`, never broken.
_PATHS = ("checkpoint", "report", "run dir")

# Lines of `print_result`: (name, required keys of result.json or `step0`, their values -> text).
_RESULT_LINES: tuple[tuple[str, tuple[str, ...], Callable[..., str]], ...] = (
    ("model", ("num_rewritten", "world_size"), lambda n, world: f"{plural(n, 'MoE layer')} on {plural(world, 'rank')}"),
    ("step 0", ("step0",), str),
    ("loss", ("loss_first", "loss_last", "steps"), lambda a, b, n: f"{a:.4f} -> {b:.4f} in {plural(n, 'step')}"),
    ("validation", ("val_loss",), lambda loss: f"{loss:.4f} nats per token"),
    ("unigram entropy", ("unigram_entropy",), lambda nats: f"{nats:.4f} nats per token, what token counts alone reach"),
    ("balance", ("max_violation_last",), lambda v: f"MaxVio {v:.3f} (fullest expert over the mean load, minus 1)"),
    ("", ("max_violation_mean_last",), lambda v: f"MaxVio {v:.3f} mean over layers and the last tenth of steps"),
    ("drops", ("drop_rate_last",), lambda rate: f"{rate:.2%} of the assignments, beyond the experts' capacity"),
    ("speed", ("tokens_per_second",), lambda speed: f"{speed:,.0f} tokens/s"),
    ("forward bytes", ("bytes_per_token_per_layer",), traffic_text),
    ("predicted", ("bytes_per_token_per_layer_predicted",), traffic_text),
    ("optimizer bytes", ("optimizer_bytes_per_step",), partial(traffic_text, per="rank and step")),
    ("predicted", ("optimizer_bytes_per_step_predicted",), partial(traffic_text, per="rank and step")),
    ("checkpoint", ("checkpoint",), str),
    ("report", ("run_dir", "report"), lambda folder, name: f"{folder}/{name}"),
    ("run dir", ("run_dir",), str),
)
