"""Every family of transformers that is MoE already, as a user's folder: trained by the command line's defaults on two
ranks, resumed on one, exported, and compared with transformers' own model in plain torch.
"""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

VOCAB, SEQ = 320, 16
STEPS, MORE = 2, 3
MORE_STEPS = f"trainer.max_steps={MORE}"
# eps: with Adam's own, gradients that are nothing but rounding would make whole steps.
SMALL = [
    f"data.seq_len={SEQ}", "data.micro_batch_size=2", "data.global_batch_size=4", "data.val_fraction=0.008", "balance=none",
    "trainer.log_interval=1", "trainer.progress_bar=false", "optimizer.warmup_steps=1", "optimizer.eps=1e-5",
]  # fmt: skip
Report = dict[str, Any]


@cache
def composed(*overrides: str) -> Any:
    """Composed once for all families, because that takes as long as a step of one."""
    from moecompile.compose import compose_config

    return compose_config(overrides)


def of_run(root: Path, name: str, kind: str, mesh: str, *more: str, resume: Path | None = None) -> Any:
    """The config as the command line makes it; rank 0 writes it to the run directory."""
    from moecompile.checkpoint.resume import resumed
    from moecompile.compose import RESOLVED, save_resolved
    from moecompile.schema import validate

    run_dir = root / kind / name
    run_dir.mkdir(parents=True, exist_ok=True)
    given = ["model.pretrained=FOLDER", "name=NAME", *(["trainer.resume=RUN"] if resume else [])]
    config = copy.deepcopy(composed(*given, f"mesh={mesh}", f"data.path={root / 'text.txt'}", *SMALL, *more))
    config.model.pretrained, config.model.name, config.name = str(root / "folders" / name), name, name
    if resume:
        config.trainer.resume = str(resume)
    config = resumed(config, run_dir)
    validate(config)
    save_resolved(config, run_dir / RESOLVED)
    return config


def each(names: list[str], work: Callable[[str], Report]) -> dict[str, Report]:
    """What `work` reports of each family; an error is the report of that family alone."""
    out: dict[str, Report] = {}
    for name in names:
        try:
            with mock.patch("moecompile.tasks.ranks.train.init_process_group"):
                out[name] = work(name)
        except Exception as error:
            out[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return out


def train_on_two(rank: int, world_size: int, root: Path, names: list[str]) -> dict[str, Report]:
    """Rank 0 reports what the run's result says. Its pictures are made, and not written, which takes most of their time."""
    from matplotlib.figure import Figure

    from moecompile.tasks.ranks import train

    def work(name: str) -> Report:
        config = of_run(root, name, "two", "cpu_1x2", f"trainer.max_steps={STEPS}")
        with mock.patch.object(Figure, "savefig"):
            train.run_rank(config, root / "two" / name)
        return json.loads((root / "two" / name / "result.json").read_text()) if rank == 0 else {}

    return each(names, work)


def resume_on_one(rank: int, world_size: int, root: Path, names: list[str]) -> dict[str, Report]:
    """Transformers' own model, and the run of two ranks that goes on here and is exported; two ranks made its pictures."""
    from moecompile.tasks import export, show
    from moecompile.tasks.ranks import train

    def work(name: str) -> Report:
        run = root / "resumed" / name
        with mock.patch.object(show, "write_graphs"), mock.patch.object(train, "write_heat_map"):
            train.run_rank(of_run(root, name, "resumed", "cpu_1", MORE_STEPS, resume=root / "two" / name), run)
        (root / "exported" / name).mkdir(parents=True)
        config = copy.deepcopy(composed("export.run=RUN"))
        config.export.run = str(run)
        export.run(config, root / "exported" / name)
        results = {
            kind: json.loads((root / kind / name / "result.json").read_text()) for kind in ("resumed", "exported")
        }
        return {"own": transformers_own(root, name), **results}

    return each(names, work)


def transformers_own(root: Path, name: str) -> Report:
    """Losses of transformers' own model in plain torch, nats per token: of each step, and of validation before the
    first, after STEPS and after MORE of them.
    """
    import torch.distributed as dist

    from moecompile.models.build import build_model
    from moecompile.runtime.data import load_data, train_loader, val_loader
    from moecompile.runtime.module import LanguageModule

    config = of_run(root, name, "own", "cpu_1", MORE_STEPS)
    folder, run_dir = root / "folders" / name, root / "own" / name
    data = load_data(config.data, run_dir, rank=0, barrier=dist.barrier, model_folder=folder)
    model = build_model(config.model, 0)
    made: Any = LanguageModule(model, config.optimizer, MORE).configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def loss_of(batches: list[dict[str, Tensor]]) -> Tensor:
        total, count = torch.zeros(()), 0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            total = total + F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
            count += int((batch["labels"] >= 0).sum())
        return total / count

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        loss = loss_of(list(val_loader(data.val, config.data, rank=0, world_size=1)))
        model.train()
        return float(loss)

    out: Report = {"val": [validate()], "steps": []}
    loader = iter(train_loader(data.train, config.data, seed=0, rank=0, world_size=1, start_step=0, num_steps=MORE))
    for step in range(1, MORE + 1):
        optimizer.zero_grad()
        loss = loss_of([next(loader), next(loader)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float(config.optimizer.clip_norm or 0))
        optimizer.step()
        scheduler.step()
        out["steps"].append(float(loss))
        if step in (STEPS, MORE):
            out["val"].append(validate())
    return out
