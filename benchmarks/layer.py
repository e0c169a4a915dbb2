"""One MoE layer, forward and backward, side by side: CPU time against a dense FFN with the activated FLOPs.

    python benchmarks/layer.py                                bf16, four sizes, about four minutes on an idle core
    python benchmarks/layer.py --dtype float32 --sizes 8,2,1024,4096 --rounds 20 --json layer.json
    python benchmarks/layer.py --profile                      and where the time of `dense` and `fused` goes

A size is experts, top-k, width of an expert, tokens; the hidden size is 512. In every round each layer runs once on the
same new input, hence with new counts, in a rotating order; medians of CPU time (one thread) and of the ratios to the
dense FFN in the same round are printed. All layers have the same weights, and their outputs and gradients are compared
with transformers' plain loop over experts before anything is timed.

    fused       what moecompile makes of a transformers block (moecompile.ops.expert_ffn)
    skewed      the same module, tokens sent to experts by Zipf's law, other favourites every round
    products    no layer: the six products of every expert alone, one after the other, by torch.mm on rows that are in
                order already. What is above 1 here, short products and reading the weights, no layer of torch.mm avoids
    torch only  the same without the compiled kernels, as on a machine without a C++ compiler
    lowered     the graph before the pass `fuse`
    grouped_mm  transformers' own fast experts
    eager       transformers' plain loop (skipped with --no-eager: it is slow with many experts)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moecompile.ops.cpu import native
from moecompile.pipeline import compile_model, make_plan

# glibc would map large buffers anew at every step; what workers of moecompile run with.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(4 * 2**30), "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30), "OMP_NUM_THREADS": "1"}
HIDDEN = 512
SKEWED, PRODUCTS = "skewed", "products"
# What --profile groups torch's operators by; the rest of them is `other`.
GROUPS = {
    "products": ("mm", "addmm", "bmm", "_grouped_mm", "linear"),
    "rows": ("index_select", "_embedding_bag", "embedding_bag", "index_add_", "index_copy_", "index_put_", "gather"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "AdamW": ("_fused_adamw_",),
    "choice": ("topk", "sort", "argsort", "cumsum", "scatter_add_", "bincount", "_softmax", "repeat_interleave"),
}
SIZES = ("8,2,1024,4096", "64,6,256,4096", "64,6,256,512", "128,8,512,4096")


class Dense(nn.Module):
    """SwiGLU with the FLOPs that a token activates, gate and up as one linear."""

    def __init__(self, width: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 2 * width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def block(experts: int, top_k: int, width: int, dtype: torch.dtype, implementation: str) -> nn.Module:
    """transformers' Mixtral block with random weights, always the same."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    made: nn.Module = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return made.to(dtype)


def layers(experts: int, top_k: int, width: int, dtype: torch.dtype, *, eager: bool) -> dict[str, nn.Module]:
    """Name -> module, all with the same weights but the dense one."""
    example = torch.zeros(1, 4, HIDDEN, dtype=dtype)
    fused, lowered = (block(experts, top_k, width, dtype, "eager") for _ in range(2))
    plan = make_plan(fused, example=example)
    unfused = replace(plan, layers=tuple(replace(layer, fused=False) for layer in plan.layers))
    compile_model(fused, example=example, plan=plan)
    compile_model(lowered, example=example, plan=unfused)
    found = {"dense": Dense(top_k * width).to(dtype)}
    found |= dict.fromkeys(("fused", SKEWED, "torch only"), fused)
    found |= {"lowered": lowered, "grouped_mm": block(experts, top_k, width, dtype, "grouped_mm")}
    return found | ({"eager": block(experts, top_k, width, dtype, "eager")} if eager else {})


def skewed(x: Tensor, router: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    """Inputs (1, T, D) whose router logits (E, D) choose experts by Zipf's law, its order drawn anew."""
    tokens, experts = x.shape[1], router.shape[0]
    zipf = 1 / torch.arange(1, experts + 1)[torch.randperm(experts, generator=generator)]
    ids = torch.multinomial(zipf.expand(tokens, -1), top_k, generator=generator)
    wanted = torch.zeros(tokens, experts).scatter_(1, ids, 1.0)
    shift = wanted @ torch.linalg.pinv(router.float()).T  # logits of 1 for the chosen, 0 for the others
    return x * 0.1 + shift * 0.5 / router.float().std()


class Products(nn.Module):
    """The products of the experts, forward and backward, on rows that stand in expert order."""

    def __init__(self, router: Tensor, top_k: int, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.router, self.top_k, self.gate_up, self.down = router, top_k, gate_up, down

    def forward(self, x: Tensor) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        """The run to be timed, for the counts of this (1, T, D); what it returns are the weights' gradients."""
        logits = F.linear(x[0], self.router)
        counts = torch.bincount(logits.topk(self.top_k).indices.flatten(), minlength=self.router.shape[0]).tolist()
        rows, width = sum(counts), self.down.shape[2]
        x_RD, grad_RD, out_RD, grad_x_RD = (x.new_ones(rows, HIDDEN) for _ in range(4))
        gate_up_RG, grad_RG = (x.new_ones(rows, 2 * width) for _ in range(2))
        h_RF, grad_h_RF = (x.new_ones(rows, width) for _ in range(2))
        rows_of = (x_RD, gate_up_RG, h_RF, out_RD, grad_RD, grad_h_RF, grad_RG, grad_x_RD)
        parts = list(zip(self.gate_up, self.down, *(t.split(counts) for t in rows_of), strict=True))

        def run() -> list[tuple[Tensor, Tensor]]:
            for gate_up, down, x_e, gate_up_e, h_e, out_e, *_ in parts:
                torch.mm(x_e, gate_up.t(), out=gate_up_e)
                torch.mm(h_e, down.t(), out=out_e)
            gradients = []
            for gate_up, down, x_e, _, h_e, _, grad_e, grad_h_e, grad_gate_up_e, grad_x_e in parts:
                torch.mm(grad_e, down, out=grad_h_e)
                torch.mm(grad_gate_up_e, gate_up, out=grad_x_e)
                gradients.append((torch.mm(grad_gate_up_e.t(), x_e), torch.mm(grad_e.t(), h_e)))
            return gradients

        return run


def use_kernels(on: bool) -> None:
    """Whether the compiled kernels are used from now on."""
    os.environ["MOECOMPILE_NATIVE"] = "1" if on else "0"
    native.kernels.cache_clear()


def cpu_seconds(name: str, layer: nn.Module, x: Tensor, direction: Tensor) -> float:
    """CPU time of one forward and backward; gradients are made anew, as after zero_grad."""
    use_kernels(name != "torch only")
    native.kernels()
    layer.zero_grad(set_to_none=True)
    if isinstance(layer, Products):
        run = layer(x)
    else:
        run = functools.partial(_step, layer, x.detach().requires_grad_(), direction)
    start = time.process_time()
    run()
    return time.process_time() - start


def _step(layer: nn.Module, x: Tensor, direction: Tensor) -> None:
    layer(x).backward(direction)


def gradients(layer: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Output, gradient of the input, and of every weight in the order of their names."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(direction)
    named = sorted(layer.named_parameters(), key=lambda pair: pair[0])
    return [t.detach().clone() for t in (out, x.grad, *(p.grad for _, p in named)) if t is not None]


def check_equal(found: dict[str, nn.Module], reference: nn.Module, x: Tensor, direction: Tensor) -> None:
    """Every layer computes what transformers' plain loop computes, gradients included."""
    wanted = gradients(reference, x, direction)
    tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
    for name in found.keys() - {"dense"}:
        use_kernels(name != "torch only")
        got = gradients(found[name], x, direction)
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True)]
        if max(errors) > tolerance:
            raise SystemExit(f"{name} does not compute the same: relative errors {errors}")


def print_profile(name: str, runs: Sequence[Callable[[], object]]) -> None:
    """Milliseconds a run spends in each group of operators; `kernels` is what operators of ours do themselves."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it announces itself
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for run in runs:
            run()
    spent = dict.fromkeys((*GROUPS, "kernels", "other"), 0.0)
    for event in profile.key_averages():
        op = event.key.removeprefix("aten::")
        group = next((group for group, ops in GROUPS.items() if op in ops), "other")
        spent["kernels" if "moecompile" in op else group] += event.self_cpu_time_total / 1e3 / len(runs)
    print(f"  profile of {name}: " + ", ".join(f"{group} {ms:.1f} ms" for group, ms in spent.items() if ms), flush=True)


def measure(size: str, dtype: torch.dtype, rounds: int, *, eager: bool, profiled: bool) -> list[dict[str, object]]:
    """One row per layer."""
    experts, top_k, width, tokens = (int(part) for part in size.split(","))
    found = layers(experts, top_k, width, dtype, eager=eager)
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(1, tokens, HIDDEN, generator=generator).to(dtype)

    check_equal(found, block(experts, top_k, width, dtype, "eager"), draw(), draw())
    weights = {name: p.detach() for name, p in found["grouped_mm"].named_parameters()}
    router = weights["gate.weight"]
    found[PRODUCTS] = Products(router, top_k, weights["experts.gate_up_proj"], weights["experts.down_proj"])
    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for i in range(rounds + 3):  # the first three are warm-up
        x, direction = draw(), draw()
        hot = skewed(x, router, top_k, generator).to(dtype)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = cpu_seconds(name, found[name], hot if name == SKEWED else x, direction)
            if i >= 3:
                seconds[name].append(taken)
    if profiled:
        for name in ("dense", "fused"):
            print_profile(name, [functools.partial(cpu_seconds, name, found[name], draw(), draw()) for _ in range(3)])
    return [
        {
            "size": size,
            "layer": name,
            "cpu_ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(t / d for t, d in zip(times, seconds["dense"], strict=True)),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="E,K,WIDTH,T")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HEAP.items()):  # libraries read them when they start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    torch.set_num_threads(1)
    rows = []
    print(f"{'experts, top-k, width, tokens':30} {'layer':12} {'CPU ms':>9} {'x dense':>8}")
    for size in arguments.sizes:
        dtype, eager = getattr(torch, arguments.dtype), not arguments.no_eager
        for row in measure(size, dtype, arguments.rounds, eager=eager, profiled=arguments.profile):
            rows.append({"dtype": arguments.dtype, **row})
            print(f"{row['size']:30} {row['layer']:12} {row['cpu_ms']:9.1f} {row['ratio']:8.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
