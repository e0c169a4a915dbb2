"""What is printed: complete, folded, and inside 80 columns where the output is not a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable

from rich.console import Console

from moecompile.passes.run import PassRecord
from moecompile.report.console import print_data, print_passes, print_result, print_sites

COLUMNS = 80


def printed(show: Callable[[Console], None]) -> str:
    out = io.StringIO()
    show(Console(file=out, width=COLUMNS))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= COLUMNS
    assert "\x1b" not in text
    return text


def words(text: str) -> str:
    return " ".join(text.split())


def test_passes_are_numbered_and_exchanges_come_first() -> None:
    records = [
        PassRecord(
            name="capture", nodes_before=0, nodes_after=12, added={"silu": 1}, detail="40 functions", seconds=0.3
        ),
        PassRecord(
            name="lower", nodes_before=12, nodes_after=19,
            added={"regroup": 1, "getitem": 4, "all_to_all": 2, "exchange_counts": 1}, detail="logical axes",
        ),
    ]  # fmt: skip
    first, *second = printed(lambda console: print_passes(records, console)).strip().splitlines()
    assert first.split() == ["1", "capture", "0.30", "s", "12", "nodes", "40", "functions"]
    lowered = words(" ".join(second))
    assert lowered.startswith("2 lower 0.00 s 12 -> 19 nodes +2 all_to_all, +1 exchange_counts, +1 regroup")
    assert "getitem" not in lowered


def test_sites_fold_and_keep_their_reasons() -> None:
    sites = [
        {"fqn": f"h.{i}.mlp", "kind": "gated", "where": f"h.{i}.mlp", "status": "rewritten", "reason": ""}
        for i in range(4)
    ] + [
        {"fqn": f"h.{i}.adapter", "kind": "-", "where": f"h.{i}.adapter", "status": "not_matched",
         "reason": f"the value of silu_{i} is also used elsewhere"}
        for i in range(4)
    ] + [{"fqn": "", "kind": "up_down", "where": "the model", "status": "left", "reason": "not selected"}]  # fmt: skip
    text = words(printed(lambda console: print_sites(sites, console)))
    assert "h.{0..3}.mlp gated rewritten 4 sites" in text
    assert "h.{0..3}.adapter - not matched the value of silu_0 is also used" in text
    assert "the model up_down left not selected" in text


RESULT = {
    "task": "train", "recipe": "deepseek_ep", "status": "ok", "seconds": 41.23, "world_size": 4, "num_rewritten": 3,
    "steps": 200, "loss_first": 7.62431, "loss_last": 4.12344, "val_loss": 4.5, "unigram_entropy": 5.77,
    "tokens_per_second": 8123.4, "step0_max_abs_diff": 3.1e-6, "step0_reason": None, "max_violation_last": 0.43,
    "max_violation_bound_last": 7.0, "val_loss_first": 7.75, "warnings": ["so", "so"],
    "max_violation_mean_last": 0.2112, "drop_rate_last": 0.0312,
    "bytes_per_token_per_layer": {"intra_node": 1034.2, "inter_node": 2345.1},
    "bytes_per_token_per_layer_predicted": {"intra_node": 1030.0, "inter_node": 2340.0},
    "checkpoint": None, "run_dir": "runs/deepseek_ep/x",
}  # fmt: skip


def test_the_closing_summary_has_every_figure() -> None:
    text = words(printed(lambda console: print_result(RESULT, console)))
    for shown in (
        "deepseek_ep ok, 2 warnings 41.2 s", "3 MoE layers on 4 ranks", "within 3.1e-06", "7.6243 -> 4.1234 in 200 steps",
        "validation 7.7500 -> 4.5000", "unigram entropy 5.7700", "MaxVio 0.430 of at most 7.000", "MaxVio 0.211 mean over layers", "drops 3.12%", "8,123 tokens/s",
        "forward bytes 1.01 KiB intra-node, 2.29 KiB inter-node", "predicted 1.01 KiB", "run dir runs/deepseek_ep/x",
    ):  # fmt: skip
        assert shown in text
    assert "checkpoint" not in text
    text = words(printed(lambda console: print_result({**RESULT, "val_loss_first": None}, console)))
    assert "validation 4.5000 nats per token unigram entropy" in text


def test_what_was_not_measured_is_left_out() -> None:
    result = {"recipe": "x", "status": "ok", "seconds": 1, "step0_max_abs_diff": None, "step0_reason": "random experts"}
    text = words(printed(lambda console: print_result(result, console)))
    assert text == "x ok 1.0 s step 0 need not equal the model before: random experts"
    result["step0_reason"] = "not compared: no rank holds the whole model"
    text = words(printed(lambda console: print_result(result, console)))
    assert text == "x ok 1.0 s step 0 not compared: no rank holds the whole model"


def test_the_data_are_shown_with_a_chat_and_what_is_wrong() -> None:
    counts = {
        "files": 1, "skipped": 2, "records": 300, "left_out": 4, "truncated": 5, "tokens": 6000, "supervised": 1500,
        "rows": 40, "fill": 0.974, "lengths": {"5%": 7, "50%": 20, "95%": 1050, "100%": 2000}, "sequences": 38,
        "held_out": 2, "sequences_per_step": 16, "steps_per_epoch": 3, "steps": 7, "epochs": 7 * 16 / 38,
        "warnings": ["5 of 300"], "example": "<user>\nHi [b]<end>\n\u27e6Ho<end>\u27e7" + "x" * 2000, "example_tokens": 21,
    }  # fmt: skip
    result = {f"data_{name}": value for name, value in counts.items()}
    out = io.StringIO()
    print_data(result, Console(file=out, width=COLUMNS))
    text = out.getvalue()
    assert words(text).startswith(
        "data 1 file (2 of other kinds not read), 300 records, 4 left out (no target), 5 truncated, 6,000 tokens, 1,500 "
        "supervised (25.0%), 40 rows, 97.4% full lengths of the chats, in tokens: 5% have at most 7, 50% have at most 20, "
        "95% have at most 1,050; the longest has 2,000 epochs 1 epoch = 3 steps (38 rows, 16 a step); this run: 7 steps, "
        "2.95 epochs a chat of 21 tokens; the loss is on what stands in \u27e6\u27e7: <user> Hi [b]<end> \u27e6Ho<end>\u27e7"
    )
    assert text.endswith("x ... and 528 characters\n\nwarning  5 of 300\n")
    plain = {f"data_{name}": counts[name] for name in ("tokens", "sequences", "held_out", "sequences_per_step",
             "steps_per_epoch", "steps", "epochs")}  # fmt: skip
    text = words(printed(lambda console: print_data({**plain, "data_warnings": []}, console)))
    assert text.startswith(
        "data 6,000 tokens, 38 sequences, 2 more held out epochs 1 epoch = 3 steps (38 sequences, 16"
    )


def test_paths_are_printed_as_they_are() -> None:
    """Brackets are markup to rich. A long path is not broken: it will be copied."""
    path = f"runs/[bold]/{'x' * 200}"
    out = io.StringIO()
    print_result({"recipe": "x", "status": "ok", "seconds": 1, "run_dir": path}, Console(file=out, width=COLUMNS))
    assert path in out.getvalue()


def test_torch_is_not_imported() -> None:
    code = "import sys, moecompile.report.console, moecompile.report.plan_tables; assert not {'torch', 'hydra', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
