"""Small models of 4 layers with random weights, as transformers runs them and as moecompile rewrites them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from layer import Dense
from torch import Tensor, nn

from side_by_side.registry import LIMIT

VOCABULARY, SEQUENCE = 1024, 512
GROUPED, PARALLEL = "transformers grouped_mm", "transformers all_to_all"
FAMILIES = ("mixtral", "deepseek_v3")


def config_of(family: str, *, hidden: int = 512) -> Any:
    """4 layers; mixtral: 8 experts, top-2, width 2 x hidden; deepseek_v3: 64 experts, top-6, width hidden / 2, one
    shared expert, 8 groups of which 4, first layer dense.
    """
    from transformers import DeepseekV3Config, MixtralConfig

    common = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 8}
    common |= {"max_position_embeddings": SEQUENCE, "use_cache": False}
    if family == "mixtral":
        return MixtralConfig(
            **common, intermediate_size=2 * hidden, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2
        )
    return DeepseekV3Config(
        **common, intermediate_size=7 * hidden // 2, moe_intermediate_size=hidden // 2, num_key_value_heads=8,
        n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=6, n_group=8, topk_group=4,
        first_k_dense_replace=1, q_lora_rank=hidden // 2, kv_lora_rank=hidden // 4, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=hidden // 8,
    )  # fmt: skip


def plain(family: str, implementation: str, dtype: torch.dtype, *, hidden: int = 512) -> nn.Module:
    """transformers' model; the same weights at every call."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(
        config_of(family, hidden=hidden), experts_implementation=implementation, dtype=dtype
    )
    return model


def ours(family: str, dtype: torch.dtype, *, ranks: int = 1, dispatch: str = "auto", hidden: int = 512) -> nn.Module:
    """The same model, its experts rewritten; over several ranks sharded by expert and by FSDP2."""
    from moecompile import compile_model

    overrides = [f"mesh.ranks_per_node={ranks}", *([f"dispatch={dispatch}"] if ranks > 1 else [])]
    example = {"input_ids": torch.arange(8).reshape(1, 8)}
    model = plain(family, "eager", dtype, hidden=hidden)
    model = compile_model(model, overrides, example=example, until="shard" if ranks > 1 else "lower")
    vars(model)["keeps_some_whole"] = ranks > 1  # the fp32 routers of a bf16 model, which FSDP2 does not take
    return model


def limit(family: str, dtype: torch.dtype, *, hidden: int = 512) -> nn.Module:
    """The same model with dense FFNs of the FLOPs that a token activates: what no MoE of this size is faster than."""
    model, config = plain(family, "eager", dtype, hidden=hidden), config_of(family, hidden=hidden)
    width = config.num_experts_per_tok * getattr(config, "moe_intermediate_size", config.intermediate_size)
    width += getattr(config, "n_shared_experts", 0) * getattr(config, "moe_intermediate_size", 0)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp = Dense(width, hidden).to(dtype)
    return model


def transformers_parallel(family: str, dtype: torch.dtype, *, ranks: int, hidden: int = 512) -> nn.Module:
    """transformers' own: experts by all-to-all, everything else by FSDP2, loaded as its documentation says."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, 0)
        source = plain(family, "grouped_mm", dtype, hidden=hidden)
        if dist.get_rank() == 0:
            source.save_pretrained(shared[0])
        dist.barrier()
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            shared[0], dtype=dtype, experts_implementation="grouped_mm",
            distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation="all_to_all"),
        )  # fmt: skip
        dist.barrier()
    return model.train()


def builders(ranks: int, *, hidden: int = 512) -> dict[str, Callable[[str, torch.dtype], nn.Module]]:
    """Name -> (family, dtype) -> model."""
    if ranks == 1:
        return {
            "moecompile": lambda family, dtype: ours(family, dtype, hidden=hidden),
            GROUPED: lambda family, dtype: plain(family, "grouped_mm", dtype, hidden=hidden),
            "transformers eager": lambda family, dtype: plain(family, "eager", dtype, hidden=hidden),
            LIMIT: lambda family, dtype: limit(family, dtype, hidden=hidden),
        }
    return {
        **{
            f"moecompile {kind}": lambda family, dtype, kind=kind: ours(
                family, dtype, ranks=ranks, dispatch=kind, hidden=hidden
            )
            for kind in ("auto", "flat")
        },
        PARALLEL: lambda family, dtype: transformers_parallel(family, dtype, ranks=ranks, hidden=hidden),
    }


def draw(sequences: int, seed: int) -> Tensor:
    """(sequences, SEQUENCE) token ids."""
    return torch.randint(0, VOCABULARY, (sequences, SEQUENCE), generator=torch.Generator().manual_seed(seed))


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over ranks."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()
