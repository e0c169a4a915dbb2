"""One MoE layer over two nodes on a real link, forward and backward, each schedule (or format of rows) in turn.

    python benchmarks/two_nodes.py --overlap                      # as root; about four minutes on two cores
    python benchmarks/two_nodes.py --overlap --rate-mbit 400      # a faster link
    python benchmarks/two_nodes.py --rows                         # formats of rows; about three minutes

Two ranks, each a network namespace of its own (benchmarks/nodes.py). The layer is real: router, shared expert,
routed experts, `dispatch=dedup`; weights and inputs are random, the same for every schedule. Schedules take turns, so
that what the machine does beside falls on all of them.

none       exchanges are waited for where they begin
shared     the shared expert runs while rows are on the wire (one chunk)
2, 4       and so do the experts of the other chunks
control    2 chunks, each exchange waited for where it begins: what chunks alone cost or bring
auto       what the planner chooses for this link and this machine
alone      one chunk of a layer without a shared expert, beside the same layer with `none`: what the two halves cost

With `--rows`, small experts, no shared one and no overlap: `dispatch.wire_dtype`, and `by torch`, which is
fp8 by torch's functions in place of the kernel.
Beside the time: decibels between what is computed from rows in fp32 and what is lost, of the output and of gradients.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PORT = 29401
SCHEDULES = {
    "none": [],
    "shared": ["dispatch.overlap=shared"],
    "2": ["dispatch.overlap=chunks", "dispatch.chunks=2"],
    "4": ["dispatch.overlap=chunks", "dispatch.chunks=4"],
    "control": ["dispatch.overlap=chunks", "dispatch.chunks=2"],
    "auto": ["dispatch.overlap=auto"],
}
FORMATS = {
    name: ["experts.num_shared=0", f"dispatch.wire_dtype={name.split()[0]}"]
    for name in ("bf16", "fp32", "fp8", "fp8_128", "fp8 by torch")
}
ALONE = {"no shared": ["experts.num_shared=0"], "alone": ["experts.num_shared=0", "dispatch.overlap=shared"]}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run. rate_mbit: of the link, each way. rows: formats of rows, in place of schedules. width: of an expert;
    the shared expert has as much.
    """

    rate_mbit: int = 400
    rows: bool = False
    hidden: int = 512
    width: int = 1024
    experts: int = 8
    top_k: int = 2
    tokens: int = 4096
    rounds: int = 12


def measure(sizes: Sizes, timeout_s: float = 1200) -> dict[str, Any]:
    """Runs both ranks; what rank 0 found.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    from nodes import one_rank_a_node

    return one_rank_a_node(__file__, PORT, sizes.rate_mbit, sizes, timeout_s)


def run_rank(folder: Path) -> None:
    """All schedules in turn; rank 0 writes `found.json`."""
    import torch
    import torch.distributed as dist
    from nodes import INTERFACE

    import moecompile
    from moecompile.ops import in_flight, narrow_rows

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), Sizes(**json.loads(os.environ["SIZES"]))
    counter = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    layers = {name: _layer(sizes, each) for name, each in (FORMATS if sizes.rows else SCHEDULES | ALONE).items()}
    generator = torch.Generator().manual_seed(rank)
    x, direction = (torch.randn(1, sizes.tokens, sizes.hidden, generator=generator) for _ in range(2))
    launch, kernels = in_flight._launch, narrow_rows.kernels

    def launch_and_wait(ticket: int, *arguments: Any) -> None:
        launch(ticket, *arguments)
        in_flight._in_flight[ticket][2].wait()

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    sent: dict[str, int] = {}
    made: dict[str, tuple[torch.Tensor, ...]] = {}
    for i in range(sizes.rounds + 1):
        names = list(layers) if i % 2 else list(reversed(layers))
        for name in names:
            in_flight._launch = launch_and_wait if name == "control" else launch
            narrow_rows.kernels = (lambda: None) if name.endswith("by torch") else kernels
            layers[name].zero_grad()
            given = x.clone().requires_grad_()
            dist.barrier()
            before, start = int(counter.read_text()), time.perf_counter()
            out = layers[name](given)
            out.backward(direction)
            dist.barrier()
            made[name] = (out.detach(), given.grad, *(weight.grad.clone() for weight in layers[name].parameters()))
            if i:
                seconds[name].append(time.perf_counter() - start)
                sent[name] = int(counter.read_text()) - before
    if rank == 0:
        found = {"sizes": vars(sizes), "seconds": seconds, "sent": sent}
        found["wire_s"] = 8 * sent[next(iter(layers))] / (sizes.rate_mbit * 1e6)
        if sizes.rows:
            found["decibels"] = {name: list(map(_decibels, made["fp32"], each)) for name, each in made.items()}
        else:
            (layer,) = moecompile.plan_of(layers["auto"]).layers
            chosen = layer.dispatch.overlap if layer.dispatch.chunks == 1 else f"{layer.dispatch.chunks} chunks"
            found["auto"] = chosen
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _decibels(exact: Any, got: Any) -> float:
    lost = float((exact.double() - got.double()).square().sum())
    return 10 * math.log10(float(exact.double().square().sum()) / lost) if lost else math.inf


def _layer(sizes: Sizes, overrides: list[str]) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    import moecompile

    class FFN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = 2 * sizes.width  # one half becomes the shared expert, the other the routed ones
            self.gate, self.up = (nn.Linear(sizes.hidden, width, bias=False) for _ in range(2))
            self.down = nn.Linear(width, sizes.hidden, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
            return out

    torch.manual_seed(0)
    config = [
        f"experts.num_routed={sizes.experts}", "experts.granularity=2", "experts.num_shared=1", "experts.init=random",
        f"routing.top_k={sizes.top_k}", "mesh.num_nodes=2", "dispatch.kind=dedup", f"data.seq_len={sizes.tokens}",
        "data.micro_batch_size=1", "routing.workload=balanced", "balance=none",
        f"hardware.inter_node_gb_s={sizes.rate_mbit / 8000}", *overrides,
    ]  # fmt: skip
    return moecompile.compile_model(FFN(), config, example=torch.zeros(1, 4, sizes.hidden), until="shard")


def report(found: dict[str, Any]) -> str:
    """Medians, and each relative to the first one as the median over the rounds."""
    (first, *_), rate = found["seconds"], found["sizes"]["rate_mbit"]
    kind, width = ("rows", 14) if "decibels" in found else ("schedule", 10)
    lines = [
        f"one MoE layer, forward and backward, {rate} Mbit/s: {found['wire_s']:.2f} s on the wire",
        f"{kind:<{width}}{'median':>9}{f'of {first}':>9}{'bytes':>9}" + "   output  gradients" * (kind == "rows"),
    ]
    for name, seconds in found["seconds"].items():
        beside = "no shared" if name in ALONE else first
        ratio = statistics.median(a / b for a, b in zip(seconds, found["seconds"][beside], strict=True))
        share = found["sent"][name] / found["sent"][beside]
        note = f"  {found['auto']}" if name == "auto" else ""
        if kind == "rows" and name != "fp32":
            output, *gradients = found["decibels"][name]
            note = f"{output:>6.1f} dB{min(gradients):>8.1f} dB"
        lines.append(f"{name:<{width}}{statistics.median(seconds):>7.2f} s{ratio:>9.2f}{share:>9.3f}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
