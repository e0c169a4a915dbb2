"""Weights and optimizer state in one process; checkpoints that try to run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from moecompile.checkpoint.folders import INDEX
from moecompile.checkpoint.tensors import (
    _IndexReader,
    forget_unused,
    read_index,
    read_tensors,
    shapes,
    staged,
    tensors_of,
    write_tensors,
)
from moecompile.errors import ConfigError


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(seed):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.usefixtures("group")
def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    model, optimizer = made(2)
    before = staged(tensors_of(model, [optimizer]))
    write_tensors(tmp_path, before, orders={})
    assert shapes(tmp_path) == {name: tuple(tensor.shape) for name, tensor in before.items()}
    assert {"model.0.weight", "model.1.running_mean", "optimizer.0.weight.exp_avg", "optimizer.1.bias.step"} <= set(
        before
    )
    other, its_optimizer = made(1)
    read_tensors(tmp_path, tensors_of(other, [its_optimizer]), orders={})
    for name, tensor in tensors_of(other, [its_optimizer]).items():
        assert torch.equal(tensor, before[name]), name
    assert its_optimizer.state[other[0].weight]["step"] == 2
    # The weights alone, into an optimizer-free model; a fresh optimizer takes the state too.
    third, fresh = made(0)
    read_tensors(tmp_path, tensors_of(third, [fresh], to_read=True), orders={})
    assert torch.equal(fresh.state[third[0].bias]["exp_avg"], before["optimizer.0.bias.exp_avg"])


@pytest.mark.usefixtures("group")
def test_a_copy_does_not_follow_training() -> None:
    model, optimizer = made(1)
    copy = staged(tensors_of(model, [optimizer]))
    kept = copy["model.0.weight"].clone()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert torch.equal(copy["model.0.weight"], kept) and not torch.equal(model[0].weight, kept)


class Payload:
    """Unpickling it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_an_index_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"its index .metadata cannot be read \([\w.]+ is not allowed in it\)"):
        read_index(tmp_path)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / INDEX).read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("text", [b"", b"no pickle", pickle.dumps({}), pickle.dumps([1, 2])[:-2]])
def test_a_broken_index_is_a_mistake(text: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(ConfigError, match=r"trainer.resume=.*its index .metadata cannot be read"):
        read_index(tmp_path)


@pytest.mark.usefixtures("group")
def test_an_entry_cannot_run_code(tmp_path: Path) -> None:
    """DCP pickles what is no tensor, and would unpickle it."""
    dcp.save({"model.weight": Payload(tmp_path / "ran")}, storage_writer=dcp.FileSystemWriter(tmp_path / "saved"))
    with pytest.raises(ConfigError, match=r"cannot be read on rank 0 \(model.weight is not a tensor\)"):
        read_tensors(tmp_path / "saved", {"model.weight": torch.zeros(3)}, orders={})
    assert not (tmp_path / "ran").exists()


def test_weights_that_nothing_uses_have_no_state_and_none_afterwards() -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = made()
    model["used"](torch.ones(1, 2)).sum().backward()  # type: ignore[index]
    optimizer.step()
    stored = tensors_of(model, [optimizer])
    assert "optimizer.used.weight.exp_avg" in stored and not any("optimizer.unused" in name for name in stored)
    again, fresh = made()
    tensors = tensors_of(again, [fresh], to_read=True)
    assert any("optimizer.unused" in name for name in tensors)
    tensors = forget_unused(again, [fresh], tensors, stored)
    assert tensors.keys() == stored.keys()
    assert all(p not in fresh.state for p in again["unused"].parameters())  # type: ignore[index]
    before = again["unused"].weight.detach().clone()  # type: ignore[index]
    again["used"](torch.ones(1, 2)).sum().backward()  # type: ignore[index]
    fresh.step()
    assert torch.equal(again["unused"].weight, before)  # type: ignore[index]
    without = [name for name in stored if name.startswith("model.")]
    tensors = tensors_of(again, [fresh], to_read=True)
    assert forget_unused(again, [fresh], tensors, without) is tensors  # a checkpoint without an optimizer is refused
    assert forget_unused(again, [fresh], tensors, without, had_steps=False).keys() == set(without)  # before any step
    assert not fresh.state


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Rprop])
def test_entries_to_save_make_no_state(kind: type[torch.optim.Optimizer]) -> None:
    model, _ = made(0)
    optimizer = kind(model.parameters())
    assert not any(name.startswith("optimizer") for name in tensors_of(model, [optimizer])) and not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_members_of_an_enum_are_read_as_the_first_versions_of_python_3_11_wrote_them() -> None:
    """By getattr, which may get nothing else."""
    getattr_ = _IndexReader(io.BytesIO()).find_class("builtins", "getattr")
    assert getattr_(Layout, "wide") is Layout.wide
    for owner, name in ((Layout, "mro"), (Layout.wide, "value"), (str, "upper"), (pickle, "loads")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            getattr_(owner, name)


class Layout(Enum):
    wide = 1


def test_an_index_that_python_3_13_wrote_is_read_by_others() -> None:
    """Only there are paths of the module pathlib._local."""
    reader = _IndexReader(io.BytesIO())
    assert reader.find_class("pathlib._local", "PosixPath") is PosixPath
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        reader.find_class("pathlib._local", "os")
