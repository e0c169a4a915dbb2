"""Exchanges in flight on a real link: one MoE layer over two nodes, forward and backward, each schedule in turn.

    python benchmarks/two_nodes.py --overlap                      # as root; about four minutes on two cores
    python benchmarks/two_nodes.py --overlap --rate-mbit 400      # a faster link

Two ranks, each a network namespace of its own (benchmarks/nodes.py). The layer is real: router, shared expert,
routed experts, `dispatch=dedup`; weights and inputs are random, the same for every schedule. Schedules take turns, so
that what the machine does beside falls on all of them.

none       exchanges are waited for where they begin
shared     the shared expert runs while rows are on the wire (one chunk)
2, 4       and so do the experts of the other chunks
control    2 chunks, each exchange waited for where it begins: what chunks alone cost or bring
auto       what the planner chooses for this link and this machine
alone      one chunk of a layer without a shared expert, beside the same layer with `none`: what the two halves cost
"""

from __future__ import annotations

import json
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
ALONE = {"no shared": ["experts.num_shared=0"], "alone": ["experts.num_shared=0", "dispatch.overlap=shared"]}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run. rate_mbit: of the link, each way. width: of an expert; the shared expert has as much."""

    rate_mbit: int = 400
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
    from moecompile.ops import in_flight

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, sizes = dist.get_rank(), Sizes(**json.loads(os.environ["SIZES"]))
    counter = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    layers = {name: _layer(sizes, overrides) for name, overrides in (SCHEDULES | ALONE).items()}
    generator = torch.Generator().manual_seed(rank)
    x, direction = (torch.randn(1, sizes.tokens, sizes.hidden, generator=generator) for _ in range(2))
    launch = in_flight._launch

    def launch_and_wait(ticket: int, *arguments: Any) -> None:
        launch(ticket, *arguments)
        in_flight._in_flight[ticket][2].wait()

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    sent: dict[str, int] = {}
    for i in range(sizes.rounds + 1):
        names = list(layers) if i % 2 else list(reversed(layers))
        for name in names:
            in_flight._launch = launch_and_wait if name == "control" else launch
            layers[name].zero_grad()
            dist.barrier()
            before, start = int(counter.read_text()), time.perf_counter()
            layers[name](x.clone().requires_grad_()).backward(direction)
            dist.barrier()
            if i:
                seconds[name].append(time.perf_counter() - start)
                sent[name] = int(counter.read_text()) - before
    if rank == 0:
        wire = 8 * sent["none"] / (sizes.rate_mbit * 1e6)
        (layer,) = moecompile.plan_of(layers["auto"]).layers
        chosen = layer.dispatch.overlap if layer.dispatch.chunks == 1 else f"{layer.dispatch.chunks} chunks"
        found = {"sizes": vars(sizes), "seconds": seconds, "sent": sent, "wire_s": wire, "auto": chosen}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


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
        "data.micro_batch_size=1", "routing.workload=balanced", f"hardware.inter_node_gb_s={sizes.rate_mbit / 8000}",
        *overrides,
    ]  # fmt: skip
    return moecompile.compile_model(FFN(), config, example=torch.zeros(1, 4, sizes.hidden), until="shard")


def report(found: dict[str, Any]) -> str:
    """Medians, and each relative to `none` as the median over the rounds."""
    rate = found["sizes"]["rate_mbit"]
    lines = [
        f"one MoE layer, forward and backward, {rate} Mbit/s: {found['wire_s']:.2f} s on the wire",
        f"{'schedule':<10}{'median':>9}{'of none':>9}{'bytes':>9}",
    ]
    for name, seconds in found["seconds"].items():
        beside = "no shared" if name in ALONE else "none"
        ratio = statistics.median(a / b for a, b in zip(seconds, found["seconds"][beside], strict=True))
        share = found["sent"][name] / found["sent"][beside]
        note = f"  {found['auto']}" if name == "auto" else ""
        lines.append(f"{name:<10}{statistics.median(seconds):>7.2f} s{ratio:>9.2f}{share:>9.3f}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
