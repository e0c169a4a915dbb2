"""docs/examples/evaluate.py and ray_train.py: what lm-eval says of an export, and Ray Train's ranks, are right.

Both libraries are large: the tests are skipped where the extras `eval` and `ray` are not installed.
"""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.chat_models import save_mixtral

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "docs" / "examples"


# On a machine that does much else, a worker needs more than Ray's 60 s to begin; Ray would start it again, without end.
PATIENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240"}


def output(program: list[str], folder: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), **PATIENT}
    done = subprocess.run(program, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("ends", [True, False], ids=["end_of_text", "no_special_tokens"])
def test_the_scores_are_those_of_a_plain_loop(ends: bool, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: `pip install -e '.[eval]'`")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_mixtral(tmp_path / "model", None, initializer_range=0.3)  # scores that differ
    if not ends:  # as task=train leaves it
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: config[key] for key in config if not key.endswith("_token")}))
    text = (REPOSITORY / "moecompile" / "runtime" / "data" / "moby_dick.txt").read_text(encoding="utf-8")[90_000:96_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    program = [sys.executable, str(EXAMPLES / "evaluate.py"), str(folder), "text.txt", "--passages", "12"]
    said = dict(re.findall(r"^(\w+): ([\d.]+)$", output(program, tmp_path), re.MULTILINE))

    runpy.run_path(str(EXAMPLES / "evaluate.py"))["write_records"](text, 12, 100, tmp_path / "records.jsonl")
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert all(len({*record["choices"], record["page"]}) == 5 for record in records)
    assert all(record["page"] + record["choices"][record["label"]] in text for record in records)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id is not None) == ends
    first = tokenizer.eos_token_id if ends else tokenizer.encode("\n", add_special_tokens=False)[0]

    @torch.no_grad()
    def score(before: list[int], tokens: list[int]) -> float:
        """Nats of `tokens` after `before`."""
        logits = model(torch.tensor([before + tokens])).logits[0].log_softmax(-1)
        return -sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(tokens))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    nats = sum(score([first], encode(record["page"])) for record in records)
    size = sum(len(record["page"].encode()) for record in records)
    assert float(said["bits_per_byte"]) == pytest.approx(nats / size / math.log(2), abs=6e-4)
    right = 0
    for record in records:
        page = encode(record["page"])
        costs = [score(page, encode(record["page"] + choice)[len(page) :]) for choice in record["choices"]]
        right += costs.index(min(costs)) == record["label"]
    assert float(said["continuation"]) == pytest.approx(right / len(records), abs=6e-4)


@pytest.mark.nightly
def test_ray_trains_as_torchrun_does(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: `pip install -e '.[ray]'`")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    outputs = [output([sys.executable, str(EXAMPLES / "ray_train.py")], tmp_path)]
    outputs.append(output([*launch, str(EXAMPLES / "lightning_module.py")], tmp_path))
    losses = [set(re.findall(r"loss ([\d.]+) after 80 steps", said)) for said in outputs]
    assert len(losses[0]) == 1 and losses[0] == losses[1], outputs
