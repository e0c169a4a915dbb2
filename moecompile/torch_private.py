"""Every use of a private torch name, in one place, so that a torch upgrade has one file to look at."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

__all__ = ["FSDPMeshInfo", "HSDPMeshInfo", "ShardPlacementResult", "in_backward", "process_group_by_name"]


def in_backward() -> bool:
    """Whether the autograd engine is running: true in backward and in the recomputation of checkpointed regions."""
    return bool(torch._C._current_graph_task_id() != -1)


def process_group_by_name(name: str) -> ProcessGroup | None:
    """The process group that c10d registered as `name`, or None."""
    try:
        return _resolve_process_group(name)
    except (RuntimeError, ValueError, KeyError):
        return None
