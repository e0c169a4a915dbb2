"""What it costs if tokens get two experts of one slice: a pretrained model before any training, and forwards alone.

    python benchmarks/quality/slices.py      # after `make real-models`; two minutes

SmolLM2-135M as the study's `copies`: every FFN in two halves, four copies of each. As long as a token has one expert of
each half, the model is the dense one. Routes are replayed in which a share of the tokens of each layer has two experts
of the same half instead.

Algorithm:
  1. The model is compiled as the study does, and compared on every eighth validation window of the prose.
  2. For each share, a token of a layer gets with that probability two different experts of one half, both drawn; else
     one of each half, from copies that are drawn independently.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # modules are named quality.*

import moecompile
from moecompile.compose import compose_config
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.models.source import source_model
from moecompile.runtime.data.tokens import plain_tokenizer
from quality import study, texts

SHARES = (0.0, 0.05, 0.1, 0.35)
EVERY, SLICES, COPIES = 8, 2, 4


def routes(tokens: int, layers: int, share: float, generator: torch.Generator) -> Tensor:
    """Experts (tokens, layers, 2); expert = copy * 2 + half."""
    size = (tokens, layers)
    copies = torch.randint(COPIES, (*size, SLICES), generator=generator)
    halves = torch.arange(SLICES).expand(*size, SLICES)
    same = torch.rand(size, generator=generator) < share
    other = (copies[..., :1] + torch.randint(1, COPIES, (*size, 1), generator=generator)) % COPIES
    half = torch.randint(SLICES, (*size, 1), generator=generator).expand_as(halves)
    copies = torch.where(same[..., None], torch.cat((copies[..., :1], other), -1), copies)
    return copies * SLICES + torch.where(same[..., None], half, halves)


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Nats per token."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return float(F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten()))


def main() -> int:
    """Prints a row for each share."""
    unit = study.Unit("real", study.REAL, "prose", "copies", 0)
    given = ["model.package=" + study.REAL_PACKAGE, "data.tokenizer=model", "data.vocab_size=null", "mesh=cpu_1"]
    config = compose_config([*study.OVERRIDES[unit.arm], *given, f"data.seq_len={study.SEQ}"])
    folder = pretrained_folder(config.model)
    assert folder is not None
    rows = texts.load(unit.domain, plain_tokenizer(folder / "tokenizer.json")).val[::EVERY]
    dense = source_model(config)
    before = loss(dense, rows)
    model = moecompile.compile_model(dense, config, example=example_inputs(dense, study.SEQ)).eval()
    layers = len(moecompile.plan_of(model).layers)
    print(
        f"dense: {before:.3f} nats\n\n| tokens with two experts of one half | validation | difference |\n|---|---|---|"
    )
    for share in SHARES:
        ids = routes(rows[:, 1:].numel(), layers, share, torch.Generator().manual_seed(0))
        with moecompile.replay_routes(model, ids):
            found = loss(model, rows)
        print(f"| {share:.0%} | {found:.3f} | {found - before:+.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
