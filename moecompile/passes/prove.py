"""The proof of experts that a model has already: rewritten for one device, they compute what they computed.

On the meta device there are no values; there only forms are taken whose meaning is known without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moecompile.capture import ModuleCall, in_mode, is_meta
from moecompile.match.experts import ExpertsMatch
from moecompile.match.regions import Region
from moecompile.passes.rewrite import Rewrite
from moecompile.passes.run import run_passes
from moecompile.plan import ExpertsSite, layer_on_one_device


def unproven(region: Region, site: ExpertsSite, call: ModuleCall) -> str | None:
    """Why the rewritten experts may not compute what the module computes in a recorded call; None where they do."""
    match, module = region.matches[site.fqn], region.module
    assert isinstance(match, ExpertsMatch)
    if is_meta(module):
        # Classes of transformers declare their layout, and one-hot ids can mean nothing else.
        # The same holds of experts that are the identity, and of matrices by the names of DBRX.
        named = match.num_identity > 0 or match.are_matrices
        known = hasattr(module, "is_concatenated") or match.call.one_hot or named
        return None if known else "its class does not declare the layout, and on the meta device it cannot be tried"
    regions, layers = {region.path: region}, {region.path: [layer_on_one_device(site)]}
    graph_module = run_passes([Rewrite()], regions, layers)[region.path].graph
    wanted, got = _output(module, call), _output(graph_module, call)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return "it does not return one tensor like its hidden states"
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
    if not float((wanted - got).abs().max()) <= tolerance:
        return f"the recorded call gives other outputs than its {', '.join(match.weights) or 'experts'} explain"
    if match.ffn is None and not torch.equal(_output(module, call, training=True), wanted):
        return "it computes something else in training mode"
    return None


@torch.no_grad()
def _output(module: nn.Module, call: ModuleCall, *, training: bool = False) -> Tensor:
    with torch.random.fork_rng(devices=[]), in_mode(module, training=training):
        out: Tensor = module.forward(*call.args, **call.kwargs)  # its own hooks go over to the graph
    return out
