"""The shape of a planned model for the time model, read from the model and its plan.

Per layer, all parameters that are neither routed experts nor part of a described mixer are products that every token
uses. Heads of attention and of scans come from the model's config, and so does the kind of each layer where layers
differ. A model without a config has no attention that could be priced; of a mixer that is neither (a convolution), or
whose sizes the config does not name as one of `_SCANS`, the weights are priced alone. A gated delta rule is priced as
the scan of Mamba-2 with as many heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import replace
from typing import Any

from torch import nn

from moecompile.capture import layers_of
from moecompile.pipeline.facts import language_config
from moecompile.pipeline.kept import dtype_of_most
from moecompile.plan import ExpertsSite, FFNSite, LayerPlan, Plan, PlannedSite
from moecompile.planner.cost_model.shapes import Attention, Experts, Layer, ModelShape, Scan
from moecompile.planner.params import layer_params, routed

_HEADS = ("num_attention_heads", "num_heads", "n_head")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_SCANS = (
    ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
    (
        "linear_num_value_heads", "linear_value_head_dim", "linear_num_key_heads", "linear_key_head_dim",
        "linear_conv_kernel_dim",
    ),
)  # fmt: skip
"""What configs of transformers call the sizes of a `Scan`: heads, d_head, groups, state, conv."""


def shape_of_model(model: nn.Module, plan: Plan) -> ModelShape:
    """The shape."""
    own, config = getattr(model, "config", None), language_config(model)
    paths = {id(module): path for path, module in model.named_modules()}
    layers = list(layers_of(model)) or [model]
    planned: dict[str, list[LayerPlan]] = {paths[id(layer)]: [] for layer in layers}
    for site in plan.layers:
        owner = next((path for path in planned if not path or f"{site.site.fqn}.".startswith(f"{path}.")), None)
        if owner is not None:
            planned[owner].append(site)
    hidden = _first(config, _HIDDEN) or max((site.site.d_model for site in plan.layers), default=1)
    of_config = set(layers if config is own else layers_of(model.get_decoder()))  # type: ignore[operator]
    mixers = iter(_mixers(config, sum(layer in of_config for layer in layers), hidden))
    found = [next(mixers) if layer in of_config else None for layer in layers]
    tables: set[object] = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {model.get_parameter(lookup.weight) for lookup in plan.lookups}
    each = [
        (mixer, _ffn(layer, mixer, planned[paths[id(layer)]], hidden, tables))
        for layer, mixer in zip(layers, found, strict=True)
    ]
    kinds = Counter(each)
    outside = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for layer in layers for p in layer.parameters()
    )
    vocab = _first(config, ("vocab_size",))
    return ModelShape(
        name=type(model).__name__, hidden=hidden, vocab=vocab,
        layers=tuple(Layer(mixer=mixer, ffn=ffn, count=count) for (mixer, ffn), count in kinds.items()),
        tied=outside < 2 * hidden * vocab,
        places=tuple((paths[id(layer)], list(kinds).index(kind)) for layer, kind in zip(layers, each, strict=True)),
        weight_bytes=dtype_of_most(model.parameters()).itemsize,
    )  # fmt: skip


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first that is there and is a number; Swin has a list of them, one for each stage."""
    found = (value for name in names if isinstance(value := _value(config, name), (int, float)) and value)
    return next(map(int, found), 0)


def _value(config: Any, name: str) -> Any:
    """None too for a value that differs from layer to layer (Gemma 4), which transformers refuses to give as one."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _mixers(config: Any, num_layers: int, hidden: int) -> list[Attention | Scan | None]:
    """The attention or scan of each layer, as far as the config names its heads."""
    attention, scan = _attention(config, hidden), _scan(config)
    kinds = list(_value(config, "layer_types") or [])[:num_layers]
    if attention is None:
        return [None] * num_layers
    sliding = attention if attention.kv_rank else replace(attention, window=_first(config, ("sliding_window",)) or None)
    found = [
        scan if kind == "linear_attention"
        else sliding if "sliding" in kind
        else attention if "attention" in kind or "hybrid" in kind
        else None
        for kind in kinds
    ]  # fmt: skip
    return found + [attention] * (num_layers - len(found))


def _attention(config: Any, hidden: int) -> Attention | None:
    heads = _first(config, _HEADS)
    if not heads:
        return None
    if kv_rank := _first(config, ("kv_lora_rank",)):
        rope, nope = _first(config, ("qk_rope_head_dim",)), _first(config, ("qk_nope_head_dim",))
        return Attention(
            heads=heads, kv_heads=heads, d_qk=rope + nope, d_v=_first(config, ("v_head_dim",)), kv_rank=kv_rank,
            q_rank=_first(config, ("q_lora_rank",)), d_rope=rope,
        )  # fmt: skip
    d_head = _first(config, ("head_dim", "d_kv")) or hidden // heads
    return Attention(
        heads=heads, kv_heads=_first(config, ("num_key_value_heads",)) or heads, d_qk=d_head, d_v=d_head
    )  # fmt: skip


def _scan(config: Any) -> Scan | None:
    for names in _SCANS:
        sizes = [_first(config, (name,)) for name in names]
        if all(sizes):
            heads, d_head, groups, state, conv = sizes
            return Scan(heads=heads, d_head=d_head, groups=groups, state=state, conv=conv)
    return None


def _ffn(
    layer: nn.Module, mixer: Attention | Scan | None, planned: list[LayerPlan], hidden: int, tables: Container[object]
) -> Experts | None:
    """The rest of a layer: its planned experts, and all other parameters but `tables` as products of every token; None:
    it has a mixer alone.
    """
    own, of_mixer = [p for p in layer.parameters() if p not in tables], mixer.weights(hidden) if mixer else 0
    always = sum(p.numel() for p in own) - of_mixer
    if not planned:
        if mixer is not None and sum(p.numel() for p in own if p.ndim > 1) <= of_mixer:
            return None
        d_shared, always = _wide(always, 2, hidden)
        return Experts(d_shared=d_shared, always=always)
    site = planned[0]
    for each in planned:
        counts = layer_params(each)
        always += counts.shared - counts.latent - counts.dense
    experts, (chosen, groups, top_groups, even_groups) = site.experts, routed(site)
    if isinstance(site.site, ExpertsSite):
        always -= experts.num_routed * hidden  # its router is a part of the layer
    latent = site.experts.latent_size or (site.row_site.d_model if site.row_site.d_model != hidden else None)
    if latent and site.experts.latent_size is None:
        always -= 2 * hidden * latent  # existing experts: their projections are a part of the layer
    d_shared, always = _wide(always, site.site.num_in_projections, hidden)
    return Experts(
        experts=experts.num_routed, top_k=chosen, d_expert=experts.d_expert, num_in=site.site.num_in_projections,
        groups=groups, top_groups=top_groups, even_groups=even_groups, d_shared=d_shared, always=always, latent=latent,
        activation=_activation(site.site), shared_in_experts=isinstance(site.site, FFNSite),
    )  # fmt: skip


def _activation(site: PlannedSite) -> str:
    """Of `ACTIVATION_PASSES`: what the runtime computes between the products of experts."""
    if site.swiglu:
        return "swiglu"
    if site.num_in_projections == 1:
        return "up_down"
    return "clamped" if site.bias_up or site.bias_down else "gated"


def _wide(numbers: int, num_in: int, hidden: int) -> tuple[int, int]:
    """The width of an FFN that every token uses with that many numbers, and the rest."""
    return divmod(max(0, numbers), (num_in + 1) * hidden)
