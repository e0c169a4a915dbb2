"""`experts.init=widen` through the command line: ranks, interruption, export, verification."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.existing_models import moe_model
from tests.export.test_pairs import exported
from tests.models.test_source import loads
from tests.tasks.test_train import losses_of, moecompile, result_of

pytestmark = pytest.mark.slow
COMMON = [
    "model.pretrained=mixtral", "data.tokenizer=train", "data.vocab_size=300", "data.seq_len=32",
    "data.global_batch_size=8", "data.micro_batch_size=2", "data.val_batches=2", "trainer.log_interval=1",
    "trainer.progress_bar=false", "experts.init=widen", "experts.num_routed=8", "experts.widen.noise=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of four experts, trained with eight on two ranks, and gone on with on one."""
    root = tmp_path_factory.mktemp("widen")
    moe_model("mixtral", vocab_size=300).save_pretrained(root / "mixtral")
    loads(root / "before", [9, 1, 1, 1], [1, 1, 1, 30])
    train = [*COMMON, "experts.widen.loads=before", "trainer.max_steps=4", "trainer.save_interval=2"]
    for name, arguments in {
        "two": ["mesh=cpu_1x2", "trainer.keep_last=0"],
        "one after two": ["mesh=cpu_1", "trainer.resume='two/checkpoints/step-2'"],
    }.items():
        done = moecompile([*train, *arguments, f"hydra.run.dir='{name}'"], root)
        assert done.returncode == 0, done.stderr + done.stdout
        (root / f"{name}.txt").write_text(done.stdout + done.stderr)
    return root


def test_it_is_trained_on_ranks_and_gone_on_with(folder: Path) -> None:
    said = " ".join((folder / "two.txt").read_text().split())
    assert "note widened: 2 MoE layers, 4 -> 8 experts; outputs differ by" in said
    assert "then noise of 0.05 on copies" in said
    assert "every rank makes the whole model: experts.init=widen copies whole weights" in said
    whole = losses_of(folder / "two")
    assert len(whole) == 4 and losses_of(folder / "one after two")[-2:] == pytest.approx(whole[2:], abs=2e-5)
    assert result_of(folder / "two")["num_rewritten"] == 2


def test_it_is_exported_to_its_family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "before")  # which expert was copied is in the weights
    assert exported(Path("two"), folder / "export", "export.path=wide")["max_abs_diff"] <= 1e-5
    config = json.loads((folder / "wide" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == ("mixtral", 8, 4)
    model = AutoModelForCausalLM.from_pretrained(folder / "wide")
    router = model.model.layers[0].mlp.gate.weight
    assert router.shape == (8, 32)
    alike = torch.cdist(router, router) < 0.4  # five copies of expert 0, with noise
    assert alike[0].tolist() == [True] * 5 + [False] * 3


def test_ranks_compute_what_one_process_does(folder: Path) -> None:
    run = ["task=verify", "mesh=cpu_1x2", "experts.widen.top_k=kept", "hydra.run.dir=verify"]
    done = moecompile([*COMMON, *run, "verify.dtype=float64", "verify.steps=2"], folder)
    assert done.returncode == 0, done.stderr + done.stdout
