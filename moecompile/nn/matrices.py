"""The matrices of a model's hidden layers, which Muon steps as wholes, and how they lie in its parameters.

A hidden matrix multiplies activations of a layer: a two-dimensional weight inside the model's layers (of a model
without a list of layers, anywhere), and one matrix per expert of a stacked weight. None are embeddings, output heads
(what is outside of the layers), routers, convolutions and vectors, also stacked ones: biases of each expert or
position, scales of each head, decay rates of each channel.

Legend: E experts, O d_out, I d_in, F expert width, D model dim.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moecompile.capture import layers_of
from moecompile.nn.adapters import output_heads, own_router, side_of
from moecompile.nn.existing import ExistingExperts, ExistingMeter, MatrixExperts
from moecompile.nn.experts import Experts
from moecompile.nn.router import Router

_STACKED = 3  # dims
_VECTORS = re.compile(r"(^|[._])(bias|bias_table|scale|A_log)$")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the matrices of one parameter are.

    joined: number of experts whose matrices lie below each other in a parameter of two dims (E O, I); 0 otherwise.
    transposed: whether a matrix is stored as (I, O). parts: 2 if gate and up are one weight: each is a matrix.
    interleaved: whether their outputs alternate, else gate comes first.
    """

    joined: int = 0
    transposed: bool = False
    parts: int = 1
    interleaved: bool = False

    def matrices(self, weight: Tensor, num_experts: int = 0) -> Tensor:
        """A view of `weight` whose last two dims are the matrices, (..., O, I).

        Args:
            weight: whole matrices: a two-dimensional weight, or a stack of any number of experts.
            num_experts: of a joined weight, those that `weight` holds.
        """
        if self.joined:
            weight = torch.unflatten(weight, 0, (num_experts, -1))
        if self.transposed:
            weight = weight.transpose(-2, -1)
        if self.parts == 1:
            return weight
        if self.interleaved:
            return torch.unflatten(weight, -2, (-1, self.parts)).transpose(-3, -2)
        return torch.unflatten(weight, -2, (self.parts, -1))


def hidden_matrices(model: nn.Module) -> dict[str, Layout]:
    """Name of a parameter -> where its matrices are, in the model's order; frozen weights are included."""
    layouts = dict(_stacked(model))
    outside = _outside(model)
    in_out = {id(module.weight) for module in model.modules() if type(module).__name__.endswith("Conv1D")}
    found: dict[str, Layout] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in layouts:
            if parameter.ndim == _STACKED or layouts[id(parameter)].joined:
                found[name] = layouts[id(parameter)]
        elif (
            parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in outside and not are_vectors(name)
        ):
            found[name] = Layout(transposed=id(parameter) in in_out)
    return found


def are_vectors(name: str) -> bool:
    """Whether a weight is applied number by number, as its name says: a vector, or one of each expert, head, position
    or channel (the `A_log` of Mamba).
    """
    return _VECTORS.search(name) is not None


def _stacked(model: nn.Module) -> Iterator[tuple[int, Layout]]:
    """(id, layout) of every parameter that is stacked over experts; biases too."""
    for owner in model.modules():
        if isinstance(owner, Experts):
            for name, parameter in owner.named_parameters(recurse=False):
                yield id(parameter), Layout(parts=2 if name == "gate_up_proj" else 1)
        for experts in owner.children():
            if isinstance(experts, ExistingExperts):
                for name in experts.names:
                    yield id(owner.get_parameter(name)), _layout(experts, name)


def _layout(experts: ExistingExperts, name: str) -> Layout:
    if isinstance(experts, MatrixExperts):
        return Layout(joined=experts.num_experts, transposed=name == experts.names[-1])
    if side_of(name):  # the factors of an adapter are matrices of their own
        return Layout()
    if name == "gate_up_proj":
        return Layout(transposed=experts.transposed, parts=2, interleaved=_alternates(experts))
    return Layout(transposed=experts.transposed)


@torch.no_grad()
def _alternates(experts: ExistingExperts) -> bool:
    """Whether gate and up alternate: then the second input of a gate of width 2 changes its first output."""
    before = torch.ones(1, 4, device="cpu")
    after = before.clone()
    after[0, 1] = 0.5
    changed = experts.gate(before) != experts.gate(after)
    return bool(changed[0, 0])


def _is_convolution(module: nn.Module) -> bool:
    """Whether the weights that are its own are filters, also of two dims; GPT-2's Conv1D is a linear, and so is every
    `nn.Linear`, whatever its name (`ConvertedLinear`).
    """
    kind = type(module).__name__
    return "Conv" in kind and not kind.endswith("Conv1D") and not isinstance(module, nn.Linear)


def _outside(model: nn.Module) -> set[int]:
    """Ids of the parameters that are not in hidden layers, of routers and of convolutions."""
    kinds = (nn.Embedding, Router)
    modules = [*output_heads(model), *(module for module in model.modules() if isinstance(module, kinds))]
    for path, module in model.named_modules():
        if isinstance(module, ExistingMeter):
            experts = path.rpartition(".")[0]
            block = model.get_submodule(experts.rpartition(".")[0])
            modules += [router for _, router in own_router(block, model.get_submodule(experts), module.num_experts)]
    outside = {id(parameter) for module in modules for parameter in module.parameters()}
    filters = [module for module in model.modules() if _is_convolution(module)]
    outside |= {id(parameter) for module in filters for parameter in module.parameters(recurse=False)}
    layers = list(layers_of(model))
    if layers:
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        outside |= {id(parameter) for parameter in model.parameters() if id(parameter) not in inside}
    return outside
