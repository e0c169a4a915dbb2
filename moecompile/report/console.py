"""What a run prints: passes, sites, checks, its summary, its baseline, and the tables of task=bench. Needs no torch.

Cells have explicit line breaks, so that tables fit 80 columns also if the output is not a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moecompile.plan import EXCHANGE_OPS
from moecompile.report.baseline import baseline_rows, verdict
from moecompile.report.text import bytes_text, fold_paths, lookups_text, plural, step0_text, traffic_text, unsuffixed

if TYPE_CHECKING:
    from moecompile.passes.run import PassRecord


# -- the style of tables -----------------------------------------------------------------------------------------------


def plain_table(*columns: str, firm: Collection[int] = (0,)) -> Table:
    """A table without a frame. firm: columns that are not wrapped."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, overflow="fold", no_wrap=i in firm)
    return table


def plain_grid() -> Table:
    """A grid for lines of names and values."""
    return Table.grid(padding=(0, 2, 0, 0))


def path_width(console: Console) -> int:
    """Characters per line of a module path in a table."""
    return console.width // 3 - 1


def path_text(path: str, count: int, width: int) -> Text:
    """A module path, wrapped at dots if it is long, and its number of sites."""
    lines = [""]
    for part in re.split(r"(?<=[^.]\.)(?=[^.])", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    text = Text("\n".join(lines))
    return text.append(f"\n{count} sites", style="dim") if count > 1 else text


# -- a run -------------------------------------------------------------------------------------------------------------


_STATUS_STYLE = {
    "ok": "green", "rewritten": "green", "failed": "bold red", "diverged": "bold red", "not_matched": "yellow"
}  # fmt: skip


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
    table = plain_table("check", "error", "tolerance", "", "worst in", firm=(1, 2, 3))
    width = path_width(console)
    for check in checks:
        passed = check["passed"]
        table.add_row(
            Text(check["name"]),
            Text(_error_text(check["max_abs_err"], ".1e")),
            Text(_error_text(check["tolerance"], ".2g")),
            Text("ok" if passed else "FAILED", style=_STATUS_STYLE["ok" if passed else "failed"]),
            Text(check["where"], style="dim") if " " in check["where"] else path_text(check["where"], 1, width),
        )
    console.print()
    console.print(table)


def _error_text(number: float, form: str) -> str:
    """A relative error, or a count."""
    return str(number) if isinstance(number, int) else format(number, form) if number else "0"


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Prints the final summary of a training run; values that the run did not measure are left out.

    Args:
        result: the content of result.json.
    """
    recipe, status = str(result["recipe"]), str(result["status"])
    console.print()
    warned = result.get("warnings")
    console.print(Text.assemble(
        (recipe, "bold"), (f"  {status}", _STATUS_STYLE.get(status, "")),
        (f", {plural(len(warned), 'warning')}" if warned else "", "yellow"), f"  {result['seconds']:.1f} s",
    ))  # fmt: skip
    lines = []
    shown = {**result, "step0": step0_text(result), "validation": _validation_text(result)}
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


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Prints one paragraph per warning."""
    for text in warnings:
        console.print()
        console.print(Text.assemble(("warning", "bold yellow"), f"  {text}"))


def print_data(result: Mapping[str, Any], console: Console) -> None:
    """Prints what is in the data, how long a pass takes, a chat with its targets, and what looks wrong.

    Args:
        result: keys of result.json that begin with `data_`.
    """
    data = {name.removeprefix("data_"): value for name, value in result.items()}
    grid = plain_grid()
    for name, text in (
        ("data", _amount_text(data)),
        ("lengths", _lengths_text(data["lengths"]) if "lengths" in data else None),
        ("epochs", _epochs_text(data)),
    ):
        if text is not None:
            grid.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
    console.print()
    console.print(grid)
    if "example" in data:
        console.print(_example_text(data["example"], data["example_tokens"]), soft_wrap=True)
    print_warnings(data["warnings"], console)


def _amount_text(data: Mapping[str, Any]) -> str:
    parts = []
    if "files" in data:
        parts.append(plural(data["files"], "file"))
        if data["skipped"]:
            parts[0] += f" ({data['skipped']:,} of other kinds not read)"
    if "documents" in data:
        parts.append(f"{data['documents']:,} documents")
    if "records" in data:
        share = data["supervised"] / max(1, data["tokens"])
        parts += [f"{data['records']:,} records", f"{data['left_out']:,} left out (no target)"]
        parts += [f"{data['truncated']:,} truncated", f"{data['tokens']:,} tokens"]
        parts += [f"{data['supervised']:,} supervised ({share:.1%})"]
        parts += [f"{data['rows']:,} rows, {data['fill']:.1%} full"]
    else:
        parts += [f"{data['tokens']:,} tokens"] if "tokens" in data else []
        parts += [f"{data['sequences']:,} sequences, {data['held_out']:,} more held out"]
    return ", ".join(parts)


def _lengths_text(lengths: Mapping[str, int]) -> str:
    """Percentiles, the last of which is that of the longest chat."""
    *parts, (_, longest) = lengths.items()
    upto = (f"{percent} have at most {length:,}" for percent, length in parts)
    return f"of the chats, in tokens: {', '.join(upto)}; the longest has {longest:,}"


def _epochs_text(data: Mapping[str, Any]) -> str:
    rows, batch, steps = data["sequences"], data["sequences_per_step"], data["steps_per_epoch"]
    this = f"this run: {plural(data['steps'], 'step')}, {data['epochs']:.3g} epochs"
    noun = "rows" if "records" in data else "sequences"
    return f"1 epoch = {plural(steps, 'step')} ({rows:,} {noun}, {batch:,} a step); {this}"


def _example_text(example: str, tokens: int) -> Text:
    """A chat, at most some lines of it, with its targets, which stand in brackets, in another colour."""
    shown = (
        example if len(example) <= _EXAMPLE else f"{example[:_EXAMPLE]} ... and {len(example) - _EXAMPLE:,} characters"
    )
    text = Text(f"a chat of {plural(tokens, 'token')}; the loss is on what stands in \u27e6\u27e7:\n  ")
    is_target = False
    for part in re.split("([\u27e6\u27e7])", shown.strip("\n").replace("\n", "\n  ")):
        is_target = part == "\u27e6" or (is_target and part != "\u27e7")
        text.append(part, "green" if is_target or part == "\u27e7" else "")
    return text


_EXAMPLE = 1_500  # characters that are shown of a chat


# Last lines of `print_result`, never broken.
_PATHS = ("checkpoint", "report", "run dir")


def _validation_text(result: Mapping[str, Any]) -> str | None:
    """The first loss is not known where a run has gone on with other text to validate."""
    first, last = result.get("val_loss_first"), result.get("val_loss")
    return None if last is None else f"{'' if first is None else f'{first:.4f} -> '}{last:.4f} nats per token"


# Lines of `print_result`: (name, required keys of result.json, `step0` or `validation`, their values -> text).
_RESULT_LINES: tuple[tuple[str, tuple[str, ...], Callable[..., str]], ...] = (
    ("model", ("num_rewritten", "world_size"), lambda n, world: f"{plural(n, 'MoE layer')} on {plural(world, 'rank')}"),
    ("step 0", ("step0",), str),
    ("loss", ("loss_first", "loss_last", "steps"), lambda a, b, n: f"{a:.4f} -> {b:.4f} in {plural(n, 'step')}"),
    ("validation", ("validation",), str),
    ("unigram entropy", ("unigram_entropy",), lambda nats: f"{nats:.4f} nats per token, what token counts alone reach"),
    (
        "balance",
        ("max_violation_last", "max_violation_bound_last"),
        lambda v, most: f"MaxVio {v:.3f} of at most {most:.3f} (fullest expert over the mean load, minus 1)",
    ),
    ("", ("max_violation_mean_last",), lambda v: f"MaxVio {v:.3f} mean over layers and the last tenth of steps"),
    ("drops", ("drop_rate_last",), lambda rate: f"{rate:.2%} of the assignments, beyond the experts' capacity"),
    ("speed", ("tokens_per_second",), lambda speed: f"{speed:,.0f} tokens/s"),
    ("forward bytes", ("bytes_per_token_per_layer",), traffic_text),
    ("predicted", ("bytes_per_token_per_layer_predicted",), traffic_text),
    ("optimizer bytes", ("optimizer_bytes_per_step",), partial(traffic_text, per="rank and step")),
    ("predicted", ("optimizer_bytes_per_step_predicted",), partial(traffic_text, per="rank and step")),
    ("lookups", ("lookup_bytes", "lookup_share"), lookups_text),
    ("predicted", ("lookup_bytes_predicted", "lookup_share_predicted"), lookups_text),
    ("checkpoint", ("checkpoint",), str),
    ("report", ("run_dir", "report"), lambda folder, name: f"{folder}/{name}"),
    ("run dir", ("run_dir",), str),
)


# -- its baseline ------------------------------------------------------------------------------------------------------


def print_baseline(result: Mapping[str, Any], console: Console) -> None:
    """Prints MoE and dense model side by side.

    Args:
        result: result.json of a run with a baseline.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in ("", "MoE", "dense"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in baseline_rows(result):
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)
    if (said := verdict(result)) is not None:
        console.print()
        console.print(Text(said))


# -- task=bench --------------------------------------------------------------------------------------------------------


def print_bench(result: Mapping[str, Any], console: Console) -> None:
    """Prints the layers compared with a dense FFN, then the optimizer step.

    Args:
        result: the content of bench.json.
    """
    unit = "GPU ms" if result["device"] == "cuda" else f"CPU ms, {plural(result['threads'], 'thread')}"
    console.print()
    console.print(
        Text(f"one layer on one rank, forward + backward of {result['layers'][0]['tokens']:,} tokens, {unit}:")
    )
    console.print(_layers_table(result["layers"], path_width(console)))
    if not all(row["has_router"] for row in result["layers"]):
        console.print(Text("the model's existing experts are timed without its own router", style="dim"))
    console.print(Text("kept: memory that forward saves for backward, without weights", style="dim"))
    console.print()
    console.print(_step_grid(result["step"]))
    if machine := result.get("machine"):
        console.print()
        console.print(
            _machine_grid(machine) if "hardware" in machine else Text(f"no hardware file: {machine['reason']}")
        )


def _layers_table(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = plain_table("layer", "experts", "dense", "MoE", "ratio", "kept", "MoE", "ratio")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        sites = row["sites"]
        path = fold_paths((site or "the model", None) for site in sites)[0][0]
        shared = f"\n+ shared {row['d_shared']}" if row["d_shared"] else ""
        experts = f"{row['num_experts']} x {row['d_expert']}\ntop-{row['top_k']}{shared}"
        numbers = (
            *(f"{_decisive(row[name]):.2f}" for name in ("dense", "moe")), f"{row['ratio']:.2f}",
            *(bytes_text(row[name]) for name in ("dense_kept", "moe_kept")), f"{row['kept_ratio']:.2f}",
        )  # fmt: skip
        cells = (Text(number, no_wrap=True) for number in numbers)
        table.add_row(path_text(path, len(sites), width), Text(experts), *cells)
    return table


def _decisive(times: Mapping[str, float | None]) -> float:
    """GPU time, or CPU time on a CPU."""
    decisive = times["cpu_ms"] if times["device_ms"] is None else times["device_ms"]
    assert decisive is not None
    return decisive


def _step_grid(step: Mapping[str, Any]) -> Table:
    grid = plain_grid()
    ranks = plural(step["world_size"], "rank")
    spent = [(name, step[name]) for name in ("exchanges", "experts", "rows")]
    rest = max(0.0, 1 - sum(share for _, share in spent))
    lines = (
        ("step", f"{step['wall_ms']:,.1f} ms for {step['tokens']:,} tokens on {ranks}"),
        ("", f"{step['cpu_ms']:,.1f} ms of CPU time per rank"),
        ("speed", f"{step['tokens_per_second']:,.0f} tokens/s"),
        ("memory", _memory_text(step)),
        ("of it", ", ".join(f"{name} {share:.0%}" for name, share in [*spent, ("the rest", rest)])),
    )
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _machine_grid(machine: Mapping[str, Any]) -> Table:
    """What of a step's time is the machine's, in CPU time of a rank."""
    host = machine["hardware"]["host"]
    fastest = {name: max(row["gflops"] for row in host[name]) for name in ("products", "grouped")}
    overheads = f"{host['node_us']['value']:.3g} us per operation, {host['optimizer_ns']['value']:.3g} ns per parameter"
    grid = plain_grid()
    lines = [
        (
            "machine",
            f"{plural(host['cores'], 'core')}, {fastest['products']:.0f} GFLOP/s, experts {fastest['grouped']:.0f}",
        ),
        (
            "",
            f"attention {host['attention_gflops']['value']:.0f} GFLOP/s, memory {host['pass_gb_s']['value']:.0f} GB/s",
        ),
        ("overhead", overheads),
    ]
    for row in host["messages"]:
        price = f"{row['fixed_us'] / 1e3:.2g} ms and {row['byte_ns']:.2g} ns per byte"
        lines.append(("exchange", f"{price} on {plural(int(row['ranks']), 'rank')}"))
    if machine["message_factor"] is None:
        lines.append(("predicted", f"{machine['predicted_cpu_ms']:,.1f} ms of CPU time for this step"))
    else:
        lines.append(("", f"{machine['message_factor']:.2g} times one alone, so that this step is met"))
    lines.append(("select it", f"hardware={machine['hardware']['name']} --config-dir FOLDER (this run's)"))
    for name, text in lines:
        grid.add_row(Text(name, style="dim"), Text(text))
    return grid


def _memory_text(step: Mapping[str, Any]) -> str:
    planned = step["planned_bytes"]
    text = f"{bytes_text(step['peak_bytes'])} of tensors on the fullest rank"
    return text if planned is None else f"{text}, planned {bytes_text(planned)}"
