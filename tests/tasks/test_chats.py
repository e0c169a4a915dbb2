"""Fine-tuning a Hugging Face MoE on chats through the command line: ranks, interruption, layouts, verification, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, OPTForCausalLM

from tests.chat_models import CHATML, chats, save_mixtral, tokenizer, unmarked, write_lines
from tests.tasks.test_train import losses_of, moecompile, result_of

pytestmark = pytest.mark.slow
COMMON = [
    "data=sft", "data.seq_len=128", "data.global_batch_size=8", "data.micro_batch_size=2", "data.val_fraction=0.1",
    "trainer.log_interval=1", "trainer.save_interval=1", "trainer.keep_last=0",
    "optimizer.warmup_steps=2", "optimizer.lr=0.01", "trainer.progress_bar=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with a chat template, 90 chats, and four runs: whole on one rank and on two, each gone on with."""
    root = tmp_path_factory.mktemp("chats")
    save_mixtral(root / "mixtral", unmarked(CHATML))
    write_lines(root / "chats.jsonl", chats(90))
    runs = {
        "one": ["mesh=cpu_1"],
        "two": ["mesh=cpu_1x2", "data.epochs=0.66", "trainer.calibrate=always"],  # which are 6 steps
        "two after one": ["mesh=cpu_1x2", "trainer.resume='one/checkpoints/step-3'"],
        "one after two": ["mesh=cpu_1", "trainer.resume='two/checkpoints/step-2'", "data.epochs=0.66"],
    }
    for name, arguments in runs.items():
        run(root, name, *arguments)
    return root


def run(root: Path, name: str, *arguments: str, code: int = 0, model: str = "mixtral") -> str:
    steps = [] if any("epochs" in word for word in arguments) else ["trainer.max_steps=6"]
    given = [*steps, f"model.pretrained={model}", "data.path=chats.jsonl", "data.cache=cache", *COMMON, *arguments]
    done = moecompile([*given, f"hydra.run.dir='{name}'"], root)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


def test_losses_are_those_of_the_whole_run_on_any_mesh(folder: Path) -> None:
    whole = losses_of(folder / "one")
    assert len(whole) == 6 and whole[-1] < whole[0] - 0.05
    for name in ("two", "two after one", "one after two"):
        assert losses_of(folder / name) == pytest.approx(whole, abs=2e-5), name
        assert result_of(folder / name)["val_loss"] == pytest.approx(result_of(folder / "one")["val_loss"], abs=2e-5)


def test_the_machine_is_measured_where_no_rank_reads_the_whole_folder(folder: Path) -> None:
    assert json.loads((folder / "two" / "forecast.json").read_text())["hardware"] == "this_machine"


def test_the_result_says_what_was_learned(folder: Path) -> None:
    """Against counts by hand: every assistant message, its end, and the prompt before it."""
    result, own = result_of(folder / "one"), tokenizer(unmarked(CHATML))
    supervised = tokens = 0
    for chat in chats(90):
        tokens += len(own.apply_chat_template(chat["messages"], tokenize=True)["input_ids"]) - 1
        for message in chat["messages"]:
            if message["role"] == "assistant":
                supervised += len(own(message["content"], add_special_tokens=False)["input_ids"]) + 1
    assert result["data_truncated"] > 0 and result["data_left_out"] == 0
    assert (result["data_files"], result["data_skipped"], result["data_records"]) == (1, 0, 90)
    assert 0.9 * tokens < result["data_tokens"] < tokens and 0.8 * supervised < result["data_supervised"] < supervised
    assert result["data_rows"] < 90 and 0.9 < result["data_fill"] <= 1.0
    assert result["unigram_entropy"] is None
    for name in ("two", "two after one"):
        assert {k: v for k, v in result_of(folder / name).items() if k.startswith("data_")} == {
            k: v for k, v in result.items() if k.startswith("data_")
        }
    stores = [path for path in (folder / "cache").iterdir() if (path / "meta.json").is_file()]
    assert len(stores) == 1


@pytest.mark.parametrize(("layout", "cp"), [("pack", 1), ("pad", 1), ("pad", 2)])
def test_ranks_compute_what_one_process_does(folder: Path, layout: str, cp: int) -> None:
    output = run(
        folder, f"verify {layout} {cp}", "task=verify", f"data.layout={layout}", "mesh=cpu_1x2", f"mesh.cp={cp}",
        "verify.steps=2", "verify.dtype=float64",
    )  # fmt: skip
    result = result_of(folder / f"verify {layout} {cp}")
    assert result["status"] == "ok" and all(check["passed"] for check in result["checks"]), output


def test_a_dense_model_whose_layers_are_traced_takes_padding(folder: Path) -> None:
    """OPT has its FFN inline in a layer that gets the mask, and does not keep packed chats apart."""
    opt = OPTConfig(
        vocab_size=480, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=0, eos_token_id=0, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(opt).save_pretrained(folder / "opt")
    tokenizer(unmarked(CHATML)).save_pretrained(folder / "opt")
    experts = ["experts.num_routed=4", "routing.top_k=2", "trainer.max_steps=2", "data.layout=pad"]
    for name, mesh in (("opt one", "cpu_1"), ("opt two", "cpu_1x2")):
        run(folder, name, f"mesh={mesh}", *experts, model="opt")
    assert losses_of(folder / "opt two") == pytest.approx(losses_of(folder / "opt one"), abs=2e-5)
    output = run(folder, "opt packed", "mesh=cpu_1", *experts[:-1], model="opt", code=2)
    assert "data.layout=pack: chats in one row of the model opt would see each other" in output


@pytest.mark.parametrize("mesh", ["cpu_1", "cpu_1x2"])
def test_a_bad_record_is_one_message(folder: Path, mesh: str) -> None:
    rows: list[dict[str, Any]] = chats(500)
    rows[400] = {"messages": [{"role": "human", "content": "x"}]}
    write_lines(folder / "bad.jsonl", rows)
    output = run(folder, f"bad {mesh}", f"mesh={mesh}", "data.path=bad.jsonl", code=2)
    message = (
        "data.path=bad.jsonl line 401: messages[0].role is 'human', not one of system, developer, user, assistant, tool"
    )
    assert output.count(message) == 1 and "Traceback" not in output


def test_a_corpus_of_tables_and_lines_with_a_new_model(folder: Path) -> None:
    """`data=corpus` on two ranks: the tokenizer is made once, and so are tokens."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    root = folder / "corpus"
    root.mkdir()
    texts = [" ".join(message["content"] for message in chat["messages"]) for chat in chats(300)]
    datasets.Dataset.from_dict({"text": texts[:150]}).to_parquet(root / "a.parquet")
    write_lines(root / "b.jsonl", [{"text": text} for text in texts[150:]])
    tiny = [
        "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.intermediate_size=64",
        "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2", "data.vocab_size=300",
        "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8", "trainer.max_steps=3",
        "trainer.log_interval=1", "optimizer.warmup_steps=1",
    ]  # fmt: skip
    for name, mesh in (("corpus one", "cpu_1"), ("corpus two", "cpu_1x2")):
        given = [
            "data=corpus",
            "data.path=corpus",
            "data.cache=cache",
            f"mesh={mesh}",
            *tiny,
            f"hydra.run.dir='{name}'",
        ]
        done = moecompile(given, folder)
        assert done.returncode == 0, done.stderr + done.stdout
        assert "2 files, 300 documents, " in done.stdout
        assert (folder / name / "tokenizer.json").is_file()
    assert losses_of(folder / "corpus two") == pytest.approx(losses_of(folder / "corpus one"), abs=2e-5)
    assert json.loads((folder / "corpus one" / "result.json").read_text())["data_documents"] == 300
