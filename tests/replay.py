"""Plans and graphs of configs that differ in one thing each, as they were and as they are.

`tests/golden/replay.txt` has two hashes for each config, of its plan and of all of its final graphs. `make bless` renews
them. `python tests/replay.py --against REV` shows what differs, line by line, from another commit of this repository.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

_DENSE = [
    "model=llama_nano", "experts=dense_copy", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.intermediate_size=80", "model.config.num_attention_heads=4", "model.config.num_key_value_heads=2",
    "data.vocab_size=260", "data.seq_len=8", "experts.num_routed=8", "routing.top_k=2", "mesh=cpu_2x2",
]  # fmt: skip
"""An upcycled Llama; each line below changes it."""
_SHARED = "experts=deepseek_moe experts.num_routed=16 routing.top_k=4"
_UPCYCLED = {
    "as it is": "",
    "one rank": "mesh=cpu_1",
    "two ranks": "mesh=cpu_1x2",
    "ep 2, edp 2": "mesh.ep=2",
    "ep 1": "mesh.ep=1",
    "hybrid": "mesh.ep=2 mesh.dp_replicate=2",
    "tensor parallel": "mesh=cpu_1x4 mesh.tp=2 mesh.ep=2",
    "tensor parallel in experts' groups": "mesh=cpu_1x4 mesh.tp=2 mesh.ep=4",
    "context parallel": "mesh=cpu_1x4 mesh.cp=2 mesh.ep=4",
    "planned for 16 GPUs": "mesh=h100_2x8 mesh.ep=8",
    **{f"{kind} on one node": f"mesh=cpu_1x4 dispatch={kind}" for kind in ("flat", "dedup", "allgather")},
    **{f"{kind} on two nodes": f"dispatch={kind}" for kind in ("flat", "dedup", "hierarchical", "allgather")},
    **{
        f"{kind}, {overlap} in flight": f"dispatch={kind} dispatch.overlap={overlap}{more}"
        for kind in ("flat", "dedup", "hierarchical")
        for overlap, more in (("shared", f" {_SHARED}"), ("chunks", " dispatch.chunks=3"))
    },
    **{f"{kind} lends": f"dispatch={kind} dispatch.balance=lend dispatch.slots=2" for kind in ("flat", "dedup")},
    "lends in chunks": "dispatch.kind=hierarchical dispatch.balance=lend dispatch.slots=1 dispatch.overlap=chunks",
    "fp32 on the wire": "dispatch.wire_dtype=fp32",
    "bf16 on the wire": "dispatch.wire_dtype=bf16",
    "bf16_mixed": "trainer.precision=bf16_mixed",
    "bf16_params": "trainer.precision=bf16_params",
    "exchanges kept": "trainer.checkpointing=keep_exchanges",
    "full recomputation": "trainer.checkpointing=full",
    "muon": "optimizer=muon",
    "fine-grained": "experts=fine_grained experts.num_routed=16 routing.top_k=4",
    "shared experts": _SHARED,
    "latent": "experts.latent_size=16",
    "random": "experts.init=random",
    "dropped": "experts.init=drop",
    **{f"score {score}": f"routing.score={score}" for score in (
        "sigmoid", "softmax_after_topk", "sqrt_softplus", "sigmoid_after_topk")},
    "groups": "routing.groups=4 routing.top_groups=2",
    "nodes": "routing.max_nodes=1",
    "normalized": "routing.normalize=true",
    "expert choice": "routing=expert_choice routing.allow_future=true",
    "hash": "routing.choice=hash",
    "capacity": "routing.capacity_factor=1.25 routing.drop=score",
    "jitter": "routing.jitter=0.01",
    "norm and scale": "routing.norm=true routing.expert_scale=true",
    "zipf": "routing.workload=zipf",
    **{f"balance {rule}": f"balance={rule}" for rule in ("aux", "bias", "quantile", "global_batch", "deepseek_v3")},
    "padding": "data.mask_padding=always",
}  # fmt: skip
_EXISTING = {
    **dict.fromkeys(("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe", "switch_transformers"), "mesh=cpu_2x2"),
    "mixtral on one rank": "mesh=cpu_1",
    "qwen3_moe in chunks": "mesh=cpu_1x2 dispatch.overlap=chunks",
    "gpt_oss with adapters": "mesh=cpu_1x2 adapters=lora",
}
"""Models that are MoE already (tests/existing_models.py)."""


def texts() -> Iterator[tuple[str, str, str]]:
    """(name of a config, its plan, its final graphs)."""
    import torch

    from moecompile.compose import compose_config
    from moecompile.models.build import build_model, example_inputs
    from moecompile.pipeline import compile_with_report
    from moecompile.plan import to_yaml
    from moecompile.report.graphs import graph_summary
    from tests.existing_models import moe_inputs, moe_model

    def shown(model: torch.nn.Module, words: list[str], example: object) -> tuple[str, str]:
        compiled = compile_with_report(model, compose_config(words), example=example)  # type: ignore[arg-type]
        final = compiled.graphs["fused" if "fused" in compiled.graphs else "lowered"]
        return to_yaml(compiled.plan), "\n".join(f"# {fqn}\n{graph_summary(graph)}" for fqn, graph in final.items())

    for name, words in _UPCYCLED.items():
        config = compose_config([*_DENSE, *words.split()])
        model = build_model(config.model, config.seed)
        yield name, *shown(model, [*_DENSE, *words.split()], example_inputs(model, config.data.seq_len))
    ids = torch.arange(1, 15).view(2, 7)
    for name, words in _EXISTING.items():
        family = name.split()[0]
        yield name, *shown(moe_model(family), words.split(), moe_inputs(family, ids))


def table() -> str:
    """A line for each config: hashes of plan and graphs."""
    rows = [(name, *(hashlib.sha256(text.encode()).hexdigest()[:12] for text in both)) for name, *both in texts()]
    return "".join(f"{plan}  {graphs}  {name}\n" for name, plan, graphs in rows)


def write(folder: Path) -> None:
    """The texts themselves, a folder for each config."""
    for name, plan, graphs in texts():
        (folder / name).mkdir(parents=True)
        (folder / name / "plan.yaml").write_text(plan, encoding="utf-8")
        (folder / name / "graphs.txt").write_text(graphs, encoding="utf-8")


def difference(before: Path, after: Path) -> str:
    """A unified diff of two folders that `write` has filled."""
    names = sorted({path.relative_to(root) for root in (before, after) for path in root.rglob("*.*")})
    lines: list[str] = []
    for name in names:
        old, new = (
            (root / name).read_text().splitlines() if (root / name).exists() else [] for root in (before, after)
        )
        lines += difflib.unified_diff(old, new, f"before/{name}", f"after/{name}", lineterm="")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """0: nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    told = parser.parse_args(words)
    if told.write is not None:
        write(told.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", root / "tree", told.against], check=True)
        try:
            shutil.copy(__file__, root / "tree" / "tests" / "replay.py")  # these configs, and as that commit makes them
            for name, tree in (("before", root / "tree"), ("after", REPOSITORY)):
                command = [sys.executable, "tests/replay.py", "--write", root / name]
                subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", root / "tree"], check=True)
        text = difference(root / "before", root / "after")
    print(text or "nothing differs")
    return int(bool(text))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
