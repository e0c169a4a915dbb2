"""A batch of chats through a compiled MoE model: loss, gradients and loads are those of each chat alone."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from moecompile.models.build import example_inputs
from moecompile.nn import update_balance
from moecompile.pipeline import compile_model
from moecompile.runtime.data import IGNORED, ChatRows
from moecompile.runtime.module import LanguageModule
from moecompile.schema import OptimizerConfig
from tests.tiny import config

LENGTHS = [[5, 3], [7], []]  # chats of each row; the last row is padding alone
VOCAB, TOP_K = 61, 2


def a_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    settings = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=TOP_K, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(settings, experts_implementation="eager").double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def chats() -> list[list[tuple[Tensor, Tensor]]]:
    """(input ids, labels) of each chat of each row; every second label is no target."""
    generator, rows = torch.Generator().manual_seed(1), []
    for lengths in LENGTHS:
        row = []
        for length in lengths:
            ids, labels = torch.randint(3, VOCAB, (2, length), generator=generator)
            row.append((ids, torch.where(torch.arange(length) % 2 == 0, labels, IGNORED)))
        rows.append(row)
    return rows


def a_batch(*, packed: bool) -> dict[str, Tensor]:
    rows = ChatRows.__new__(ChatRows)
    rows.packed, rows.pad_id = packed, 0
    items = []
    alone = [[chat] for chats_of_row in chats() for chat in chats_of_row]
    for row in chats() if packed else alone:
        empty = [torch.zeros(0, dtype=torch.int64)]
        items.append(
            {
                "input_ids": torch.cat(empty + [ids for ids, _ in row]),
                "labels": torch.cat(empty + [labels for _, labels in row]),
                "position_ids": torch.cat(empty + [torch.arange(len(ids)) for ids, _ in row]),
            }
        )
    return rows.collate(items)


@pytest.mark.parametrize("packed", [True, False])
def test_chats_in_a_batch_are_as_if_alone(packed: bool) -> None:
    """Against transformers' own model on one chat at a time, in float64; padding reaches no expert."""
    own = a_mixtral()
    ours = config("data.kind=sft")
    model = compile_model(copy.deepcopy(own), ours, example=example_inputs(own, 8))
    batch = a_batch(packed=packed)
    assert batch["attention_mask"].sum() == 15 < batch["attention_mask"].numel()
    loss, num_tokens = LanguageModule(model, OptimizerConfig(), 1).summed_loss(batch)
    loss.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for ids, labels in (chat for row in chats() for chat in row):
        logits = own(input_ids=ids[None], use_cache=False).logits[0]
        expected = expected + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert num_tokens == 3 + 2 + 4
    wanted = dict(own.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0, atol=1e-9, msg=name)
    for layer in update_balance(model):
        assert layer.tokens == 15 and int(layer.load.sum()) == TOP_K * 15


def test_a_validation_loss_is_on_disk_when_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed after it goes on from the checkpoint of the same step, and validates that step no more."""
    module = LanguageModule(nn.Linear(1, 1), OptimizerConfig(), 40)
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=100)
    trainer = SimpleNamespace(loggers=[logger], global_step=20)
    monkeypatch.setattr(LanguageModule, "trainer", trainer)
    monkeypatch.setattr(LanguageModule, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr("moecompile.runtime.module.groups_of", lambda trainer: SimpleNamespace(losses=None))
    monkeypatch.setattr("moecompile.runtime.module.dist.all_reduce", lambda *args, **kwargs: None)
    module._val_sums = torch.tensor([6.0, 2.0])
    module.on_validation_epoch_end()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,val_loss", "20,3.0"]
