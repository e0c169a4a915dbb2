"""The strategy's own parts, without ranks; trainings are in tests/distributed/test_strategy.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from moecompile.errors import ConfigError
from moecompile.nn import auxiliary_loss, update_balance
from moecompile.pipeline import compile_model
from moecompile.runtime.even_batches import Even, made_even
from moecompile.runtime.strategy import _train_routing
from tests.existing_models import moe_model


class Numbers(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return iter(np.random.rand(4).tolist())


def seeded(number: int) -> None:
    np.random.seed(7 + number)


def test_the_even_copy_of_a_loader_is_a_loader_and_leaves_it_as_it_was() -> None:
    """Lightning sets how its workers are seeded, and ends workers that stay; another fit has a copy of its own."""
    own = DataLoader(Numbers(), 1, num_workers=1, persistent_workers=True)
    wanted = np.random.RandomState(7).rand(4)[:2]
    for _ in range(2):
        made = made_even(own, 2, of=own)
        assert isinstance(made, DataLoader) and len(made) == 2
        made.worker_init_fn = seeded
        assert [float(batch) for batch in made] == pytest.approx(wanted)
        made._iterator._shutdown_workers()
        assert own._iterator is None and own.worker_init_fn is None
    assert not hasattr(made, "state_dict") and isinstance(made_even([1], 1), Even)


def test_the_position_of_a_stream_is_saved_through_its_even_copy() -> None:
    """A runtime protocol, as which Lightning asks for it, looks at classes from Python 3.12 on."""

    class Stream:
        at = 0

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.at, 3))

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    made = made_even(Stream(), None)
    assert isinstance(made, _Stateful)
    made.load_state_dict({"at": 2})
    assert list(made) == [2] and made.state_dict() == {"at": 2}
    with pytest.raises(TypeError, match="does not know its length"):
        len(made)


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


def test_a_frozen_stack_beside_one_that_is_trained_stays_as_it_is() -> None:
    """A teacher whose biases moved would be another one."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = (moe_model("deepseek_v3").eval() for _ in range(2))
            self.teacher.requires_grad_(False)

        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.student(input_ids).logits, self.teacher(input_ids).logits

    ids = torch.arange(8).reshape(1, 8)
    pair = compile_model(Pair(), ["mesh.ranks_per_node=1", "balance.rule=bias"], example={"input_ids": ids})
    _train_routing(pair)
    pair(ids)
    before = {name: buffer.clone() for name, buffer in pair.named_buffers()}
    loads = {load.name: load.tokens for load in update_balance(pair)}
    assert {name.partition(".")[0]: tokens for name, tokens in loads.items()} == {"student": 8, "teacher": 0}
    moved = {name for name, buffer in pair.named_buffers() if "bias" in name and not torch.equal(buffer, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"student"}
