"""A larger MoE from an MoE: experts and their router rows are copied, so that training can make them differ.

The result is a plain model of transformers with a larger config: it is planned, verified, trained, checkpointed and
exported like any other. Expert Upcycling (arXiv 2604.19835) copies experts so, with top-k kept, and by utility.

Why step 0 can be equal: with `factor` = m copies of every expert, the m copies of an expert have equal logits. If top-k
grows to m k, a token chooses all copies of its k experts, and the weights of these have the same sum as before:

    softmax over all experts    p becomes p / m for each copy, whether the weights are normalised afterwards or not
    softmax over the chosen     each copy gets 1 / m of the weight
    sigmoid, normalised         the same; not normalised, the sum is m times as large

A correction bias b is added to the scores that experts are chosen by. Sigmoids of copies stay, and so does b; beside a
softmax it becomes b / m, since p / m + b / m ranks experts like p + b.

With top-k kept, equal logits tie, and a token may get copies of one expert instead of two experts; with one expert per
token, whose score is a sigmoid, any copy does the same. Groups scored by the sum of their two best experts may be
ranked differently. Both are not promised to be equal, and neither are copies by load, where experts have different
numbers of copies.

Algorithm:
  1. Find the experts and read their number, top-k and groups.
  2. Decide how many copies each expert has: `factor`, or more for those with a larger load, within its group.
  3. Make the larger model and copy: a weight with one row per expert gets the rows of the copied experts.
  4. Add noise to all copies but the first of each expert.
  5. Compare the outputs on the example, and refuse a difference where equality is promised.

Legend: E experts, m factor, K top-k.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecompile import hub_kernels
from moecompile.arguments import check_example, check_model
from moecompile.capture import Example, call_with, in_mode, is_meta
from moecompile.errors import ArgumentError, ConfigError
from moecompile.match.experts import ExpertsMatch
from moecompile.models.without_hub_code import make
from moecompile.nn.existing import CORRECTION_BIAS
from moecompile.nn.scaled_input import standard_calls
from moecompile.pipeline.captured import capture_planned
from moecompile.pipeline.facts import WIDENED
from moecompile.plan import ExpertsSite
from moecompile.schema import Config
from moecompile.torch_private import set_attribute

NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of transformers' configs for the number of routed experts of a layer."""
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
TOP_K = ("scaled", "kept")
_LEAST_EPS = torch.finfo(torch.float32).eps  # transformers computes scores in fp32 in every model


@dataclass(frozen=True)
class Widened:
    """The larger model.

    copies: path of the experts -> which expert each new one is a copy of, (m E). reason: why outputs are not promised
    to stay; None: they are. max_abs_diff: of the outputs on the example, before noise; NaN on the
    meta device.
    """

    model: nn.Module
    copies: dict[str, list[int]]
    reason: str | None
    max_abs_diff: float

    def __str__(self) -> str:
        """For people."""
        sizes = ", ".join(dict.fromkeys(f"{len(set(of))} -> {len(of)} experts" for of in self.copies.values()))
        promised = "promised" if self.reason is None else f"not promised to stay: {self.reason}"
        measured = "not compared" if math.isnan(self.max_abs_diff) else f"differ by {self.max_abs_diff:.3g}"
        return f"{len(self.copies)} MoE layers, {sizes}; outputs {measured} ({promised})"


def widen_experts(
    model: nn.Module,
    factor: int,
    *,
    example: Example,
    top_k: str = "scaled",
    load: Mapping[str, Sequence[float]] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Widened:
    """A model of the same family with `factor` times as many experts, which are copies. `model` is not changed.

    Args:
        model: of transformers, MoE already, not compiled.
        factor: how many times as many experts.
        example: inputs of one forward, on which step 0 is compared.
        top_k: `scaled` (times `factor`, which can keep the outputs) or `kept`.
        load: path of the experts (or layer of a run's load.npz) -> tokens of each expert: experts with a larger load
            get more copies. None: all get `factor`.
        noise: standard deviation of what is added to the copies, relative to that of each weight. Without it, copies
            that are chosen together get the same gradients and stay the same.
        seed: of the noise.

    Raises:
        ArgumentError: an argument has no meaning for this model.
        ConfigError: the model cannot be widened.
    """
    check_model(model)
    check_example(example)
    _check(factor, top_k, noise)
    hub_kernels.take_off(model)
    sites = moe_sites(model, example, top_k)  # Step 1
    copies = {
        site.fqn: _copied(site, factor, None if load is None else _load_of(load, site)) for site in sites
    }  # Step 2
    wide = _larger(model, sites, copies, factor, factor if top_k == "scaled" else 1)  # Step 3
    reason = _why_not_equal(model, sites, factor, top_k, load is not None)
    if is_meta(model):
        return _marked(Widened(wide, copies, reason, math.nan), noise)
    diff, is_explained = _compared(model, wide, example)
    if reason is None and not is_explained:  # Step 5, without the noise
        raise ConfigError(
            "top_k", top_k, f"outputs on the example are promised to stay but differ by {diff:.3g}", "Report this model"
        )
    if noise:
        _add_noise(model, wide, copies, noise, seed)  # Step 4
    return _marked(Widened(wide, copies, reason, diff), noise)


def _compared(model: nn.Module, wide: nn.Module, example: Example) -> tuple[float, bool]:
    """The largest difference of the outputs, and whether rounding explains it.

    With fewer digits a near tie of a router may send a token elsewhere, so what differs there is compared again
    in fp32, in copies of both models.
    """
    before, after = _logits(model, example), _logits(wide, example)
    diff = float((before.double() - after.double()).abs().max())
    is_explained = diff <= float(before.abs().max()) * max(torch.finfo(before.dtype).eps, _LEAST_EPS) ** 0.5
    if is_explained or torch.promote_types(before.dtype, torch.float32) == before.dtype:
        return diff, is_explained
    return diff, _compared(copy.deepcopy(model).float(), copy.deepcopy(wide).float(), example)[1]


def _marked(widened: Widened, noise: float) -> Widened:
    """The model knows what was done, so that plans can say it."""
    then = f"then noise of {noise:g} on copies" if noise else "without noise, copies chosen together stay alike"
    set_attribute(widened.model, WIDENED, f"{widened}; {then}")
    return widened


def _check(factor: int, top_k: str, noise: float) -> None:
    if type(factor) is not int or factor < 2:
        raise ArgumentError("factor", factor, "must be a whole number of at least 2", "Use 2")
    if top_k not in TOP_K:
        raise ArgumentError("top_k", top_k, f"must be one of {list(TOP_K)}", "Use scaled")
    if not 0 <= noise < 1:
        raise ArgumentError("noise", noise, "must be at least 0 and less than 1", "Use 0.01")


def moe_sites(model: nn.Module, example: Example, top_k: str = "kept") -> list[ExpertsSite]:
    """The experts of a model that can be widened with this top-k.

    Raises:
        ArgumentError: it cannot be.
    """
    if not hasattr(model, "_from_config"):
        raise ArgumentError("model", type(model).__name__, "is no model of transformers", "Widen one of these")
    with standard_calls(model, example):
        captured = capture_planned(model, None, Config(), example)
    sites = [site for site in captured.sites if isinstance(site, ExpertsSite)]
    if not sites:
        raise ArgumentError("model", type(model).__name__, "has no experts", "Rewrite its FFNs: compile_model")
    for site in sites:
        if site.form == "modules":
            rule = f"each expert of {site.fqn} is a module, whose names would change"
            raise ArgumentError("model", type(model).__name__, rule, "Widen a family with stacked experts")
    for path, region in captured.regions.items():
        match = region.matches[path]
        if top_k == "scaled" and isinstance(match, ExpertsMatch) and match.scales_input:
            rule = f"{path} scales what its experts read, which is supported for one expert per token"
            raise ArgumentError("top_k", top_k, rule, "Use kept")
    if len({(site.num_experts, site.top_k) for site in sites}) > 1:
        rule = "its layers have different numbers of experts, and the config of a family has one"
        raise ArgumentError("model", type(model).__name__, rule, "Widen a model whose layers are alike")
    return sites


def _load_of(load: Mapping[str, Sequence[float]], site: ExpertsSite) -> Sequence[float]:
    """The load of a site; layers of a run are named like its experts."""
    if site.fqn not in load or len(load[site.fqn]) < site.num_experts:
        rule = f"must have {site.num_experts} numbers for {site.fqn}"
        raise ArgumentError(
            "load", sorted(load), rule, "Give the load of this model: LoadHistory.read(RUN / 'load.npz')"
        )
    return list(load[site.fqn])[: site.num_experts]


def _copied(site: ExpertsSite, factor: int, load: Sequence[float] | None) -> list[int]:
    """Which expert each new one is a copy of, copies side by side: groups stay groups of consecutive experts."""
    counts = [factor] * site.num_experts
    if load is not None:
        size = site.num_experts // site.groups
        counts = [1] * site.num_experts
        for first in range(0, site.num_experts, size):
            members = range(first, first + size)
            for _ in range((factor - 1) * size):  # one more copy for the expert whose copies have the most to do
                counts[max(members, key=lambda e: (load[e] / counts[e], -e))] += 1
    return [expert for expert, count in enumerate(counts) for _ in range(count)]


def _why_not_equal(
    model: nn.Module, sites: Sequence[ExpertsSite], factor: int, top_k: str, by_load: bool
) -> str | None:
    """Why outputs are not promised to stay (module docstring); None: they are."""
    first, config = sites[0], text_config_of(model.config)
    if by_load:
        return "experts have different numbers of copies, so their shares of a token change"
    if top_k == "kept" and (first.top_k > 1 or first.score != "sigmoid"):
        return "copies tie with top-k kept, so a token may get copies of one expert in place of another expert"
    if any(site.top_groups < site.groups for site in sites):
        return "copies change the scores of expert groups"
    if first.score not in ("softmax", "sigmoid"):
        return "what the router makes of its logits is not known"
    if top_k == "scaled" and first.score == "sigmoid" and not getattr(config, "norm_topk_prob", True):
        return f"{factor} copies of a sigmoid that is not normalised have {factor} times the weight"
    return None


def text_config_of(config: Any) -> Any:
    """The part of a model's config that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _larger(
    model: nn.Module, sites: Sequence[ExpertsSite], copies: Mapping[str, list[int]], factor: int, more_top_k: int
) -> nn.Module:
    """The larger model with the copied weights, in the same mode and precision; what was frozen stays so."""
    config = copy.deepcopy(model.config)
    text = text_config_of(config)
    _multiply(text, NUM_EXPERTS, sites[0].num_experts, factor)
    _multiply(text, _TOP_K, sites[0].top_k, more_top_k)
    first = next(model.parameters())
    kind: Any = type(model)  # the class itself: auto classes do not know all
    with torch.device("meta"):
        wide: nn.Module = make(kind, config, dtype=first.dtype, experts_implementation="eager")
    wide.to_empty(device=first.device)
    wide.tie_weights()  # type: ignore[operator]
    old = dict(_tensors(model))
    of_softmax = {site.fqn: copies[site.fqn] for site in sites if site.score == "softmax"}
    for name, tensor in _tensors(wide):
        tensor.data = tensor.data.to(old[name].dtype) if name in old else tensor.data
        _fill(name, tensor, old.get(name), _rows(name, copies))
        if name.rpartition(".")[2] == CORRECTION_BIAS and _rows(name, of_softmax):
            tensor.data /= factor  # as the scores beside it
        tensor.requires_grad_(old[name].requires_grad)
    for path, module in wide.named_modules():
        module.training = model.get_submodule(path).training
    if hasattr(model, "generation_config"):
        wide.generation_config = copy.deepcopy(model.generation_config)
    return wide


def _multiply(config: Any, names: Sequence[str], value: int, factor: int) -> None:
    found = [name for name in names if getattr(config, name, None) == value]
    if not found:
        rule = f"none of its keys {list(names)} is {value}, as in the model"
        raise ArgumentError("model", config.model_type, rule, "Widen another family")
    for name in found:
        setattr(config, name, value * factor)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _rows(name: str, copies: Mapping[str, list[int]]) -> list[int]:
    """The copied experts of the block that a weight is in; empty outside of MoE blocks."""
    for experts, rows in copies.items():
        block = experts.rpartition(".")[0]
        if not block or name.startswith(f"{block}."):
            return rows
    return []


@torch.no_grad()
def _fill(name: str, new: Tensor, old: Tensor | None, rows: Sequence[int]) -> None:
    if old is not None and new.shape == old.shape:
        new.copy_(old)
        return
    grown = [] if old is None or old.ndim != new.ndim else [d for d in range(old.ndim) if old.shape[d] != new.shape[d]]
    sizes = [(old.shape[d], new.shape[d]) for d in grown] if old is not None else []
    if old is None or not rows or sizes != [(len(set(rows)), len(rows))]:
        shapes = f"{None if old is None else tuple(old.shape)} in the model, {tuple(new.shape)} in the larger one"
        raise ConfigError(name, shapes, "has not one row for each expert", "Widen another family")
    new.copy_(old.index_select(grown[0], torch.tensor(rows, device=old.device)))  # dim 0, but for Ernie 4.5's bias


@torch.no_grad()
def _add_noise(model: nn.Module, wide: nn.Module, copies: Mapping[str, list[int]], noise: float, seed: int) -> None:
    """Adds noise to the matrices of experts and to router rows; every first copy stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wide.named_parameters():
        rows, before = _rows(name, copies), model.get_parameter(name)
        if parameter.ndim < 2 or parameter.shape[0] == before.shape[0]:  # not one row for each expert
            continue
        is_copy = torch.tensor([i > 0 and rows[i] == rows[i - 1] for i in range(len(rows))], device=parameter.device)
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        parameter.add_(noise * parameter.std() * drawn * is_copy.view(-1, *[1] * (parameter.ndim - 1)))


@torch.no_grad()
def _logits(model: nn.Module, example: Example) -> Tensor:
    with in_mode(model, training=False):
        out = call_with(model, example)
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise ArgumentError("example", type(out).__name__, "makes no logits to compare", "Widen a language model")
    return logits
