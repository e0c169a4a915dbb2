"""Puts routers into training mode, also in a model that was loaded in evaluation mode."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from moecompile.nn import LoadMeter, Router


def train_routing(model: nn.Module) -> None:
    """Puts routers and meters of `model` into training mode before training begins; prints a note if it changes any.

    `from_pretrained` leaves a model in evaluation mode, and Lightning keeps the mode: counts, the bias rule and
    auxiliary losses would silently be off. Other modules keep their mode, as does a model without trained parameters.
    """
    in_eval = [module for module in model.modules() if isinstance(module, (Router, LoadMeter)) and not module.training]
    if not in_eval or not any(parameter.requires_grad for parameter in model.parameters()):
        return
    for module in in_eval:
        module.train()
    layers = sum(isinstance(module, LoadMeter) for module in in_eval)
    rank_zero_info(
        f"The routers of {layers} MoE layers were in evaluation mode, as from_pretrained leaves a model. They are "
        "now in training mode: loads are counted, the bias rule and auxiliary losses hold. All else, such as dropout, "
        "keeps its mode; call model.train() to change that."
    )
