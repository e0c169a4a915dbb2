"""Training steps of whole MoE models, rewritten by moecompile and as transformers runs them, side by side.

    python benchmarks/full_models.py                 one process: a Mixtral-like and a DeepSeek-V3-like model
    python benchmarks/full_models.py --ranks 2       experts over two ranks and FSDP2, gloo, both of them
    python benchmarks/full_models.py --families mixtral --rounds 3 --sequences 2

4 layers, hidden size 512, vocabulary 1024, random weights, bf16, sequences of 512 tokens. A step is forward, backward
and AdamW. All models take turns on the same new sequences, in a rotating order. Before that they are compared in
float32 with transformers' plain model in one process: logits, and what one AdamW step changes in the weights.

tokens/CPU s   tokens of a rank in a second of CPU time of its one thread (mean over ranks)
tokens/s       the same by wall time, of the slowest rank
x grouped_mm   tokens/CPU s relative to transformers' own fast experts (several ranks: to its all-to-all)
limit          one process: the same model with dense FFNs of the activated FLOPs in place of its experts

Writes benchmarks/results/full_models.json, one part for each number of ranks, and what docs/understand/peers.md shows.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from side_by_side import common

REPOSITORY = Path(__file__).resolve().parents[1]


def options() -> argparse.Namespace:
    """What the command line says, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4))
    parser.add_argument("--families", nargs="+", default=("mixtral", "deepseek_v3"), choices=("mixtral", "deepseek_v3"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4, help="of a rank in a step")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one process: also print where the time of a step goes")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results" / "full_models.json")
    parser.add_argument(
        "--page", type=Path, default=REPOSITORY / "docs" / "assets", help="folder for what the page shows"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    found = parser.parse_args()
    if min(found.rounds, found.sequences) < 1 or found.hidden % 128:
        parser.error("--rounds and --sequences start at 1, --hidden is a multiple of 128")
    return found


def main() -> None:
    """Measures, prints and writes."""
    common.restart_with_environment()
    told = options()
    import torch
    from side_by_side import launch, models, registry, report, training

    torch.set_num_threads(1)
    if told.job:
        training.run_rank(json.loads(told.job), told.folder)
    if told.ranks > 1:
        launch.enter_namespace()
    names = [name for name in models.builders(told.ranks) if not (told.no_eager and name.endswith("eager"))]
    if told.ranks > 1 and find_spec("accelerate") is None:
        names.remove(models.PARALLEL)
        print(f"left out: {models.PARALLEL}: transformers asks for accelerate: pip install accelerate")
    if told.ranks == 1:
        rows = []
        for family in told.families:
            rows += training.measure(
                family, names, told.rounds, told.sequences, common.Place(), hidden=told.hidden, profiled=told.profile
            )
            print(report.models_table(rows[-len(names) :]), "\n", flush=True)
        found = {"rows": rows}
    else:
        job = {"families": list(told.families), "names": names, "rounds": told.rounds}
        job |= {"sequences": told.sequences, "hidden": told.hidden}
        found = launch.launch(Path(__file__), told.ranks, job)
    installed = {name: entry for name, entry in registry.ONE_RANK.items() if entry.package == "transformers"}
    found |= {"versions": registry.versions(installed), "machine": report.machine()}
    found = report.store(told.results, f"ranks_{told.ranks}", found)
    page = report.models_page(found)
    print(page)
    (told.page / f"full_models_{told.ranks}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
