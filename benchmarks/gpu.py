"""Does moecompile hold on this GPU, and how fast is it there? Correctness, speed, memory, in one command.

    python benchmarks/gpu.py                          every part, on the first GPU
    python benchmarks/gpu.py --parts 'correct;ranks'    some of them
    python benchmarks/gpu.py --device cpu --parts layer    a smoke run: what needs a GPU is named as skipped

    correct  logits and every gradient of each recipe's model against the CPU in float64, fp32 and bf16
    layer    one MoE layer beside grouped products (torchtitan's way), transformers' own and a dense FFN: CUDA events,
             kernels, host waits, memory kept for backward
    train    a short training by the command line (one process, with NCCL on a GPU) beside the same one on the CPU
    memory   the fullest moment of a training step beside what the plan says
    ranks    two ranks on the one device with gloo: exchanges, FSDP2 and reductions against one process

Needs torch, transformers and moecompile, and no network; docs/use/gpu.md says how to bring the few packages that a bare
machine lacks. Every part runs in a process of its own, so a failure, also of the CUDA context, ends that part alone.
The report, gpu.json, is written after each part. The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

GROUPS = ("correct", "layer", "train", "memory", "ranks")
MINUTES = 20
"""Of one part."""
_DONE = {True: "ok", False: "wrong"}


def parts(device: str) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """name -> what runs it in a scratch folder and says whether it is `ok`; names begin with their group."""
    import torch
    from on_gpu import correct, layer, ranks, runs

    place = torch.device(device)
    on_gpu = place.type == "cuda"
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for recipe in correct.recipes():
        for precision in correct.PRECISIONS:
            found[f"correct {recipe} {precision}"] = _without_folder(correct.check_recipe, recipe, place, precision)
    for size in layer.LARGE if on_gpu else layer.SMALL:
        for dtype in (torch.bfloat16, torch.float32):
            name = f"layer {size.experts},{size.top_k},{size.width} {str(dtype).removeprefix('torch.')}"
            found[name] = _without_folder(layer.measure, size, place, dtype, 20 if on_gpu else 3)
    for precision in runs.LOSS:
        found[f"train {precision}"] = partial(runs.train, place, precision)
        found[f"memory {precision}"] = partial(runs.memory, place, precision, large=on_gpu)
    for kind in ranks.KINDS:
        found[f"ranks {kind}"] = partial(ranks.check, kind, place)
    return found


def _without_folder(run: Callable[..., dict[str, Any]], *arguments: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda _: run(*arguments)


def main() -> int:
    """Runs the parts one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke run")
    parser.add_argument("--parts", default=";".join(GROUPS), help="groups or whole names, between semicolons")
    parser.add_argument("--report", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the process of one part
    options = parser.parse_args()
    if options.only:
        return _run_one(options.only, options.device, options.report)
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU here: --device cpu for a smoke run", file=sys.stderr)
        return 2
    asked = options.parts.split(";")
    chosen = [name for name in parts(options.device) if name in asked or name.split()[0] in asked]
    if unknown := [name for name in asked if not any(name in (part, part.split()[0]) for part in chosen)]:
        print(f"no part is called {', '.join(unknown)}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"machine": _machine(options.device), "parts": []}
    print(json.dumps(report["machine"], indent=2), flush=True)
    for name in chosen:
        report["parts"].append(_in_a_process(name, options.device))
        options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(_line(report["parts"][-1]), flush=True)
    return _summary(report, options.report)


def _in_a_process(name: str, device: str) -> dict[str, Any]:
    """The entry of a part in the report."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "part.json")
        command = [sys.executable, __file__, "--only", name, "--device", device, "--report", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
            error = f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}"
        except subprocess.TimeoutExpired:
            error = f"did not end within {MINUTES} minutes"
        entry = json.loads(output.read_text()) if output.is_file() else {"status": "failed", "error": error}
    return {"name": name, "seconds": round(time.perf_counter() - began, 1), **entry}


def _run_one(name: str, device: str, output: Path) -> int:
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = parts(device)[name](Path(folder))
        entry = {"status": _DONE[bool(result["ok"])], "result": result}
    except Exception:
        entry = {"status": "failed", "error": traceback.format_exc()[-4000:]}
    output.write_text(json.dumps(entry), encoding="utf-8")
    return int(entry["status"] != "ok")


def _machine(device: str) -> dict[str, Any]:
    import torch

    from moecompile.version import versions

    found: dict[str, Any] = {"device": device, "python": platform.python_version(), "versions": versions()}
    if device == "cpu":
        return found | {"skipped": "all that needs a GPU: CUDA events, kernels, host waits, NCCL, the GPU's allocator"}
    gpu = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory,
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }  # fmt: skip


def _line(part: dict[str, Any]) -> str:
    """One line of a part, and more of a layer or a failure."""
    head = f"{part['status']:>6}  {part['seconds']:7.1f} s  {part['name']}"
    if part["status"] == "failed":
        return f"{head}\n{part['error']}"
    result = part["result"]
    if "layers" in result:
        rows = [f"{'':17} {'ms':>9} {'x dense':>8} {'kernels':>8} {'waits':>6} {'kept MiB':>9}"]
        for name, row in result["layers"].items():
            ms = row["cpu_ms"] if row["device_ms"] is None else row["device_ms"]
            counts = ("skipped" if row[key] is None else str(row[key]) for key in ("kernels", "waits"))
            rows.append(
                "{:>17} {:9.3f} {:8.2f} {:>8} {:>6} {:9.1f}".format(
                    name, ms, row["ratio"], *counts, row["kept_bytes"] / 2**20
                )
            )
        return "\n".join([head, *rows])
    numbers = (f"{key} {value:.3g}" for key, value in result.items() if isinstance(value, float))
    return f"{head}  {', '.join(numbers)}"


def _summary(report: dict[str, Any], path: Path) -> int:
    bad = [part["name"] for part in report["parts"] if part["status"] != "ok"]
    print(f"\n{len(report['parts']) - len(bad)} of {len(report['parts'])} parts are ok; {path}")
    if bad:
        print(f"not ok: {'; '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
