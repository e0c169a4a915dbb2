"""A process group of one rank, in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def axis(tmp_path: object) -> Iterator[str]:
    """The name of a gloo process group whose only rank is this process."""
    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()
