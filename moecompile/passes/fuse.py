"""fuse: experts whose activation is SwiGLU gather their rows and sum their outputs themselves, in one op.

What is copied for the experts and what lies between the projections is then neither kept nor written to memory as a
whole (moecompile.ops.expert_ffn). Other experts stay as they are.

Algorithm, for each experts call:
  1. Is it SwiGLU, without biases? What the activation computes is compared, so any spelling counts.
  2. Does it stand between an op that copies rows and the one that sums them?
  3. Sort the assignments alone, give the experts the rows and where each one's sources are, drop both ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.comm.dispatch import items
from moecompile.errors import PassError
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts
from moecompile.passes.base import erase_unused, op_name
from moecompile.passes.lower import exchanges_of, experts_calls

ops = torch.ops.moecompile


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """No options."""

    name: str = "fuse"

    def run(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """A new GraphModule over the same modules; the input keeps its graph."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(graph_module.graph, {}))
        new = fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
        for call in experts_calls(new):
            if is_swiglu(new.get_submodule(str(call.target))):  # Step 1
                _fuse(new.graph, call)
        erase_unused(new.graph)
        new.graph.lint()
        new.recompile()
        return new

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """The same exchanges in the same order; a fused experts call reads one sort, and rows that are not copied."""
        was, now = ([(op_name(n), str(n.args[-1])) for n in exchanges_of(graph)] for graph in (before, after))
        if was != now:
            raise PassError(self.name, "", f"exchanges were {was}, are {now}")
        for call in experts_calls(after):
            if "source_R" not in call.kwargs:
                continue
            sources = {call.args[1], call.kwargs["source_R"], call.kwargs["weights_R"]}
            sorts = {op_name(n.args[0]) for n in sources if isinstance(n, fx.Node) and isinstance(n.args[0], fx.Node)}
            if len(sources) != 3 or len(sorts) != 1 or not min(sorts).startswith("sort_"):
                raise PassError(self.name, str(call.target), f"counts, sources and weights come from {sorted(sorts)}")


def is_swiglu(experts: nn.Module) -> bool:
    """Whether experts without biases compute silu(gate) * up, in training and in evaluation."""
    if isinstance(experts, Experts):
        plain = experts.gated and experts.gate_up_proj_bias is None and experts.down_proj_bias is None
        return plain and _computes_swiglu(experts.activation, experts.activation)
    if isinstance(experts, ExistingExperts):
        plain = set(experts.names) == {"gate_up_proj", "down_proj"} and not experts.transposed
        return plain and _computes_swiglu(experts.own, lambda gate, up: experts.gate(torch.cat((gate, up), -1)))
    return False


@torch.no_grad()
def _computes_swiglu(owner: nn.Module, activation: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Compared on a grid that is wide enough to show clamps and other slopes; dropout shows in training."""
    if any(True for _ in owner.parameters()) or any(True for _ in owner.buffers()):
        return False
    cpu = torch.device("cpu")  # a model may be compiled where new tensors are on the meta device
    values = torch.cat((torch.linspace(-40, 40, 161, device=cpu), torch.linspace(-2, 2, 41, device=cpu)))
    gate, up = torch.meshgrid(values, values, indexing="ij")
    wanted, modes = F.silu(gate) * up, [(module, module.training) for module in owner.modules()]
    try:
        for training in (False, True):
            owner.train(training)
            with torch.random.fork_rng(devices=[]):
                if not torch.allclose(activation(gate.contiguous(), up.contiguous()), wanted, rtol=1e-5, atol=1e-6):
                    return False
    finally:
        for module, training in modes:
            module.training = training
    return True


def _fuse(graph: fx.Graph, call: fx.Node) -> None:
    # Step 2
    rows = call.args[0]
    assert isinstance(rows, fx.Node)
    copied, summed = rows.args[0], list(call.users)
    assert isinstance(copied, fx.Node)
    rule = _RULES.get(op_name(copied))
    if rule is None or len(summed) != 1 or op_name(summed[0]) != rule.sums:
        return
    # Step 3
    x, sort, arguments = rule.sorting(copied, summed[0])
    with graph.inserting_before(call):
        ordered = graph.call_function(sort, arguments)
        weights, source, _, counts = items(graph, ordered, "weights", "source", "order", "counts")
    call.args = (x, counts, *call.args[2:])
    call.kwargs = {"source_R": source, "weights_R": weights}
    summed[0].replace_all_uses_with(call)
    graph.erase_node(summed[0])


# -- what copies rows, and what sums them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """sums: op that sums the experts' outputs. sorting: (copying node, summing node) -> input rows, op, arguments."""

    sums: str
    sorting: Callable[[fx.Node, fx.Node], tuple[Any, Any, tuple[Any, ...]]]


def _permute(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, ids, *rest = copied.args
    return x, ops.sort_assignments, (ids, summed.args[2], *rest)


def _expand_rows(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, *rest = copied.args
    return x, ops.sort_received, tuple(rest)


def _take_local(copied: fx.Node, summed: fx.Node) -> tuple[Any, Any, tuple[Any, ...]]:
    x, *rest = copied.args
    return x, ops.sort_gathered, tuple(rest)


_RULES = {
    "permute": _Rule("unpermute", _permute),
    "expand_rows": _Rule("reduce_rows", _expand_rows),
    "take_local": _Rule("reduce_rows", _take_local),
}
