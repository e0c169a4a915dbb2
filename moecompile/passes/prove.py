"""Proves the rewrite of existing experts: rewritten for one device, they compute the same outputs.

The meta device has no values to compare, so only forms of known meaning are accepted there. This is before anything is
planned, and tells forms apart; the receipt compares what was rewritten within rounding (agreement.py).
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
    """Why the rewritten experts may differ from the module on a recorded call; None if they agree."""
    match, module = region.matches[site.fqn], region.module
    assert isinstance(match, ExpertsMatch)
    if is_meta(module):
        # Classes of transformers declare their layout, and one-hot ids are unambiguous.
        # So are identity experts, and matrices with the names that DBRX uses.
        unambiguous = match.num_identity > 0 or match.are_matrices
        known = hasattr(module, "is_concatenated") or match.call.one_hot or unambiguous
        return None if known else "its class does not declare the layout, and on the meta device it cannot be tried"
    regions, layers = {region.path: region}, {region.path: [layer_on_one_device(site)]}
    graph_module = run_passes([Rewrite()], regions, layers)[region.path].graph
    expected, got = _output(module, call), _output(graph_module, call)
    if not isinstance(expected, Tensor) or expected.shape != got.shape or expected.dtype != got.dtype:
        return "it does not return one tensor like its hidden states"
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    if not float((expected - got).abs().max()) <= tolerance:
        return f"the recorded call gives other outputs than its {', '.join(match.weights) or 'experts'} explain"
    if match.ffn is None and not torch.equal(_output(module, call, training=True), expected):
        return "it computes something else in training mode"
    return None


@torch.no_grad()
def _output(module: nn.Module, call: ModuleCall, *, training: bool = False) -> Tensor:
    with torch.random.fork_rng(devices=[]), in_mode(module, training=training):
        out: Tensor = module.forward(*call.args, **call.kwargs)  # not __call__: its hooks move to the graph
    return out
