"""Whole runs by the command line: a short training beside the same one on the CPU, a step's memory beside the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LOSS, OFF = {"fp32": 1e-3, "bf16_params": 3e-2}, 0.25
"""Largest relative difference of a loss to that in fp32 on the CPU; of a peak to the plan."""
MINUTES = 10
_SHORT = [
    "mesh=cpu_1", "data.val_batches=2", "trainer.log_interval=1", "trainer.progress_bar=false",
    "trainer.save_checkpoint=false",
]  # fmt: skip
_SMALL = ["data.vocab_size=300", "data.seq_len=64", "data.micro_batch_size=2", "data.global_batch_size=4"]
_LARGE = [
    "model.config.hidden_size=1024", "model.config.intermediate_size=2048", "data.micro_batch_size=8",
    "data.global_batch_size=8",
]  # fmt: skip


def train(device: torch.device, precision: str, folder: Path, *, steps: int = 5) -> dict[str, Any]:
    """`recipe=olmoe` for some steps: validation losses before and after, here and in fp32 on the CPU."""
    asked = ["recipe=olmoe", *_SHORT, *_SMALL, f"trainer.max_steps={steps}", f"trainer.val_interval={steps}"]
    mine = _run("train", [*asked, f"trainer.precision={precision}"], device, folder / "mine")
    own = _run("train", [*asked, "trainer.precision=fp32"], torch.device("cpu"), folder / "cpu")
    keys = ("val_loss_first", "val_loss")
    errors = {key: abs(mine[key] / own[key] - 1) for key in keys}
    found = {key: mine[key] for key in (*keys, "tokens_per_second")}
    return {"ok": all(error <= LOSS[precision] for error in errors.values()), **found, "errors": errors}


def memory(device: torch.device, precision: str, folder: Path, *, large: bool) -> dict[str, Any]:
    """`task=bench` of `recipe=mixtral_ep`, made `large` for a GPU: bytes at a step's fullest moment, and the plan's."""
    asked = [
        "recipe=mixtral_ep", *_SHORT, *(_LARGE if large else _SMALL), f"trainer.precision={precision}",
        "bench.warmup=1", "bench.rounds=2", "bench.machine=false",
    ]  # fmt: skip
    result = _run("bench", asked, device, folder / "bench")
    step = result["step"]
    ratio = step["peak_bytes"] / step["planned_bytes"]
    kept = {name: step[name] for name in ("peak_bytes", "planned_bytes", "wall_ms", "experts", "exchanges", "rows")}
    return {"ok": abs(ratio - 1) <= OFF, "ratio": ratio, **kept}


def _run(task: str, asked: list[str], device: torch.device, folder: Path) -> dict[str, Any]:
    """The contents of result.json.

    Raises:
        RuntimeError: the run failed, with the end of its messages.
    """
    command = [sys.executable, "-m", "moecompile", f"task={task}", *asked, f"mesh.device={device.type}"]
    # cuBLAS' workspace comes from torch's allocator: 32 MiB on a large GPU, which no plan knows of.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"], env=environment, capture_output=True, text=True, timeout=60 * MINUTES
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[1:])}\nexit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
        )
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found
