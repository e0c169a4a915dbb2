"""Creates the process group for tasks that need it before the Trainer."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from moecompile.schema import Config


def init_process_group(config: Config) -> None:
    """Initializes gloo or NCCL; the Trainer uses this group later. Also sets the CPU threads of this rank."""
    torch.set_num_threads(config.trainer.threads_per_rank)
    cuda = config.mesh.device == "cuda" or (config.mesh.device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=config.trainer.timeout_s))
