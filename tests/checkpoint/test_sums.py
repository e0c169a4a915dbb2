"""A checkpoint whose files have changed since is refused, and the file is named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moecompile import plan as plans
from moecompile.checkpoint import folders
from moecompile.checkpoint.folders import INDEX
from moecompile.checkpoint.tensors import read_index, read_tensors, shapes, write_tensors
from moecompile.errors import ConfigError
from tests.distributed.harness import run_distributed_test
from tests.plan.plans import a_plan


def flip(path: Path, at: int = -1) -> None:
    """One bit of one byte; by default in the middle, where a shard has its numbers."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2 if at < 0 else at] ^= 1
    path.write_bytes(body)


def two_ranks(rank: int, world_size: int, folder: str) -> tuple[str, bool]:
    """Both ranks write, then the shard of rank 1 is damaged; which message there was, and whether anything was read."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(4096.0).view(64, 64)
    path = Path(folder) / "saved"
    write_tensors(path, {"a": distribute_tensor(whole, mesh, [Shard(0)])}, orders={})
    dist.barrier()
    if rank == 0:
        flip(path / "__1_0.distcp")
    dist.barrier()
    read: dict[str, Tensor] = {"a": distribute_tensor(torch.zeros(64, 64), mesh, [Shard(0)])}
    try:
        read_tensors(path, read, orders={})
    except ConfigError as error:
        return str(error), bool(read["a"].to_local().any())  # type: ignore[attr-defined]
    raise AssertionError("it was read")


def test_a_flipped_bit_in_a_shard_is_named_on_all_ranks_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    found = run_distributed_test(two_ranks, 2, str(tmp_path))
    assert found[0] == found[1]
    message, was_read = found[0]
    assert message.startswith(f"trainer.resume={path}: __1_0.distcp has the checksum ")
    assert message.endswith(", so it is damaged. Use another checkpoint, or a copy of this one.")
    assert not was_read
    with pytest.raises(ConfigError, match=r"__1_0\.distcp has the checksum"):  # one process, as an export has
        read_tensors(path, {"a": torch.zeros(64, 64)}, orders={})


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sealed(group: None, tmp_path: Path) -> Path:
    """A checkpoint of one process, with another file beside the tensors."""
    write_tensors(tmp_path / "one", {"a": torch.arange(1000.0)}, orders={})
    (tmp_path / "one" / "plan.yaml").write_text("plan: 1\n")
    folders.seal(tmp_path / "one")
    return tmp_path / "one"


def test_each_file_is_checked(sealed: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in sealed.iterdir() if path.name != folders.SUMS)
    assert names == [INDEX, "__0_0.distcp", "plan.yaml"]
    folders.check(sealed, names)
    for name in names:
        for place in (0, -1):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sealed, copy)
            flip(copy / name, place)
            with pytest.raises(ConfigError, match=rf"{name} has the checksum [0-9a-f]+ where [0-9a-f]+ was written"):
                folders.check(copy, names)
    with pytest.raises(ConfigError, match=rf"{INDEX} has the checksum"):
        flip(sealed / INDEX)
        read_index(sealed)


def test_a_shard_that_is_cut_off_or_gone_is_named(sealed: Path) -> None:
    shard = sealed / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ConfigError, match=r"__0_0\.distcp has \d+ bytes where \d+ were written, so it is damaged"):
        read_tensors(sealed, {"a": torch.zeros(1000)}, orders={})
    shard.unlink()
    with pytest.raises(ConfigError, match=r"__0_0\.distcp cannot be read \(No such file or directory\)"):
        read_tensors(sealed, {"a": torch.zeros(1000)}, orders={})


@pytest.mark.parametrize("text", ["", "[]", '{"plan.yaml": 3}', '{"plan.yaml": "1"}'])
def test_broken_checksums_are_a_mistake(text: str, sealed: Path) -> None:
    (sealed / folders.SUMS).write_text(text)
    with pytest.raises(ConfigError, match=r"its checksums\.json cannot be read"):
        folders.check(sealed, ["plan.yaml"])


def test_missing_checksums_are_a_mistake_of_a_version_that_writes_them(sealed: Path) -> None:
    (sealed / folders.SUMS).unlink()
    plans.save(a_plan(), sealed / "plan.yaml")
    with pytest.raises(ConfigError) as caught:
        shapes(sealed)
    assert str(caught.value) == (
        f"trainer.resume={sealed}: has no checksums.json, which the version that wrote it writes, so it is damaged. Use "
        "another checkpoint, or a copy of this one."
    )


def test_a_checkpoint_of_the_first_version_is_still_read(sealed: Path) -> None:
    """It has no checksums, and a plan without keys of later versions."""
    (sealed / folders.SUMS).unlink()
    found = {"a": torch.zeros(1000)}
    read_tensors(sealed, found, orders={})
    assert torch.equal(found["a"], torch.arange(1000.0)) and shapes(sealed) == {"a": (1000,)}
