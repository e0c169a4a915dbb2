"""Steps of the optimizer on sharded weights with given gradients, beside a plain loop over whole matrices in one process.

The loop shares nothing with what it checks: which weights are Muon's and how their matrices lie in them is written by
hand for every model, and each matrix is orthogonalized by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moecompile.compose import compose_config
from moecompile.mesh import MeshSpec
from moecompile.ops.traffic import optimizer_traffic
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.weight_groups import make_optimizer
from moecompile.schema import MuonConfig, MuonScale, OptimizerConfig, OptimizerKind, WeightGroupConfig
from tests.distributed.gradient_job import full

STEPS, VOCAB = 2, 64
LR, DECAY, BETAS, EPS = 0.02, 0.1, (0.9, 0.95), 1e-8
Blocks = Callable[[str, Tensor], Iterator[Tensor]]


def plain(name: str, weight: Tensor) -> Iterator[Tensor]:
    """The matrices of a weight, (d_out, d_in) views: one per linear; per expert gate, up and down."""
    if weight.ndim == 2:
        yield weight
        return
    for expert in weight:
        if name.endswith("gate_up_proj"):
            half = expert.shape[0] // 2
            yield expert[:half]
            yield expert[half:]
        else:
            yield expert


def alternating(name: str, weight: Tensor) -> Iterator[Tensor]:
    """GPT-OSS: experts are stored as (d_in, d_out), and columns of gate and up alternate."""
    if weight.ndim == 2:
        yield weight
        return
    for expert in weight:
        if name.endswith("gate_up_proj"):
            yield expert[:, 0::2].T
            yield expert[:, 1::2].T
        else:
            yield expert.T


def joined(name: str, weight: Tensor) -> Iterator[Tensor]:
    """DBRX: the matrices of 2 experts below each other, which FSDP cuts anywhere; w2 as (d_in, d_out)."""
    if not name.endswith(("w1", "v1", "w2")):
        yield weight
        return
    for expert in weight.chunk(2):
        yield expert.T if name.endswith("w2") else expert


def factors(name: str, weight: Tensor) -> Iterator[Tensor]:
    """Adapters: each factor is a matrix, of every linear and of every expert."""
    yield from weight if weight.ndim == 3 else [weight]


def conv1d(name: str, weight: Tensor) -> Iterator[Tensor]:
    """GPT-2: linears are stored as (d_in, d_out), except those that became experts."""
    if weight.ndim == 2:
        yield weight.T
    else:
        yield from plain(name, weight)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a mesh of 4 ranks (ep, tp, dp_replicate). muon: parts of the names of Muon's weights."""

    architecture: str
    muon: tuple[str, ...]
    blocks: Blocks = plain
    overrides: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    groups: tuple[dict[str, Any], ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
_UPCYCLED = ("experts.num_routed=4", "routing.top_k=2", "balance.rule=none")
_SHARED = (
    "experts.num_routed=4", "experts.granularity=2", "experts.init=virtual_group", "experts.num_shared=1",
    "experts.shared_gate=true", "routing.top_k=2", "balance.rule=none",
)  # fmt: skip
_LLAMA_MUON = (*_ATTENTION, "experts.gate_up_proj", "experts.down_proj", "shared_experts.")
_TIED = {**_LLAMA, "tie_word_embeddings": True}


def _mesh(ep: int, tp: int = 1, dp_replicate: int = 1, ranks: int = 4) -> tuple[str, ...]:
    sizes = {"num_nodes": 1, "ranks_per_node": ranks, "ep": ep, "tp": tp, "dp_replicate": dp_replicate}
    return tuple(f"mesh.{name}={size}" for name, size in sizes.items())


def _llama(mesh: tuple[str, ...], routing: tuple[str, ...] = _UPCYCLED, **more: Any) -> Case:
    changes = {"config": _LLAMA, **more}
    return Case(architecture="llama", muon=_LLAMA_MUON, overrides=(*mesh, *routing), **changes)


CASES: dict[str, Case] = {
    "ep2": _llama(_mesh(2), _SHARED),
    "ep1": _llama(_mesh(1), config=_TIED),
    "ep2 replicated": _llama(
        _mesh(2, dp_replicate=2), options={"scale": MuonScale.original, "lr": 0.05, "nesterov": False, "momentum": 0.8}
    ),
    "ep4 tp2": _llama(_mesh(4, tp=2), _SHARED, config=_TIED),
    "ep2 tp2": _llama(_mesh(2, tp=2), options={"steps": 3, "coefficients": [2.0, -1.5, 0.5]}),
    "ep1 tp4": _llama(_mesh(1, tp=4), config={**_LLAMA, "num_key_value_heads": 4}),
    "groups": _llama(
        _mesh(2),
        groups=(
            {"match": "*.q_proj.weight", "kind": OptimizerKind.adamw, "lr_scale": 0.5},
            {"match": "*.1.*experts*", "weight_decay": 0.0, "lr_scale": 2.0},
            {"match": "*embed*", "weight_decay": 0.5},
        ),
    ),
    "gpt_oss": Case(
        architecture="gpt_oss", muon=(*_ATTENTION, "experts.gate_up_proj", "experts.down_proj"), blocks=alternating,
        overrides=(*_mesh(2), "balance.rule=none"), options={"scale": MuonScale.original},
        config={**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "dbrx": Case(
        architecture="dbrx", muon=("Wqkv", "out_proj", "w1", "v1", "w2"), blocks=joined,
        overrides=(*_mesh(1), "balance.rule=none"), options={"scale": MuonScale.original},
        config={
            "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 15, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 24},
        },
    ),
    "gpt_oss, cut within": Case(
        architecture="gpt_oss", muon=(*_ATTENTION, "experts.gate_up_proj", "experts.down_proj"), blocks=alternating,
        overrides=(*_mesh(2), "balance.rule=none"), options={"scale": MuonScale.original},
        config={**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    ),
    "adapters, cut within": Case(
        architecture="mixtral", muon=("lora_",), blocks=factors,
        overrides=(*_mesh(2), "balance.rule=none", "adapters=lora", "adapters.rank=4", "adapters.dense=*_proj"),
        config={**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    "adapters": Case(
        architecture="mixtral", muon=("lora_",), blocks=factors,
        overrides=(*_mesh(2), "balance.rule=none", "adapters=lora", "adapters.rank=4", "adapters.dense=*_proj"),
        config={**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": Case(
        architecture="gpt2", muon=("c_attn.weight", "c_proj.weight", "experts.up_proj", "experts.down_proj"),
        blocks=conv1d, overrides=(*_mesh(2), *_UPCYCLED), options={"scale": MuonScale.original},
        config={"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
}  # fmt: skip


def _model(case: Case) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = AutoConfig.for_model(case.architecture, vocab_size=VOCAB, use_cache=False, **case.config)
    sizes._experts_implementation = "eager"
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(sizes).to(torch.float64).eval()
    ids = torch.arange(8).view(1, 8)
    config = compose_config([*case.overrides, "optimizer=muon"])
    config.optimizer = settings(case)
    compiled = compile_model(model, config, example={"input_ids": ids})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return compiled


def settings(case: Case) -> OptimizerConfig:
    return OptimizerConfig(
        kind=OptimizerKind.muon, lr=LR, weight_decay=DECAY, betas=list(BETAS), eps=EPS,
        groups=[WeightGroupConfig(**group) for group in case.groups], muon=MuonConfig(**case.options),
    )  # fmt: skip


def gradient(name: str, shape: Sequence[int], step: int) -> Tensor:
    """The same on every rank; an expert without tokens has none."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    made = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if len(shape) == 3 and step == 0:
        made[1] = 0.0
    return made


@dataclass(kw_only=True)
class Run:
    """weights: after the steps, whole. bytes_sent: by the optimizer of this rank in one step; planned: the mean over
    ranks of it, and of_muon: the planned number of Muon's parameters. state: entries in the state of each weight.
    """

    weights: dict[str, Tensor]
    bytes_sent: int = 0
    planned: float = 0.0
    of_muon: int = 0
    state: dict[str, int] = field(default_factory=dict)


def sharded(case: Case) -> Run:
    """The steps on this rank's shards."""
    model = _model(case)
    plan = plan_of(model)
    mesh: MeshSpec = plan.mesh
    shard(model, plan, device_mesh_of(mesh, "cpu"))
    optimizer = make_optimizer(model, settings(case))
    optimizer_traffic.take()
    sent = 0
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = gradient(name, parameter.shape, step)
            if isinstance(parameter, DTensor):
                like = parameter.detach()
                parameter.grad = _distributed(whole, like)
            else:
                parameter.grad = whole
        optimizer.step()
        sent = sum(number for rank, number in optimizer_traffic.take().items() if rank != dist.get_rank())
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[p]: sum(v.numel() for k, v in entry.items() if k != "step") for p, entry in optimizer.state.items()}
    weights = {name: full(parameter) for name, parameter in model.named_parameters()}
    assert plan.estimate is not None
    per_step = plan.estimate.optimizer_bytes_per_step
    planned = 2 * (per_step.intra_node + per_step.inter_node)  # for weights of 4 bytes; these have 8
    return Run(
        weights=weights, bytes_sent=sent, planned=planned, of_muon=plan.estimate.params_muon, state=state
    )  # fmt: skip


def _distributed(whole: Tensor, like: Any) -> Tensor:
    """`whole` cut as `like`, which may be cut over tp first; every rank has the same values."""
    mesh, placements = like.device_mesh, like.placements
    if any(type(placement).__name__ == "_StridedShard" for placement in placements) or mesh.ndim > 1:
        # Cut by hand, last axis first, as shard() does: torch's own would exchange values that are here already.
        local = whole
        for i in reversed(range(mesh.ndim)):
            if not placements[i].is_replicate():
                step = -(-local.shape[placements[i].dim] // mesh.size(i))
                pieces = local.split(step, placements[i].dim) if step else (local,)
                rank = mesh.get_local_rank(i)
                empty = local.narrow(placements[i].dim, 0, 0)
                local = pieces[rank] if rank < len(pieces) else empty
        return DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def looped(case: Case) -> Run:
    """The same steps in a plain loop over whole matrices."""
    model, config = _model(case), settings(case)
    muon, rest, moments = config.muon, [], dict[str, Tensor]()
    plain_lr = LR if muon.lr is None else muon.lr
    state: dict[str, int] = {}
    chosen: dict[str, tuple[float, float]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = next((g for g in config.groups if _matches(name, g.match)), WeightGroupConfig())
        by_muon = parameter.ndim > 1 and any(part in name for part in case.muon) and not name.endswith("bias")
        by_muon = by_muon and "gate_weight" not in name and group.kind is not OptimizerKind.adamw
        decays = parameter.ndim > 1 and not name.endswith("bias")
        decay = (DECAY if decays else 0.0) if group.weight_decay is None else group.weight_decay
        if by_muon:
            chosen[name], moments[name] = (plain_lr * group.lr_scale, decay), torch.zeros_like(parameter)
        else:
            rest.append({"params": [parameter], "lr": LR * group.lr_scale, "weight_decay": decay})
        state[name] = parameter.numel() * (1 if by_muon else 2)
    adamw = torch.optim.AdamW(rest or [torch.zeros(())], betas=BETAS, eps=EPS)
    for step in range(STEPS):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step) if parameter.requires_grad else None
        adamw.step()
        with torch.no_grad():
            for name, (lr, decay) in chosen.items():
                parameter = model.get_parameter(name)
                assert parameter.grad is not None
                moments[name] = muon.momentum * moments[name] + (1 - muon.momentum) * parameter.grad
                ahead = muon.momentum * moments[name] + (1 - muon.momentum) * parameter.grad
                update = (ahead if muon.nesterov else moments[name]).clone()
                parameter -= lr * decay * parameter
                for weight, matrix in zip(case.blocks(name, parameter), case.blocks(name, update), strict=True):
                    weight -= lr * _factor(muon, *weight.shape) * _newton_schulz(matrix, muon)
    of_muon = sum(model.get_parameter(name).numel() for name in chosen)
    return Run(weights={n: p.detach().clone() for n, p in model.named_parameters()}, of_muon=of_muon, state=state)


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)


def _factor(muon: MuonConfig, rows: int, columns: int) -> float:
    if muon.scale is MuonScale.original:
        return max(1.0, rows / columns) ** 0.5
    return float(0.2 * max(rows, columns) ** 0.5)


def _newton_schulz(matrix: Tensor, muon: MuonConfig) -> Tensor:
    a, b, c = muon.coefficients
    x = matrix / max(float((matrix * matrix).sum()) ** 0.5, 1e-7)
    for _ in range(muon.steps):
        gram = x.T @ x  # on the other side than what is checked, where a matrix is not tall
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x
