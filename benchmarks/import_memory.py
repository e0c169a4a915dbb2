"""How much memory a rank needs to import a model, or to draw its initial weights, against the shard that it keeps.

    python benchmarks/import_memory.py                    Mixtral, DeepSeek-V3 and an upcycled Llama at 1, 2 and 4 ranks
    python benchmarks/import_memory.py --ranks 4 --hidden 768
    python benchmarks/import_memory.py --drawn            the same models from a config, whose weights are drawn

A model is written to a temporary folder as save_pretrained writes it, then built, compiled, sharded and filled on real
ranks (gloo). `peak` is the growth of a rank's anonymous memory (RssAnon, read every millisecond) from before the build
to the end of the import: what the process allocated itself, graphs of the compilation included, without the pages of
the safetensors files, which the kernel maps and can drop. `full`, at the highest number of ranks, is the same for a
full load that is sharded afterwards. The rank with the highest ratio is shown. Takes a few minutes. Writes
benchmarks/results/import_memory.json, and exits with 1 if a sharded import needs more than 1.3 x shard + the largest
stored tensor. With --drawn there is no folder, the largest tensor is the stacked experts of a layer, and the file is
import_memory_drawn.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "import_memory.json"
MOST, SEQ, MIB = 1.3, 16, 2**20
MODELS = ("mixtral", "deepseek_v3", "llama upcycled")


def model_config(kind: str, hidden: int) -> dict[str, Any]:
    """Enough for a shard to be large beside what Python itself allocates."""
    sizes = {"vocab_size": 4096, "hidden_size": hidden, "num_hidden_layers": 6, "num_attention_heads": 8,
             "num_key_value_heads": 8, "max_position_embeddings": 64}  # fmt: skip
    if kind == "mixtral":
        return {**sizes, "intermediate_size": 2 * hidden, "num_local_experts": 8, "num_experts_per_tok": 2}
    if kind == "deepseek_v3":
        return {
            **sizes, "intermediate_size": 4 * hidden, "moe_intermediate_size": hidden // 4, "n_routed_experts": 64,
            "num_experts_per_tok": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_mtp_layers": 0,
            "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
        }  # fmt: skip
    return {**sizes, "intermediate_size": 2 * hidden}


def write(kind: str, hidden: int, folder: Path) -> None:
    """A random model, in files of 50 MB."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = kind.split(maxsplit=1)[0]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **model_config(kind, hidden))).save_pretrained(
        folder, max_shard_size="50MB"
    )


class Peak:
    """The growth of this process's anonymous memory since `start`, and its highest value, bytes."""

    def __init__(self) -> None:
        gc.collect()
        self.start = self.highest = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.highest - self.start

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.highest = max(self.highest, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


def one(source: str, world_size: int, load: str) -> dict[str, Any]:
    """One import on this rank. source: a folder, or `model.config` as JSON."""
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from moecompile.compose import compose_config
    from moecompile.models.build import build_model, example_inputs
    from moecompile.models.sharded import ShardedImport
    from moecompile.passes.shard import device_mesh_of, shard
    from moecompile.pipeline import compile_with_report

    torch.set_num_threads(1)
    config = compose_config(["mesh.num_nodes=1", f"mesh.ranks_per_node={world_size}", f"data.seq_len={SEQ}"])
    if source.startswith("{"):
        config.model.config = json.loads(source)
        config.model.architecture = config.model.config.pop("architecture")
    else:
        config.model.architecture, config.model.config, config.model.pretrained = None, {}, source

    def sharded() -> torch.nn.Module:
        importing = ShardedImport(config)
        compiled = compile_with_report(importing.model, config, example=example_inputs(importing.model, SEQ))
        shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
        importing.fill(compiled)
        return compiled.model

    def full() -> torch.nn.Module:
        model = build_model(config.model, config.seed)
        compiled = compile_with_report(model, config, example=example_inputs(model, SEQ))
        return shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))

    ways: dict[str, Callable[[], torch.nn.Module]] = {"sharded": sharded, "full": full}
    dist.barrier()
    peak = Peak()
    model = ways[load]()
    highest = peak.end()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return {
        "peak": highest,
        "shard": sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors),
        "model": sum(t.numel() * t.element_size() for t in tensors),
    }


def rank_main(source: str, tiny: str, load: str) -> None:
    """A rank: imports a tiny model first, so that modules that Python loads late do not count."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    one(tiny, world_size, load)
    rows: list[Any] = [None] * world_size
    dist.all_gather_object(rows, one(source, world_size, load))
    if dist.get_rank() == 0:
        print("ROWS" + json.dumps(rows), flush=True)
    dist.barrier()
    os._exit(0)


def measure(source: str, tiny: str, world_size: int, load: str) -> list[dict[str, Any]]:
    """The rows of all ranks."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", __file__,
        "--rank", source, tiny, load,
    ]  # fmt: skip
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("ROWS")]
    if not found:
        sys.exit(done.stdout + done.stderr)
    rows: list[dict[str, Any]] = json.loads(found[0].removeprefix("ROWS"))
    return rows


def largest_weight(settings: dict[str, Any]) -> int:
    """Bytes of the largest weight of a model from a config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("architecture"), **settings))
    return max(parameter.nbytes for parameter in model.parameters())


def largest_stored(folder: Path) -> int:
    """Bytes of the largest tensor on disk."""
    from safetensors import safe_open

    sizes = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            sizes += [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
    return max(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--drawn", action="store_true")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(*arguments.rank)
    results = []
    head = ("model", "shard", "peak", "bound", "full")
    print(f"{'MiB':16} {'ranks':>5} {' '.join(f'{name:>8}' for name in head)} peak/bound")
    for kind in MODELS:
        with TemporaryDirectory() as folder:
            if arguments.drawn:
                both = [
                    {"architecture": kind.split()[0], **model_config(kind, size)} for size in (arguments.hidden, 64)
                ]
                largest, (path, tiny) = largest_weight(both[0]), map(json.dumps, both)
            else:
                path, tiny = f"{folder}/model", f"{folder}/tiny"
                write(kind, arguments.hidden, Path(path))
                write(kind, 64, Path(tiny))
                largest = largest_stored(Path(path))
            for world_size in arguments.ranks:
                rows = measure(path, tiny, world_size, "sharded")
                last = world_size == max(arguments.ranks)
                full = max(row["peak"] for row in measure(path, tiny, world_size, "full")) if last else None
                for row in rows:
                    row["bound"] = int(MOST * row["shard"] + largest)
                row = max(rows, key=lambda row: row["peak"] / row["bound"])
                results.append({"model_name": kind, "ranks": world_size, "largest": largest, "full": full, **row})
                sizes = {**row, "full": full}
                shown = (f"{sizes[key] / MIB:8.1f}" if sizes[key] else " " * 8 for key in head)
                print(f"{kind:16} {world_size:5} {' '.join(shown)} {row['peak'] / row['bound']:10.2f}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    file = RESULTS.with_stem("import_memory_drawn") if arguments.drawn else RESULTS
    file.write_text(json.dumps({"hidden": arguments.hidden, "rows": results}, indent=2) + "\n", encoding="utf-8")
    return int(any(row["peak"] > row["bound"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
