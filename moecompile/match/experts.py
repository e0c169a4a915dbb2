"""Finds existing experts by their call and their weights, never by names of modules.

transformers calls all its experts with hidden states (T, D), expert ids (T, K) and routing weights (T, K). It names the
weights `gate_up_proj` and `down_proj`, and flags of the classes describe their layout.

Algorithm, for each module that was called:
  1. Check that its arguments are three such tensors. Ids may also be one-hot, (T, K, E).
  2. Read the stacked weights, or the modules if each expert is a separate module.
  3. Account for every parameter, or give the reason why the experts are not supported.

Legend: T tokens, D model dim, F expert width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from moecompile.match.own_router import RouterMatch
from moecompile.match.patterns import FFNMatch

OWN = "own_experts"
"""Name of the model's experts in the captured graph of their region, which is a single call of them."""

_MATRICES = ("w1", "v1", "w2")  # DBRX: gate, up and down, each one matrix (E F, D)
_GROUPS = (("num_group", "topk_group"), ("n_group", "topk_group"))  # names of (G, M) in routers and configs


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """arguments: parameter names of hidden states, ids and weights in forward. one_hot: whether ids are (T, K, E).
    is_flat: whether hidden states are (T, D); else they and the output have more leading dims.
    """

    arguments: tuple[str, str, str]
    d_model: int
    top_k: int
    one_hot: bool = False
    is_flat: bool = True


@dataclass(frozen=True, kw_only=True)
class ExpertsMatch:
    """Existing experts of a supported form.

    weights: names of the stacked parameters. If each expert is a separate module there are none; `modules` are then
    the paths of the experts below the experts module, and `ffn` is the traced first one with its FFN. num_identity:
    experts after the last one that return their input; their rows of the up projection are unused. are_matrices: the
    weights are gate, up and down, (E F, D) each, in a child. transposed: whether stacked weights are (E, d_in, d_out).
    norm: a child that is applied to the rows after the experts. activation: for display. router: where the logits of
    the model's own router are; None: not found.
    """

    call: ExpertsCall
    num_experts: int
    d_expert: int
    weights: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    ffn: tuple[fx.GraphModule, FFNMatch] | None = None
    num_identity: int = 0
    are_matrices: bool = False
    transposed: bool = False
    norm: str | None = None
    activation: str
    router: RouterMatch | None = None

    @property
    def form(self) -> str:
        """`stacked` or `modules`."""
        return "modules" if self.modules else "stacked"

    @property
    def gated(self) -> bool:
        """Whether two projections feed the activation."""
        return self.are_matrices or "gate_up_proj" in self.weights


def experts_call(arguments: Mapping[str, object]) -> ExpertsCall | None:
    """The call, if bound arguments are those of experts (step 1)."""
    tensors = [(name, value) for name, value in arguments.items() if isinstance(value, Tensor)]
    if len(tensors) != 3 or len(tensors) != len(arguments):
        return None
    (_, hidden), (_, ids), (_, weights) = tensors
    if not hidden.is_floating_point() or not weights.is_floating_point() or hidden.ndim < 2 or weights.ndim != 2:
        return None
    one_hot, d_model = ids.ndim == 3, hidden.shape[-1]
    if ids.dtype != torch.int64 or ids.shape[:2] != weights.shape or ids.ndim > 3:
        return None
    if ids.shape[0] * d_model != hidden.numel():
        return None
    names = (tensors[0][0], tensors[1][0], tensors[2][0])
    return ExpertsCall(arguments=names, d_model=d_model, top_k=ids.shape[1], one_hot=one_hot, is_flat=hidden.ndim == 2)


def match_stacked(module: nn.Module, call: ExpertsCall) -> ExpertsMatch | str:
    """Experts with stacked weights (steps 2 and 3), or the reason why they are not supported."""
    own = dict(module.named_parameters(recurse=False))
    first = next((name for name in ("gate_up_proj", "up_proj") if name in own), None)
    if first is None or "down_proj" not in own:
        names = f"called {', '.join(own)}" if own else "in its children"
        return f"its weights are {names}, not gate_up_proj or up_proj, and down_proj"
    if call.one_hot:
        return "its expert ids are one-hot, which is supported for experts that are modules"
    supported = (first, "down_proj", f"{first}_bias", "down_proj_bias")
    weights = tuple(name for name in own if name in supported)
    norm = "post_expert_norm" if getattr(module, "has_post_expert_norm", False) else None
    num_identity = _identities(module, own[first], own["down_proj"])
    if reason := _unsupported(module, own, weights, norm, num_identity):
        return reason
    transposed = _transposed(module, own[first], call.d_model)
    d_in, d_out = (1, 2) if transposed else (2, 1)
    width, down = own[first].shape[d_out], own["down_proj"]
    d_expert = width // 2 if first == "gate_up_proj" else width
    rules = (
        (own[first].shape[d_in] != call.d_model, f"{first} does not read the hidden states' {call.d_model} entries"),
        ((down.shape[d_in], down.shape[d_out]) != (d_expert, call.d_model), "down_proj does not fit the projection up"),
        (not hasattr(module, "_apply_gate") and not hasattr(module, "act_fn"), "it has neither act_fn nor _apply_gate"),
    )
    if reason := next((text for broken, text in rules if broken), None):
        return reason
    return ExpertsMatch(
        call=call, num_experts=down.shape[0], d_expert=d_expert, weights=weights, num_identity=num_identity,
        transposed=transposed, norm=norm, activation=_activation(module),
    )  # fmt: skip


def matrices_of(module: nn.Module) -> tuple[str, int] | None:
    """(name of the child with one matrix per projection, number of experts), as in DBRX."""
    holders = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    counts = {value for name, value in vars(module).items() if "experts" in name and isinstance(value, int)}
    if len(holders) != 1 or len(counts) != 1 or any(True for _ in module.parameters(recurse=False)):
        return None
    own = dict(module.get_submodule(holders[0]).named_parameters())
    (num_experts,) = counts
    shapes = {parameter.shape for parameter in own.values()}
    if tuple(own) != _MATRICES or len(shapes) > 1 or own["w1"].ndim != 2 or own["w1"].shape[0] % num_experts:
        return None
    return holders[0], num_experts


def match_matrices(module: nn.Module, call: ExpertsCall) -> ExpertsMatch | str:
    """Experts whose projections are one matrix each (steps 2 and 3), or the reason why they are not supported."""
    matrices = matrices_of(module)
    assert matrices is not None
    holder, num_experts = matrices
    rows, d_in = module.get_submodule(holder).get_parameter("w1").shape
    activation = getattr(module.get_submodule(holder), "activation_fn", None)
    if call.one_hot or d_in != call.d_model or activation is None:
        return "its w1, v1 and w2 are not a gate, an up and a down projection with an activation_fn"
    return ExpertsMatch(
        call=call, num_experts=num_experts, d_expert=rows // num_experts, are_matrices=True,
        weights=tuple(f"{holder}.{name}" for name in _MATRICES), activation=_name_of(activation),
    )  # fmt: skip


def expert_modules(module: nn.Module) -> tuple[str, ...]:
    """Names of the children if each is one expert, in a list or dict of modules that has a forward."""
    if not isinstance(module, (nn.ModuleDict, nn.ModuleList)) or type(module).forward is nn.Module.forward:
        return ()
    children = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    direct = any(True for _ in module.parameters(recurse=False))
    if len(children) < 2 or direct or len({structure(child) for child in children.values()}) > 1:
        return ()
    return tuple(children)


def structure(module: nn.Module, inlined: Container[str] | None = None) -> tuple[object, ...]:
    """A key that is equal for modules that compute the same function: their classes, shapes and attributes.

    Attributes that are not plain values (a config) are compared by identity.

    Args:
        inlined: relative paths of submodules that count in full; only the class of the others counts. None: all count.
    """
    parts: list[object] = []
    for name, child in module.named_modules():
        if name and inlined is not None and name not in inlined:
            parts.append((name, type(child)))
            continue
        plain = tuple((key, _value(value)) for key, value in sorted(vars(child).items()) if not key.startswith("_"))
        tensors = tuple(
            (key, tuple(tensor.shape), tensor.dtype, tensor.device)
            for tensors in (child.named_parameters(recurse=False), child.named_buffers(recurse=False))
            for key, tensor in tensors
        )
        parts.append((name, type(child), plain, tensors))
    return tuple(parts)


def groups_of(block: nn.Module, experts: nn.Module) -> tuple[int, int]:
    """(groups, top groups) of the router in an MoE block; (1, 1) if it does not limit tokens to groups."""
    inside = set(experts.modules())
    for module in block.modules():
        if module in inside:
            continue
        for holder in (module, getattr(module, "config", None)):
            if getattr(holder, "topk_method", "") == "greedy":  # DeepSeek-V2-Lite has groups but does not use them
                return 1, 1
            for names in _GROUPS:
                groups, top_groups = (getattr(holder, name, None) for name in names)
                if isinstance(groups, int) and isinstance(top_groups, int) and 1 <= top_groups <= groups:
                    return (groups, top_groups) if top_groups < groups else (1, 1)
    return 1, 1


def _identities(module: nn.Module, first: Tensor, down: Tensor) -> int:
    """The number of identity experts, as in LongCat-Flash."""
    extra = first.shape[0] - down.shape[0]
    return extra if extra > 0 and type(getattr(module, "identity_expert", None)) is nn.Identity else 0


def _unsupported(
    module: nn.Module, own: Mapping[str, Tensor], names: tuple[str, ...], norm: str | None, num_identity: int
) -> str | None:
    if unknown := [name for name in own if name not in names]:
        return f"its parameter {unknown[0]} is not known"
    counts = {own[name].shape[0] - (0 if name.startswith("down_proj") else num_identity) for name in names}
    if len(counts) > 1 or any(own[name].ndim not in (2, 3) for name in names):
        shapes = ", ".join(f"{name} {tuple(own[name].shape)}" for name in names)
        return f"its weights are not stacked over the same experts: {shapes}"
    for name, child in module.named_children():
        if name != norm and any(True for _ in (*child.parameters(), *child.buffers())):
            return f"its {name} has weights of its own"
    return None


def _transposed(module: nn.Module, first: Tensor, d_model: int) -> bool:
    """From the flag of the class; without a flag, from the shape."""
    flag = getattr(module, "is_transposed", None)
    return bool(flag) if flag is not None else first.shape[1] == d_model != first.shape[2]


def _activation(module: nn.Module) -> str:
    name = getattr(getattr(module, "_apply_gate", None), "__qualname__", "")
    act = getattr(module, "act_fn", None)
    if act is None or name.startswith(type(module).__name__):
        return name
    return _name_of(act)


def _name_of(activation: object) -> str:
    return str(getattr(activation, "__name__", type(activation).__name__)).removesuffix("Activation")


def _value(value: object) -> object:
    return value if isinstance(value, (int, float, bool, str, torch.dtype, type(None))) else id(value)


def holds_stacks(module: nn.Module) -> bool:
    """Whether a module has stacked weights (E, ., .) and an attribute with the number of experts, E."""
    sizes = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3}
    counts = {value for name, value in vars(module).items() if "experts" in name and isinstance(value, int)}
    return bool(sizes & counts - {1})
