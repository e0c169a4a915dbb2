"""One run of the first study, in this process: the model, moecompile's compilation and training, the result.

Algorithm:
  1. The model is a folder that `save_pretrained` wrote: that of the parent, or of a new random model of transformers.
  2. moecompile compiles it by the unit's overrides and trains it, as task=train does (`moecompile.runtime.training`).
     Only the order of windows is given here, so that it is the same in every arm of a seed.
  3. A parent is written as a folder; the sha256 of its weights is its identity.
  4. Loads of experts are counted over the validation windows of each source, and of the other domain.
  5. FLOPs are counted twice: by moecompile's plan, and by torch's counter on transformers' own model of the same shape
     with its plain loop over experts, which multiplies all pairs of positions where the plan has those that are seen.

A run saves checkpoints in `study.unfinished` and goes on from the last one; it computes the same as without.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.atomic import creating, write_text
from moecompile.compose import compose_config
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.nn import update_balance
from moecompile.pipeline import compile_with_report
from moecompile.pipeline.shape import shape_of_model
from moecompile.plan import Plan, reductions
from moecompile.planner.cost_model.shapes import training_flops
from moecompile.runtime.data import TextData, encode
from moecompile.runtime.training import train
from moecompile.schema import Config, mesh_spec, validate
from moecompile.tasks.forecast import outline
from quality import study, texts
from quality.models import counted_flops, new_model, weights_hash
from quality.order import Rows, in_order, order_of
from quality.study import DOMAINS, ROWS, SEQ, VOCAB, Unit, hash_of_parent, parent_folder

# -- the run --------------------------------------------------------------------------------------------------------


class Spent:
    """Wall and CPU seconds of this process and of those before it that were ended, with what they computed in vain."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.cpu = path, time.time(), time.process_time()
        self.before: list[float] = json.loads(path.read_text()) if path.exists() else [0.0, 0.0]

    def note(self) -> tuple[float, float]:
        """Writes both down, for a process after this one."""
        spent = self.before[0] + time.time() - self.start, self.before[1] + time.process_time() - self.cpu
        write_text(self.path, json.dumps(spent))
        return spent


def run(unit: Unit) -> dict[str, Any]:
    """Runs a unit and returns its result."""
    torch.set_num_threads(unit.threads)
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        folder = study.unfinished(unit)
        folder.mkdir(parents=True, exist_ok=True)
        return _run(unit, folder)
    finally:
        dist.destroy_process_group()


def _run(unit: Unit, folder: Path) -> dict[str, Any]:
    parent_hash = hash_of_parent(unit.parent) if unit.parent else None
    every = unit.steps // study.POINTS
    # Between validations: what was validated is on disk with the next checkpoint, and the last one would be missing.
    going_on = [f"trainer.save_interval={2 * every - 1}", "trainer.keep_last=1", "trainer.resume=auto"]
    config = compose_config([*study.overrides(unit), *going_on, *_source(unit, folder)])
    validate(config)
    text = _texts(unit, config)
    order = order_of(unit, len(text.parent), len(text.branch))
    rows = torch.cat((text.parent, text.branch))
    data = TextData(text.tokenizer, in_order(rows, order, config.seed), Rows(text.val), text.sha256)
    model = source_model(config)
    example = example_inputs(model, SEQ)
    before = outline(model)
    assert before is not None
    none = Plan(mesh=mesh_spec(config.mesh), layers=(), reductions=reductions(mesh_spec(config.mesh)))
    is_dense = unit.arm in study.DENSE
    compiled = compile_with_report(model, config, example=example, plan=none if is_dense else None)
    by_plan = training_flops(shape_of_model(before, compiled.plan), SEQ)
    by_counter = counted_flops(unit.size, unit.arm)
    spent = Spent(folder / "spent.json")
    outcome = train(compiled.model, compiled.plan, config, data, folder / "run", on_row=spent.note)
    wall_s, cpu_s = spent.note()
    result = {
        "unit": unit.name, "settings": unit.settings, "settings_hash": unit.hash, "parent_hash": parent_hash,
        "text_sha256": text.sha256, "order_sha256": hashlib.sha256(order.numpy().tobytes()).hexdigest(),
        "flops_per_token": {"plan": by_plan, "counter": by_counter},
        "params": {
            "total": sum(parameter.numel() for parameter in compiled.model.parameters()),
            "step0_diff": compiled.step0.max_abs_diff, "notes": compiled.notes,
        },
        "curve": _curve(folder / "run", outcome.val_loss_first, text.val_bytes / text.val[:, 1:].numel()),
        "train_loss_last": outcome.loss_last, "wall_s": round(wall_s, 1), "cpu_s": round(cpu_s, 1),
        "routing": None if is_dense else {
            "max_violation": outcome.max_violation_mean_last,
            "max_violation_bound": outcome.max_violation_bound_mean_last,
            "dead_experts": outcome.dead_experts, "entropy": outcome.entropy_last,
            "loads": _loads(compiled.model, unit, text),
        },
        "versions": _versions(),
    }  # fmt: skip
    if unit.study == "quality" and unit.seed is None:
        result["weights_hash"] = _write_parent(unit, compiled.model, text)
    return result


def _source(unit: Unit, folder: Path) -> list[str]:
    """The overrides that name the model (step 1)."""
    if unit.study == "real":
        return [f"model.package={study.REAL_PACKAGE}", "data.tokenizer=model", "data.vocab_size=null"]
    if unit.parent is not None:
        source = parent_folder(unit.parent)
    else:
        source = folder / "new"  # made again, the same
        seed = study.PARENT_SEED if unit.seed is None else unit.seed
        new_model(unit.size, unit.arm, seed).save_pretrained(source)
    return [f"model.pretrained={source}", f"data.vocab_size={VOCAB}", "data.tokenizer=train"]


def _texts(unit: Unit, config: Config) -> texts.Texts:
    if unit.study != "real":
        return texts.load(unit.domain)
    from moecompile.models.build import pretrained_folder
    from moecompile.runtime.data.tokens import plain_tokenizer

    folder = pretrained_folder(config.model)
    assert folder is not None
    return texts.load(unit.domain, plain_tokenizer(folder / "tokenizer.json"))


def _curve(run_dir: Path, first: float | None, bytes_per_token: float) -> list[dict[str, float]]:
    """Validation over tokens. seconds: wall time of training alone, from its rows, without validation."""
    points, seconds, last = [], 0.0, 0
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[int, dict[str, float]] = {0: {"val": float(first)}} if first is not None else {}
    for row in rows:
        step = int(row["step"])
        if row.get("tokens_per_second"):
            seconds += (step - last) * ROWS * SEQ / float(row["tokens_per_second"])
            last = step
            found.setdefault(step, {})["seconds"] = round(seconds, 2)
            found[step]["train"] = round(float(row["loss"]), 6)
        if row.get("val_loss"):
            found.setdefault(step, {})["val"] = float(row["val_loss"])
    for step, values in sorted(found.items()):
        if "val" in values:
            tokens = step * ROWS * SEQ
            per_byte = values["val"] / bytes_per_token
            points.append({"step": step, "tokens": tokens, "seconds": 0.0, **values, "val_per_byte": per_byte})
    assert len(points) == study.POINTS + 1, [point["step"] for point in points]
    return points


@torch.no_grad()
def _loads(model: nn.Module, unit: Unit, text: texts.Texts) -> dict[str, dict[str, list[int]]]:
    """Layer -> group of validation windows -> assignments to each expert (step 4)."""
    groups: dict[str, Tensor] = {}
    for source in dict.fromkeys(text.val_sources):
        groups[source] = text.val[[i for i, found in enumerate(text.val_sources) if found == source], :-1]
    (other,) = (name for name in DOMAINS if name != unit.domain)
    foreign = [encode(text.tokenizer, piece)[:SEQ] for piece in texts.load(other).val_texts]
    groups[other] = torch.stack([row for row in foreign if len(row) == SEQ])
    loads: dict[str, dict[str, list[int]]] = {}
    model.train()  # loads are counted in training mode alone
    update_balance(model, move=False)
    for group, rows in groups.items():
        for part in rows.split(study.MICRO_ROWS):
            model(input_ids=part, use_cache=False)
        for load in update_balance(model, move=False):
            loads.setdefault(load.name, {})[group] = load.load.tolist()
    return loads


def _write_parent(unit: Unit, model: nn.Module, text: texts.Texts) -> str:
    """Writes the folder of a parent and returns the hash of its weights (step 3)."""
    from moecompile.export.huggingface import find_target, write
    from moecompile.pipeline import plan_of

    folder = parent_folder(unit)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with creating(folder) as path:
        write(model, find_target(model, plan_of(model), None), path)
        text.tokenizer.save(str(path / "tokenizer.json"))
        from transformers import AutoModelForCausalLM

        found = weights_hash(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        (path / "weights.sha256").write_text(found)
    return found


def _versions() -> dict[str, str]:
    import transformers

    import moecompile

    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "moecompile": moecompile.__version__, "processor": cpu, "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
