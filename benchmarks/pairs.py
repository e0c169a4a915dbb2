"""Exchanges of a forward and a backward in flight together, on a real link: steps of a small model on two nodes.

    python benchmarks/two_nodes.py --pairs                        # as root; about seven minutes on two cores
    python benchmarks/two_nodes.py --pairs --rate-mbit 800        # a faster link

Two ranks, each a network namespace of its own (benchmarks/nodes.py), share the experts of all layers; `dispatch=dedup`.
Ways to run a step take turns, so that what the machine does beside falls on all of them.

plain       one micro-batch after the other, forward and backward
chunks      the same with `dispatch.overlap=chunks` (2)
one by one  `pipeline.schedule=dualpipev`: the order of pairs, forward before backward
pairs       and with `pipeline.overlap=exchanges`: both of a pair at once
both        pairs and chunks
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

PORT = 29402
ONE_BY_ONE = ["pipeline.schedule=dualpipev"]
WAYS = {
    "plain": [],
    "chunks": ["dispatch.overlap=chunks", "dispatch.chunks=2"],
    "one by one": ONE_BY_ONE,
    "pairs": [*ONE_BY_ONE, "pipeline.overlap=exchanges"],
    "both": [*ONE_BY_ONE, "pipeline.overlap=exchanges", "dispatch.overlap=chunks", "dispatch.chunks=2"],
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run. rate_mbit: of the link, each way. micro_batches: of a step, each of `sequences` a rank. steps: of a
    turn, the first of which warms up.
    """

    rate_mbit: int = 400
    hidden: int = 384
    layers: int = 4
    seq_len: int = 128
    sequences: int = 8
    micro_batches: int = 8
    steps: int = 3
    rounds: int = 4


def measure(sizes: Sizes, timeout_s: float = 1800) -> dict[str, Any]:
    """Runs both ranks; what rank 0 found.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    from nodes import one_rank_a_node

    return one_rank_a_node(__file__, PORT, sizes.rate_mbit, sizes, timeout_s)


# -- one rank --------------------------------------------------------------------------------------------------------


def run_rank(folder: Path) -> None:
    """All ways in turn; rank 0 writes `found.json`."""
    import torch.distributed as dist
    from nodes import INTERFACE

    from moecompile.runtime.data import load_data
    from moecompile.runtime.groups import init_process_group

    sizes = Sizes(**json.loads(os.environ["SIZES"]))
    config = _config(sizes, [])
    init_process_group(config)
    data = load_data(config.data, folder, rank=dist.get_rank(), barrier=dist.barrier)
    counter = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    sent: dict[str, float] = {}
    for i in range(sizes.rounds):
        for name in WAYS if i % 2 else reversed(WAYS):
            before = int(counter.read_text())
            found, losses[name] = _turn(_config(sizes, WAYS[name]), data, folder)
            sent[name] = (int(counter.read_text()) - before) / sizes.steps
            seconds[name] += found
    if dist.get_rank() == 0:
        wire = 8 * sent["plain"] / (sizes.rate_mbit * 1e6)
        found_all = {"sizes": vars(sizes), "seconds": seconds, "losses": losses, "sent": sent, "wire_s": wire}
        (folder / "found.json").write_text(json.dumps(found_all))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _config(sizes: Sizes, overrides: list[str]) -> Any:
    from moecompile.compose import compose_config

    return compose_config([
        "recipe=deepseek_ep", "dispatch=dedup", "mesh.num_nodes=2", "mesh.ranks_per_node=1", "mesh.ep=2",
        f"model.config.hidden_size={sizes.hidden}", f"model.config.intermediate_size={-(-sizes.hidden // 10) * 10}",
        f"model.config.num_hidden_layers={sizes.layers}", "data.vocab_size=300", f"data.seq_len={sizes.seq_len}",
        f"data.micro_batch_size={sizes.sequences}", "trainer.checkpointing=none", "routing.max_nodes=null",
        f"data.global_batch_size={sizes.sequences * 2 * sizes.micro_batches}", f"trainer.max_steps={sizes.steps}",
        "trainer.progress_bar=false", "trainer.timeout_s=300", *overrides,
    ])  # fmt: skip


def _turn(config: Any, data: Any, folder: Path) -> tuple[list[float], float]:
    """Seconds of each step but the first one, and the loss of the last one."""
    import torch.distributed as dist

    from moecompile.models.build import build_model, example_inputs
    from moecompile.pipeline import compile_model, plan_of
    from moecompile.runtime.data import train_loader
    from moecompile.runtime.metrics import Metrics
    from moecompile.runtime.module import LanguageModule
    from moecompile.runtime.observer import StepObserver
    from moecompile.runtime.training import make_trainer

    model = build_model(config.model, config.seed)
    model = compile_model(model, config, example=example_inputs(model, config.data.seq_len))
    plan = plan_of(model)

    class Clock(StepObserver):
        def __init__(self) -> None:
            self.found: list[float] = []

        def started(self, module: LanguageModule) -> None:
            self._begin()

        def step_ended(self, module: LanguageModule, strategy: Any) -> None:
            dist.barrier()
            self.found.append(time.perf_counter() - self.start)
            self._begin()

        def _begin(self) -> None:
            dist.barrier()
            self.start = time.perf_counter()

    clock, metrics = Clock(), Metrics(1, config.trainer.max_steps)
    loader = train_loader(
        data.train,
        config.data,
        seed=config.seed,
        rank=dist.get_rank(),
        world_size=2,
        num_steps=config.trainer.max_steps,
    )
    trainer = make_trainer(config, plan, folder, [metrics, clock])
    trainer.fit(LanguageModule(model, config.optimizer, config.trainer.max_steps), loader)
    return clock.found[1:], metrics.tally.loss_last


def report(found: dict[str, Any]) -> str:
    """Medians, each relative to `plain` and to `one by one`, step by step."""
    seconds, sizes = found["seconds"], found["sizes"]
    lines = [
        f"a step of {sizes['micro_batches']} micro-batches, {sizes['rate_mbit']} Mbit/s: "
        f"{found['wire_s']:.2f} s on the wire",
        f"{'':<12}{'median':>9}{'of plain':>10}{'of one by one':>15}{'loss':>9}",
    ]
    for name in WAYS:
        plain, one_by_one = (
            statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
            for other in ("plain", "one by one")
        )
        middle = statistics.median(seconds[name])
        lines.append(f"{name:<12}{middle:>7.2f} s{plain:>10.2f}{one_by_one:>15.2f}{found['losses'][name]:>9.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
