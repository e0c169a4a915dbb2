"""What the planner must know of a model, read from the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moecompile.capture import Example, layers_of
from moecompile.match.regions import Captured
from moecompile.mesh import Part, axes_that_split
from moecompile.nn.adapters import output_heads
from moecompile.nn.matrices import hidden_matrices
from moecompile.nn.watch import masks_of
from moecompile.pipeline.attention import attention_of
from moecompile.pipeline.shape import mixers
from moecompile.pipeline.splits import heads_of, no_split, splits_of
from moecompile.planner import ModelFacts
from moecompile.schema import MeshConfig

WIDENED = "_moecompile_widened"
"""Attribute of a model that `widen_experts` has made: what it did, for people."""
_QUERY_NORMS = ("q_norm", "query_layernorm", "q_layernorm")


def facts_of(
    model: nn.Module, example: Example | None = None, captured: Captured | None = None, mesh: MeshConfig | None = None
) -> ModelFacts:
    """Sizes of the dense model, 0 if they cannot be read from the module; and what is known from the example.

    Args:
        captured: its sites, to know which modules they are made of. mesh: attention is looked at only if an axis splits
            positions, because that takes three forwards.
    """
    has_parts = mesh is not None and any(getattr(mesh, axis) > 1 for axis in axes_that_split(Part.SEQUENCE))
    layers = list(layers_of(model))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    attention, no_context = attention_of(model, example) if has_parts else ((), "")
    config = getattr(model, "config", None)
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in inside)
    return ModelFacts(
        params_total=sum(parameter.numel() for parameter in model.parameters()),
        params_embedding=outside if layers else 0,
        num_layers=len(layers),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        bytes_per_param=next((parameter.element_size() for parameter in model.parameters()), 4),
        causal=True if hasattr(model, "generate") else None,  # as in language models of transformers
        frozen=_frozen(model),
        linears=_linears(model),
        has_padding_mask=_has_padding_mask(model, example),
        split=splits_of(model, captured or Captured()),
        no_split=no_split(model),
        matrices=_matrices(model),
        heads=heads_of(model),
        d_model=hidden,
        attention_numbers=_attention_numbers(model, config, len(layers), hidden),
        attention=attention,
        no_context=no_context,
        widened=getattr(model, WIDENED, ""),
    )


def _attention_numbers(model: nn.Module, config: Any, num_layers: int, hidden: int) -> int:
    """`ModelFacts.attention_numbers`, counted for Llama, Qwen3 and DeepSeek-V3."""
    found = [mixer for mixer in mixers(config, num_layers, hidden) if mixer is not None] if hidden else []
    if not found:
        return 0
    norms = any(name.rpartition(".")[2] in _QUERY_NORMS for name, _ in model.named_modules())
    kept = 0
    for mixer in found:
        if mixer.kv_rank:  # latents and their norms; queries, keys, values, with the parts that they are made of
            nope = mixer.d_qk - mixer.d_rope
            kept += 3 * (mixer.q_rank + mixer.kv_rank) + mixer.heads * (2 * mixer.d_qk + nope + 3 * mixer.d_v)
        else:
            kept += (4 if norms else 2) * (mixer.heads + mixer.kv_heads) * mixer.d_qk
    return kept // len(found)


def _has_padding_mask(model: nn.Module, example: Example | None) -> bool:
    if example is None:
        return False
    if isinstance(example, Mapping):
        return bool(masks_of(model, (), example))
    return bool(masks_of(model, example if isinstance(example, tuple) else (example,), {}))


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`ModelFacts.linears`."""
    heads = output_heads(model)
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and all(module is not head for head in heads)
    }


def _matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`ModelFacts.matrices`."""
    weights = {name: model.get_parameter(name) for name in hidden_matrices(model)}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items() if weight.requires_grad}


def _frozen(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`ModelFacts.frozen`."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return {}
    inside = {path: list(module.parameters()) for path, module in model.named_modules()}
    return {
        path: (sum(p.numel() for p in found if not p.requires_grad), sum(p.numel() for p in found))
        for path, found in inside.items()
    }
