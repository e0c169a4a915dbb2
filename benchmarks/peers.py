"""moecompile side by side with its peers: one MoE layer, bf16, forward and backward, in one run.

    make peers                                                installs the peers into .venv-peers, and runs this
    python benchmarks/peers.py                                one process, five sizes
    python benchmarks/peers.py --ranks 2                      experts over two ranks, gloo (--ranks 4 likewise)
    python benchmarks/peers.py --ranks 4 --link-mbit 1000     on two nodes, joined by a link of this rate (as root)
    python benchmarks/peers.py --only moecompile "transformers grouped_mm" --sizes 8,2,1024,4096 --rounds 3

A size is experts, top-k, width of an expert, tokens of a rank; the hidden size is 512. In every round each layer runs
once on the same new input, in a rotating order. Before that, output and gradients of each are compared with
transformers' plain loop in float32. Peers that are not installed are named and left out.

CPU ms    median CPU time (one thread); with ranks the mean over them, the threads of gloo included
wall ms   median wall time; with ranks of the slowest
x limit   CPU time relative to the limit, a dense SwiGLU FFN with the activated FLOPs, in the same round
ours x    CPU time of moecompile relative to this layer, in the same round (with ranks: of `moecompile auto`)
kept MiB  what forward leaves allocated for backward, its output included; measured in a process of its own
peak MiB  the most that is allocated at any time of the step, gradients of the weights included
sent MiB  what a rank sends in a step, counted at the loopback interface for all alike; on two nodes what crosses the
          link, by rank
error     largest error of output and gradients, relative to the largest entry

Writes benchmarks/results/peers.json (one part for each number of ranks) and what docs/understand/peers.md shows: a
table and a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from side_by_side import common

REPOSITORY = Path(__file__).resolve().parents[1]
ONE_RANK_SIZES = ("8,2,1024,4096", "64,6,256,4096", "64,6,256,512", "64,6,256,64", "128,8,512,4096")
RANKS_SIZES = ("64,6,256,4096", "64,6,256,512")


def options() -> argparse.Namespace:
    """What the command line says, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--link-mbit", type=int, metavar="RATE", help="two nodes with half of the ranks each")
    parser.add_argument("--sizes", nargs="+", metavar="E,K,WIDTH,T")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers; the limit always runs")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "peers.json")
    parser.add_argument(
        "--page", type=Path, default=REPOSITORY / "docs" / "assets", help="folder for what the page shows"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    found = parser.parse_args()
    if found.ranks < 1 or found.rounds < 1:
        parser.error("--ranks and --rounds start at 1")
    if found.link_mbit is not None and (found.link_mbit < 1 or found.ranks % 2):
        parser.error("--link-mbit is a positive rate, of a link between two halves of --ranks")
    found.sizes = found.sizes or (ONE_RANK_SIZES if found.ranks == 1 else RANKS_SIZES)
    try:
        parsed = [common.Size.parse(size) for size in found.sizes]
    except ValueError as error:
        parser.error(str(error))
    if uneven := [size for size in parsed if size.experts % found.ranks]:
        parser.error(f"{uneven[0].experts} experts cannot be spread over {found.ranks} ranks")
    return found


def main() -> None:
    """Measures, prints and writes."""
    common.restart_with_environment()
    told = options()
    import torch
    from side_by_side import launch, one_rank, ranks, registry, report

    torch.set_num_threads(1)
    if told.job:
        ranks.run_rank(json.loads(told.job), told.folder)
    if told.ranks > 1 and told.link_mbit is None:
        launch.enter_namespace()
    many = registry.MANY_RANKS if told.link_mbit is None else registry.TWO_NODES
    try:
        chosen, missing = registry.choose(registry.ONE_RANK if told.ranks == 1 else many, told.only)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
    if told.ranks == 1:
        rows = []
        for size in told.sizes:
            rows += one_rank.measure(chosen, common.Size.parse(size), told.rounds)
            print(report.table([row for row in rows if row["size"] == size]), "\n", flush=True)
        found = {"rows": rows}
    else:
        job = {"sizes": list(told.sizes), "rounds": told.rounds, "names": list(chosen)}
        found = launch.launch(Path(__file__), told.ranks, job, link_mbit=told.link_mbit)
    found |= {"versions": registry.versions(chosen), "machine": report.machine(), "missing": missing}
    name = f"{told.ranks}" if told.link_mbit is None else f"{told.ranks}_link"
    found = report.store(told.results, f"ranks_{name}", found | {"link_mbit": told.link_mbit})
    page = report.layers_page(found)
    print(page)
    (told.page / f"peers_{name}.md").write_text(page, encoding="utf-8")
    report.draw(found["rows"], told.page / f"peers_{name}.png")


if __name__ == "__main__":
    main()
