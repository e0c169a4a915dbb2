"""What a larger MoE gains from an MoE: experts copied by `widen_experts`, against the same model not widened.

    python benchmarks/widen.py                      # one process, one thread: a few minutes on one idle core
    python benchmarks/widen.py --seeds 3 --steps 400

A small Mixtral is trained on the embedded text, byte by byte. Then it goes on in several ways on the same tokens: as it
is, and widened to twice as many experts (top-k scaled or kept, with noise or without, copies by load). Training is
plain torch on transformers' own models. Writes benchmarks/results/widen.json.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.models.widen import widen_experts
from moecompile.runtime.text import load_text
from moecompile.schema import DataConfig

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "widen.json"
ROWS, SEQ, RATE, HELD_OUT = 8, 64, 3e-3, 8
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": SEQ,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "not widened": {},
    "top-k scaled": {"top_k": "scaled"},
    "top-k scaled, noise": {"top_k": "scaled", "noise": 0.1},
    "top-k kept, noise": {"top_k": "kept", "noise": 0.1},
    "top-k kept, noise, by load": {"top_k": "kept", "noise": 0.1, "load": True},
}


def small_mixtral(seed: int) -> nn.Module:
    """A Mixtral of 0.2 M parameters with four experts, top-2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model("mixtral", use_cache=False, **SIZES)
    model: nn.Module = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """Cross entropy of the next byte, nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, steps: range, seed: int) -> None:
    """Steps of AdamW; step i sees the same bytes in every way."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RATE)
    for step in steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(text) - SEQ - 1, (ROWS,), generator=generator)
        optimizer.zero_grad()
        loss_of(model, torch.stack([text[s : s + SEQ + 1] for s in starts.tolist()])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def validation(model: nn.Module, text: Tensor) -> float:
    """Mean loss over the held-out end of the text."""
    rows = text[: len(text) // (SEQ + 1) * (SEQ + 1)].view(-1, SEQ + 1)
    return fmean(float(loss_of(model.eval(), part)) for part in rows.split(64)[:HELD_OUT])


@torch.no_grad()
def loads(model: Any, rows: Tensor) -> dict[str, list[int]]:
    """Tokens of each expert, by the path of the experts, from the router's own choices."""
    counts: dict[str, list[int]] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):

        def count(_: Any, __: Any, out: Any, path: str = f"model.layers.{i}.mlp.experts") -> None:
            counts[path] = torch.bincount(out[2].flatten(), minlength=SIZES["num_local_experts"]).tolist()

        handles.append(layer.mlp.gate.register_forward_hook(count))
    model.eval()(input_ids=rows[:, :-1])
    for handle in handles:
        handle.remove()
    return counts


def run(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """Way -> validation loss right after widening, and at the end."""
    whole = torch.tensor(list(load_text(DataConfig()).encode()))
    held = HELD_OUT * 64 * (SEQ + 1)
    text, rest = whole[:-held], whole[-held:]
    base = small_mixtral(seed)
    train(base, text, range(steps), seed)
    example = {"input_ids": text[:SEQ].view(1, -1)}
    found = {}
    for way, options in WAYS.items():
        options = dict(options)
        if options.pop("load", False):
            options["load"] = loads(base, rest[: 64 * (SEQ + 1)].view(64, -1))
        model = widen_experts(base, 2, example=example, seed=seed, **options).model if options else copy.deepcopy(base)
        start = validation(model, rest)
        train(model, text, range(steps, 2 * steps), seed)
        found[way] = {"start": start, "end": validation(model, rest)}
        print(f"seed {seed}  {way:28} {start:.4f} -> {found[way]['end']:.4f}", flush=True)
    return found


def main() -> None:
    """Runs all seeds and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150, help="before widening, and again after it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(seed, given.steps) for seed in range(given.seeds)]
    RESULTS.write_text(json.dumps({"steps": given.steps, "runs": runs}, indent=1) + "\n")
    for way in WAYS:
        gained = [each["not widened"]["end"] - each[way]["end"] for each in runs]
        end = fmean(each[way]["end"] for each in runs)
        print(f"{way:28} {end:.4f}  gains {fmean(gained):+.4f} ({min(gained):+.4f} to {max(gained):+.4f})")


if __name__ == "__main__":
    main()
