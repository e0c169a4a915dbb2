"""Whether experts compute SwiGLU, silu(gate) * up, however it is written; one fused op can then run them (fuse.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile.match.experts import ExpertsMatch
from moecompile.match.patterns import FFNMatch, activation_module
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts, MatrixExperts, without_parameters


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
