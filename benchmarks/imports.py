"""Imported configs beside the throughput that was published for them: docs/assets/imports.md.

    python benchmarks/imports.py

The settings are those of tests/imports/megatron.yaml, with what the published row says of its layout. Nothing is fitted
here; the rows of benchmarks/published/published.yaml are among the runs that docs/understand/foresight.md scores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moecompile.compose import compose_config  # noqa: E402
from moecompile.imports.composed import with_import  # noqa: E402
from moecompile.models.source import source_model  # noqa: E402
from moecompile.pipeline.shape import shape_of_model  # noqa: E402
from moecompile.planner.cost_model.forecast import forecast_plan  # noqa: E402
from moecompile.schema import with_workload  # noqa: E402
from moecompile.tasks.plan import planned  # noqa: E402
from tests.imports.published import of, write  # noqa: E402

PUBLISHED = ROOT / "benchmarks" / "published" / "published.yaml"
OUTPUT = ROOT / "docs" / "assets" / "imports.md"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A published figure. row: its id in published.yaml, or where else it stands. flags, names: what it changes."""

    config: str
    row: str
    flags: Mapping[str, str | None]
    names: Mapping[str, object]
    tflops: float | None = None


_AGAIN = {"recompute_granularity": "selective", "recompute_modules": "layernorm moe_act"}
_DEEPEP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
_OVERLAP = {"overlap_moe_expert_parallel_comm": "true"}
CASES = (
    Case(config="qwen3_235b_modelzoo", row="T201", flags=_AGAIN | _DEEPEP, names={"GBS": 2048}),
    Case(config="qwen3_235b_modelzoo", row="T202", flags=_AGAIN | _DEEPEP | _OVERLAP, names={"GBS": 2048}),
    Case(
        config="qwen3_235b_modelzoo", row="T204", flags=_AGAIN | {"moe_token_dispatcher_type": "alltoall"},
        names={"GBS": 2048, "PP": 32, "EP": 8, "LAYERS_PER_VP": 1},
    ),
    Case(config="qwen3_235b_modelzoo", row="T205", flags=_DEEPEP, names={"GBS": 2048, "TP": 4, "EP": 8}),
    Case(
        config="qwen3_235b_modelzoo", row="T207", flags=_DEEPEP | _AGAIN | {"recompute_modules": "layernorm moe"},
        names={"GBS": 256, "TP": 4, "EP": 8, "SEQ_LEN": 16384},
    ),
    Case(config="deepseek_v3_gb200", row="T002", flags={"global_batch_size": "4096"}, names={}),
    Case(
        config="mixtral_8x22b_modelzoo", row="a comment in best_practice/Mixtral/run_mixtral_8x22B.sh: dropless",
        flags={}, names={}, tflops=455,
    ),
)  # fmt: skip


def predicted(case: Case) -> tuple[float, str]:
    """Model TFLOP/s of a GPU, and the layout in words."""
    config = of(case.config)
    with TemporaryDirectory() as folder:
        path = write(config, Path(folder), **case.flags)
        names = {**config.get("set", {}), **case.names}
        names = {key: value for key, value in names.items() if key not in case.flags}
        words = [
            "task=import",
            "from=megatron",
            f"file={path}",
            *(f"set.{key}={value}" for key, value in names.items()),
        ]
        if "ranks" in config:
            nodes, ranks = config["ranks"].split("x")
            words += [f"mesh.num_nodes={nodes}", f"mesh.ranks_per_node={ranks}"]
        imported = with_import(compose_config(words), words)
    imported, _ = with_workload(imported)
    model = source_model(imported)
    plan = planned(model, imported, None).plan
    forecast = forecast_plan(shape_of_model(model, plan), plan, imported)
    workload, mesh = imported.workload, imported.mesh
    gpus = mesh.num_nodes * mesh.ranks_per_node
    layout = f"{gpus} {imported.hardware.name}, tp {workload.tp} pp {workload.pp} vpp {workload.vpp} ep {mesh.ep}"
    return forecast.tflops_per_rank, f"{layout}, {workload.seq_len:,} x {workload.global_batch_size:,}"


def main() -> None:
    """Prints the table, and writes it for the documentation."""
    rows = {row["id"]: row for row in yaml.safe_load(PUBLISHED.read_text())["throughput"]}
    lines = [
        "| imported | layout, tokens x sequences | published, TFLOP/s | predicted | off | published where |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found, layout = predicted(case)
        row = rows.get(case.row, {})
        published = case.tflops or row["tflops_gpu"]
        where = f"{case.row}: {row['source']}" if row else f"yanring/Megatron-MoE-ModelZoo, {case.row}"
        off = f"{100 * (found / published - 1):+.0f}%"
        lines.append(f"| `{case.config}` | {layout} | {published:g} | {found:.0f} | {off} | {where} |")
        print(lines[-1], flush=True)
    OUTPUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
