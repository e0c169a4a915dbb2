"""Losses of a small MoE model, by what the optimizer keeps: `python benchmarks/moments.py --steps 150 --seeds 0 1 2`.

One process, the model of recipe=deepseek_ep made smaller, moby_dick. Every kind sees the same weights and batches for a
seed. Validation loss is over the same batches at the end. Prints a table in Markdown; writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.compose import compose_config
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import compile_model
from moecompile.runtime.data import load_data, train_loader, val_loader
from moecompile.runtime.module import LanguageModule
from moecompile.schema import Config

MODEL = [
    "recipe=deepseek_ep", "mesh=cpu_1", "model.config.num_hidden_layers=2", "model.config.hidden_size=128",
    "model.config.intermediate_size=320", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=4",
    "data.vocab_size=1024", "data.seq_len=64", "data.micro_batch_size=8", "data.global_batch_size=8",
    "data.val_batches=16", "optimizer.warmup_steps=20", "routing.groups=1", "balance=none",
]  # fmt: skip
KINDS = {
    "fp32 weights": {
        "fp32 (default)": [], "bf16": ["optimizer.state=bf16"], "int8": ["optimizer.state=int8"],
    },
    "bf16 weights": {
        "nearest, bf16 (default)": [], "nearest, fp32": ["optimizer.state=fp32"],
        "master, fp32": ["optimizer.bf16_weights=master"],
        "master, int8": ["optimizer.bf16_weights=master", "optimizer.state=int8"],
        "stochastic, bf16": ["optimizer.bf16_weights=stochastic"],
        "stochastic, int8": ["optimizer.bf16_weights=stochastic", "optimizer.state=int8"],
    },
}  # fmt: skip


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def compiled(model: nn.Module, config: Config) -> nn.Module:
    """The model with experts, in this process."""
    return compile_model(model, config, example=example_inputs(model, config.data.seq_len))


def trained(
    settings: list[str], seed: int, steps: int, dtype: torch.dtype,
    compiled: Callable[[nn.Module, Config], nn.Module] = compiled,
) -> tuple[float, float, float]:  # fmt: skip
    """Validation loss, bytes of a parameter that the optimizer holds, and ns of CPU of a step, per parameter."""
    config = compose_config([*MODEL, *settings, f"seed={seed}", f"trainer.max_steps={steps}"])
    with tempfile.TemporaryDirectory() as folder:
        data = load_data(config.data, Path(folder), rank=0, barrier=lambda: None)
    model = compiled(build_model(config.model, seed).to(dtype), config)
    module = LanguageModule(model, config.optimizer, steps)
    optimizer = module.configure_optimizers()["optimizer"]
    schedule, seconds = module.schedule(optimizer), 0.0
    loader = train_loader(data.train, config.data, seed=seed, rank=0, world_size=1, start_step=0, num_steps=steps)
    for batch in loader:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.process_time()
        optimizer.step()
        seconds += time.process_time() - start
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        batches = list(val_loader(data.val, config.data, rank=0, world_size=1))
        loss = statistics.mean(float(loss_of(model, batch)) for batch in batches)
    held = sum(v.nbytes for state in optimizer.state.values() for name, v in state.items() if name != "step")
    parameters = sum(p.numel() for p in model.parameters())
    return loss, held / parameters, 1e9 * seconds / steps / parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| weights | moments | bytes a parameter | ns of CPU a parameter and step | validation loss: mean, range of "
        "seeds | over fp32's, by seed |"
    )
    print("|---|---|---|---|---|---|")
    wanted: list[float] = []
    for weights, kinds in KINDS.items():
        dtype = torch.float32 if weights.startswith("fp32") else torch.bfloat16
        for name, settings in kinds.items():
            runs = [trained(settings, seed, options.steps, dtype) for seed in options.seeds]
            losses = [run[0] for run in runs]
            wanted = wanted or losses
            apart = ", ".join(f"{loss - base:+.4f}" for loss, base in zip(losses, wanted, strict=True))
            spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            ns = statistics.median(run[2] for run in runs)
            print(f"| {weights} | {name} | {runs[0][1]:.2f} | {ns:.1f} | {spread} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
