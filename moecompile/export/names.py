"""The weights of an upcycled model with the names and shapes of a model family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moecompile.export.families import Family, Names
from moecompile.export.form import MoEForm

_ROUTER, _EXPERTS, _SHARED = "router", "experts", "shared_experts"


def family_weights(weights: Mapping[str, Tensor], form: MoEForm, family: Family) -> dict[str, Tensor]:
    """Name -> tensor in the family. Tensors that need no change are not copied."""
    blocks = {form.block(layer, form.name) + ".": form.block(layer, family.names.block) + "." for layer in form.layers}
    out = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(blocks))}
    for ours, theirs in blocks.items():
        inside = {name.removeprefix(ours): tensor for name, tensor in weights.items() if name.startswith(ours)}
        out |= {theirs + name: tensor for name, tensor in _block(inside, form, family.names)}
    return out


def _block(ours: Mapping[str, Tensor], form: MoEForm, names: Names) -> Iterator[tuple[str, Tensor]]:
    yield names.router, ours[f"{_ROUTER}.weight"]
    if names.bias:
        bias_E = ours[f"{_ROUTER}.correction_bias"]
        yield names.bias, bias_E.unsqueeze(0) if names.bias_row else bias_E
    for name in ("gate_up_proj", "down_proj"):
        yield f"{_EXPERTS}.{name}", ours[f"{_EXPERTS}.{name}"]
    if names.shared and form.experts.num_shared:
        yield from _shared(ours, names, gated=form.experts.shared_gate)
    elif names.shared and names.shared_always:
        yield from _silent(ours, names)


def _shared(ours: Mapping[str, Tensor], names: Names, *, gated: bool) -> Iterator[tuple[str, Tensor]]:
    """The shared expert. If the family has a gate but the plan has none, the gate is 0.5 and down_proj is doubled."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = ours[f"{_SHARED}.{name}.weight"]
        doubled = name == "down_proj" and names.gate is not None and not gated
        yield f"{names.shared}.{name}.weight", weight * 2 if doubled else weight
    if names.gate is not None:
        down_DF = ours[f"{_SHARED}.down_proj.weight"]
        yield names.gate, ours[f"{_SHARED}.gate_weight"] if gated else down_DF.new_zeros(1, down_DF.shape[0])


def _silent(ours: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    """A shared expert with an output of zero: a zero down_proj, but projections of expert 0, so that it can learn."""
    gate_FD, up_FD = ours[f"{_EXPERTS}.gate_up_proj"][0].chunk(2)
    yield f"{names.shared}.gate_proj.weight", gate_FD.clone()
    yield f"{names.shared}.up_proj.weight", up_FD.clone()
    yield f"{names.shared}.down_proj.weight", torch.zeros_like(ours[f"{_EXPERTS}.down_proj"][0])
    if names.gate is not None:
        yield names.gate, up_FD.new_zeros(1, up_FD.shape[1])
