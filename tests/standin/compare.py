"""Trainings on GPUs that are played by the CPU (host_gpu.py), each beside the same one on CPUs: their losses are equal.

python tests/standin/compare.py [NAME ...]
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STANDIN = Path(__file__).parent
_TINY = [
    "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=80",
    "model.config.num_attention_heads=4", "model.config.num_key_value_heads=4", "data.vocab_size=300", "data.seq_len=32",
    "data.micro_batch_size=2",
]  # fmt: skip
_RUN = [
    "data.global_batch_size=16", "data.val_batches=2", "trainer.max_steps=3", "trainer.log_interval=1",
    "trainer.progress_bar=false", "trainer.save_checkpoint=false", "trainer.calibrate=never", "optimizer.eps=0.001",
]  # fmt: skip
"""With AdamW's own eps, its first steps make whole steps of gradients that are rounding alone: kimi_k3 is then 1e-5 off."""
_DENSE = ["recipe=deepseek_ep", *_TINY]
_MIXTRAL = ["recipe=mixtral_ep", *_TINY]
CASES = {
    "one rank": [*_DENSE, "mesh=cpu_1"],
    "two nodes": [*_DENSE, "mesh=cpu_2x2", "dispatch=hierarchical", "dispatch.overlap=chunks", "dispatch.balance=lend"],
    "pairs of stages": [
        *_DENSE, "mesh=cpu_1x4", "mesh.pp=2", "pipeline.schedule=dualpipev", "pipeline.overlap=exchanges",
        "trainer.checkpointing=full", "model.config.num_hidden_layers=4",
    ],
    "all axes": [*_MIXTRAL, "mesh=cpu_1x4", "mesh.tp=2", "mesh.cp=2", "mesh.ep=2"],
    "replicas, in bf16": [
        *_MIXTRAL, "mesh=cpu_1x4", "mesh.ep=2", "mesh.dp_replicate=2", "trainer.precision=bf16_params",
        "trainer.gather=step", "trainer.reduce=last", "optimizer.state=int8",
    ],
    "1f1b, Muon": [*_DENSE, "mesh=cpu_1x4", "mesh.pp=2", "optimizer=muon"],
    "one copy of each token": [*_DENSE, "mesh=cpu_1x2", "dispatch=dedup", "trainer.precision=bf16_mixed"],
    "all tokens everywhere": [*_MIXTRAL, "mesh=cpu_1x2", "dispatch=allgather", "balance=quantile"],
    "eight bits on the wire": [*_MIXTRAL, "mesh=cpu_1x2", "dispatch.wire_dtype=fp8", "balance=global_batch"],
    "jitter, a capacity": [
        *_MIXTRAL, "mesh=cpu_1x2", "trainer.checkpointing=keep_exchanges", "routing.jitter=0.1", "routing.capacity_factor=1.0",
    ],
    "a dense model beside it": [*_MIXTRAL, "mesh=cpu_1x2", "trainer.baseline=dense_flops"],
    **{
        recipe: [f"recipe={recipe}", "mesh=cpu_1x2"]
        for recipe in (
            "switch_ep", "qwen4", "nemotron3", "gpt_oss", "deepseek_v2", "deepseek_v4", "kimi_k3", "olmoe", "qwen3_moe", "longcat",
        )
    },
}  # fmt: skip
OFF = {"fp32": 2e-6, "bf16": 1e-2, "fp8": 1e-4}
"""Largest relative difference of a loss: sums in another order, which a narrow type rounds otherwise now and then."""


def losses(arguments: list[str], device: str, run_dir: Path, *, timeout_s: float = 300) -> list[float]:
    """Of a training and its validation, in order.

    Raises:
        RuntimeError: it failed or warned, with the end of what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cuda":
        environment["PYTHONPATH"] = str(STANDIN)
    words = [*arguments, *_RUN, f"mesh.device={device}", f"hydra.run.dir={run_dir}"]
    done = subprocess.run(
        [sys.executable, "-m", "moecompile", *words], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode or "Warning" in done.stderr:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    rows = csv.DictReader((run_dir / "metrics.csv").read_text().splitlines())
    return [float(row[key]) for row in rows for key in ("val_loss", "loss") if row[key]]


def off(name: str, folder: Path) -> tuple[float, float]:
    """The largest relative difference of a case's losses, and what is allowed."""
    words = CASES[name]
    ours, cpu = (losses(words, device, folder / f"{list(CASES).index(name)}-{device}") for device in ("cuda", "cpu"))
    assert len(ours) == len(cpu) > 4
    allowed = next((limit for part, limit in OFF.items() if any(f"={part}" in word for word in words)), OFF["fp32"])
    return max(abs(a - b) / abs(b) for a, b in zip(ours, cpu, strict=True)), allowed


def main() -> int:
    """Compares those that are named, or all."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or CASES:
            found, allowed = off(name, Path(folder))
            wrong += found > allowed
            print(f"{name}: {found:.1e}{' WRONG' if found > allowed else ''}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
