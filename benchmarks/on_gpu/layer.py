"""One MoE layer, forward and backward: moecompile beside grouped products as torchtitan arranges them, transformers'
own, and the dense FFN with the activated FLOPs, which no MoE layer can beat by much.

All layers have the same weights, and what they compute is compared before anything is timed. On a GPU times are of
CUDA events; kernels are counted by torch's profiler, and host waits by torch's debug mode for synchronization.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from layer import Dense
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from moecompile.bench.measure import Times, kept_bytes, medians, timed
from moecompile.pipeline import compile_model

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest norm of a difference over the norm, between layers that round in other places."""
_WAIT = "called a synchronizing CUDA operation"
_COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Size:
    """experts, top-k, width of an expert, tokens, hidden size."""

    experts: int
    top_k: int
    width: int
    tokens: int
    hidden: int


LARGE = (Size(8, 2, 4096, 8192, 2048), Size(64, 6, 1024, 8192, 2048), Size(128, 8, 768, 8192, 2048))
SMALL = (Size(8, 2, 64, 256, 64),)
"""For a smoke run on a CPU."""


class Grouped(nn.Module):
    """Softmax, top-k, sort, three grouped products over all experts, and a scatter: torchtitan's arrangement."""

    def __init__(self, router_ED: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor, top_k: int) -> None:
        super().__init__()
        gate, up = gate_up_EHD.chunk(2, 1)
        self.router, self.top_k = nn.Parameter(router_ED.clone()), top_k
        self.w1, self.w3 = nn.Parameter(gate.contiguous()), nn.Parameter(up.contiguous())
        self.w2 = nn.Parameter(down_EDF.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        x_TD = x.flatten(0, -2)
        weights_TK, ids_TK = F.linear(x_TD, self.router).float().softmax(-1).topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        order_R = ids_TK.flatten().argsort(stable=True)
        counts_E = torch.zeros(len(self.router), dtype=torch.int64, device=x.device)
        offs_E = counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(order_R)).cumsum(0).to(torch.int32)
        token_R = order_R // self.top_k
        rows_RD = x_TD.index_select(0, token_R)
        gate, up = (F.grouped_mm(rows_RD, w.transpose(1, 2), offs=offs_E) for w in (self.w1, self.w3))
        out_RD = F.grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs=offs_E)
        weighted = out_RD.float() * weights_TK.flatten().index_select(0, order_R).unsqueeze(1)
        return weighted.new_zeros(x_TD.shape).index_add(0, token_R, weighted).to(x.dtype).view_as(x)


def measure(size: Size, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Each layer's errors against the plain loop, times, kernels, waits and memory; `ok`: whether all agree."""
    layers = _layers(size, device, dtype)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(1, size.tokens, size.hidden, generator=generator).to(device, dtype)

    agree = _errors(layers, draw(), draw())
    layers.pop("plain loop")
    times: dict[str, list[Times]] = {name: [] for name in layers}
    for i in range(-3, rounds):  # the first ones warm up
        x, direction, names = draw(), draw(), list(layers)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = timed(_both(layers[name], x, direction), device)
            if i >= 0:
                times[name].append(taken)
    rows = {}
    for name, layer in layers.items():
        ratios = [mine.decisive_ms / dense.decisive_ms for mine, dense in zip(times[name], times["dense"], strict=True)]
        run = _both(layer, draw(), draw())
        rows[name] = {
            **asdict(medians(times[name])),
            "ratio": statistics.median(ratios),
            "kept_bytes": kept_bytes(lambda layer=layer: layer(draw().requires_grad_()), layer.parameters()),
            **(counted(run, device) if device.type == "cuda" else {"kernels": None, "waits": None}),
        }
    ok = all(max(each.values()) <= TOLERANCE[dtype] for each in agree.values())
    return {"ok": ok, "size": asdict(size), "dtype": str(dtype), "errors": agree, "layers": rows}


def counted(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Kernels of one run (without copies and fills), and how often the host waits for the device in it."""
    run()
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum(_WAIT in str(warning.message) for warning in seen)
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_device = [event.name for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return {"kernels": sum(not name.startswith(_COPIES) for name in on_device), "waits": waits}


def _layers(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All with the same weights, but for the dense one."""
    plain = _block(size, dtype, "eager")
    found = {"plain loop": plain, "transformers": _block(size, dtype, "grouped_mm")}
    ours = _block(size, dtype, "eager")
    compile_model(ours, example=torch.zeros(1, 4, size.hidden, dtype=dtype))
    experts = plain.experts
    found |= {"moecompile": ours, "grouped": Grouped(plain.gate.weight.detach(), experts.gate_up_proj.detach(),
                                                     experts.down_proj.detach(), size.top_k)}  # fmt: skip
    found["dense"] = Dense(size.top_k * size.width, size.hidden).to(dtype)
    return {name: layer.to(device).train() for name, layer in found.items()}


def _block(size: Size, dtype: torch.dtype, implementation: str) -> Any:
    """transformers' Mixtral block with random weights, always the same."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.hidden, intermediate_size=size.width, num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )  # fmt: skip
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return block.to(dtype)


def _both(layer: nn.Module, x: Tensor, direction: Tensor) -> Callable[[], None]:
    """Forward and backward, without earlier gradients."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).backward(direction)

    return run


def _errors(layers: dict[str, nn.Module], x: Tensor, direction: Tensor) -> dict[str, dict[str, float]]:
    """Norm of the difference to the plain loop over its norm, of the output and the input's gradient.

    Only of tokens whose choice of experts is clear: layers round the router's product in different ways.
    """
    router = layers["plain loop"].get_parameter("gate.weight").float()
    best_TK = (x[0].float() @ router.T).topk(min(_top_k(layers) + 1, len(router))).values
    clear_T = best_TK[:, -2] - best_TK[:, -1] > 0.02 * best_TK.std()
    wanted = _results(layers["plain loop"], x, direction)
    found = {}
    for name, layer in layers.items():
        if name not in ("plain loop", "dense"):
            got = _results(layer, x, direction)
            found[name] = {
                what: float((got[what] - value)[clear_T].norm() / value[clear_T].norm())
                for what, value in wanted.items()
            }
    return found


def _top_k(layers: dict[str, nn.Module]) -> int:
    grouped = layers["grouped"]
    assert isinstance(grouped, Grouped)
    return grouped.top_k


def _results(layer: nn.Module, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(direction)
    assert x.grad is not None
    return {"output": out.detach()[0].float(), "input": x.grad[0].float()}
