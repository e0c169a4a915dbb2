"""Our own format: safetensors with our own names, together with the config and the plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType

from safetensors.torch import save_file
from torch import Tensor, nn

from moecompile import plan as plans
from moecompile.checkpoint.folders import seal
from moecompile.compose import RESOLVED, save_resolved
from moecompile.export.run import PLAN, Run, find_run, load_run
from moecompile.named_code import Named

_FILE_BYTES = 4 * 2**30


def write_native(model: nn.Module, run: Run, folder: Path) -> None:
    """Writes `resolved.yaml`, `plan.yaml` and `model-*.safetensors`, each of at most 4 GiB or one tensor."""
    save_resolved(run.config, folder / RESOLVED)
    plans.save(run.plan, folder / PLAN)
    files = _files(dict(model.state_dict()))
    index: dict[str, str] = {}
    for i, tensors in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        # safetensors refuses tied weights, which share memory, so each name gets its own tensor in the file.
        save_file({key: _own(key, tensor, tensors) for key, tensor in tensors.items()}, folder / name)
        index |= dict.fromkeys(tensors, name)
    body = json.dumps({"weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(body + "\n", encoding="utf-8")
    seal(folder)


def load_exported(path: str | Path, *, named: Named = MappingProxyType({})) -> nn.Module:
    """The model of a native export, or of a run directory's latest checkpoint, on one device in evaluation mode.

    Args:
        named: for a model that a function has made, the function: `{"model.factory": "package.module:function"}`. The
            folder does not choose it.

    Raises:
        ConfigError: the folder is incomplete, or names a function that is not in `named`.
        PlanError: so is the plan in it.
    """
    return load_run(find_run(str(path), None, named=named))


def _files(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if files[-1] and size + tensor.nbytes > _FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    return files


def _own(name: str, tensor: Tensor, others: dict[str, Tensor]) -> Tensor:
    first = next(key for key, other in others.items() if other.data_ptr() == tensor.data_ptr())
    return tensor.contiguous() if first == name else tensor.clone()
