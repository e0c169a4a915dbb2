"""Losses of a small MoE with rows in eight bits: `python benchmarks/narrow_rows.py --steps 1000 --seeds 0 1 2 3 4 5`.

One process, the model of benchmarks/moments.py as four ranks would run it with `dispatch=dedup`: rows and gradients are
rounded where ranks send them, to the values that ranks receive (tests/distributed/test_dispatch_kinds.py, and
`task=verify` in float64). Every format sees the same weights and batches for a seed. `rounding` is `auto` from weights
that differ by 1e-7 of their size: how far two runs part that should be the same. Prints a table in Markdown, with
Student's interval of 95% of the paired differences.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from moments import trained
from scipy import stats
from torch import nn

from moecompile.models.build import example_inputs
from moecompile.pipeline import compile_model, make_plan
from moecompile.plan import on_one_process
from moecompile.schema import Config
from moecompile.verify.narrow_rows import round_rows, separate

FORMATS = ("auto", "rounding", "fp8", "fp8_128")


def compiled(model: nn.Module, config: Config) -> nn.Module:
    """The model in one process, with the rows that ranks have."""
    example = example_inputs(model, config.data.seq_len)
    plan = make_plan(model, config, example=example)
    alone = separate(on_one_process(plan), plan)
    model = compile_model(model, config, example=example, plan=alone)
    round_rows(model, plan.layers)
    return model


def parted(model: nn.Module, config: Config) -> nn.Module:
    """The model with other last digits."""
    model = compiled(model, config)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + 1e-7 * torch.randn(weight.shape, generator=generator)
    return model


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| rows | validation loss: mean, range of seeds | over auto's, by seed | mean, 95% |")
    print("|---|---|---|---|")
    wanted: list[float] = []
    for name in FORMATS:
        make, wire = (parted, "auto") if name == "rounding" else (compiled, name)
        settings = ["mesh=cpu_1x4", "dispatch=dedup", f"dispatch.wire_dtype={wire}"]
        losses = [trained(settings, seed, options.steps, torch.float32, make)[0] for seed in options.seeds]
        wanted = wanted or losses
        apart = [loss - base for loss, base in zip(losses, wanted, strict=True)]
        spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        by_seed = ", ".join(f"{each:+.4f}" for each in apart)
        print(f"| {name} | {spread} | {by_seed} | {interval(apart)} |", flush=True)


def interval(apart: list[float]) -> str:
    """Mean and 95% interval; without one for a single seed, or the format that others are compared with."""
    mean, number = statistics.mean(apart), len(apart)
    if number == 1 or not any(apart):
        return f"{mean:+.4f}"
    half = float(stats.t.ppf(0.975, number - 1)) * statistics.stdev(apart) / math.sqrt(number)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


if __name__ == "__main__":
    main()
