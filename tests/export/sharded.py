"""Runs on real ranks: a tiny trained model, sharded, saved by DCP as a run does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from moecompile import plan as plans
from moecompile.compose import save_resolved
from moecompile.models.build import build_model, example_inputs
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_with_report
from tests.export.runs import SEQ, scramble, tiny_config

RUNS: dict[str, tuple[str, list[str]]] = {
    "mixtral": ("llama", ["mesh=cpu_2x2", "mesh.ep=2"]),
    "deepseek": (
        "deepseek_v3",
        [
            "mesh=cpu_2x2", "experts.granularity=4", "experts.num_shared=1", "experts.num_routed=12",
            "experts.init=virtual_group", "experts.layers=1:", "routing=deepseek_v3", "routing.top_k=3",
            "routing.max_nodes=1", "balance=bias",
        ],
    ),
}  # fmt: skip


def save_runs(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    """Writes FOLDER/NAME of each run and returns the logits of its model, computed on these ranks."""
    logits = {}
    for name, (architecture, overrides) in RUNS.items():
        config, run = tiny_config(architecture, overrides), Path(folder, name)
        model = build_model(config.model, config.seed)
        example = example_inputs(model, SEQ)
        compiled = compile_with_report(model, config, example=example)
        scramble(compiled.model)
        if config.balance.rule.value in ("auto", "none"):
            for key, buffer in compiled.model.named_buffers():
                if key.endswith("correction_bias"):
                    buffer.zero_()
        shard(compiled.model, compiled.plan, device_mesh_of(compiled.plan.mesh, "cpu"))
        weights = compiled.model.state_dict()
        for step, changed in {2: torch.zeros_like, 3: torch.square, 5: torch.sin, 7: torch.clone}.items():
            checkpoint = run / "checkpoints" / f"step-{step}"
            saved = {f"model.{key}": changed(value) for key, value in weights.items()}
            dcp.save({"state_dict": saved}, checkpoint_id=checkpoint)
            if rank == 0:
                (checkpoint / "state.json").write_text("{}")  # what makes it whole
        if rank == 0:
            save_resolved(config, run / "resolved.yaml")
            plans.save(compiled.plan, run / "plan.yaml")
        logits[name] = compiled.model.eval()(**example, use_cache=False).logits.detach()
    return logits
