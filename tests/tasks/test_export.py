"""From training to transformers and back through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.runs import scramble
from tests.tasks.test_train import TINY, losses_of, moecompile, result_of


@pytest.mark.slow
def test_the_demo_becomes_deepseek_v3(tmp_path: Path) -> None:
    trained = moecompile([*TINY, "hydra.run.dir=run"], tmp_path)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    done = moecompile(["task=export", "export.run=run", "hydra.run.dir=out"], tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    result = result_of(tmp_path / "out")
    assert (result["task"], result["recipe"], result["status"]) == ("export", "deepseek_ep", "ok")
    assert (result["architecture"], result["path"]) == ("DeepseekV3ForCausalLM", str(tmp_path / "out" / "model"))
    assert result["max_abs_diff"] <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(result["path"])
    tokenizer = AutoTokenizer.from_pretrained(result["path"])
    tokens = model.generate(
        **tokenizer("Call me", return_tensors="pt"),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert tokenizer.decode(tokens[0]).startswith("Call me")
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert [bool(bias.any()) for bias in biases] == [True]  # three steps of the rule

    second = moecompile(["task=export", "export.run=run", "export.path=out/model", "hydra.run.dir=again"], tmp_path)
    assert (second.returncode, "is there already" in second.stderr) == (2, True)


@pytest.mark.slow
def test_a_pretrained_model_trains_alike_loaded_sharded_and_in_full(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config)
    scramble(dense)
    dense.save_pretrained(tmp_path / "dense")
    arguments = [
        "recipe=mixtral_ep", "model.architecture=null", "model.pretrained=dense", *TINY[3:4], *TINY[7:],
        "mesh.ep=2",
    ]  # fmt: skip
    for load in ("sharded", "full"):
        done = moecompile([*arguments, f"model.load={load}", f"hydra.run.dir={load}"], tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
    assert losses_of(tmp_path / "sharded") == losses_of(tmp_path / "full")
    assert result_of(tmp_path / "full")["step0_max_abs_diff"] <= 1e-5
    assert result_of(tmp_path / "sharded")["step0_reason"].startswith(
        "not compared: the model is sharded over the ranks"
    )
    assert (
        json.loads((tmp_path / "full" / "result.json").read_text())["val_loss"]
        == result_of(tmp_path / "sharded")["val_loss"]
    )
