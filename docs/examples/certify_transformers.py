"""Is transformers' own expert parallelism what one process computes?"""

import tempfile

import torch
import torch.distributed as dist
from certify_ours import batch, build
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import moecompile


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Experts by all-to-all, everything else by FSDP2, loaded as transformers' documentation says."""
    logging.disable_progress_bar()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    how = DistributedConfig(fsdp_size=mesh.size(), ep_size=mesh["ep"].size(), ep_implementation="all_to_all")
    parallel: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder[0], dtype=next(model.parameters()).dtype, experts_implementation="eager", distributed_config=how
    )
    return parallel


if __name__ == "__main__":
    print(moecompile.certify(build, parallelize, batch, {"copies": 2, "ep": 2}))
    print(moecompile.certify(build, parallelize, batch, {"ep": 2}, dtype=torch.float32))
    print(moecompile.certify(build, parallelize, batch, {"ep": 2}))
