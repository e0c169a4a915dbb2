"""Which weight is stepped how, with counts; and patterns that match nothing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import moecompile
from moecompile.errors import ConfigError
from moecompile.nn import Experts
from moecompile.nn.existing import ExistingExperts
from moecompile.passes.lookups import tables_of
from moecompile.runtime.gradients import forget
from moecompile.runtime.muon import Muon
from moecompile.runtime.weight_groups import check_rows_are_stepped, make_optimizer, step_meshes_apart, weight_groups
from moecompile.schema import OptimizerConfig, OptimizerKind, WeightGroupConfig
from tests.table_models import build
from tests.tiny import fake_rank

MUON = OptimizerKind.muon


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2))
        self.head = nn.Linear(4, 10, bias=False)


def group(match: str, **settings: object) -> WeightGroupConfig:
    return WeightGroupConfig(match=match, **settings)  # type: ignore[arg-type]


def rows(config: OptimizerConfig, model: nn.Module | None = None) -> list[tuple[object, ...]]:
    return [tuple(each.row().values()) for each in weight_groups(model or Small(), config)]


def test_by_default_matrices_decay_and_vectors_do_not() -> None:
    assert rows(OptimizerConfig()) == [("adamw", 6, 176, 1e-3, 0.1, None), ("adamw", 8, 36, 1e-3, 0.0, None)]


@pytest.mark.parametrize("existing", [False, True])
def test_biases_of_experts_decay_no_more_than_those_of_a_dense_layer(existing: bool) -> None:
    owner = nn.Module()
    experts = Experts(4, 6, 3, gated=True, activation=nn.Identity(), bias_up=True, bias_down=True)
    for name, parameter in experts.named_parameters() if existing else ():
        owner.register_parameter(name, nn.Parameter(parameter.detach()))
    owner.experts = ExistingExperts(3, nn.Identity(), experts.names, transposed=False) if existing else experts
    assert rows(OptimizerConfig(), owner) == [("adamw", 2, 216, 1e-3, 0.1, None), ("adamw", 2, 48, 1e-3, 0.0, None)]


def test_muon_has_the_matrices_of_hidden_layers() -> None:
    assert rows(OptimizerConfig(kind=MUON)) == [
        ("muon", 4, 96, 1e-3, 0.1, None), ("adamw", 2, 80, 1e-3, 0.1, None), ("adamw", 8, 36, 1e-3, 0.0, None),
    ]  # fmt: skip


def test_the_first_pattern_that_matches_counts() -> None:
    groups = [
        group("layers.0.1.weight", kind=OptimizerKind.adamw, lr_scale=2.0), group("layers.0.*", weight_decay=0.3),
        group("head*", lr_scale=0.0),
    ]  # fmt: skip
    assert rows(OptimizerConfig(kind=MUON, groups=groups)) == [
        ("adamw", 1, 24, 2e-3, 0.1, "layers.0.1.weight"), ("muon", 1, 24, 1e-3, 0.3, "layers.0.*"),
        ("adamw", 4, 18, 1e-3, 0.3, "layers.0.*"), ("adamw", 1, 40, 0.0, 0.1, "head*"),
        ("muon", 2, 48, 1e-3, 0.1, None), ("adamw", 1, 40, 1e-3, 0.1, None), ("adamw", 4, 18, 1e-3, 0.0, None),
    ]  # fmt: skip


def test_muon_may_have_a_learning_rate_of_its_own() -> None:
    config = OptimizerConfig(kind=MUON, groups=[group("layers.1.*", lr_scale=0.5)])
    config.muon.lr = 0.02
    found = rows(config)
    assert [(row[0], row[3]) for row in found] == [
        ("muon", 0.01), ("adamw", 5e-4), ("muon", 0.02), ("adamw", 1e-3), ("adamw", 1e-3),
    ]  # fmt: skip


def test_frozen_weights_are_in_no_group() -> None:
    model = Small()
    model.layers.requires_grad_(False)
    assert rows(OptimizerConfig(), model) == [("adamw", 2, 80, 1e-3, 0.1, None)]
    with pytest.raises(ConfigError, match="no matrix of a hidden layer is trained with it"):
        weight_groups(model, OptimizerConfig(kind=MUON))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OptimizerConfig(groups=[group("*.norm*", weight_decay=0.0)]),
            "optimizer.groups[0].match='*.norm*': matches none of the 14 trained weights (embed.weight, layers.0.0.weight, "
            "layers.0.0.bias, ...). Change the pattern, or remove the group.",
        ),
        (
            OptimizerConfig(groups=[group("layers.*"), group("*.bias")]),
            "optimizer.groups[1].match='*.bias': the weights that it matches are all in earlier groups. Put it before "
            "these.",
        ),
        (
            OptimizerConfig(kind=MUON, groups=[group("head*", kind=MUON)]),
            "optimizer.groups[0].kind='muon': head.weight is no matrix of a hidden layer: embeddings, heads, routers, "
            "convolutions and stacked vectors are not. Change the pattern, or use adamw.",
        ),
        (
            OptimizerConfig(kind=MUON, groups=[group("*.bias", kind=MUON)]),
            "optimizer.groups[0].kind='muon': layers.0.0.bias is no matrix of a hidden layer: its shape is [4]. Change the "
            "pattern, or use adamw.",
        ),
    ],
)
def test_what_cannot_be_is_said(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        weight_groups(Small(), config)
    assert str(error.value).replace("'", "") == message.replace("'", "")


def test_it_is_part_of_the_python_api() -> None:
    model = Small()
    optimizer = moecompile.make_optimizer(model, ["optimizer=muon", "optimizer.lr=0.01", "optimizer.muon.steps=3"])
    assert isinstance(optimizer, Muon)
    assert next((g["kind"], g["lr"], g["steps"]) for g in optimizer.param_groups) == ("muon", 0.01, 3)
    assert type(moecompile.make_optimizer(model)) is torch.optim.AdamW
    with pytest.raises(ConfigError, match=r"optimizer.muon.momentum=1.0: must lie in \[0, 1\)"):
        moecompile.make_optimizer(model, ["optimizer=muon", "optimizer.muon.momentum=1"])


def test_settings_survive_in_torchs_groups() -> None:
    config = OptimizerConfig(groups=[group("*.0.weight", lr_scale=0.5, weight_decay=0.2)])
    first = make_optimizer(Small(), config).param_groups[0]
    assert (first["lr"], first["weight_decay"], len(first["params"])) == (5e-4, 0.2, 2)


@pytest.fixture
def of_two_meshes() -> Iterator[list[nn.Parameter]]:
    """A weight of this rank alone, as those of experts may be, and one that all ranks have a part of."""
    with fake_rank(0, 2):
        shared = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        weights = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(shared)]
        for weight in weights:
            weight.grad = torch.full_like(weight, 0.5)
        yield weights


def test_a_users_optimizer_steps_weights_of_two_meshes_as_on_a_gpu(
    of_two_meshes: list[nn.Parameter], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_optimizers = import_module("torch.optim.optimizer")
    monkeypatch.setattr(of_optimizers, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])  # as it is there
    optimizer = torch.optim.AdamW(of_two_meshes, lr=0.1)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        optimizer.step()
    for weight in of_two_meshes:
        nn.init.ones_(weight)
    optimizer = torch.optim.AdamW(of_two_meshes, lr=0.1)
    step_meshes_apart(optimizer)
    optimizer.step()
    own, shared = of_two_meshes
    assert isinstance(shared, DTensor)
    torch.testing.assert_close(torch.cat([own, shared.to_local()]), torch.full((5, 4), 1 - 0.1 * 0.01 - 0.1))
    assert optimizer.param_groups[0]["foreach"] is None  # a checkpoint has it as it was made


@pytest.mark.parametrize("told", ["foreach", "fused"])
def test_a_users_optimizer_that_would_step_two_meshes_at_once_is_refused(
    of_two_meshes: list[nn.Parameter], told: str
) -> None:
    settings: dict[str, Any] = {told: True}
    made = torch.optim.AdamW(of_two_meshes, **settings)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        made.step()
    with pytest.raises(ConfigError) as error:
        step_meshes_apart(made)
    assert str(error.value) == (
        f"configure_optimizers=AdamW({told}=True): would step all weights of a group at once, and this one has weights of "
        f"several device meshes. Use moecompile.make_optimizer, leave {told} out, or give each device mesh a group of its own."
    )
    step_meshes_apart(torch.optim.AdamW([{"params": [weight]} for weight in of_two_meshes], **settings))


def test_an_optimizer_that_would_not_step_tables_by_rows_is_refused() -> None:
    """Their gradients are not in `.grad`, so that it would leave them as they were made."""
    settings = ["experts.num_routed=4", "embeddings.shard=ep", "embeddings.min_numbers=300"]
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model = moecompile.compile_model(build(), [*settings, "embeddings.optimizer=lazy_adamw"], example=ids)
    check_rows_are_stepped(model, [make_optimizer(model)])
    check_rows_are_stepped(model, [make_optimizer(model, ["optimizer=muon"])])
    with pytest.raises(ConfigError) as error:
        check_rows_are_stepped(model, [torch.optim.AdamW(model.parameters())])
    assert str(error.value) == (
        "embeddings.optimizer=lazy_adamw: model.embed_tokens.weight is stepped by rows, which AdamW would not do. Return "
        "moecompile.make_optimizer(self.model, overrides) from configure_optimizers, or use embeddings.optimizer=same."
    )
    for name in tables_of(model):
        model.get_parameter(name).requires_grad_(False)
    check_rows_are_stepped(model, [torch.optim.AdamW(model.parameters())])
    same = moecompile.compile_model(build(), settings, example=ids)
    check_rows_are_stepped(same, [torch.optim.AdamW(same.parameters())])


def test_a_skipped_step_does_not_count_for_tables_by_rows() -> None:
    """As for other weights: what Adam's moments are corrected by is the number of steps that had a gradient."""
    settings = ["experts.num_routed=4", "embeddings.shard=ep", "embeddings.min_numbers=300"]
    ids, after = torch.arange(8).unsqueeze(0), []
    for skips in (False, True):
        torch.manual_seed(0)
        model = moecompile.compile_model(build(), [*settings, "embeddings.optimizer=lazy_adamw"], example=ids)
        optimizer = make_optimizer(model)
        for is_skipped in (True, False) if skips else (False,):
            model(ids).logits.square().sum().backward()
            if is_skipped:
                forget(model.parameters())  # as the strategy does with trainer.on_nan=skip
            optimizer.step()
            optimizer.zero_grad()
        after.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    assert tables_of(model)
    for name, weight in after[0].items():
        assert torch.equal(after[1][name], weight), name
