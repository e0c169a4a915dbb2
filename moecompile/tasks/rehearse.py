"""task=rehearse: the step of one rank of any mesh, run without values and compared with the plan; needs no GPU.

Algorithm:
  1. Make the plan, as task=plan does, or take the given one.
  2. Rehearse the ranks, each in a process of its own (moecompile.runtime.rehearsal): those that are named, and all of
     the pipeline of the first one.
  3. Compare what the first one, or each of its pipeline, holds and sends with the plan (planner/memory.py,
     planner/step.py).
  4. Compare the collectives of ranks with the same layers, one by one.
  5. Run what the ranks of the pipeline send, receive and wait for against each other (moecompile.runtime.messages).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moecompile import plan as plans
from moecompile import waiting
from moecompile.errors import ConfigError, MoecompileError, RehearsalDiffers
from moecompile.mesh import MeshSpec, Part, dense_axes
from moecompile.models.build import example_inputs
from moecompile.named_code import VARIABLE, for_ranks, named_in
from moecompile.pipeline.captured import planning_facts
from moecompile.plan import EXCHANGES, LOOKUP_OPS, Plan
from moecompile.planner.build_plan import GIB, run_facts
from moecompile.planner.cost_model.forecast import loads_of
from moecompile.planner.given import FILE, given_plan
from moecompile.planner.memory import memory_of_fullest_rank
from moecompile.planner.params import RunFacts, checkpointing_of
from moecompile.planner.pipeline import OfRank, ranks_of
from moecompile.planner.step import (
    BACK,
    BACK_IN,
    COUNTS,
    FEW,
    FORTH,
    FORTH_IN,
    GATHERED,
    REDUCED,
    ROWS,
    SUMMED,
    TABLE_ROWS,
    Planned,
    rehearsed_run,
    step_of_rank,
)
from moecompile.report.rehearsal import Row, conclusion, print_rehearsal
from moecompile.report.result import write_result
from moecompile.rundir import accept, output_dir
from moecompile.runtime.messages import MESSAGES, SEND, disagreements
from moecompile.runtime.objective import is_encoder_decoder
from moecompile.runtime.rehearsal import STEP
from moecompile.schema import Compiled, Config, DataKind, with_workload
from moecompile.tasks.plan import as_planned, plan_fields, planned, require_layers
from moecompile.tasks.ranks.rehearse import FOLDER, micro_batches, result_of, structure_of

MEMORY = 0.15
"""By how much of the plan's total memory the peak, or a part of it, may differ."""
_NAMED = 3  # ranks, in the line before they are rehearsed
KINDS = {
    **{f"{op}{end}": ROWS for op in EXCHANGES for end in ("", "_start")},
    **{op: COUNTS for op, row in EXCHANGES.items() if row.sends == "counts"},
    **dict.fromkeys((*LOOKUP_OPS, "send_row_gradients"), TABLE_ROWS),
    "send forward": FORTH, "recv forward": FORTH_IN, "send backward": BACK, "recv backward": BACK_IN,
    "gradient_start": ROWS, "allgather_base": GATHERED, "reduce_scatter_base": REDUCED, "allreduce": SUMMED,
}  # fmt: skip


def run(config: Config, run_dir: Path) -> None:
    """Prints what was seen beside the plan and writes `plan.yaml`, `result.json` and what each rank has seen.

    Raises:
        ConfigError: something of the config cannot be rehearsed.
        RehearsalDiffers: the program holds or sends something else than the plan says.
    """
    config, notes = with_workload(config)
    model = structure_of(config)
    of_config = planned(model, config, given_plan(config))  # Step 1
    plan = of_config.plan
    require_layers(plan, config)
    _check(config, plan, model)
    ranks = _ranks(config, plan)
    _, facts = planning_facts(model, config, example_inputs(model, config.data.seq_len), plan)
    facts = as_planned(facts, plan)
    number = micro_batches(config, plan)
    load = next(each.p50 for each in loads_of(plan, config, plan.mesh.ep) if each.name == config.rehearse.load.value)
    facts_of_run = rehearsed_run(
        run_facts(config, plan.mesh, facts), plan, checkpointing_of(config, plan), number, load
    )
    plans.save(plan, output_dir(run_dir) / FILE)
    seen = _rehearse(config, run_dir, ranks, load)  # Step 2
    compared = [_compared(each, of, plan, facts_of_run) for each, of in zip(seen, ranks_of(plan, facts), strict=False)]
    shown = max(compared, key=lambda each: each.memory[-1].seen)  # Step 3
    differs = [text for each in compared for text in each.differs]
    differs += first_differences(seen, plan)  # Step 4
    together = seen[: plan.mesh.size(Part.LAYERS)]
    differs += disagreements({each["rank"]: each["seen"] for each in together})  # Step 5
    accept(run_dir)
    room = config.hardware.memory_gib * GIB
    fields = {
        "ranks": ranks,
        "load": config.rehearse.load.value,
        "rows_over_mean": load,
        "micro_batches": number,
        **shown.fields(room),
        "pipeline": [each.fields(room) for each in compared] if plan.pipeline is not None else [],
        "messages": sum(each["op"] == SEND for of in together for each in of["seen"]["sent"]),
        "differs": differs,
        "notes": [*of_config.notes, *notes, *_notes(config, number)],
    }
    result = write_result(run_dir, "rehearse", config.name, {**plan_fields(plan), **fields})
    print_rehearsal(result, plan, Console())
    print(conclusion(differs, result["messages"]), flush=True)
    if differs:
        raise RehearsalDiffers("; ".join(differs))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a rank has seen, beside the plan. stages: that it has; () without a pipeline."""

    stages: tuple[int, ...]
    seen: Mapping[str, Any]
    memory: list[Row]
    sent: list[Row]

    @property
    def differs(self) -> list[str]:
        """What differs from the plan."""
        where = f"rank {self.seen['rank']}: " if self.stages else ""
        return [f"{where}{row.text}" for row in (*self.memory, *self.sent) if row.differs]

    def fields(self, room: float) -> dict[str, Any]:
        """Of result.json."""
        peak = self.memory[-1].seen
        return {
            "rank": self.seen["rank"],
            "stages": self.stages,
            "memory_peak_bytes": peak,
            "memory_fits": peak <= room,
            "moments": self.seen["seen"]["moments"],
            "memory": [dataclasses.asdict(row) for row in self.memory],
            "collectives": [dataclasses.asdict(row) for row in self.sent],
        }


def _compared(seen: Mapping[str, Any], of: OfRank, plan: Plan, run: RunFacts) -> Compared:
    sent = collective_rows(seen["seen"]["sent"], step_of_rank(plan, of, run), of.mesh)
    memory = memory_rows(seen, of, of.run(run, plan.pipeline))
    stages = () if plan.pipeline is None else plan.pipeline.stages_of(of.index)
    return Compared(stages=stages, seen=seen, memory=[*memory], sent=[*sent])


def _check(config: Config, plan: Plan, model: nn.Module) -> None:
    """Refuses what is not covered.

    Raises:
        ConfigError: the first of it.
    """
    for path, value, why, fix in _refused(config, plan, model):
        raise ConfigError(path, value, f"cannot be rehearsed: {why}", f"Use {fix} for task=rehearse")


def _refused(config: Config, plan: Plan, model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """(key, value, why, what can be rehearsed)"""
    if config.trainer.compile is Compiled.regions:
        yield "trainer.compile", "regions", "a compiler makes other tensors than the program", "none"
    if is_encoder_decoder(model):
        yield "model", config.model.name, "the data decide how long its decoder's sequences are", "a model without one"
    for layer in plan.layers:
        if layer.dispatch.lends:
            yield "dispatch.balance", "lend", "values decide which experts are lent", "none"
        if layer.dispatch.backend:
            yield (
                "dispatch.backend",
                layer.dispatch.backend,
                "a back end needs values",
                "null: the kind says what it sends",
            )
        if layer.experts.backend:
            yield "experts.backend", layer.experts.backend, "a back end needs values", "null"


def _notes(config: Config, number: int) -> Iterator[str]:
    yield f"rehearsed with {number} micro-batch{'es' * (number != 1)} a step"
    if config.data.kind is DataKind.sft:
        yield "rows of chats are rehearsed full: without padding, as one sequence each"


def _ranks(config: Config, plan: Plan) -> list[int]:
    """Those of the pipeline of the first one, in the order of its stages, then the others."""
    world = plan.mesh.world_size
    ranks = config.rehearse.ranks or [0, world - 1]
    if wrong := [rank for rank in ranks if not 0 <= rank < world]:
        raise ConfigError("rehearse.ranks", wrong, f"the mesh has ranks 0 to {world - 1}", "Give some of these")
    return list(dict.fromkeys((*plan.mesh.group(Part.LAYERS, rank=ranks[0]), *ranks)))


# -- Step 2: the ranks ------------------------------------------------------------------------------------------------


def _rehearse(config: Config, run_dir: Path, ranks: Sequence[int], load: float) -> list[dict[str, Any]]:
    """What each rank has seen.

    Raises:
        MoecompileError: a rank refused or failed.
    """
    shutil.rmtree(output_dir(run_dir) / FOLDER, ignore_errors=True)
    (output_dir(run_dir) / FOLDER).mkdir()
    environment = {
        **os.environ,
        VARIABLE: for_ranks(named_in(config)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    names, world = " and ".join(map(str, ranks)), config.mesh.num_nodes * config.mesh.ranks_per_node
    if len(ranks) > _NAMED:
        names = f"{ranks[0]} and {len(ranks) - 1} others"
    waiting.show(f"{config.name}: rehearsing rank {names} of {world:,}")
    command = [sys.executable, "-m", "moecompile.tasks.ranks.rehearse", str(run_dir), str(load), *map(str, ranks)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate()
    finally:
        process.terminate()  # it ends its ranks
        process.wait()
        waiting.done()
    files = [result_of(run_dir, rank) for rank in ranks]
    seen = [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {} for file in files]
    for rank, each in zip(ranks, seen, strict=True):
        if "error" in each:
            raise MoecompileError(f"rank {rank}: {each['error']}")
        if "failure" in each:
            raise MoecompileError(_failure(rank, each["failure"], debug=config.debug))
    if lost := [rank for rank, each in zip(ranks, seen, strict=True) if not each]:
        raise MoecompileError(_failure(lost[0], errors, debug=config.debug))
    return seen


def _failure(rank: int, errors: str, *, debug: bool) -> str:
    lines = [line for line in errors.strip().splitlines() if line.strip()] or ["it was killed"]
    return errors if debug else f"rank {rank} cannot be rehearsed: {lines[-1]} (debug=true shows where)"


# -- Step 3: beside the plan ------------------------------------------------------------------------------------------


def memory_rows(seen: Mapping[str, Any], of: OfRank, run: RunFacts) -> Iterator[Row]:
    """The parts that can be told apart, then the peak."""
    estimate = memory_of_fullest_rank(of.layers, of.mesh, of.facts, run)
    moments = {each["name"]: each for each in seen["seen"]["moments"]}
    start, optimizer, within = seen["seen"]["start"], seen["optimizer"], MEMORY * estimate.total
    passes = [each["peak"] + optimizer for name, each in moments.items() if name != STEP]
    rows = [("weights", seen["weights"], estimate.weights)]
    if run.keeps_whole_grads and "backward 1" in moments:
        start += seen["gathered"] if run.gather == "step" else 0
        rows.append(("gradients", moments["backward 1"]["end"] - start, estimate.grads))
    rows.append(("optimizer", optimizer, estimate.optimizer))
    rows.append(("peak", max(*passes, moments[STEP]["peak"]), estimate.total))
    for name, held, of_plan in rows:
        yield Row(name=name, seen=held, planned=of_plan, differs=abs(held - of_plan) > within)


def collective_rows(sent: Sequence[Mapping[str, Any]], plan: Sequence[Planned], mesh: MeshSpec) -> Iterator[Row]:
    """Those that are planned, then the others."""
    kinds = {row.kind for row in plan}
    left = [_named(each, mesh) for each in sent if each["ranks"] > 1]
    for row in plan:
        mine = [
            each for each in left
            if KINDS.get(each["op"]) == row.kind and each["axis"] in (row.axis, "all") and each["ranks"] == row.ranks
        ]  # fmt: skip
        left = [each for each in left if each not in mine]
        bytes_ = sum(each["bytes"] for each in mine)
        wrong = row.calls is not None and len(mine) != row.calls
        yield Row(
            name=row.kind, axis=row.axis, ranks=row.ranks, calls=len(mine), planned_calls=row.calls, seen=bytes_,
            planned=row.bytes, differs=wrong or abs(bytes_ - row.bytes) > row.within * row.bytes + row.few,
        )  # fmt: skip
    for key in dict.fromkeys((each["op"], each["axis"], each["ranks"]) for each in left):
        mine = [each for each in left if (each["op"], each["axis"], each["ranks"]) == key]
        op, axis, ranks = key
        yield Row(
            name=op, axis=axis, ranks=ranks, calls=len(mine), seen=sum(each["bytes"] for each in mine),
            differs=KINDS.get(op) in kinds and sum(each["bytes"] for each in mine) > FEW,
        )  # fmt: skip


def _named(each: Mapping[str, Any], mesh: MeshSpec) -> dict[str, Any]:
    """A collective by its axis, a message by its direction."""
    if each["op"] in MESSAGES:
        return {**each, "op": f"{each['op']} {each['axis'].partition(' ')[0]}", "axis": "pp"}
    return {**each, "axis": _axis(each["axis"], mesh)}


def _axis(name: str, mesh: MeshSpec) -> str:
    """The name of joined axes without those of one rank."""
    for axis in dense_axes():
        if mesh.size(axis) == 1 and name != axis:
            name = re.sub(rf"(^|_){axis}(_|$)", r"\1", name).strip("_")
    return name


# -- Step 4: rank beside rank -----------------------------------------------------------------------------------------


def first_differences(seen: Sequence[Mapping[str, Any]], plan: Plan) -> Iterator[str]:
    """The first collective in which a rank differs from the first one with the same layers.

    Not compared: bytes of exchanges where ranks cut a micro-batch, and of matrices that an optimizer brings together,
    which are not the same on all ranks.
    """
    is_cut = any(layer.cut_over for layer in plan.layers)

    def known(each: Mapping[str, Any] | None) -> tuple[Any, ...]:
        if each is None:
            return ("none", "", 0, 0)
        varies = each["op"].startswith("alltoall") or (is_cut and KINDS.get(each["op"]) == ROWS)
        same = each["ranks"], each["peer"], each["form"], each["message"]
        return each["op"], each["axis"], None if varies else each["bytes"], *same

    for other in seen:
        place = plan.mesh.index(other["rank"], Part.LAYERS)
        first = next(each for each in seen if plan.mesh.index(each["rank"], Part.LAYERS) == place)
        pairs = zip_longest(first["seen"]["sent"], other["seen"]["sent"])
        for i, (ours, theirs) in enumerate(pairs):
            if known(ours) != known(theirs):
                texts = [" over ".join(map(str, known(each)[:2])) + f", {known(each)[2]} B" for each in (ours, theirs)]
                yield f"collective {i} is {texts[0]} on rank {first['rank']}, {texts[1]} on rank {other['rank']}"
                break
