"""What the planner must know of a model to split it over `tp`: its own `tp_plan`, and the sizes behind it."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.nn import Parameter

from moecompile.match.patterns import FFNMatch
from moecompile.match.regions import Captured
from moecompile.plan import HEADS_STYLE
from moecompile.planner.params import SplitFact


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def heads_of(model: nn.Module) -> dict[str, int]:
    """`ModelFacts.heads`."""
    config = _text_config(model)
    found = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: heads for name, heads in found.items() if isinstance(heads, int)}


def no_split(model: nn.Module) -> str:
    """`ModelFacts.no_split`."""
    if not getattr(model, "tp_plan", None):
        return f"{type(model).__name__} has no tp_plan, which says how its weights are split"
    if dropout := getattr(_text_config(model), "attention_dropout", None):
        return f"attention_dropout={dropout} of {type(model).__name__} would be drawn alike for the heads of every rank"
    return ""


def splits_of(model: nn.Module, captured: Captured) -> tuple[SplitFact, ...]:
    """`ModelFacts.split`: modules, and parameters that have an entry of their own, in model order."""
    styles: dict[str, str] = getattr(model, "tp_plan", None) or {}
    parts = _parts(captured)
    facts, seen = [], set[Parameter]()
    for path, part in (*model.named_modules(), *model.named_parameters()):
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", path)
        if (style := styles.get(pattern)) is None:
            continue
        site = next((fqn for prefix, fqn in parts.items() if f"{path}.".startswith(prefix)), None)
        sizes = _sizes(part, style)
        weight = getattr(part, "weight", None)
        if weight in seen:  # tied
            sizes["params"] = 0
        if isinstance(weight, Parameter):
            seen.add(weight)
        facts.append(SplitFact(path=path, pattern=pattern, style=style, site=site, **sizes))
    return tuple(facts)


def _sizes(part: nn.Module | Parameter, style: str) -> dict[str, Any]:
    """kind, size, size_name, params and width of a `SplitFact`; the size of what is not split is 0."""
    if isinstance(part, nn.Embedding):
        kind, name, width = "embedding", "num_embeddings", part.embedding_dim
    elif isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward and "forward" not in vars(part):
        kind, name, width = (
            "linear",
            "in_features" if style.startswith("rowwise") else "out_features",
            part.out_features,
        )
    else:
        return {"kind": type(part).__name__, "size": 0, "size_name": "", "params": 0}
    if style in ("mla_kv_a_proj", HEADS_STYLE):
        return {"kind": kind, "size": 0, "size_name": "", "params": 0}
    bias = part.bias.numel() if name == "out_features" and isinstance(part.bias, Parameter) else 0
    params = part.weight.numel() + bias
    return {"kind": kind, "size": getattr(part, name), "size_name": name, "params": params, "width": width}


def _parts(captured: Captured) -> dict[str, str]:
    """Prefix of module paths -> the site that is made of these modules."""
    parts: dict[str, str] = {}
    for fqn, path in captured.region_of.items():
        region = captured.regions.get(path)
        match = None if region is None else region.matches.get(fqn)
        if isinstance(match, FFNMatch):
            owners = {linear.weight.rpartition(".")[0] for linear in (*match.ins, match.down)}
            parts |= {".".join(filter(None, (path, owner))) + ".": fqn for owner in owners}
        elif match is not None:
            parts[f"{path}."] = fqn
    return parts
