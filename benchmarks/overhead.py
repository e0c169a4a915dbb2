"""What moecompile costs where it has nothing to win, against limits: exits with 1 if one is missed.

python benchmarks/overhead.py                     # about two minutes on two idle cores
python benchmarks/overhead.py --json overhead.json

one expert  a dense FFN rewritten into one expert, top-1, 4,096 tokens, forward and backward: CPU time of one thread
            beside the dense FFN in the same round, medians
import      CPU time of `import torch, moecompile` beyond that of `import torch`, medians of fresh processes
plan        `task=plan model=deepseek_v3` (671B parameters, on the meta device) from the shell, wall time
start       `recipe=deepseek_ep` from the shell to its first optimizer step on four ranks, wall time
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from layer import HEAP, HIDDEN, block, cpu_seconds
from torch import Tensor, nn
from torch.nn import functional as F

import moecompile
from moecompile.pipeline import compile_with_report
from moecompile.torch_private import compile_whole

WIDTH, TOKENS = 2048, 4096
ONE_EXPERT = ["experts.num_routed=1", "routing.top_k=1", "experts.init=copy", "balance=none"]
LIMITS = {
    "one expert, float32": 1.05, "one expert, bfloat16": 1.05, "compiled, float32": 1.05,
    "import, s": 0.3, "plan, s": 8.0, "start, s": 25.0,
}  # fmt: skip
MOECOMPILE = [sys.executable, "-m", "moecompile"]


class FFN(nn.Module):
    """SwiGLU with two linears in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Model(nn.Module):
    """A place for the FFN: a model is rewritten below its root."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = FFN()

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, D)."""
        out: Tensor = self.ffn(x)
        return out


def _zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 4, HIDDEN, dtype=dtype)


def one_expert(dtype: torch.dtype, rounds: int, tokens: int = TOKENS) -> float:
    """CPU time of the rewritten FFN relative to the dense one."""
    torch.manual_seed(0)
    dense = Model().to(dtype)
    moe = moecompile.compile_model(Model().to(dtype), ONE_EXPERT, example=_zeros(dtype))
    ratios = []
    for i in range(rounds + 2):
        x, direction = (torch.randn(1, tokens, HIDDEN).to(dtype) for _ in range(2))
        layers = (dense, moe) if i % 2 else (moe, dense)
        seconds = {layer: cpu_seconds("fused", layer, x, direction) for layer in layers}
        if i >= 2:  # the first are warm-up
            ratios.append(seconds[moe] / seconds[dense])
    return statistics.median(ratios)


def compiled_region(dtype: torch.dtype, rounds: int, tokens: int = 1024) -> float:
    """CPU time of a compiled MoE region relative to the same one as it is.

    Raises:
        torch._dynamo.exc.RecompileError: another number of tokens compiled it again.
    """
    layers = [compile_with_report(block(8, 2, 1024, dtype, "eager"), example=_zeros(dtype)) for _ in range(2)]
    (path,) = layers[1].graphs["fused"]
    compile_whole(layers[1].model.get_submodule(path))
    seconds: list[list[float]] = [[], []]
    for i in range(rounds + 3):
        x, direction = (torch.randn(1, tokens + i, HIDDEN).to(dtype) for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=i >= 3):  # the first make the number of tokens a symbol
            for which in (0, 1) if i % 2 else (1, 0):
                taken = cpu_seconds("fused", layers[which].model, x, direction)
                if i >= 3:
                    seconds[which].append(taken)
    return statistics.median(fast / plain for plain, fast in zip(*seconds, strict=True))


def import_seconds(runs: int) -> float:
    """CPU seconds that importing moecompile adds to importing torch."""
    found: dict[str, list[float]] = {"import torch": [], "import torch, moecompile": []}
    for _ in range(runs):
        for code, seconds in found.items():
            before = _children()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds.append(_children() - before)
    alone, both = (statistics.median(seconds) for seconds in found.values())
    return both - alone


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plan_seconds() -> float:
    """Wall time of planning DeepSeek-V3."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [*MOECOMPILE, "task=plan", "model=deepseek_v3", f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def start_seconds(*overrides: str) -> float:
    """Wall time until the first row of metrics.csv."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.csv")
        command = [
            *MOECOMPILE, "recipe=deepseek_ep", "trainer.max_steps=1", "trainer.log_interval=1", "data.val_batches=1",
            "trainer.progress_bar=false", "trainer.save_checkpoint=false", f"hydra.run.dir={folder}", *overrides,
        ]  # fmt: skip
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while not (metrics.exists() and metrics.read_text().count("\n") > 1):
                if process.poll() not in (None, 0):
                    raise SystemExit(f"{' '.join(command)} failed")
                time.sleep(0.05)
            return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    measures = {
        "one expert, float32": lambda: one_expert(torch.float32, given.rounds),
        "one expert, bfloat16": lambda: one_expert(torch.bfloat16, given.rounds),
        "compiled, float32": lambda: compiled_region(torch.float32, given.rounds),
        "import, s": lambda: import_seconds(given.rounds),
        "plan, s": plan_seconds,
        "start, s": start_seconds,
    }
    found = {}
    for name, measure in measures.items():
        found[name] = measure()
        print(f"{name:22} {found[name]:8.3f}   limit {LIMITS[name]}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(found[name] > LIMITS[name] for name in found))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in HEAP.items()):  # libraries read them when they start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    sys.exit(main())
