"""Published runs as inputs of the time model: model, layout, machine, software, and the measured tokens/s.

What a row does not say is assumed, the same for all rows, and counted in `Run.assumed`:

* `etp`: tp, for the methods without parallel folding of arXiv 2504.14960 (mcore, tp+ep+dp, fsdp+ep); else 1.
* `vpp`: one layer per virtual stage for `mcore` with pp > 1; else 1. `gbs` 1,024; `mbs` 1; `cp` 1.
* A row of Megatron-Bridge, or of its paper, without an open recipe: HybridEP and, on Blackwell, graphs of attention,
  router and preprocessing. Others: alltoall, no graphs.
* Rows with TFLOP/s alone are converted with this model's operations per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from forecast.families import shape_of
from moecompile.compose import compose_config
from moecompile.planner.cost_model.counts import Counts, count
from moecompile.planner.cost_model.inputs import Layout, Machine, Software, machine_of
from moecompile.planner.cost_model.seconds import step_seconds
from moecompile.planner.cost_model.shapes import Layer, ModelShape, training_flops

PUBLISHED = Path(__file__).parents[1] / "published"
DATA = ("published.yaml", "published_features.yaml", "models.yaml")
ALLTOALL_SHARE = 0.82  # conf/stack/nccl.yaml
GRAPHS = {"moe_router": "router", "moe_preprocess": "preprocess"}
RECOMPUTED = {"norm": "layernorm", "act": "moe_act"}
WITH_ETP = ("mcore", "tp+ep+dp", "fsdp+ep")
DOUBTED = 0.2  # weight of rows that their source footnotes


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run. tokens_s: measured, per GPU. real: whether a trained router chose. weight: in a fit."""

    id: str
    model: ModelShape
    system: str
    layout: Layout
    machine: Machine
    software: Software
    counts: Counts
    tokens_s: float
    real: bool
    weight: float
    assumed: tuple[str, ...]

    @property
    def group(self) -> str:
        """Rows of one group are on one side of a split."""
        return f"{self.model.name}|{self.system}"

    @property
    def config(self) -> tuple[object, ...]:
        """What is equal in runs that differ in their release alone."""
        return self.model.name, self.system, self.layout, self.software, self.real


def tokens_s(run: Run, constants: Mapping[str, float]) -> float:
    """Predicted tokens/s per GPU."""
    layout = run.layout
    return layout.global_batch * layout.seq / layout.gpus / sum(parts(run, constants).values())


def parts(run: Run, constants: Mapping[str, float]) -> dict[str, float]:
    """The predicted addends of a step, seconds."""
    load = constants["load"] if run.real else 1.0
    return step_seconds(run.counts, run.machine, run.software, constants, run.layout.gpus, load)


@cache
def machine(system: str) -> Machine:
    """A machine of conf/hardware."""
    return machine_of(compose_config([f"hardware={system.lower()}"]).hardware)


@cache
def models() -> dict[str, ModelShape]:
    """All described models."""
    published, ours = (read(name) for name in ("published.yaml", "models.yaml"))
    configs = {
        entry["name"]: {**entry["config"], **ours["changes"].get(entry["name"], {})} for entry in published["models"]
    }
    return {name: shape_of(name, config) for name, config in {**configs, **ours["more"]}.items()}


def read(name: str, folder: Path = PUBLISHED) -> Any:
    """A file of benchmarks/published."""
    return yaml.safe_load((folder / name).read_text(encoding="utf-8"))


def read_runs(
    rows: Path = PUBLISHED / "published.yaml", features: Path = PUBLISHED / "published_features.yaml"
) -> tuple[list[Run], dict[str, str]]:
    """The runs of a file, and id -> reason of those that cannot be described."""
    settings = {row["id"]: row for row in yaml.safe_load(features.read_text(encoding="utf-8"))["rows"]}
    runs, left_out = [], {}
    for row in yaml.safe_load(rows.read_text(encoding="utf-8"))["throughput"]:
        if reason := _undescribed(row):
            left_out[row["id"]] = reason
        else:
            runs.append(_run(row, settings.get(row["id"])))
    return runs, left_out


def _undescribed(row: Mapping[str, Any]) -> str | None:
    if row["model"] not in models():
        return f"the architecture of {row['model']} is not described"
    if not all(row.get(key) for key in ("seq", "ep", "tp", "pp")):
        return "the source does not give the layout"
    return None


def _run(row: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> Run:
    model, box = models()[row["model"]], machine(row["system"])
    if row.get("variant") == "w/o MTP":
        model = replace(model, layers=tuple(model.main_layers()))
    if share := row.get("recompute_share"):
        model = replace(model, layers=tuple(part for layer in model.layers for part in _repeated(layer, share)))
    layout, assumed = layout_of(row, model)
    software, more = _software(row, recipe)
    measured = row.get("tokens_s_gpu") or row["tflops_gpu"] * 1e12 / training_flops(model, row["seq"])
    return Run(
        id=row["id"], model=model, system=row["system"], layout=layout, machine=box, software=software,
        counts=count(model, layout, box, software), tokens_s=float(measured), real="real" in row["routing"],
        weight=DOUBTED if "low weight" in row.get("note", "") else 1.0, assumed=(*assumed, *more),
    )  # fmt: skip


def _repeated(layer: Layer, share: float) -> Iterator[Layer]:
    """Equal layers, of which backward computes a share again."""
    again = round(layer.count * share)
    for number, what in ((again, ("full",)), (layer.count - again, ())):
        if number:
            yield replace(layer, count=number, recompute=what)


def layout_of(row: Mapping[str, Any], model: ModelShape) -> tuple[Layout, list[str]]:
    """The layout of a row, and what was assumed."""
    method, assumed = row.get("method") or "", []

    def known(key: str, otherwise: int) -> int:
        if not row.get(key):
            assumed.append(f"{key} {otherwise}")
        return row.get(key) or otherwise

    staged = method.startswith("mcore") and row["pp"] > 1 and model.num_layers % row["pp"] == 0
    return Layout(
        gpus=row["gpus"], seq=row["seq"], global_batch=known("gbs", 1024), micro_batch=known("mbs", 1), ep=row["ep"],
        tp=row["tp"], pp=row["pp"], vpp=known("vpp", model.num_layers // row["pp"] if staged else 1),
        cp=known("cp", 1), etp=known("etp", row["tp"] if method in WITH_ETP else 1),
        zero=3 if row.get("fsdp") or method.startswith("fsdp") else 1,
    ), assumed  # fmt: skip


def _software(row: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> tuple[Software, list[str]]:
    precision = str(row["precision"])
    bits = 4 if "FP4" in precision else 8 if "8" in precision else 16
    if recipe is not None:
        whole = recipe["cuda_graph"] == "full_iteration"
        graph = ("all",) if whole else tuple(GRAPHS.get(part, part) for part in recipe["graph_scope"])
        dispatcher, overlap = recipe["dispatcher"], recipe["ep_overlap"]
        made = _make(bits, dispatcher, overlap, graph, recipe["fused_grouped_mlp"], tuple(recipe["recompute"]))
        return replace(made, grad_bits=recipe.get("grad_bits", made.grad_bits)), []
    stated = row.get("recompute") or ""
    again = [RECOMPUTED.get(part.strip(), part.strip()) for part in stated.split(",")]
    recompute = tuple(part for part in again if part and part != "none stated")
    if any(name in row["stack"] for name in ("megatron-bridge", "megatron-core 0.16")):
        graph = () if row["system"].startswith("H") else ("attn", "mamba", "router", "preprocess")
        return _make(bits, "hybridep", False, graph, False, recompute), ["dispatcher", "graphs"]
    dispatcher = (row.get("dispatcher") or "alltoall").split(" ")[0]
    overlap = "overlap" in (row.get("dispatcher") or "")
    return _make(bits, dispatcher, overlap, (), False, recompute), [] if row.get("dispatcher") else ["dispatcher"]


def _make(
    bits: int, dispatcher: str, overlap: bool, graph: Sequence[str], fused: bool, recompute: tuple[str, ...]
) -> Software:
    return Software(
        bits=bits, dispatcher=dispatcher, overlap=overlap, graph=tuple(graph), fused=fused, recompute=recompute,
        wire_share=ALLTOALL_SHARE if dispatcher == "alltoall" else 1.0,
    )  # fmt: skip
