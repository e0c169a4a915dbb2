"""A model on several ranks: made in full and sharded, and made by shards; what differs. From a folder, or a config."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecompile.compose import compose_config
from moecompile.models.build import build_model, example_inputs
from moecompile.models.sharded import ShardedImport
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_with_report
from moecompile.schema import Config, ModelConfig, validate
from tests.export.runs import SEQ
from tests.forked import REPOSITORY

Source = str | dict[str, Any]
"""A folder, or settings of `model`."""


def import_config(source: Source, overrides: list[str]) -> Config:
    config = compose_config([*overrides, f"data.seq_len={SEQ}"])
    of_model: dict[str, Any] = {"pretrained": source} if isinstance(source, str) else source
    config.model = ModelConfig(name="tiny", **of_model)
    validate(config)
    return config


def compare(rank: int, world_size: int, cases: dict[str, tuple[Source, list[str]]]) -> dict[str, list[str]]:
    """case -> the tensors of this rank that are not equal bit for bit, and whether outputs are."""
    return {name: _differences(import_config(source, overrides)) for name, (source, overrides) in cases.items()}


def _differences(config: Config) -> list[str]:
    model = build_model(config.model, config.seed)
    full = compile_with_report(model, config, example=example_inputs(model, SEQ))
    mesh = device_mesh_of(full.plan.mesh, "cpu")
    shard(full.model, full.plan, mesh)

    importing = ShardedImport(config)
    parts = compile_with_report(importing.model, config, example=example_inputs(importing.model, SEQ))
    shard(parts.model, parts.plan, mesh)
    importing.fill(parts)

    expected, got = tensors(full.model), tensors(parts.model)
    wrong = [f"only on one side: {name}" for name in expected.keys() ^ got.keys()]
    wrong += [name for name in expected.keys() & got.keys() if not same(expected[name], got[name])]
    if parts.plan != full.plan:
        wrong.append("plans differ")
    ties = [[id(p) for _, p in m.named_parameters(remove_duplicate=False)] for m in (full.model, parts.model)]
    if len(set(ties[0])) != len(set(ties[1])):
        wrong.append("tied weights are not tied")
    example = example_inputs(model, SEQ)
    with torch.no_grad():
        outputs = [m.eval()(**example, use_cache=False).logits for m in (full.model, parts.model)]
    if not torch.equal(*outputs):
        wrong.append(f"logits differ by {(outputs[0] - outputs[1]).abs().max()}")
    return wrong


def memory(rank: int, world_size: int, source: str, tiny: str) -> dict[str, int]:
    """What a rank allocates to draw the weights of a model, bytes (benchmarks/import_memory.py). tiny: drawn before."""
    spec = importlib.util.spec_from_file_location("import_memory", REPOSITORY / "benchmarks" / "import_memory.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.one(tiny, world_size, "sharded")
    found: dict[str, int] = benchmark.one(source, world_size, "sharded")
    return found


def tensors(model: Any) -> dict[str, Tensor]:
    """All parameters and buffers, also those that no state dict holds."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def same(a: Tensor, b: Tensor) -> bool:
    if isinstance(a, DTensor) != isinstance(b, DTensor):
        return False
    if isinstance(a, DTensor) and isinstance(b, DTensor):
        return a.placements == b.placements and torch.equal(a.to_local(), b.to_local())
    return a.dtype == b.dtype and torch.equal(a, b)


def write_pretrained(folder: Path, model: Any) -> str:
    """What save_pretrained writes, in several files."""
    model.save_pretrained(folder, max_shard_size="40KB")
    return str(folder)
