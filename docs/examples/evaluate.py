"""Scores an exported model with lm-eval on tasks made of a text file: nothing is downloaded.

    python docs/examples/evaluate.py runs/default/.../model text.txt

`bits_per_byte`: how well the model predicts the text. `continuation`: which of four passages follows; 0.25 is chance.
The dictionaries are lm-eval's own task configs, so its other tasks, of local files or its hub, go into the same list.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any


def write_records(text: str, count: int, size: int, path: Path) -> None:
    """`count` passages of `size` characters, spread over the text, with four continuations each, one of them right."""
    parts = [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            here = number * (len(parts) - 1) // count
            others = draw.sample([part for at, part in enumerate(parts) if at not in (here, here + 1)], 3)
            label = draw.randrange(4)
            choices = [*others[:label], parts[here + 1], *others[label:]]
            file.write(json.dumps({"page": parts[here], "choices": choices, "label": label}) + "\n")


def tasks(records: Path) -> list[dict[str, Any]]:
    """Two tasks on the same records."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(records)}}, "test_split": "test"}
    return [
        {
            **data, "task": "bits_per_byte", "output_type": "loglikelihood_rolling",
            "doc_to_text": "", "doc_to_target": "{{page}}", "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            **data, "task": "continuation", "output_type": "multiple_choice", "target_delimiter": "",
            "doc_to_text": "{{page}}", "doc_to_choice": "choices", "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
    ]  # fmt: skip


def main() -> None:
    """Prints one line per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what task=export wrote")
    parser.add_argument("text", type=Path, help="a text that the model has not been trained on")
    parser.add_argument("--passages", type=int, default=50)
    parser.add_argument("--characters", type=int, default=100, help="of a passage; two must fit the model's positions")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from lm_eval import simple_evaluate
    from transformers import AutoTokenizer

    model: dict[str, Any] = {"pretrained": str(arguments.folder)}
    model["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:  # lm-eval wants a token before the first one
        model["prefix_token_id"] = tokenizer.encode("\n", add_special_tokens=False)[0]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder, "records.jsonl")
        write_records(arguments.text.read_text(encoding="utf-8"), arguments.passages, arguments.characters, records)
        found = simple_evaluate("hf", model_args=model, tasks=tasks(records))
    assert found is not None  # None only on other ranks than the first
    for name, metrics in found["results"].items():
        value = next(value for key, value in metrics.items() if key.startswith(("bits_per_byte,", "acc,")))
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
