"""A training step with a table of hashed n-grams: gathered by FSDP, or its rows spread: `python benchmarks/tables.py`.

Two ranks, Qwen4-exp in miniature (its layers of linear attention), whose table has 8 heads with `--rows` rows each. The
settings take turns for `--rounds`; of each the fastest run counts. Takes about two minutes; prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moecompile.plan import read

SETTINGS = {
    "gathered": ["embeddings.shard=none"],
    "spread, `same`": ["embeddings.shard=ep"],
    "spread, `lazy_adamw`": ["embeddings.shard=ep", "embeddings.optimizer=lazy_adamw"],
    "spread, `rowwise_adagrad`": ["embeddings.shard=ep", "embeddings.optimizer=rowwise_adagrad"],
}


def run(settings: list[str], rows: int, steps: int, folder: Path) -> dict[str, Any]:
    """The result of one run."""
    linear = "model.config.layer_types=[linear_attention,linear_attention]"
    command = [
        sys.executable, "-m", "moecompile", "recipe=qwen4", linear, f"model.config.ngram_vocab_size_base={rows}",
        f"trainer.max_steps={steps}", f"trainer.val_interval={steps}", "trainer.log_interval=2", "data.val_batches=1",
        "trainer.save_checkpoint=false", f"hydra.run.dir={folder}", *settings,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def lines(best: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table in Markdown."""
    yield "| table | a step takes | memory of a rank, planned | of these optimizer | lookups send |"
    yield "|---|---|---|---|---|"
    slowest = best["gathered"]["tokens_per_second"]
    for name, result in best.items():
        memory, sent = result["memory"], result["lookup_bytes"]
        yield (
            f"| {name} | {slowest / result['tokens_per_second']:.2f} | {memory.total / 2**20:.0f} MiB | "
            f"{memory.optimizer / 2**20:.0f} MiB | {'-' if sent is None else f'{sent / 2**10:.0f} KiB'} |"
        )


def main() -> None:
    """Runs all settings and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=250_000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name, settings in SETTINGS.items():
            with tempfile.TemporaryDirectory() as folder:
                result = run(settings, options.rows, options.steps, Path(folder))
                estimate = read(Path(folder) / "plan.yaml").estimate
                assert estimate is not None
                result["memory"] = estimate.memory_bytes_per_rank
            if name not in best or result["tokens_per_second"] > best[name]["tokens_per_second"]:
                best[name] = result
            print(f"{name}: {result['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    print("\n".join(lines(best)))


if __name__ == "__main__":
    main()
