"""Errors of predictions: by split, leaving out a system or a model, of pairs of layouts, without parts of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations

import numpy as np

from forecast.families import shape_of
from forecast.fit import fit
from forecast.kernels import kernel_shares
from forecast.runs import ALLTOALL_SHARE, Run, machine, models, read, tokens_s
from moecompile.planner.cost_model.constants import CONSTANTS, PRIORS
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.inputs import Layout, Software
from moecompile.planner.cost_model.seconds import step_seconds, sustained
from moecompile.planner.cost_model.shapes import training_flops

FOLDS, HELD = 3, 2  # groups in alphabetical order go to the folds in turn; the model was made without looking at fold 2
APART = 0.05
KERNEL_WEIGHT = 4.0  # of a class of kernels, in runs


def calibrate(runs: Sequence[Run], free: Sequence[str] | None = None) -> dict[str, float]:
    """The constants, fitted to `runs` and to the kernels that were measured one by one."""
    box, shares = machine("b200"), kernel_shares()

    def predicted(constants: Mapping[str, float]) -> list[float]:
        kernels = [constants[name] * sustained(box, constants) for name in shares]
        return [tokens_s(run, constants) for run in runs] + kernels

    measured = [run.tokens_s for run in runs] + list(shares.values())
    return fit(predicted, measured, [run.weight for run in runs] + [KERNEL_WEIGHT] * len(shares), free)


def errors(runs: Sequence[Run], constants: Mapping[str, float]) -> list[float]:
    """|predicted / measured - 1| of tokens/s, percent."""
    return [100 * abs(tokens_s(run, constants) / run.tokens_s - 1) for run in runs]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 90th percentile, worst and number."""
    median, high = np.percentile(values, [50, 90])
    return {
        "median": round(float(median), 1),
        "p90": round(float(high), 1),
        "worst": round(max(values), 1),
        "runs": len(values),
    }


def fold(run: Run, groups: Sequence[str]) -> int:
    """The fold of a run's group."""
    return groups.index(run.group) % FOLDS


def splits(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Errors on fold 2 of constants that were fitted to the others, and of each fold in turn."""
    groups = sorted({run.group for run in runs})
    by_fold = [out_of(runs, lambda run, k=k: fold(run, groups) == k) for k in range(FOLDS)]
    seen = [run for run in runs if fold(run, groups) != HELD]
    return {
        "fitted to": summary(errors(seen, calibrate(seen))),
        "held out": summary(by_fold[HELD]),
        "each fold in turn": summary([*chain(*by_fold)]),
        "priors alone": summary(errors(runs, PRIORS)),
    }


def out_of(runs: Sequence[Run], left: Callable[[Run], bool]) -> list[float]:
    """Errors of the runs that are left out of the fit."""
    return errors([run for run in runs if left(run)], calibrate([run for run in runs if not left(run)]))


def leave_out(runs: Sequence[Run], key: Callable[[Run], str]) -> dict[str, dict[str, float]]:
    """Errors on each system, or model, of constants that were fitted to all others."""
    found = {name: out_of(runs, lambda run, name=name: key(run) == name) for name in sorted({key(run) for run in runs})}
    return {**{name: summary(values) for name, values in found.items()}, "all": summary([*chain(*found.values())])}


def one_vote(runs: Sequence[Run], constants: Mapping[str, float]) -> dict[str, float]:
    """Errors where runs that differ in their release alone have one vote: the median of theirs."""
    votes: dict[tuple[object, ...], list[float]] = {}
    for run, error in zip(runs, errors(runs, constants), strict=True):
        votes.setdefault(run.config, []).append(error)
    return summary([float(np.median(values)) for values in votes.values()])


def pairs(runs: Sequence[Run], constants: Mapping[str, float], *, layouts: bool) -> dict[str, float]:
    """Pairs of runs of one model, system, GPUs and sequence, more than 5% apart, ordered right; `layouts`: of those
    that differ in their layout, else also of those that differ in software alone."""
    right = total = 0
    for a, b in combinations(runs, 2):
        same = (a.group, a.layout.gpus, a.layout.seq) == (b.group, b.layout.gpus, b.layout.seq)
        differ = a.layout != b.layout if layouts else a.config != b.config
        if same and differ and abs(np.log(a.tokens_s / b.tokens_s)) > np.log1p(APART):
            total += 1
            right += (tokens_s(a, constants) > tokens_s(b, constants)) == (a.tokens_s > b.tokens_s)
    return {"pairs": total, "right": right, "percent": round(100 * right / total, 1)}


def ablation(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Errors in each fold in turn with one constant held at its prior, and without what is known of software."""
    groups = sorted({run.group for run in runs})

    def turns(chosen: Sequence[Run], free: Sequence[str] | None) -> dict[str, float]:
        found: list[float] = []
        for k in range(FOLDS):
            constants = calibrate([run for run in chosen if fold(run, groups) != k], free)
            found += errors([run for run in chosen if fold(run, groups) == k], constants)
        return summary(found)

    names = [constant.name for constant in CONSTANTS]
    result = {"everything": turns(runs, None)}
    for name in names:
        result[f"{name} held at its prior"] = turns(runs, [other for other in names if other != name])
    result["nothing fitted"] = summary(errors(runs, PRIORS))
    blind = [_without_features(run) for run in runs]
    result["dispatcher, overlap, graphs, fusion and recomputation unknown"] = turns(blind, None)
    return result


def _without_features(run: Run) -> Run:
    software = Software(bits=run.software.bits, dispatcher="alltoall", wire_share=ALLTOALL_SHARE)
    return replace(run, software=software, counts=count(run.model, run.layout, run.machine, software))


def deepseek_v3(constants: Mapping[str, float]) -> dict[str, float]:
    """A step of DeepSeek-V3 on 2,048 H800, with DualPipe and 20 of 132 SMs for exchanges."""
    facts, model, box = read("published.yaml")["deepseek_v3_facts"], models()["deepseek-v3"], machine("h800")
    layout = Layout(
        gpus=facts["gpus"], seq=facts["seq_len"], global_batch=facts["tokens_per_batch"] // facts["seq_len"],
        ep=facts["ep"], pp=facts["pp"],
    )  # fmt: skip
    software = Software(
        bits=8, dispatcher="deepep", overlap=True, schedule="dualpipe", row_bits=8, moment_bits=16,
        comm_units=facts["comm_sms"], recompute=("mla_up_proj", "layernorm", "moe_act"),
    )  # fmt: skip
    seconds = sum(step_seconds(count(model, layout, box, software), box, software, constants, layout.gpus).values())
    published = facts["derived"]["step_s_at_full_batch"]
    return {
        "published_s": published,
        "predicted_s": round(seconds, 2),
        "percent": round(100 * (seconds / published - 1), 1),
    }


def simumax(constants: Mapping[str, float]) -> list[dict[str, object]]:
    """Steps of SimuMax's rows, which nothing was fitted to."""
    data, configs = read("simumax.yaml"), {entry["name"]: entry["config"] for entry in read("published.yaml")["models"]}
    box, rows = machine(data["system"]), []
    software = Software(dispatcher="alltoall", wire_share=ALLTOALL_SHARE)
    for row in data["rows"]:
        config = {**configs[row["model"]], "layers": data["layers"], "dense_layers": data["dense_layers"], "mtp": 0}
        layout = Layout(
            gpus=8, seq=4096, global_batch=row["micro_batches"] * 8 // row["pp"], ep=row["ep"], pp=row["pp"]
        )
        counts = count(shape_of(row["model"], config), layout, box, software)
        ms = 1e3 * sum(step_seconds(counts, box, software, constants, layout.gpus).values())
        rows.append({**row, "predicted_ms": round(ms, 1), "percent": round(100 * (ms / row["ms"] - 1), 1)})
    return rows


def counted() -> list[dict[str, object]]:
    """Parameters and operations per token beside published ones."""
    published, rows = read("published.yaml"), []
    for entry in published["models"]:
        ours = models()[entry["name"]].params_total() / 1e9
        theirs = entry["counted_total_b"]
        rows.append(
            {
                "what": f"{entry['name']}, parameters, 1e9",
                "published": theirs,
                "ours": round(ours, 3),
                "percent": round(100 * (ours / theirs - 1), 3),
            }
        )
    for entry in published["flops_per_token"]["rows"]:
        if "older" in entry.get("variant", "") or entry["model"] == "gpt-oss-20b":
            continue  # counts of releases that ignored windows in another way
        named = ", ".join(
            [entry["model"], f"{entry['seq']:,} tokens", *([entry["variant"]] if "variant" in entry else [])]
        )
        mtp = entry.get("variant") != "without MTP"
        ours = training_flops(models()[entry["model"]], entry["seq"], mtp=mtp) / 1e9
        rows.append(
            {
                "what": f"{named}, 1e9 operations per token",
                "published": entry["gflop"],
                "ours": round(ours, 1),
                "percent": round(100 * (ours / entry["gflop"] - 1), 2),
            }
        )
    return rows
