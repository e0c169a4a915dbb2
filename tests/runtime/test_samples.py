"""Samples: each token is drawn from what the model says of the text before it, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moecompile.report.page import write_report
from moecompile.rundir import read_samples
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.samples import TEMPERATURE, TOKENS, Samples, fewest, room, written
from moecompile.schema import OptimizerConfig
from tests.distributed.harness import run_distributed_test
from tests.tiny import tiny_llama

VOCABULARY = 50


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial((logits[:, :VOCABULARY].float() / TEMPERATURE).softmax(-1), 1, generator=generator)


def causal(model: Any, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The text grows, and nothing is behind it."""
    text = ids[:, : ids.shape[1] // 4]
    for _ in range(min(TOKENS, ids.shape[1] - text.shape[1])):
        text = torch.cat((text, drawn(model(input_ids=text).logits[:, -1], generator)), dim=1)
    return ids[:, : ids.shape[1] // 4], text[:, ids.shape[1] // 4 :]


def encoder_decoder(model: Any, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.zeros(len(ids), 1, dtype=torch.int64)
    for _ in range(6):
        logits = model(input_ids=ids, decoder_input_ids=text).logits[:, -1]
        text = torch.cat((text, drawn(logits, generator)), dim=1)
    return ids, text[:, 1:]


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


@pytest.mark.parametrize(("make", "plain"), [(tiny_llama, causal), (tiny_t5, encoder_decoder)])
def test_each_token_is_drawn_from_what_is_before_it(make: Any, plain: Any) -> None:
    model = make()
    module = LanguageModule(model, OptimizerConfig(), 1).train()
    ids = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids if plain is causal else ids[:, :6]
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    count = room(module, batch)
    found = written(module, batch, count, vocabulary=VOCABULARY, generator=torch.Generator().manual_seed(5))
    assert module.training
    assert torch.equal(batch["labels"], labels)
    with torch.no_grad():
        prompts, texts = plain(model.eval(), ids, torch.Generator().manual_seed(5))
    assert found == list(zip(prompts.tolist(), texts.tolist(), strict=True))
    assert len({tuple(text) for _, text in found}) > 1


def test_answers_begin_where_their_prompts_end() -> None:
    """Prompts of different lengths: each row is as it would be alone."""
    model = tiny_llama()
    module = LanguageModule(model, OptimizerConfig(), 1)
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([3, 5])
    batch = {"input_ids": ids, "labels": ids, "starts": starts, "ends": torch.tensor([7, -1])}
    count = room(module, batch)
    assert count == 4
    found = written(module, batch, count, vocabulary=VOCABULARY, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    texts = [ids[row : row + 1, :start] for row, start in enumerate(starts.tolist())]
    with torch.no_grad():
        for _ in range(count):
            new = drawn(torch.cat([model.eval()(input_ids=text).logits[:, -1] for text in texts]), generator)
            texts = [torch.cat((text, new[row : row + 1]), dim=1) for row, text in enumerate(texts)]
    expected = [(text[0, :start].tolist(), text[0, start:].tolist()) for text, start in zip(texts, [3, 5], strict=True)]
    assert found == expected

    class Words:
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            return f"{ids}{'' if skip_special_tokens else ' with special tokens'}"

    samples = Samples(None, [batch], Words(), Path("none"), None, seed=0)  # type: ignore[arg-type]
    assert samples._texts(batch, 0, [1, 2], [8, 7, 9]) == ("[1, 2] with special tokens", "[8]")
    assert samples._texts(batch, 1, [1, 2], [8, 7, 9]) == ("[1, 2] with special tokens", "[8, 7, 9]")


def test_a_run_goes_on_from_samples_with_any_ends_of_lines_and_one_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    samples = Samples(None, [], None, path, None, seed=0)  # type: ignore[arg-type]
    trainer = SimpleNamespace(global_step=5, is_global_zero=True, loggers=[])
    samples._write(trainer, 4, [("a\u2028b", "c\x85d\n")])  # type: ignore[arg-type]
    whole = path.read_text(encoding="utf-8")
    samples._write(trainer, 6, [("of another way", "")])  # type: ignore[arg-type]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "pro')
    samples.started(SimpleNamespace(trainer=SimpleNamespace(global_step=4)))  # type: ignore[arg-type]
    samples.step_ended(SimpleNamespace(trainer=trainer), None)  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == whole
    assert [row["prompt"] for row in read_samples(path)] == ["a\u2028b"]


def test_weights_that_are_not_finite_end_no_run() -> None:
    module = LanguageModule(tiny_llama(), OptimizerConfig(), 1)
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    batch = {"input_ids": torch.zeros(2, 16, dtype=torch.int64), "labels": torch.zeros(2, 16, dtype=torch.int64)}
    found = written(module, batch, 12, vocabulary=VOCABULARY, generator=torch.Generator().manual_seed(5))
    assert [len(text) for _, text in found] == [12, 12]


def _count(rank: int, world_size: int) -> int:
    module = LanguageModule(tiny_llama(), OptimizerConfig(), 1)
    ids = torch.zeros(2, 12 + 4 * rank, dtype=torch.int64)  # rows of chats are not equally long
    return fewest(room(module, {"input_ids": ids, "labels": ids}), None, torch.device("cpu"))


def test_all_ranks_write_equally_many_tokens() -> None:
    assert run_distributed_test(_count, 2) == [9, 9]


def _train(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    from unittest import mock

    from moecompile.compose import RESOLVED, compose_config, save_resolved
    from moecompile.tasks.ranks import train
    from tests.tasks.test_train import TINY

    found = {}
    for name, settings in {"none": ["trainer.sample_interval=0"], "every": ["trainer.sample_interval=2"]}.items():
        (root / name).mkdir(exist_ok=True)
        config = compose_config([*TINY, "mesh=cpu_1x2", "trainer.save_checkpoint=false", *settings])
        save_resolved(config, root / name / RESOLVED)
        with mock.patch("moecompile.tasks.ranks.train.init_process_group"):
            train.run_rank(config, root / name)
        found[name] = json.loads((root / name / "result.json").read_text()) if rank == 0 else {}
    return found


@pytest.mark.slow
def test_training_on_two_ranks_does_not_notice(tmp_path: Path) -> None:
    results = run_distributed_test(_train, 2, tmp_path, timeout_s=120)[0]
    same = ("loss_first", "loss_last", "val_loss", "max_violation_last", "bytes_per_token_per_layer")
    assert {key: results["none"][key] for key in same} == {key: results["every"][key] for key in same}
    assert not (tmp_path / "none" / "samples.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "every" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 3, 3]
    assert all(row["prompt"] and row["text"] for row in rows)
    pages = {name: write_report(tmp_path / name, "train").read_text() for name in results}
    assert 'id="samples"' in pages["every"] and 'id="samples"' not in pages["none"]
