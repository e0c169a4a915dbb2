"""The recipes of pretrained models, with the real weights: run where the packages are installed (`make real-models`)."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from moecompile.compose import compose_config
from moecompile.models.build import build_model, example_inputs, pretrained_folder
from moecompile.pipeline import Compilation, compile_with_report
from tests.models.packaged import REAL
from tests.tasks.test_train import moecompile, result_of

pytestmark = pytest.mark.slow

# A few steps of the recipe: everything but the time that it takes.
SHORT = [
    "trainer.max_steps=2", "trainer.val_interval=2", "trainer.log_interval=1", "data.val_batches=1",
    "data.micro_batch_size=1", "data.global_batch_size=4", "trainer.progress_bar=false",
]  # fmt: skip
SENTENCES = (
    "Call me Ishmael.", "It is not down in any map; true places never are.", "A whale-ship was my Yale College.",
)  # fmt: skip


def needs(recipe: str) -> pytest.MarkDecorator:
    """Skips where the recipe's package is not installed."""
    try:
        found = metadata.version(REAL[recipe])
    except metadata.PackageNotFoundError:
        found = None
    return pytest.mark.skipif(found is None, reason=f"{REAL[recipe]} is not installed: make real-models")


def compiled(recipe: str) -> tuple[nn.Module, Compilation]:
    """The dense model and the compiled one."""
    config = compose_config([f"recipe={recipe}"])
    dense = build_model(config.model, config.seed).eval()
    model = build_model(config.model, config.seed)
    return dense, compile_with_report(
        model, config, example=example_inputs(model, config.data.seq_len), until="rewrite"
    )


@needs("upcycle_smollm2")
def test_smollm2_is_the_same_model_at_step_0() -> None:
    dense, result = compiled("upcycle_smollm2")
    assert len(result.plan.layers) == 4 and result.step0.max_abs_diff is not None
    text = Tokenizer.from_file(str(_folder("upcycle_smollm2") / "tokenizer.json")).encode(" ".join(SENTENCES)).ids
    batch = {"input_ids": torch.tensor([text])}
    with torch.no_grad():
        before, after = dense(**batch).logits, result.model.eval()(**batch).logits
    assert (after - before).abs().max() <= 1e-3  # of logits up to 40
    targets = batch["input_ids"][0, 1:]
    losses = [nn.functional.cross_entropy(logits[0, :-1], targets).item() for logits in (before, after)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0] < 8  # it is the pretrained model: random weights have a loss of 10.8
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(dense.generate(**batch, **greedy), result.model.generate(**batch, **greedy))


@needs("upcycle_smollm2")
def test_smollm2_trains_on_four_ranks_beside_the_dense_model(tmp_path: Path) -> None:
    run = moecompile(["recipe=upcycle_smollm2", *SHORT, "hydra.run.dir=out"], tmp_path)
    assert run.returncode == 0, run.stderr + run.stdout
    result = result_of(tmp_path / "out")
    assert (result["world_size"], result["num_rewritten"], result["steps"]) == (4, 4, 2)
    assert result["val_loss_first"] == pytest.approx(result["baseline"]["val_loss_first"], abs=1e-4)
    assert result["val_loss"] < result["val_loss_first"] < 6
    assert result["max_violation_last"] > 0  # loads are counted
    assert json.dumps(result["baseline"]["val_loss"]) in (tmp_path / "out" / "result.json").read_text()


@needs("upcycle_bert")
def test_the_embeddings_of_sentences_are_those_of_the_dense_encoder() -> None:
    dense, result = compiled("upcycle_bert")
    assert len(result.plan.layers) == 6
    assert result.step0.max_abs_diff is not None and result.step0.max_abs_diff <= 1e-4
    before, after = (_embeddings(model) for model in (dense, result.model.eval()))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert (before @ before.T)[0, 1:].max() < 0.9  # the sentences are told apart


@needs("upcycle_bert")
def test_an_encoder_is_not_trained_on_text(tmp_path: Path) -> None:
    run = moecompile(["recipe=upcycle_bert", "task=train", "mesh=cpu_1"], tmp_path)
    assert run.returncode == 2
    assert (
        "error: data.objective=causal: the model minilm_l6, a BertModel, writes no text. Use task=compile" in run.stderr
    )


def _folder(recipe: str) -> Path:
    folder = pretrained_folder(compose_config([f"recipe={recipe}"]).model)
    assert folder is not None
    return folder


@torch.no_grad()
def _embeddings(model: nn.Module) -> Tensor:
    """As sentence-transformers computes them: the mean over a sentence's tokens, of length 1."""
    tokenizer = Tokenizer.from_file(str(_folder("upcycle_bert") / "tokenizer.json"))
    tokenizer.no_padding()
    means = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0].mean(0) for text in SENTENCES]
    return nn.functional.normalize(torch.stack(means), dim=-1)
