"""Finds existing experts by their call and their weights, never by names of modules.

transformers calls all its experts with hidden states (T, D), expert ids (T, K) and routing weights (T, K). It names the
weights `gate_up_proj` and `down_proj`, and flags of the classes describe their layout.

Algorithm, for each module that was called:
  1. Check that its arguments are three such tensors. Ids may also be one-hot, (T, K, E).
  2. Read the stacked weights, or the modules if each expert is a separate module.
  3. Account for every parameter, or give the reason why the experts are not supported.

Legend: T tokens, D model dim, F expert width, E experts, K top-k, B sequences, S tokens of one. Of a router, E are the
experts that a token may choose: identity experts count.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.capture import Recording
from moecompile.match.ffn import FFNMatch, activation_module
from moecompile.match.pointwise import torch_name
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts, MatrixExperts, without_parameters
from moecompile.torch_private import tree_leaves

# -- their router ------------------------------------------------------------------------------------------------------


_LINEARS = ("linear", "addmm", "matmul", "bmm", "einsum")
_SCORES = ("softmax", "sigmoid")
_CHOICES = ("topk", "argmax", "max", "sort")
_SAME = (
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "to", "type", "type_as", "float",
    "double",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RouterMatch:
    """Where the logits of a model's own router are, and what it makes of them.

    path: of the module that returns them, from the model. index: which of the tensors that it returns. num_choices: E.
    score: `softmax` or `sigmoid`; `other`. sequences: whether the block is called with (B, S, D), so that it is known
    which tokens are one sequence.
    """

    path: str
    index: int
    num_choices: int
    score: str
    sequences: bool


def own_router(recording: Recording, path: str, num_choices: int, d_model: int) -> RouterMatch | None:
    """The router of the experts at `path`; None: its logits are nothing that a module of their block returns.

    Algorithm, by dataflow from the expert ids of their call:
      1. Walk up from the ids and the routing weights to the linears that they come from.
      2. The scores are the softmax or sigmoid on the way that has one value for every expert; the logits are its input.
         If there is none, ids are chosen by the logits themselves, and weights are a softmax or sigmoid of the chosen
         ones.
      3. Find a module of the block that returns these logits, up to their shape and precision: a hook can read them
         there.

    Args:
        num_choices: experts that a token may choose. d_model: width of the block's input.
    """
    read = recording.read.get(path, [])
    if len(read) < 3 or read[1] is None or read[2] is None:
        return None
    scored = _scored(read[1], read[2], num_choices)  # Steps 1 and 2
    if scored is None:
        return None
    score, logits = scored
    block, _, _ = path.rpartition(".")
    inside = f"{block}." if block else ""
    for name, made in recording.made.items():  # Step 3
        if name.startswith(inside) and name != block and not f"{name}.".startswith(f"{path}."):
            index = next((i for i, node in enumerate(made) if node is not None and _root(node) is logits), None)
            if index is not None and _width(made[index]) == num_choices:
                sequences = _has_sequences(recording, block, d_model)
                return RouterMatch(path=name, index=index, num_choices=num_choices, score=score, sequences=sequences)
    return None


def skips_tokens(recording: Recording, path: str) -> bool:
    """Whether the router of the experts at `path` takes some tokens past them: the same mask makes their ids and their
    weights 0, so that they reach expert 0 with nothing to add (Zaya).
    """
    read = [_root(node) for node in recording.read.get(path, [])[1:3]]
    masked = [node.args[1:] for node in read if node is not None and _name(node) == "masked_fill"]
    return len(masked) == 2 and masked[0] == masked[1] and bool(masked[0][1] == 0)


def _scored(ids: fx.Node, weights: fx.Node, num_choices: int) -> tuple[str, fx.Node] | None:
    """(score, root of the logits)."""
    above_ids, above_weights = list(_above(ids)), list(_above(weights))
    both = [*above_ids, *above_weights]
    wide = {(_name(n), _root(n.args[0])) for n in both if _name(n) in _SCORES and _width(n) == num_choices}
    if len(wide) == 1:
        ((score, logits),) = wide
        return (score, logits) if logits is not None and _is_of_linear(logits, num_choices) else None
    if wide:
        return None
    linears = {n for n in both if _name(n) in _LINEARS and _width(n) == num_choices}
    if len(linears) != 1:
        return None
    logits = linears.pop()
    chosen = {_unbiased(n.args[0]) for n in above_ids if _name(n) in _CHOICES and _width_of(n.args[0]) == num_choices}
    of_chosen = {_name(n) for n in above_weights if _name(n) in _SCORES}
    return (of_chosen.pop() if chosen == {logits} and len(of_chosen) == 1 else "other"), logits


def _above(start: fx.Node) -> Iterator[fx.Node]:
    """The nodes above `start`, itself included, up to the first linears."""
    seen, left = {start}, [start]
    while left:
        node = left.pop()
        yield node
        for source in _sources(node):
            if source not in seen:
                seen.add(source)
                left.append(source)


def _sources(node: fx.Node) -> list[fx.Node]:
    name = _name(node)
    if name in _LINEARS:
        return []
    return node.all_input_nodes[:1] if name in _SAME else node.all_input_nodes  # not the tensor that gives a type


def _is_of_linear(node: fx.Node, num_choices: int) -> bool:
    """Whether a linear with one row for every expert is above `node`, and nothing that chooses."""
    above = list(_above(node))
    linears = [n for n in above if _name(n) in _LINEARS and _width(n) == num_choices]
    return len(linears) == 1 and not any(_name(n) in (*_CHOICES, *_SCORES) for n in above)


def _root(value: object) -> fx.Node | None:
    """The node of which `value` is another shape or precision."""
    while isinstance(value, fx.Node) and _name(value) in _SAME and isinstance(value.args[0], fx.Node):
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None


def _unbiased(value: object) -> fx.Node | None:
    """The root without a correction bias, a tensor of the model that is added."""
    node = _root(value)
    if node is not None and _name(node) == "add":
        added = {_root(part) for part in node.args}
        rest = {part for part in added if part is not None and part.op != "get_attr"}
        return rest.pop() if len(rest) == 1 else node
    return node


def _name(node: fx.Node) -> str:
    """Nodes of a recording are functions and attributes; no modules are looked up."""
    return torch_name(node, lambda path: (_ for _ in ()).throw(KeyError(path)))


def _width(node: fx.Node | None) -> int:
    shape = () if node is None else node.meta.get("shape", ())
    return int(shape[-1]) if shape else 0


def _width_of(value: object) -> int:
    return _width(value) if isinstance(value, fx.Node) else 0


def _has_sequences(recording: Recording, block: str, d_model: int) -> bool:
    call = recording.calls.get(block)
    if call is None:
        return False
    first = next((leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)), None)
    return first is not None and first.dim() == 3 and first.shape[-1] == d_model


# -- experts -----------------------------------------------------------------------------------------------------------


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
    norm: a child that is applied to the rows after the experts. scales_input: whether routing weights scale what
    experts read, not what they return. activation: for display. router: where the logits of the model's own router are;
    None: not found. skips: whether a weight of 0 is a token that goes past the experts.
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
    scales_input: bool = False
    activation: str
    router: RouterMatch | None = None
    skips: bool = False

    @property
    def form(self) -> str:
        """`stacked` or `modules`."""
        return "modules" if self.modules else "stacked"

    @property
    def gated(self) -> bool:
        """Whether two projections feed the activation."""
        return self.are_matrices or "gate_up_proj" in self.weights

    @property
    def no_adapters(self) -> str:
        """Why stacked weights of these experts cannot have adapters; empty if they can."""
        if self.are_matrices:
            return "are one matrix per projection, which peft cannot adapt expert by expert"
        return "have identity experts, whose unused rows peft would adapt too" if self.num_identity else ""


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
        transposed=transposed, norm=norm, scales_input=getattr(module, "scales_input", False),
        activation=_activation(module),
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
        plain = tuple(
            (key, _value(value))
            for key, value in sorted(vars(child).items())
            if not key.startswith("_") or isinstance(value, (int, float, str))
        )
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


# -- whether they are SwiGLU -------------------------------------------------------------------------------------------


def existing_experts(match: ExpertsMatch, module: nn.Module) -> ExistingExperts:
    """A module that computes the experts of `module` on rows, with weights as arguments."""
    if match.are_matrices:
        holder = module.get_submodule(match.weights[0].rpartition(".")[0])
        return MatrixExperts(match.num_experts, without_parameters(holder), match.weights)
    return ExistingExperts(match.num_experts, without_parameters(module), match.weights, transposed=match.transposed)


def are_swiglu(match: ExpertsMatch, module: nn.Module) -> bool:
    """Whether the model's own experts are SwiGLU without biases and without a norm on their outputs."""
    if match.ffn is not None:
        return ffn_is_swiglu(*match.ffn)
    return match.norm is None and is_swiglu(existing_experts(match, module))


def ffn_is_swiglu(root: fx.GraphModule, match: FFNMatch) -> bool:
    """Whether experts made from this dense FFN will be SwiGLU without biases."""
    if match.kind != "gated" or any(linear.bias for linear in (*match.ins, match.down)):
        return False
    activation = activation_module(root, match)
    return is_swiglu(Experts(1, 1, 1, gated=True, activation=activation, device="meta"))


def is_swiglu(experts: nn.Module) -> bool:
    """Whether experts have no biases and compute silu(gate) * up, in training and in evaluation mode."""
    if isinstance(experts, Experts):
        plain = experts.gated and experts.gate_up_proj_bias is None and experts.down_proj_bias is None
        return plain and _computes_swiglu(experts.activation, experts.activation)
    if isinstance(experts, ExistingExperts):
        plain = set(experts.names) == {"gate_up_proj", "down_proj"} and not experts.transposed
        return plain and _computes_swiglu(experts.own, lambda gate, up: experts.gate(torch.cat((gate, up), -1)))
    return False


@torch.no_grad()
def _computes_swiglu(owner: nn.Module, activation: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Compares on a grid wide enough to reveal clamps and other slopes; training mode reveals dropout."""
    if any(True for _ in owner.parameters()) or any(True for _ in owner.buffers()):
        return False
    cpu = torch.device("cpu")  # the default device may be meta
    values = torch.cat((torch.linspace(-40, 40, 161, device=cpu), torch.linspace(-2, 2, 41, device=cpu)))
    gate, up = torch.meshgrid(values, values, indexing="ij")
    expected, modes = F.silu(gate) * up, [(module, module.training) for module in owner.modules()]
    try:
        for training in (False, True):
            owner.train(training)
            with torch.random.fork_rng(devices=[]):
                if not torch.allclose(activation(gate.contiguous(), up.contiguous()), expected, rtol=1e-5, atol=1e-6):
                    return False
    finally:
        for module, training in modes:
            module.training = training
    return True
