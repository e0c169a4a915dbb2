"""The strategy's own parts, without ranks; trainings are in tests/distributed/test_strategy.py."""

from __future__ import annotations

import pytest
import torch

from moecompile.errors import ConfigError
from moecompile.nn import auxiliary_loss, update_balance
from moecompile.pipeline import compile_model
from moecompile.runtime.strategy import _train_routing
from tests.existing_models import moe_model


def test_losses_of_a_models_own_routers_hold_in_whatever_mode_it_came() -> None:
    """As from `from_pretrained`, whose models have experts of their own."""
    ids = torch.arange(8).reshape(1, 8)
    model = compile_model(moe_model("mixtral").eval(), ["mesh.ranks_per_node=1"], example={"input_ids": ids})
    _train_routing(model)
    assert not model.training
    model(ids)
    loss, loads = auxiliary_loss(model), update_balance(model)
    assert loss is not None and loss > 0 and loss.requires_grad
    assert [load.tokens for load in loads] == [8, 8] and all(load.entropy for load in loads)
    with pytest.raises(ConfigError, match="would count twice"):
        model(ids, labels=ids, output_router_logits=True)
    with pytest.warns(UserWarning, match="has padding"):
        model(ids, attention_mask=(ids > 2).long())
