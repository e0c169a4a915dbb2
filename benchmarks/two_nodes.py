"""Two nodes for real: network namespaces joined by a link of limited rate, and what each dispatch puts on it.

    python benchmarks/two_nodes.py                                # as root; about 5 minutes on two cores
    python benchmarks/two_nodes.py --rate-mbit 200 --hidden 256   # a slower link, a smaller model
    python benchmarks/two_nodes.py --overlap                      # exchanges in flight: benchmarks/overlap.py
    python benchmarks/two_nodes.py --rows                         # formats of rows, in the same layer
    python benchmarks/two_nodes.py --pairs                        # those of two micro-batches: benchmarks/pairs.py

`recipe=deepseek_ep` trains on 2 nodes x 2 ranks. Each node is a network namespace with one end of a veth pair, whose
rate a token bucket limits, so that ranks of a node talk over its own loopback and the interface's counter counts bytes
between nodes alone. The dispatch kinds take turns in one launch, a few optimizer steps each.

counted    bytes that both interfaces sent in a step, less those of a step with one sequence a rank, whose exchanges are
           subtracted from the prediction as well: what does not depend on tokens (FSDP, router gradients) cancels
predicted  bytes that the forward exchanges of the measured routing send between nodes, twice: backward sends as many
planned    the same before anything ran, from the plan

The counter also has TCP's headers and acknowledgements.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes import ADDRESSES, INTERFACE, NODES, run_ranks, two_nodes, why_not

KINDS = ("flat", "dedup", "hierarchical")
RANKS_PER_NODE, LAYERS = 2, 3
PORT = 29400


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is run. rate_mbit: of the link, each way. sequences: per rank and step. steps: per turn, the first of which
    warms up.
    """

    rate_mbit: int = 1000
    hidden: int = 512
    sequences: int = 16
    seq_len: int = 128
    steps: int = 4
    rounds: int = 3


# -- the launcher ----------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, timeout_s: float = 1800) -> dict[str, Any]:
    """Runs the ranks of both nodes; what rank 0 found.

    Raises:
        RuntimeError: a rank failed, with the end of its output.
    """
    with two_nodes(sizes.rate_mbit) as names, tempfile.TemporaryDirectory() as folder:
        place_of = [names[rank // RANKS_PER_NODE] for rank in range(NODES * RANKS_PER_NODE)]
        return run_ranks(
            lambda rank, log: _start(place_of[rank], rank, sizes, folder, log), len(place_of), folder, timeout_s
        )


def _start(namespace: str, rank: int, sizes: Sizes, folder: str, log: Any) -> subprocess.Popen[bytes]:
    """One rank, with what torchrun would give it."""
    from moecompile.runtime.ranks import worker_variables

    place = {
        "RANK": rank, "WORLD_SIZE": NODES * RANKS_PER_NODE, "LOCAL_RANK": rank % RANKS_PER_NODE,
        "LOCAL_WORLD_SIZE": RANKS_PER_NODE, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT,
        "GLOO_SOCKET_IFNAME": INTERFACE, "TWO_NODES": json.dumps(vars(sizes)),
    }  # fmt: skip
    environment = os.environ | worker_variables(1, one_machine=False) | {k: str(v) for k, v in place.items()}
    command = ["ip", "netns", "exec", namespace, sys.executable, __file__, "--folder", folder]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


# -- one rank --------------------------------------------------------------------------------------------------------


def run_rank(folder: Path) -> None:
    """All turns; rank 0 writes `found.json`."""
    import torch.distributed as dist

    from moecompile.runtime.data import load_data
    from moecompile.runtime.groups import init_process_group

    sizes = Sizes(**json.loads(os.environ["TWO_NODES"]))
    turns = [(kind, sizes.sequences) for kind in KINDS] + [("flat", 1)]
    config = _config(sizes, "flat", 1)
    init_process_group(config)
    rank = dist.get_rank()
    data = load_data(config.data, folder, rank=rank, barrier=dist.barrier)
    steps: list[dict[str, Any]] = []
    for _ in range(sizes.rounds):
        for kind, sequences in turns:
            steps += _turn(_config(sizes, kind, sequences), data, folder)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"sizes": vars(sizes), "steps": steps}))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _config(sizes: Sizes, kind: str, sequences: int) -> Any:
    from moecompile.compose import compose_config

    return compose_config([
        "recipe=deepseek_ep", f"dispatch={kind}", f"model.config.hidden_size={sizes.hidden}",
        f"model.config.intermediate_size={-(-sizes.hidden // 10) * 5}", f"model.config.num_hidden_layers={LAYERS}",
        "data.vocab_size=300", f"data.seq_len={sizes.seq_len}", f"data.micro_batch_size={sequences}",
        f"data.global_batch_size={sequences * NODES * RANKS_PER_NODE}", f"trainer.max_steps={sizes.steps}",
        "trainer.progress_bar=false", "trainer.timeout_s=300",
    ])  # fmt: skip


def _turn(config: Any, data: Any, folder: Path) -> list[dict[str, Any]]:
    """A few steps of one dispatch kind: what happened in each but the first."""
    import torch
    import torch.distributed as dist

    from moecompile.mesh import LinkClass
    from moecompile.models.build import build_model, example_inputs
    from moecompile.ops import traffic
    from moecompile.pipeline import compile_model, plan_of
    from moecompile.runtime.data import train_loader
    from moecompile.runtime.module import LanguageModule
    from moecompile.runtime.observer import StepObserver
    from moecompile.runtime.training import make_trainer

    model = build_model(config.model, config.seed)
    model = compile_model(model, config, example=example_inputs(model, config.data.seq_len))
    plan, rank = plan_of(model), dist.get_rank()

    class Meter(StepObserver):
        """(seconds, bytes on the wire, predicted bytes) of each step, over all ranks."""

        def __init__(self) -> None:
            self.found: list[tuple[float, float, float]] = []
            self.sent = 0.0

        def started(self, module: LanguageModule) -> None:
            self._begin()

        def micro_batch_ended(self, module: LanguageModule, number: int) -> None:
            by_rank = traffic.take().items()
            self.sent += 2 * sum(n for peer, n in by_rank if plan.mesh.link(rank, peer) is LinkClass.INTER_NODE)

        def step_ended(self, module: LanguageModule, strategy: Any) -> None:
            dist.barrier()
            counted = _sent_bytes() - self.before if rank % RANKS_PER_NODE == 0 else 0
            sums = torch.tensor([counted, self.sent], dtype=torch.float64)
            seconds = time.perf_counter() - self.start
            dist.all_reduce(sums)
            self.found.append((seconds, *sums.tolist()))
            self._begin()

        def _begin(self) -> None:
            traffic.take()
            self.sent = 0.0
            dist.barrier()
            self.before, self.start = _sent_bytes(), time.perf_counter()

    meter = Meter()
    loader = train_loader(
        data.train, config.data, seed=config.seed, rank=rank, world_size=plan.mesh.world_size,
        num_steps=config.trainer.max_steps,
    )  # fmt: skip
    trainer = make_trainer(config, plan, folder, [meter])
    trainer.fit(LanguageModule(model, config.optimizer, config.trainer.max_steps), loader)
    tokens = config.data.micro_batch_size * config.data.seq_len * plan.mesh.world_size
    planned = 2 * plan.estimate.bytes_per_token_per_layer.inter_node * tokens * len(plan.layers)
    head = {"kind": config.dispatch.kind.value, "sequences": config.data.micro_batch_size, "planned": planned}
    return [
        head | {"seconds": seconds, "counted": counted, "predicted": predicted}
        for seconds, counted, predicted in meter.found[1:]
    ]


def _sent_bytes() -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


# -- the table -------------------------------------------------------------------------------------------------------


def summary(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of each kind: bytes per step, less those of a step with one sequence a rank, and seconds."""
    many = found["sizes"]["sequences"]

    def median(kind: str, sequences: int, key: str) -> float:
        return statistics.median(
            step[key] for step in found["steps"] if (step["kind"], step["sequences"]) == (kind, sequences)
        )

    return {
        kind: {
            "counted": median(kind, many, "counted") - median("flat", 1, "counted"),
            "predicted": median(kind, many, "predicted") - median("flat", 1, "predicted"),
            "planned": median(kind, many, "planned"),
            "seconds": median(kind, many, "seconds"),
        }
        for kind in KINDS
    }


def main() -> None:
    """Runs, prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--output", type=Path, help="where to write what was measured, as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--overlap", action="store_true", help="one layer with exchanges in flight (overlap.py)")
    parser.add_argument("--rows", action="store_true", help="one layer with rows in several formats (overlap.py)")
    parser.add_argument("--pairs", action="store_true", help="steps with a forward beside a backward (pairs.py)")
    options = parser.parse_args()
    if options.folder is not None:
        run_rank(options.folder)
    if reason := why_not():
        sys.exit(f"two nodes cannot be made here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    if options.overlap or options.rows or options.pairs:
        import overlap
        import pairs

        slow = {} if options.rate_mbit == Sizes().rate_mbit else {"rate_mbit": options.rate_mbit}
        if options.pairs:
            found = pairs.measure(pairs.Sizes(**slow))
            print(pairs.report(found))
        else:
            wide = {"rate_mbit": options.rate_mbit, "rows": True, "hidden": 256, "width": 128, "tokens": 16384}
            found = overlap.measure(overlap.Sizes(**(wide if options.rows else slow)))
            print(overlap.report(found))
        if options.output:
            options.output.write_text(json.dumps(found, indent=2) + "\n")
        return
    sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
    rows = summary(measure(sizes))
    print(f"bytes per optimizer step that cross the link of {sizes.rate_mbit} Mbit/s, both ways; medians")
    print(f"{'dispatch':<14}{'counted':>12}{'predicted':>12}{'ratio':>8}{'planned':>12}{'of flat':>9}{'step':>9}")
    for kind, row in rows.items():
        share, ratio = row["counted"] / rows["flat"]["counted"], row["counted"] / row["predicted"]
        print(
            f"{kind:<14}{row['counted'] / 2**20:>8.1f} MiB{row['predicted'] / 2**20:>8.1f} MiB{ratio:>8.3f}"
            f"{row['planned'] / 2**20:>8.1f} MiB{share:>9.2f}{row['seconds']:>7.2f} s"
        )
    if options.output:
        options.output.write_text(json.dumps({"sizes": vars(sizes), "kinds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
