"""What `--help` and `--cfg job` take beside a bare Hydra program: exits with 1 if one is above the limit.

python benchmarks/startup.py                      # half a minute
python benchmarks/startup.py --rounds 20 --json startup.json

The bare program is `@hydra.main` over an empty config, with the same flag. Both run in turn, A B A B, each time in a
new process; the figure is the median of the rounds' ratios of CPU time, which another program's work hardly moves.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIMIT = 3.0
FLAGS = {"--help": ["--help"], "--cfg job": ["--cfg", "job"], "--cfg job, a recipe": ["--cfg", "job"]}
RECIPE = {"--cfg job, a recipe": ["recipe=deepseek_ep"]}
BARE = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(config):
    pass

main()
"""


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratio(name: str, bare: Path, rounds: int) -> tuple[float, float, float]:
    """Median seconds of the bare program and of ours, and the median of their ratio."""
    ours, theirs = ["-m", "moecompile", *FLAGS[name], *RECIPE.get(name, ())], [str(bare), *FLAGS[name]]
    pairs = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(rounds + 1)][1:]  # the first one fills caches
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second), statistics.median(b / a for a, b in pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line a flag; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "bare.py")
        bare.write_text(BARE, encoding="utf-8")
        for name in FLAGS:
            first, second, found[name] = ratio(name, bare, options.rounds)
            print(f"{name:20} bare {first:.2f} s  moecompile {second:.2f} s  {found[name]:.2f} x  limit {LIMIT:g} x")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(max(found.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
