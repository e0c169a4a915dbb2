"""Finds the logits of the router that a model has already, by dataflow from the expert ids of its experts' call.

Algorithm:
  1. Walk up from the ids and the routing weights to the linears that they come from.
  2. The scores are the softmax or sigmoid on the way that has one value for every expert; the logits are its input. If
     there is none, ids are chosen by the logits themselves, and weights are a softmax or sigmoid of the chosen ones.
  3. Find a module of the block that returns these logits, up to their shape and precision: a hook can read them there.

Legend: T tokens, E experts that a token may choose (identity experts count), K top-k, B sequences, S tokens of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from moecompile.capture import Recording
from moecompile.match.pointwise import torch_name
from moecompile.torch_private import tree_leaves

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
