"""What the planner must know of a model, read from the model: its sizes, and how its own `tp_plan` splits it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import Parameter

from moecompile.capture import Example, layers_of
from moecompile.match.boundaries import tokens_of
from moecompile.match.experts import ExpertsMatch
from moecompile.match.ffn import FFNMatch
from moecompile.match.regions import Captured, Match, Region
from moecompile.mesh import Part, axes_that_split
from moecompile.nn.adapters import output_heads, own_router
from moecompile.nn.matrices import hidden_matrices
from moecompile.nn.own_router import own_losses
from moecompile.nn.padding import are_of_mask
from moecompile.nn.stages import put
from moecompile.nn.watch import argument_of, masks_of, reads_no_tokens
from moecompile.pipeline.attention import attention_of
from moecompile.pipeline.kept import KeptLayers, dtype_of_most, kinds_of
from moecompile.plan import ATTENTION, FFN, HEADS_STYLE, NORMS, ExpertsSite, Lookup
from moecompile.planner import ModelFacts
from moecompile.planner.params import FP32_BYTES, UNNAMED, CutFacts, LayerFact, SplitFact, TableFact, WeightFact
from moecompile.routing import is_of_router
from moecompile.schema import LEAST_NUMBERS, MeshConfig
from moecompile.torch_private import own_parameters

_NORMS = (
    "q_norm",
    "k_norm",
    "query_norm",
    "key_norm",
    "q_layernorm",
    "k_layernorm",
    "query_layernorm",
    "key_layernorm",
)
WIDENED = "_moecompile_widened"
"""Attribute of a model that `widen_experts` has made: what it did, for people."""


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
    apart, frozen, apart_bytes = _apart(model)
    splits = splits_of(model, captured or Captured())
    attention, no_context = attention_of(model, example) if has_parts else ((), "")
    of_layers = _layers(model, layers, captured or Captured())
    masks = _masks(model, example)
    routers, router_params = _routers(model, captured or Captured())
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in inside)
    return ModelFacts(
        params_total=sum(parameter.numel() for parameter in model.parameters()),
        params_embedding=outside if layers else 0,
        num_layers=len(layers),
        vocab_size=_size(model, "vocab_size"),
        bytes_per_param=dtype_of_most(model.parameters()).itemsize,
        causal=True if hasattr(model, "generate") else None,  # as in language models of transformers
        frozen=_frozen(model),
        linears=_linears(model),
        idle=captured.idle if captured is not None else frozenset(),
        has_padding_mask=bool(masks),
        unmasked=_unmasked(model, masks, captured or Captured()),
        split=splits,
        no_split=no_split(model),
        matrices=_matrices(model),
        heads=heads_of(model),
        d_model=_size(model, "hidden_size"),
        kept=None if example is None else KeptLayers(model, example, of_layers, splits),
        attention=attention,
        no_context=no_context,
        widened=getattr(model, WIDENED, ""),
        own_losses=own_losses(model),
        no_adapters=_no_adapters(captured or Captured()),
        routers=routers,
        router_params=router_params,
        apart=apart,
        apart_frozen=frozen,
        apart_bytes=apart_bytes,
        weights=_weights(model, inside, splits, captured or Captured()),
        layers=of_layers,
        cut=_cut(model, captured),
        tables=_tables(model, example, inside, captured or Captured()),
    )


def _tables(
    model: nn.Module, example: Example | None, inside: Collection[Parameter], captured: Captured
) -> tuple[TableFact, ...]:
    """`ModelFacts.tables`."""
    apart, facts = {p for found in _others(model).values() for p in found}, list[TableFact]()
    tokens = 1 if example is None else tokens_of(example)
    names = dict(model.named_parameters())
    for found in captured.tables:
        if (weight := names.get(found.weight)) is None:  # of another stage
            continue
        facts.append(
            TableFact(
                lookup=Lookup(
                    weight=found.weight, module=found.module, rows=found.rows, width=found.width,
                    computed=found.computed, ids_per_token=found.ids / tokens, reads=found.reads,
                ),
                is_root=weight not in inside, is_trained=weight.requires_grad, number_bytes=weight.element_size(),
                is_apart=weight in apart, refused=found.refused,
            )
        )  # fmt: skip
    return tuple(facts)


def _cut(model: nn.Module, captured: Captured | None) -> CutFacts | None:
    """`ModelFacts.cut`."""
    if captured is None or captured.boundaries is None:
        return None
    of, whole = captured.boundaries, {}
    tables = {model.get_parameter(found.weight) for found in captured.tables if not found.is_used_whole}
    for called in of.units:
        module = model.get_submodule(called.path)
        is_lookup = all(isinstance(m, nn.Embedding) for m in module.modules() if own_parameters(m))
        products = [parameter for parameter in module.parameters() if parameter not in tables]
        whole[called.path] = 0 if is_lookup else sum(parameter.numel() for parameter in products)
    uncut = replace(captured, boundaries=None)

    @cache  # a search asks for the same stages on many meshes
    def facts(units: tuple[str, ...], has_head: bool) -> ModelFacts:
        """Of the model without the other units."""
        absent = {path: model.get_submodule(path) for path in whole if path not in units}
        put(model, dict.fromkeys(absent, nn.Module()))
        try:
            found = facts_of(model, None, uncut)
        finally:
            put(model, absent)
        return found if has_head else replace(found, vocab_size=0, has_head=False)

    tied = () if of.refused else of.tied
    return CutFacts(
        refused=of.refused, layers=tuple(of.layers), units=whole, tied=tied, stages=cache(of.stages), facts=facts,
        tied_numbers=sum(model.get_parameter(first).numel() for first, _ in tied),
    )  # fmt: skip


def _layers(model: nn.Module, layers: Sequence[nn.Module], captured: Captured) -> tuple[LayerFact, ...]:
    """`ModelFacts.layers`.

    Children of a layer, those of a list instead of the list. The one that holds a site is `ffn`, as is that of its name
    in a layer without one, what has one-dimensional weights alone is a norm, others with weights are `attention`, or
    what else mixes positions. A layer whose FFN is no child of its own has no parts.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    named = [(paths[id(layer)], layer) for layer in layers]
    sites = [path for site in captured.sites if (path := captured.region_of[site.fqn]) or not named]
    holders = [_with_sites(path, layer, sites) for path, layer in named]
    names = {name for found in holders for name in found}
    return tuple(
        LayerFact(
            path=path,
            kind=kind,
            params=sum(parameter.numel() for parameter in layer.parameters()),
            parts=tuple(_layer_parts(layer, found, names)),
        )
        for (path, layer), found, kind in zip(named, holders, kinds_of(layers), strict=True)
    )


def _layer_parts(
    layer: nn.Module, with_sites: Sequence[str], names: Collection[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    children = dict(_children(layer))
    ffn = list(with_sites) or [name for name in children if name in names]
    if not ffn or "" in ffn:
        return
    norms = [name for name, child in children.items() if name not in ffn and _is_norm(child)]
    others = [
        name for name, child in children.items() if name not in (*ffn, *norms) and any(True for _ in child.parameters())
    ]
    for part, found in ((ATTENTION, others), (NORMS, norms), (FFN, ffn)):
        if found:
            yield part, tuple(found)


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children by path; those of a list, which has no forward, instead of the list."""
    for name, child in layer.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{path}", inner) for path, inner in _children(child))
        else:
            yield name, child


def _with_sites(path: str, layer: nn.Module, sites: Sequence[str]) -> list[str]:
    """Children that hold sites; "" where a site is the layer itself, or spans children."""
    start = f"{path}." if path else ""
    children = [name for name, _ in _children(layer)]
    found: list[str] = []
    for site in (each for each in sites if f"{each}.".startswith(start)):
        inside = f"{site}.".removeprefix(start)
        found.append(next((name for name in children if inside.startswith(f"{name}.")), ""))
    return list(dict.fromkeys(found))


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.dim() <= 1 for parameter in parameters)


def _others(model: nn.Module) -> dict[bool, list[Parameter]]:
    """Whether they are trained -> parameters of another dtype than most of these (moecompile.passes.shard)."""
    others: dict[bool, list[Parameter]] = {}
    for trained in (True, False):
        mine = [parameter for parameter in model.parameters() if parameter.requires_grad is trained]
        most = dtype_of_most(mine)
        others[trained] = [parameter for parameter in mine if parameter.dtype != most]
    return others


def _weights(
    model: nn.Module, inside: Collection[Parameter], splits: Sequence[SplitFact], captured: Captured
) -> tuple[WeightFact, ...]:
    """`ModelFacts.weights`."""
    whole = {parameter for found in _others(model).values() for parameter in found}
    cut = {fact.path: "columns" if fact.size_name == "in_features" else "rows" for fact in splits if fact.size}
    experts = {site.fqn: site.fqn for site in captured.sites if isinstance(site, ExpertsSite)}
    parts = {prefix.rstrip("."): fqn for prefix, fqn in _parts(captured).items() if fqn not in experts} | experts
    sizes = Counter[WeightFact]()
    for name, parameter in model.named_parameters():
        if parameter in whole:
            continue
        owner, _, kind = name.rpartition(".")
        paths = [owner[: match.start()] for match in re.finditer(r"\.|$", owner)]
        fact = WeightFact(
            rows=parameter.shape[0] if parameter.ndim else 1,
            params=0,
            site=next((parts[path] for path in paths if path in parts), None),
            is_root=parameter not in inside,
            split="" if kind == "bias" and cut.get(owner) == "columns" else cut.get(owner, ""),
            width=parameter.shape[-1] if parameter.ndim > 1 and parameter.numel() >= LEAST_NUMBERS else 0,
            is_trained=parameter.requires_grad,
        )
        sizes[fact] += parameter.numel()
    return tuple(replace(fact, params=number) for fact, number in sizes.items())


def _apart(model: nn.Module) -> tuple[int, int, int]:
    """`ModelFacts.apart`, `apart_frozen` and `apart_bytes`."""
    others = _others(model)
    wide = max((parameter.element_size() for found in others.values() for parameter in found), default=FP32_BYTES)
    sizes = {trained: sum(parameter.numel() for parameter in found) for trained, found in others.items()}
    return sizes[True], sizes[False], wide


def _masks(model: nn.Module, example: Example | None) -> dict[str, Tensor]:
    """The padding masks of the example, by argument."""
    if example is None:
        return {}
    if isinstance(example, Mapping):
        return masks_of(model, (), example)
    return masks_of(model, example if isinstance(example, tuple) else (example,), {})


def _unmasked(model: nn.Module, masks: Mapping[str, Tensor], captured: Captured) -> frozenset[str]:
    """`ModelFacts.unmasked`."""
    found = set()
    for path, region in captured.regions.items():
        mask = masks.get(argument_of(model, path))
        for fqn, match in region.matches.items():
            shape = _tokens(region, match)
            fits = mask is None or mask.dim() != 2 or shape is None or are_of_mask(shape, mask.shape)
            if not fits or reads_no_tokens(model, path):
                found.add(fqn)
    return frozenset(found)


def _no_adapters(captured: Captured) -> dict[str, str]:
    """`ModelFacts.no_adapters`."""
    matches = [found for region in captured.regions.values() for found in region.matches.items()]
    return {fqn: match.no_adapters for fqn, match in matches if isinstance(match, ExpertsMatch) and match.no_adapters}


def _routers(model: nn.Module, captured: Captured) -> tuple[dict[str, str], dict[str, int]]:
    """`ModelFacts.routers` and `router_params`."""
    found, params = dict[str, str](), dict[str, int]()
    for fqn, match in (each for region in captured.regions.values() for each in region.matches.items()):
        if not isinstance(match, ExpertsMatch) or match.router is None or _module(model, fqn) is None:
            continue
        block = fqn.rpartition(".")[0]
        source = match.router.path.removeprefix(f"{block}.")
        own = own_router(model.get_submodule(block), model.get_submodule(fqn), match.router.num_choices, source)
        if any(is_of_router(path, source) for path, _ in own):
            found[fqn] = match.router.path
            params[fqn] = sum(parameter.numel() for parameter in own[0][1].parameters())
    return found, params


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None: it is of another stage."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tokens(region: Region, match: Match) -> tuple[int, ...] | None:
    """The shape of the tokens that a site gets from the example; None: unknown."""
    if isinstance(match, FFNMatch):
        node: fx.Node | None = match.ins[0].x
    else:
        inputs = region.graph.graph.find_nodes(op="placeholder")
        node = next((each for each in inputs if each.target == match.call.arguments[0]), None)
    shape = None if node is None else node.meta.get("shape")
    return None if shape is None else tuple(shape[:-1])


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


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def language_config(model: nn.Module) -> Any:
    """The model's config, or the part of it for the language model of one that also sees or hears (Gemma 3)."""
    return _text_config(model) if output_heads(model) else getattr(model, "config", None)


def _size(model: nn.Module, name: str) -> int:
    configs = getattr(model, "config", None), language_config(model)
    return next((int(size) for config in configs if (size := getattr(config, name, 0))), 0)


def heads_of(model: nn.Module) -> dict[str, int]:
    """`ModelFacts.heads`."""
    config = _text_config(model)
    found = {name: getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return {name: heads for name, heads in found.items() if isinstance(heads, int)}


def no_split(model: nn.Module) -> str:
    """Why the model cannot be split over `tp`; empty: it can."""
    if not getattr(model, "tp_plan", None):
        return f"{type(model).__name__} has no tp_plan, which says how its weights are split"
    for name in ("attention_dropout", "attn_pdrop"):
        if dropout := getattr(_text_config(model), name, None):
            return f"{name}={dropout} of {type(model).__name__} would be drawn alike for the heads of every rank"
    return ""


def splits_of(model: nn.Module, captured: Captured) -> tuple[SplitFact, ...]:
    """`ModelFacts.split`: modules, and parameters that have an entry of their own, in model order."""
    styles: dict[str, str] = getattr(model, "tp_plan", None) or {}
    styles, parts = styles | _norms_of_heads(model, styles), _parts(captured)
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


def _norms_of_heads(model: nn.Module, styles: Mapping[str, str]) -> dict[str, str]:
    """Pattern -> style of norms of queries and keys that a tp_plan leaves out (GLM-4.5's) where it splits heads: a rank
    has the gradients of its own heads. `UNNAMED`: of weights that are not those of one head.
    """
    found, heads = dict[str, str](), heads_of(model).get("num_attention_heads", 1)
    for path, module in model.named_modules():
        owner, _, name = path.rpartition(".")
        patterns = [re.sub(r"\.\d+(?=\.|$)", ".*", each) for each in (path, f"{owner}.q_proj")]
        if name not in _NORMS or patterns[0] in styles or styles.get(patterns[1]) != "colwise":
            continue
        queries = model.get_submodule(owner).q_proj
        if weights := list(module.parameters()):
            of_a_head = isinstance(queries, nn.Linear) and all(
                weight.shape == (queries.out_features // heads,) for weight in weights
            )
            found[patterns[0]] = HEADS_STYLE if of_a_head else UNNAMED
    return found


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
