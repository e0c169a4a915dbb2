"""From an installed package to text: a tiny GGUF is upcycled, trained on two ranks beside its dense self, exported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.models.packaged import TOKENS, gguf_of, install, tiny_llama
from tests.tasks.test_train import moecompile, result_of

pytestmark = pytest.mark.slow

RUN = [
    "model.architecture=null", "model.config={}", "model.package=tiny-llama", "model.name=tiny", "data=moby_dick_model",
    "experts.num_routed=4", "experts.layers=1:", "mesh=cpu_1x2", "data.seq_len=32", "data.micro_batch_size=2",
    "data.global_batch_size=4", "data.val_batches=2", "data.val_fraction=0.01", "trainer.max_steps=3",
    "trainer.log_interval=1", "trainer.progress_bar=false", "trainer.baseline=dense", "optimizer.lr=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, `out`, and of what it needs."""
    folder = tmp_path_factory.mktemp("packaged")
    install(folder / "site", "tiny-llama", {"tiny_llama/tiny.gguf": gguf_of(tiny_llama(), folder / "tiny.gguf")})
    run = moecompile([*RUN, "hydra.run.dir=out"], folder, **_variables(folder))
    assert run.returncode == 0, run.stderr + run.stdout
    assert run.stdout.count("converting tiny.gguf") <= 1  # whichever rank came first
    return folder


def _variables(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}


def test_it_is_trained_beside_its_dense_self(trained: Path) -> None:
    result = result_of(trained / "out")
    dense = result["baseline"]
    assert (result["world_size"], result["num_rewritten"], result["steps"], dense["steps"]) == (2, 1, 3, 3)
    assert result["val_loss_first"] == pytest.approx(dense["val_loss_first"], abs=1e-4)
    assert max(result["val_loss"], dense["val_loss"]) < result["val_loss_first"]
    assert result["max_violation_last"] > 0  # the model trains, and counts
    assert 2 < result["unigram_entropy"] < 5  # 262 tokens, most of them bytes
    assert (trained / "out" / "tokenizer.json").is_file()


def test_what_was_exported_writes_text_without_moecompile(trained: Path) -> None:
    from transformers import pipeline

    arguments = ["task=export", "export.run=out", "export.path=model", "hydra.run.dir=exported"]
    run = moecompile(arguments, trained, **_variables(trained))
    assert run.returncode == 0, run.stderr + run.stdout
    assert result_of(trained / "exported")["architecture"] == "Qwen2MoeForCausalLM"  # a layer stayed dense
    write = pipeline("text-generation", model=str(trained / "model"), device="cpu")
    assert len(write.tokenizer) == len(TOKENS)
    (text,) = write("the whale", max_new_tokens=5, do_sample=False)
    assert text["generated_text"].startswith("the whale") and len(text["generated_text"]) > len("the whale")
