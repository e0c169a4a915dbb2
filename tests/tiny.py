"""Small models that several tests share, and a text form of graphs for tests in the program's own notation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, fx, nn
from torch.nn import functional as F

from moecompile import planner
from moecompile.compose import compose_config
from moecompile.match.ffn import FFNMatch, find_ffns
from moecompile.match.linears import GraphView
from moecompile.match.regions import Region
from moecompile.match.sites import graph_sites
from moecompile.mesh import MeshSpec
from moecompile.nn import Router
from moecompile.passes.base import GraphPass
from moecompile.passes.run import run_passes
from moecompile.pipeline import make_plan
from moecompile.plan import Estimate, LayerPlan, Plan
from moecompile.planner import ModelFacts, RunFacts
from moecompile.report.graphs import graph_summary
from moecompile.routing import BalanceSpec, RouterConfig
from moecompile.schema import Config
from moecompile.torch_private import fake_group

D_MODEL, D_FF = 8, 16
SHORT = f"data.path='{Path(__file__).with_name('short.txt')}'"
"""60 kB of the embedded text: a run tokenizes all it has on every rank, which takes longer than a few tiny steps."""
NARROW = ["model.config.hidden_size=64", "model.config.intermediate_size=240"]
"""Half as wide as the smallest models that are shipped, with FFNs that any recipe can cut: two thirds of the time of a
comparison of ranks with one process."""
COPY4 = ["experts.num_routed=4", "routing.top_k=2"]


def collective(name: str) -> str:
    """What this torch calls one of its collectives: before 2.13 two of them had other names."""
    earlier = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
    return name if hasattr(dist, name) else earlier[name]


PLAIN_ROUTING = {
    "top_k": 2, "score": "softmax", "normalize": True, "scale": 1.0, "groups": 1, "top_groups": 1, "group_score": "top2",
}  # fmt: skip


def a_router(
    d_model: int,
    num_experts: int,
    *,
    losses: Mapping[str, float] | None = None,
    bias_rate: float = 0.0,
    bias_update: str = "sign",
    num_nodes: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Router:
    """A router without values; `options` are those of `RouterConfig`, and change a plain softmax top-2."""
    rule = "bias" if bias_rate else "none"
    balance = BalanceSpec(rule=rule, rate=bias_rate, update=bias_update, **(losses or {}))
    config = RouterConfig(**{**PLAIN_ROUTING, **options})
    return Router(d_model, num_experts, config, balance, num_nodes=num_nodes, dtype=dtype)


class UpDown(nn.Module):
    """up -> activation -> down."""

    def __init__(
        self,
        d_model: int = D_MODEL,
        d_ff: int = D_FF,
        *,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff, bias=bias), nn.Linear(d_ff, d_model, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Gated(nn.Module):
    """activation(gate) * up -> down."""

    def __init__(self, d_model: int = D_MODEL, d_ff: int = D_FF, *, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d_model, d_ff, bias=bias), nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A pre-norm layer of a GPT: attention, then an FFN, both residual."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm_2(x))


class TinyGPT(nn.Module):
    """A hand-written GPT: ids (B, L) -> logits (B, L, V)."""

    def __init__(self, *, vocab: int = 31, d_model: int = 16, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def ids(batch: int = 2, length: int = 5, vocab: int = 31, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokens(num_tokens: int = 6, d_model: int = D_MODEL, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random hidden states, (T, D)."""
    return torch.randn(num_tokens, d_model, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_llama(seed: int = 0, **changes: object) -> nn.Module:
    """transformers' Llama: 2 layers, hidden 32, FFN 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def tiny_deepseek(seed: int = 0, **changes: object) -> nn.Module:
    """transformers' DeepSeek-V3 with dense FFNs in every layer: 2 layers, hidden 32, FFN 64."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "first_k_dense_replace": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "max_position_embeddings": 64, "num_mtp_layers": 0, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**settings, **changes}))


def trace(module: nn.Module) -> fx.GraphModule:
    """`fx.symbolic_trace`. The types are dropped: fx cannot pickle annotations that are strings, as they are here."""
    graph_module = fx.symbolic_trace(module)
    for node in graph_module.graph.nodes:
        node.type = None
    graph_module.recompile()
    return graph_module


def only_ffn(module: nn.Module) -> tuple[fx.GraphModule, FFNMatch]:
    """The traced module and its single FFN."""
    graph_module = trace(module)
    matches, misses = find_ffns(GraphView(graph_module.graph, graph_module))
    assert len(matches) == 1, misses
    return graph_module, matches[0]


@cache
def defaults() -> Config:
    """What holds without any override. Composing takes Hydra a tenth of a second or more, so it is done once."""
    return compose_config()


def estimate(
    layers: Sequence[LayerPlan], mesh: MeshSpec, facts: ModelFacts, run: RunFacts, **settings: Any
) -> Estimate:
    """The planner's, of a plan with these layers alone."""
    return planner.estimate(Plan(mesh=mesh, layers=tuple(layers), reductions=()), facts, run, **settings)


def config(*overrides: str) -> Config:
    """`compose_config(overrides)` for `group.key=value` overrides, without Hydra."""
    made = copy.deepcopy(defaults())
    for override in overrides:
        path, _, value = override.partition("=")
        group, _, key = path.rpartition(".")
        owner = attrgetter(group)(made) if group else made
        before, parsed = getattr(owner, key), yaml.safe_load(value)
        if isinstance(before, Enum):
            parsed = type(before)(parsed)
        elif isinstance(before, float):
            parsed = float(parsed)
        setattr(owner, key, parsed)
    return made


def plan_for(module: nn.Module, overrides: Sequence[str] = COPY4) -> Plan:
    """The plan of a traceable module."""
    return make_plan(trace(module), config(*overrides))


def only_region(module: nn.Module) -> Region:
    """The traced module with its only FFN, as passes take it."""
    graph_module = trace(module)
    matches = {site.fqn: match for site, match in graph_sites(graph_module).items()}
    assert len(matches) == 1
    return Region(path="", graph=graph_module, module=graph_module, matches=matches)


def passed(region: Region, layer: LayerPlan, *steps: GraphPass) -> Region:
    """What passes make of a region with one layer, between their contracts."""
    return run_passes(steps, {region.path: region}, {region.path: [layer]})[region.path]


def text(graph_module: fx.GraphModule) -> str:
    """The graph op by op, with values numbered."""
    return graph_summary(graph_module)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Redraws every parameter independently, so that experts differ and gradients of the router are not rounding noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def max_diff(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return float((a - b).detach().abs().max())


@contextmanager
def one_rank(folder: Path) -> Iterator[str]:
    """The name of a gloo process group whose only rank is this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process is a rank of others that do not exist; what that does to it is undone."""
    with mock.patch.object(dist, "broadcast_object_list"):
        fake_group(rank, world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()
