"""Is Mixtral over two ranks what one process computes? Its reference is transformers alone."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, MixtralConfig

import moecompile
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated


def build() -> nn.Module:
    """The whole model, in one process."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config, experts_implementation="eager")  # it has float64
    return model


def parallelize(model: nn.Module, mesh: DeviceMesh) -> moecompile.Parallel:
    """Experts and everything else over the ranks, with what a loop of your own does after backward."""
    overrides = [f"mesh.ranks_per_node={mesh.size()}"]
    sharded = moecompile.compile_model(model, overrides, example=batch(0), until="shard")

    def finish(targets: int) -> None:
        sum_replicated(sharded.parameters(), dist.group.WORLD)
        total = torch.tensor(targets)
        dist.all_reduce(total)
        divide(sharded.parameters(), total)

    def clip(norm: float) -> Tensor:
        return clip_by_global_norm(sharded.parameters(), norm, dist.group.WORLD)

    return moecompile.Parallel(module=sharded, finish=finish, clip=clip)


def batch(number: int) -> dict[str, Tensor]:
    """A micro-batch; `certify` masks some of the labels."""
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    print(moecompile.certify(build, parallelize, batch, {"ep": 2}, reduction="targets").check())
