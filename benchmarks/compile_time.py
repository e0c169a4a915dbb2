"""How long a published model takes to plan and compile on the meta device, and how that grows with its layers.

    python benchmarks/compile_time.py                                    DeepSeek-V3 with 15, 30 and 61 layers
    python benchmarks/compile_time.py --model qwen3_235b_a22b --layers 24 48 94

Each row is a process of its own: from the empty process to lowered graphs of all layers, in seconds of wall time and of
CPU time, which another load on the machine does not stretch. `import` is torch, transformers and moecompile. At the
end the whole command `task=plan` is timed from the shell. Writes benchmarks/results/compile_time.json, and exits with 1
if the largest model takes more than 10 s of wall time from build to lowered graphs, or 2 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "compile_time.json"
MESH = "h800_256x8"
MOST_SECONDS, MOST_GIB = 10.0, 2.0
COLUMNS = ("import", "build", "capture", "build_plan", "rewrite", "lower", "compile")


def one(model: str, layers: int, mesh: str) -> dict[str, Any]:
    """One compilation in this process. compile: build to lowered graphs, the sum of the steps before it."""
    start, cpu_start = time.perf_counter(), time.process_time()
    import transformers.models.auto.modeling_auto  # noqa: F401  (else it would count as building)

    from moecompile.compose import compose_config
    from moecompile.models.build import build_model, example_inputs
    from moecompile.pipeline import compile_with_report

    seconds = {"import": time.perf_counter() - start}
    begin, cpu_begin = time.perf_counter(), time.process_time()
    config = compose_config([f"model={model}", f"mesh={mesh}", f"model.config.num_hidden_layers={layers}"])
    built = build_model(config.model, config.seed)
    seconds["build"] = time.perf_counter() - begin
    compiled = compile_with_report(built, config, example=example_inputs(built, config.data.seq_len))
    seconds["compile"] = time.perf_counter() - begin
    seconds |= {record.name: record.seconds for record in compiled.records}
    return {
        "model": model,
        "layers": layers,
        "moe_layers": len(compiled.plan.layers),
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
        "nodes": compiled.records[-1].nodes_after,
        "seconds": seconds,
        "cpu_seconds": {
            "import": cpu_begin - cpu_start,
            "compile": time.process_time() - cpu_begin,
        },
        "peak_gib": _peak_kib() / 2**20,
    }


def _peak_kib() -> int:
    """Of this program alone: getrusage's figure begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])


def shell(model: str, mesh: str) -> dict[str, float]:
    """The command line from start to exit."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moecompile", "task=plan", f"model={model}", f"mesh={mesh}"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [*command, f"hydra.run.dir={folder}/run"], check=True, cwd=folder, env=_environment(), capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def _in_a_process(model: str, layers: int, mesh: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", "--model", model, "--layers", str(layers), "--mesh", mesh]
    done = subprocess.run(command, check=True, env=_environment(), stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _print(rows: list[dict[str, Any]], whole: dict[str, float], model: str, mesh: str) -> None:
    heads = ("layers", "parameters", *COLUMNS, "CPU", "ms a layer", "peak GiB")
    print("  ".join(f"{head:>10}" for head in heads))
    for row in rows:
        cells = [str(row["layers"]), f"{row['parameters'] / 1e9:.1f} B", *(f"{row['seconds'][c]:.2f}" for c in COLUMNS)]
        cpu = row["cpu_seconds"]["compile"]
        cells += [f"{cpu:.2f}", f"{1000 * cpu / row['layers']:.0f}", f"{row['peak_gib']:.2f}"]
        print("  ".join(f"{cell:>10}" for cell in cells))
    took = f"{whole['seconds']:.1f} s, CPU {whole['cpu_seconds']:.1f} s"
    print(f"\ntask=plan model={model} mesh={mesh} from the shell: {took}")


def main() -> int:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 30, 61])
    parser.add_argument("--mesh", default=MESH)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.model, args.layers[0], args.mesh)))
        return 0
    rows = [_in_a_process(args.model, layers, args.mesh) for layers in args.layers]
    whole = shell(args.model, args.mesh)
    _print(rows, whole, args.model, args.mesh)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows, "shell": whole}, indent=2) + "\n", encoding="utf-8")
    last = rows[-1]
    return int(last["seconds"]["compile"] > MOST_SECONDS or last["peak_gib"] > MOST_GIB)


if __name__ == "__main__":
    sys.exit(main())
