"""adapters: adapters of linears by peft, and what is trained. Adapters of experts are inserted by `rewrite`.

Algorithm:
  1. Let peft wrap the planned linears, so that names and computation are those of peft.
  2. Fill all adapters, those of experts too.
  3. Freeze everything but adapters, and routers if they are to be trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moecompile.errors import ConfigError, PassError, PlanError
from moecompile.nn.adapters import init_adapters, own_router, side_of, train_only_adapters, wide
from moecompile.passes.base import ModelPass
from moecompile.plan import ExpertsSite, Plan


@dataclass(frozen=True, kw_only=True)
class AttachAdapters(ModelPass):
    """seed: first values depend only on it and on names."""

    seed: int
    name: str = "adapters"

    def wants(self, plan: Plan) -> bool:
        """Models with adapters."""
        return plan.adapters is not None

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """Every planned linear is there."""
        assert plan.adapters is not None
        modules = dict(model.named_modules())
        for path in plan.adapters.linears:
            if not isinstance(modules.get(path), nn.Linear):
                raise PlanError("adapters.linears", path, "is not a linear of the model", "Plan again for this model")

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model in place."""
        assert plan.adapters is not None
        if plan.adapters.linears:  # Step 1
            with torch.random.fork_rng(devices=[]):
                _inject(model, plan)
        init_adapters(model, self.seed)  # Step 2
        routers = [router for _, router in routers_to_train(model, plan)]
        train_only_adapters(model, routers)  # Step 3

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Adapters are where they are planned and nowhere else, and all of them are trained."""
        assert plan.adapters is not None
        found = {name for name, _ in model.named_parameters() if side_of(name)}
        planned = {f"{path}.lora_{side}.default.weight" for path in plan.adapters.linears for side in "AB"}
        for layer in plan.layers:
            weights = layer.adapters.weights if layer.adapters else ()
            planned |= {f"{layer.site.fqn}.lora_{side}.{name}".lstrip(".") for name in weights for side in "AB"}
        if found != planned:
            raise PassError(self.name, min(found ^ planned), f"{len(found)} adapters for {len(planned)} planned ones")
        if frozen := [name for name in sorted(found) if not model.get_parameter(name).requires_grad]:
            raise PassError(self.name, frozen[0], "is an adapter and is frozen")


def _inject(model: nn.Module, plan: Plan) -> None:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "adapters.kind", "lora", "adapters of linears need the package peft", "pip install 'moecompile[lora]'"
        ) from error
    adapters = plan.adapters
    assert adapters is not None
    # The holder has no config: from a config of transformers, peft concludes that linears called gate_proj or w1 are
    # experts of the model's older form, and adapts the experts instead.
    holder = nn.Module()
    holder.model = model
    kind: Any = peft.LoraConfig  # its alpha is declared as an integer
    config = kind(
        r=adapters.rank, lora_alpha=adapters.alpha, lora_dropout=adapters.dropout,
        target_modules=[f"model.{path}" for path in adapters.linears],
    )  # fmt: skip
    peft.inject_adapter_in_model(config, holder)
    for name, parameter in model.named_parameters():
        if side_of(name):
            parameter.data = parameter.data.to(wide(parameter.dtype))


def routers_to_train(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """(module path, module) of the model's own routers that are trained in full.

    Raises:
        PlanError: a router is not found.
    """
    if plan.adapters is None or not plan.adapters.train_router:
        return
    for site in (layer.site for layer in plan.layers):
        assert isinstance(site, ExpertsSite)
        path = site.fqn.rpartition(".")[0]
        found = own_router(model.get_submodule(path), model.get_submodule(site.fqn), site.num_experts)
        if len(found) != 1:
            raise PlanError(
                "adapters.train_router", True, f"{path} has {len(found)} modules with a row per expert, not one router",
                "Use adapters.train_router=false",
            )  # fmt: skip
        yield f"{path}.{found[0][0]}".lstrip("."), found[0][1]
