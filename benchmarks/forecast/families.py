"""A model's shape from a plain description, as in the published tables (and conf/model).

Keys: layers, hidden, vocab, heads, kv, head_dim, ffn, moe_ffn, dense_layers, dense_ffn, experts, topk, shared,
shared_ffn, moe_every, groups, topk_group, mtp, window, mla {q_lora, kv_lora, nope, rope, v}, latent, num_in, tied, and
for a hybrid model `pattern`, a letter per layer (M scan, E experts, * attention), with `scan` {heads, head_dim, groups,
state}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moecompile.errors import ConfigError
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape, Scan

_SIZES = (
    "layers",
    "hidden",
    "vocab",
    "heads",
    "kv",
    "head_dim",
    "dense_layers",
    "moe_every",
    "mtp",
    "window",
    "mla",
    "tied",
)
_WIDTHS = ("ffn", "moe_ffn", "dense_ffn", "shared", "shared_ffn", "latent", "num_in", "activation")
_KEYS = frozenset((*_SIZES, *_WIDTHS, "experts", "topk", "groups", "topk_group", "pattern", "scan"))


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape of the model that `config` describes.

    Raises:
        ConfigError: a key is missing or unknown.
    """
    if unknown := sorted(set(config) - _KEYS):
        raise ConfigError(
            f"{name}.{unknown[0]}", config[unknown[0]], "is not part of a model's description", "Remove it"
        )
    try:
        layers = _hybrid(config) if "pattern" in config else _uniform(config)
        return ModelShape(
            name=name, hidden=config["hidden"], vocab=config["vocab"], layers=tuple(layers),
            tied=bool(config.get("tied", False)),
        )  # fmt: skip
    except KeyError as error:
        raise ConfigError(f"{name}.{error.args[0]}", None, "is not given", "Add it to the description") from error


def _attention(config: Mapping[str, Any], window: int | None = None) -> Attention:
    heads = config["heads"]
    if (mla := config.get("mla")) is not None:
        return Attention(
            heads=heads, kv_heads=heads, d_qk=mla["nope"] + mla["rope"], d_v=mla["v"], q_rank=mla["q_lora"] or 0,
            kv_rank=mla["kv_lora"], d_rope=mla["rope"],
        )  # fmt: skip
    d_head = config.get("head_dim") or config["hidden"] // heads
    return Attention(heads=heads, kv_heads=config["kv"], d_qk=d_head, d_v=d_head, window=window)


def _experts(config: Mapping[str, Any]) -> Experts:
    width = config.get("moe_ffn") or config["ffn"]
    return Experts(
        experts=config["experts"], top_k=config["topk"], d_expert=width, num_in=config.get("num_in", 2),
        activation=config.get("activation", "swiglu"),
        d_shared=config.get("shared_ffn") or config.get("shared", 0) * width, latent=config.get("latent"),
        groups=config.get("groups", 1), top_groups=config.get("topk_group", 1),
    )  # fmt: skip


def _uniform(config: Mapping[str, Any]) -> list[Layer]:
    """Layers of attention and a feed-forward part; windows and dense layers in turn."""
    moe, first = _experts(config), config.get("dense_layers", 0)
    dense = Experts(d_shared=config.get("dense_ffn") or config.get("ffn") or 0, num_in=config.get("num_in", 2))
    windows = (config["window"], None) if config.get("window") else (None,)
    every = config.get("moe_every", 1)
    kinds = Counter(
        (windows[i % len(windows)], i < first or (i - first) % every != every - 1) for i in range(config["layers"])
    )
    layers = [
        Layer(mixer=_attention(config, window), ffn=dense if is_dense else moe, count=count)
        for (window, is_dense), count in kinds.items()
    ]
    mtp = config.get("mtp", 0)
    return layers + [Layer(mixer=_attention(config), ffn=moe, count=mtp, mtp=True)] * bool(mtp)


def _hybrid(config: Mapping[str, Any]) -> list[Layer]:
    scan, count = config["scan"], Counter(config["pattern"])
    mixer = Scan(heads=scan["heads"], d_head=scan["head_dim"], groups=scan["groups"], state=scan["state"])
    layers = [
        Layer(mixer=mixer, ffn=None, count=count["M"]),
        Layer(mixer=_attention(config), ffn=None, count=count["*"]),
        Layer(mixer=None, ffn=_experts(config), count=count["E"]),
    ]
    mtp = config.get("mtp", 0)
    return layers + [Layer(mixer=_attention(config), ffn=_experts(config), count=mtp, mtp=True)] * bool(mtp)
