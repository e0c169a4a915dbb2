"""Losses of a small MoE whose rows are in eight bits: `python benchmarks/narrow_rows.py --steps 1000 --seeds 0 1 2`.

One process, the model of benchmarks/moments.py as four ranks would run it with `dispatch=dedup`: rows and gradients are
rounded where ranks send them, to the values that ranks receive (tests/distributed/test_dispatch_kinds.py, and
`task=verify` in float64). Every format sees the same weights and batches for a seed. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from moments import trained
from torch import nn

from moecompile.models.build import example_inputs
from moecompile.pipeline import compile_model, make_plan
from moecompile.plan import on_one_process
from moecompile.schema import Config
from moecompile.verify.narrow_rows import round_rows, separate

FORMATS = ("auto", "fp8", "fp8_128")


def compiled(model: nn.Module, config: Config) -> nn.Module:
    """The model in one process, with the rows that ranks have."""
    example = example_inputs(model, config.data.seq_len)
    plan = make_plan(model, config, example=example)
    alone = separate(on_one_process(plan), plan)
    model = compile_model(model, config, example=example, plan=alone)
    round_rows(model, plan.layers)
    return model


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | validation loss: mean, range of seeds | over auto's, by seed | mean |")
    print("|---|---|---|---|")
    wanted: list[float] = []
    for name in FORMATS:
        settings = ["mesh=cpu_1x4", "dispatch=dedup", f"dispatch.wire_dtype={name}"]
        losses = [trained(settings, seed, options.steps, torch.float32, compiled)[0] for seed in options.seeds]
        wanted = wanted or losses
        apart = [loss - base for loss, base in zip(losses, wanted, strict=True)]
        spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        by_seed = ", ".join(f"{each:+.4f}" for each in apart)
        print(f"| {name} | {spread} | {by_seed} | {statistics.mean(apart):+.4f} |", flush=True)


if __name__ == "__main__":
    main()
