"""What compiling adds to a dense model of 30 layers: seconds of each step, and memory.

    python benchmarks/rewrite_time.py                 # one model of each form of FFN: about a minute
    python benchmarks/rewrite_time.py llama opt       # some

The models have random weights and the sizes of a 135 M parameter model (30 layers, hidden size 576, FFN 1536); their
FFNs become 4 copied experts. `CPU` is capture + match + rewrite + lower in seconds of CPU time, which another load on
the machine stretches less than the `wall` clock's; both with the two forwards that measure step 0. `peak` is the most
memory of the process while it compiled, beyond the dense model; `experts` is what the new weights take, less the dense
FFNs that they replace. Writes benchmarks/results/rewrite_time.json and exits with 1 if more than 3 s of CPU time
are added.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "rewrite_time.json"
MOST_SECONDS = 3.0
FORMS = {
    "llama": "own, gated",
    "phi3": "own, gate and up fused",
    "gpt2": "own, Conv1D",
    "opt": "inline",
    "bert": "split",
}
WIDTHS = (6, 23, 5, 6, 6, 9, 7, 6)
LAYERS, HIDDEN, FFN, VOCAB = 30, 576, 1536, 49_152


def build(name: str) -> Any:
    """The dense model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": 9,
        "num_key_value_heads": 9, "vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    names = {"opt": {"intermediate_size": "ffn_dim"}, "gpt2": {"intermediate_size": "n_inner"}}.get(name, {})
    own = {"opt": {"word_embed_proj_dim": HIDDEN}, "bert": {"is_decoder": True}}.get(name, {})
    config = AutoConfig.for_model(name, **{names.get(key, key): value for key, value in sizes.items()}, **own)
    return AutoModelForCausalLM.from_config(config).eval()


def one(name: str) -> dict[str, Any]:
    """One compilation in this process."""
    import torch

    from moecompile.compose import compose_config
    from moecompile.pipeline import compile_with_report

    model = build(name)
    example = {"input_ids": torch.arange(2 * 16).view(2, 16)}
    config = compose_config(["experts.num_routed=4", "routing.top_k=2"])
    before, start, cpu = _bytes_of(model), _peak(), time.process_time()
    compiled = compile_with_report(model, config, example=example)
    cpu, peak = time.process_time() - cpu, _peak() - start
    seconds = {record.name: round(record.seconds, 3) for record in compiled.records}
    sites = len(compiled.plan.layers)
    del compiled
    gc.collect()
    return {
        "model": name,
        "form": FORMS[name],
        "sites": sites,
        "seconds": seconds,
        "added": round(cpu, 3),
        "wall": round(sum(seconds.values()), 3),
        "dense_gib": before / 2**30,
        "experts_gib": (_bytes_of(model) - before) / 2**30,
        "peak_gib": peak / 2**30,
    }


def _bytes_of(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.models[0])))
        return 0
    rows = []
    heads = ("model", "form", "sites", "CPU", "wall", "dense GiB", "experts", "peak")
    print("  ".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    for name in args.models:
        done = subprocess.run([sys.executable, __file__, "--one", name], check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        numbers = (row[key] for key in ("added", "wall", "dense_gib", "experts_gib", "peak_gib"))
        cells = (name, row["form"], row["sites"], *(f"{number:.2f}" for number in numbers))
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(max(row["added"] for row in rows) > MOST_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
