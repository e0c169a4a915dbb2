"""What a run computes and what it learns from, as names and values for the checkpoint. Needs no torch.

    model.class, model.config.KEY    the model: every setting of its config that affects its outputs
    data.text, data.tokenizer        hashes of their content: a file may change under the same name

Settings that may change when a run is resumed (mesh, dispatch, optimizer, intervals) are not included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from moecompile.schema import Config

TEXT = "data.text"
_FIXED = ("data.objective", "data.corpus", "data.path", "data.vocab_size", "data.seq_len", "data.global_batch_size",
          "data.val_fraction", "seed")  # fmt: skip
_PLACES = ("data.corpus", "data.path")
"""Locations of the text, which do not matter if its content is known."""

_NO_FUNCTION = {
    "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation", "id2label",
    "initializer_factor", "initializer_range", "label2id", "name_or_path", "output_attentions", "output_hidden_states",
    "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "router_z_loss_coef", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of transformers that change neither the outputs nor the weights of a trained model."""


def settings(config: Config) -> dict[str, Any]:
    """The settings that determine the next data, by dotted path."""
    values = {}
    for path in _FIXED:
        value: Any = config
        for key in path.split("."):
            value = getattr(value, key)
        values[path] = getattr(value, "value", value)
    return values


def fingerprint(model: object, *, text_hash: str, tokenizer: str) -> dict[str, Any]:
    """Names and values of a model and its data.

    Args:
        model: a module; one of transformers has a config. text_hash: of the text. tokenizer: its definition.
    """
    values: dict[str, Any] = {"model.class": type(model).__name__}
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if callable(to_dict):
        plain = json.loads(json.dumps(to_dict(), default=str))  # as state.json will be read
        values |= dict(_flat("model.config", plain))
    return values | {TEXT: text_hash, "data.tokenizer": content_hash(tokenizer)}


def content_hash(text: str) -> str:
    """The hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, saved value, value now) of each difference; a value that is missing on one side is "not set"."""
    has_text = TEXT in saved and TEXT in now
    for name in dict.fromkeys((*saved, *now)):
        before, after = saved.get(name, "not set"), now.get(name, "not set")
        if before != after and not (has_text and name in _PLACES):
            yield name, before, after


def _flat(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if key.startswith("_") or key in _NO_FUNCTION or key.endswith(("dropout", "dropout_rate", "_pdrop")):
            continue
        if isinstance(item, Mapping):
            yield from _flat(f"{prefix}.{key}", item)
        else:
            yield f"{prefix}.{key}", item
