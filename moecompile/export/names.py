"""The weights of an upcycled model with the names and shapes of a model family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from moecompile.export.families import Family, Names
from moecompile.export.form import MoEForm

_ROUTER, _EXPERTS, _SHARED = "router", "experts", "shared_experts"
_LATENT_DOWN = "latent_down.weight"


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
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if (stacked := ours.get(f"{_EXPERTS}.{name}")) is not None:
            yield f"{_EXPERTS}.{name}", stacked
    if names.latent is not None and form.experts.latent_size is not None:
        yield from zip(names.latent, (ours[_LATENT_DOWN], ours["latent_up.weight"]), strict=True)
    if names.shared and form.experts.num_shared:
        yield from _shared(ours, names, gated=form.experts.shared_gate)
    elif names.shared and names.shared_always:
        yield from _silent(ours, names)


def _shared(ours: Mapping[str, Tensor], names: Names, *, gated: bool) -> Iterator[tuple[str, Tensor]]:
    """The shared expert. If the family has a gate but the plan has none, the gate is 0.5 and down_proj is doubled."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = ours.get(f"{_SHARED}.{name}.weight")
        if weight is None:  # no gate
            continue
        doubled = name == "down_proj" and names.gate is not None and not gated
        yield f"{names.shared}.{name}.weight", weight * 2 if doubled else weight
    if names.gate is not None:
        down_DF = ours[f"{_SHARED}.down_proj.weight"]
        yield names.gate, ours[f"{_SHARED}.gate_weight"] if gated else down_DF.new_zeros(1, down_DF.shape[0])


def _silent(ours: Mapping[str, Tensor], names: Names) -> Iterator[tuple[str, Tensor]]:
    """A shared expert with an output of zero: a zero down_proj, but projections of expert 0, so that it can learn."""
    stacked = ours.get(f"{_EXPERTS}.gate_up_proj")
    if stacked is not None:
        gate_FD, up_FD = stacked[0].chunk(2)
        yield f"{names.shared}.gate_proj.weight", gate_FD.clone()
    else:
        up_FD = ours[f"{_EXPERTS}.up_proj"][0]
    if _LATENT_DOWN in ours:  # a shared expert reads x, not its projection
        up_FD = up_FD @ ours[_LATENT_DOWN]
    yield f"{names.shared}.up_proj.weight", up_FD.clone()
    yield f"{names.shared}.down_proj.weight", up_FD.new_zeros(up_FD.shape[::-1])
    if names.gate is not None:
        yield names.gate, up_FD.new_zeros(1, up_FD.shape[1])
