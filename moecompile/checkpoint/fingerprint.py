"""What a run computes and what it learns from, as names and values for the checkpoint. Needs no torch.

    KEY of the config                every key, except those that are listed here
    model.class, model.config.KEY    the model: every setting of its config that affects its outputs
    data.text, data.tokenizer        hashes of their content: a file may change under the same name

A key that is added to the schema is compared until somebody lists it here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from fnmatch import translate
from functools import cache
from typing import Any

from moecompile.checkpoint.fit import MODEL_CLASS
from moecompile.schema import Config

TEXT, TOKENIZER = "data.text", "data.tokenizer"
_PLACES = ("data.corpus", "data.path")
"""Locations of the text, which do not matter if its content is known."""

IN_THE_PLAN = (
    "adapters.alpha", "adapters.dense", "adapters.experts", "adapters.kind", "adapters.rank", "adapters.train_router",
    "data.mask_padding", "experts.backend", "experts.drop_ratio", "experts.granularity", "experts.init",
    "experts.latent_norm", "experts.latent_size", "experts.layers", "experts.match", "experts.num_identity",
    "experts.num_routed", "experts.num_shared", "experts.shared_gate", "experts.shared_routed", "experts.sites",
    "experts.weight_scaling", "per_layer", "plan", "routing.bias", "routing.choice", "routing.even_groups",
    "routing.expert_scale",
    "routing.group_score", "routing.groups", "routing.max_nodes", "routing.norm", "routing.normalize", "routing.scale",
    "routing.score", "routing.top_groups", "routing.top_k",
)  # fmt: skip
"""Keys that decide the plan, which is compared layer by layer (moecompile.checkpoint.fit)."""
IN_THE_MODEL = (
    "experts.widen.loads", "experts.widen.noise", "experts.widen.top_k", "model.architecture", "model.config",
    "model.init", "model.package", "model.pretrained",
)  # fmt: skip
"""Keys that decide the model, whose own config is compared; its weights are those of the checkpoint."""
IN_THE_DATA = ("data.kind", "data.layout", "data.text_field", "data.tokenizer")
"""Keys that decide text and tokens, whose content is compared."""
MAY_DIFFER = (
    # What only training uses.
    "adapters.dropout", "balance.losses.global_batch", "balance.losses.micro_batch", "balance.losses.sequence",
    "balance.losses.z", "balance.rate", "balance.recenter", "balance.rule", "balance.update", "optimizer.*",
    "routing.capacity_factor", "routing.drop", "routing.hot_experts", "routing.jitter", "routing.replay",
    "routing.skew", "routing.workload", "trainer.allow_changes", "trainer.async_save", "trainer.baseline",
    "trainer.calibrate", "trainer.callbacks", "trainer.checkpointing", "trainer.compile", "trainer.gather",
    "trainer.keep_last", "trainer.log_interval", "trainer.loggers", "trainer.max_restarts", "trainer.max_steps",
    "trainer.on_nan", "trainer.precision", "trainer.progress_bar", "trainer.reduce", "trainer.resume",
    "trainer.sample_interval", "trainer.save_checkpoint", "trainer.save_interval", "trainer.threads_per_rank",
    "trainer.timeout_s", "trainer.val_interval",
    # How it is computed, and where.
    "data.cache", "data.epochs", "data.micro_batch_size", "data.val_batches", "dispatch.*", "embeddings.*",
    "hardware.*", "imported.*", "launcher.*", "mesh.*", "model.attention", "model.device", "model.load", "pipeline.*",
    "stack.*", "workload.*",
    # Names, permissions and other tasks.
    "bench.*", "chat.*", "compare", "debug", "export.*", "given", "model.name", "model.published", "name", "place.*",
    "routing.allow_future", "rehearse.*", "search.*", "task.*", "verify.*",
)  # fmt: skip
"""Keys that change neither the function that is trained nor the data that come next."""

_NO_FUNCTION = {
    "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation", "id2label",
    "initializer_factor", "initializer_range", "label2id", "name_or_path", "output_attentions", "output_hidden_states",
    "output_router_logits", "problem_type", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "router_z_loss_coef", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Settings of transformers that change neither the outputs nor the weights of a trained model."""


def settings(config: Config) -> dict[str, Any]:
    """All keys of the config that are compared as they are, by dotted path, with plain values."""
    listed = _listed()
    return {path: value for path, value in _leaves("", config) if not listed.match(path)}


def of_training(config: Config) -> dict[str, str]:
    """How the optimizer steps, as text by dotted path: what a dense baseline must have for all of its steps."""
    values = {path: str(value) for path, value in _leaves("", config) if path.startswith("optimizer.")}
    values["trainer.precision"] = config.trainer.precision.value
    if config.optimizer.min_lr_ratio != 1:  # else the rate does not depend on where it ends
        values["trainer.max_steps"] = str(config.trainer.max_steps)
    return values


@cache
def _listed() -> re.Pattern[str]:
    """Matches the keys that are compared in another way, or not at all."""
    return re.compile("|".join(map(translate, (*IN_THE_PLAN, *IN_THE_MODEL, *IN_THE_DATA, *MAY_DIFFER))))


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key of a config."""
    if dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _leaves(f"{path}.{entry.name}" if path else entry.name, getattr(value, entry.name))
    else:
        yield path, value.value if isinstance(value, Enum) else value


def data_settings(config: Config, known: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which tokens come in which order. known: from `fingerprint`."""
    order = {path: value for path, value in settings(config).items() if path == "seed" or path.startswith("data.")}
    return order | {path: known[path] for path in (TEXT, TOKENIZER)}


def fingerprint(model: object, *, text_hash: str, tokenizer: str) -> dict[str, Any]:
    """Names and values of a model and its data.

    Args:
        model: a module; one of transformers has a config. text_hash: of the text. tokenizer: its definition.
    """
    values: dict[str, Any] = {MODEL_CLASS: type(model).__name__}
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if callable(to_dict):
        plain = json.loads(json.dumps(to_dict(), default=str))  # as state.json will be read
        values |= dict(_flat("model.config", plain))
    return values | {TEXT: text_hash, TOKENIZER: content_hash(tokenizer)}


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
