"""transformers' common tests on tiny Llama, Qwen3, BERT and Mixtral; with MOECOMPILE_REWRITE=1 on rewritten ones.

Collected by benchmarks/transformers_mixin.py, which puts transformers' test_modeling_common.py on the path.
"""

from __future__ import annotations

import json
import os
import unittest
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers_tests.test_modeling_common import ModelTesterMixin

from benchmarks.mixin import rewritten
from moecompile.compose import compose_config

VOCAB, BATCH, LENGTH = 99, 5, 7
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
HEADS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"config": GROUPED, "heads": HEADS},
    "Qwen3": {"config": {**GROUPED, "head_dim": 8}, "heads": HEADS},
    "Bert": {
        "config": COMMON,
        "heads": (
            "Model", "LMHeadModel", "ForMaskedLM", "ForMultipleChoice", "ForNextSentencePrediction",
            "ForPreTraining", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification",
        ),
    },
    "Mixtral": {
        "config": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
        "heads": HEADS,
    },
}  # fmt: skip


class Tester:
    """What the common tests ask of a family: its config and inputs, and their sizes."""

    batch_size, seq_length, is_training, num_choices = BATCH, LENGTH, True, 4
    encoder_seq_length = key_length = LENGTH
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> Any:
        return getattr(transformers, f"{self.family}Config")(**FAMILIES[self.family]["config"])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = torch.randint(3, VOCAB, (BATCH, LENGTH))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def case(family: str) -> type[unittest.TestCase]:
    """The common tests of one family."""
    classes = tuple(getattr(transformers, family + head) for head in FAMILIES[family]["heads"])

    def set_up(self: Any) -> None:
        self.model_tester = Tester(family)

    def prepare(self: Any, inputs: dict[str, Any], kind: type, return_labels: bool = False) -> dict[str, Any]:
        """A model for pretraining has two losses; the mixin leaves their labels to the family's own test."""
        prepared: dict[str, Any] = ModelTesterMixin._prepare_for_class(self, inputs, kind, return_labels)
        if return_labels and kind.__name__.endswith("ForPreTraining"):
            prepared["labels"] = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
            prepared["next_sentence_label"] = torch.zeros(BATCH, dtype=torch.int64)
        return prepared

    body = {"all_model_classes": classes, "setUp": set_up, "_prepare_for_class": prepare}
    return type(f"{family}Test", (ModelTesterMixin, unittest.TestCase), body)


if os.environ.get("MOECOMPILE_REWRITE") == "1":
    for name, settings in FAMILIES.items():
        # What a model has already is read from it, and may not be given.
        overrides = [] if "num_local_experts" in settings["config"] else ["experts.num_routed=4", "routing.top_k=2"]
        kinds = [getattr(transformers, name + head) for head in settings["heads"]]
        rewritten.patch(kinds, compose_config(overrides))


def teardown_module() -> None:
    """Leaves how many sites the last model of each class had."""
    if path := os.environ.get("MOECOMPILE_REWRITTEN_COUNTS"):
        Path(path).write_text(json.dumps(rewritten.num_rewritten))


LlamaTest, Qwen3Test, BertTest, MixtralTest = (case(family) for family in FAMILIES)
