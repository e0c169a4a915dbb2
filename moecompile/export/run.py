"""A trained run: its config, plan and the weights of a checkpoint, in one process; and our own format for it.

The format is safetensors with our own names, together with the config and the plan.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moecompile import plan as plans
from moecompile.checkpoint.folders import seal, step_folder, steps
from moecompile.checkpoint.tensors import latest_checkpoint, load_mean
from moecompile.compose import RESOLVED, load_resolved, save_resolved
from moecompile.errors import ConfigError
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.models.recorded import NotRecorded
from moecompile.models.sharded import ShardedImport
from moecompile.models.source import source_structure
from moecompile.named_code import FACTORY, PLUGINS, Named, load_plugins
from moecompile.pipeline import compile_with_report
from moecompile.plan import Plan
from moecompile.schema import Config, ExpertInit, ModelAttention, ModelConfig, ModelDevice

PLAN, TOKENIZER = "plan.yaml", "tokenizer.json"


@dataclass(frozen=True)
class Run:
    """folder: the run directory. checkpoint: the folder with the weights. before: those to take the mean with."""

    folder: Path
    checkpoint: Path
    config: Config
    plan: Plan
    before: tuple[Path, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the run trained, or that of the pretrained model."""
        beside = pretrained_folder(self.config.model)
        folders = [self.folder] if beside is None else [self.folder, beside]
        return next((path for folder in folders if (path := folder / TOKENIZER).is_file()), None)


def find_run(
    run: str | None, checkpoint: str | None, *, named: Named = MappingProxyType({}), key: str = "export.run"
) -> Run:  # fmt: skip
    """The run with a checkpoint, by default its latest. If only a checkpoint is given, its run is two levels above it.

    Args:
        named: the code that the caller names. Back ends are not among it: the run is loaded without them.
        key: the config path that names the run, for messages.

    Raises:
        ConfigError: a folder without config, plan or checkpoint, or code that only its config names.
    """
    folder = Path(run) if run is not None else Path(str(checkpoint)).resolve().parents[1]
    path, value = (key, run) if run is not None else ("export.checkpoint", checkpoint)
    for name in (RESOLVED, PLAN):
        if not (folder / name).is_file():
            raise ConfigError(path, value, f"{folder} has no {name}", "Name the run directory of task=train")
    weights = Path(checkpoint) if checkpoint is not None else latest_checkpoint(folder)
    if not weights.is_dir():
        raise ConfigError("export.checkpoint", weights, "is not a folder", "Name one of the run's checkpoints")
    config = load_resolved(folder / RESOLVED, named=named, runs=(FACTORY, PLUGINS), given_as=(path, value))
    load_plugins(config.plugins)
    config.model.device = ModelDevice.cpu  # one process has no shards to fill
    return Run(folder, weights, config, plans.read(folder / PLAN))


def averaged(run: Run, number: int) -> Run:
    """The run with the mean of its checkpoint and those before it, `number` in all.

    Raises:
        ConfigError: there are fewer, or the mean would not be that of what was trained.
    """
    if number == 1:
        return run
    if run.plan.adapters is not None:
        rule = "of A and of B, the two weights of an adapter, is not that of their products"
        raise ConfigError("export.average", number, f"the mean {rule}", "Leave it out, or train without adapters")
    if run.plan.lookups:
        rule = "would need the tables whole in memory, whose rows were spread over ranks"
        raise ConfigError("export.average", number, rule, "Leave it out")
    folder = run.checkpoint.resolve()
    known = [step_folder(folder.parent, step) for step in steps(folder.parent)]
    before = known[: known.index(folder)] if folder in known else []
    if len(before) < number - 1:
        raise ConfigError(
            "export.average", number, f"{run.checkpoint} and what is before it are {len(before) + 1} checkpoints",
            "Use fewer; trainer.save_interval and trainer.keep_last decide how many there are",
        )  # fmt: skip
    return replace(run, before=tuple(before[-number + 1 :]))


def load_run(run: Run, tables: Path | None = None) -> nn.Module:
    """The model on one device, in evaluation mode, rewritten by the run's plan and filled from its checkpoint.

    Args:
        tables: a folder on a disk, where tables lie whose rows were spread: they need not fit into memory. No file is
            left there.

    Raises:
        ConfigError, PlanError: config, plan and checkpoint do not belong together.
    """
    here = replace(run.config.model, attention=ModelAttention.auto)  # that of the run may need its GPU
    run = replace(run, config=replace(run.config, model=here))
    model = source_structure(run.config) if tables is None or not run.plan.lookups else _on_disk(run, tables)
    example = example_inputs(model, run.config.data.seq_len)
    model = compile_with_report(model, run.config, example=example, plan=run.plan, until="rewrite").model
    load_mean([*run.before, run.checkpoint], model.state_dict())
    return model.eval()


def _on_disk(run: Run, folder: Path) -> nn.Module:
    """The model before the rewrite, with its tables in files."""
    if run.config.experts.init is ExpertInit.widen:  # by copies of whole weights
        return source_structure(run.config)
    try:
        importing = ShardedImport(run.config)
    except (ConfigError, NotRecorded):  # it is built by code of its own, or with values
        return source_structure(run.config)
    return importing.stand_in(_tables_on_disk(importing.model, run, folder))


def reload_by_rows(run: Run, folder: Path) -> nn.Module:
    """An export in the format of transformers, with its tables in files: transformers has them whole in memory."""
    importing = ShardedImport(replace(run.config, model=ModelConfig(pretrained=str(folder))))
    return importing.whole(_tables_on_disk(importing.model, run, folder))


def _tables_on_disk(model: nn.Module, run: Run, folder: Path) -> dict[str, Tensor]:
    """Memory for the run's tables: zeros in files that are gone from `folder` already, and last as long as these.

    Raises:
        ConfigError: the disk has no room. It is taken now: a process that writes to a mapped file on a full disk is
            ended without a word.
    """
    found = dict[str, Tensor]()
    for lookup in run.plan.lookups:
        like, file = model.get_parameter(lookup.weight), folder / f"table_{len(found)}"
        try:
            with file.open("xb") as opened:
                os.posix_fallocate(opened.fileno(), 0, like.nbytes)
            flat = torch.from_file(str(file), shared=True, size=like.numel(), dtype=like.dtype)
        except OSError as error:
            rule = f"has no room for {lookup.weight}, {like.nbytes / 2**30:.1f} GiB beside the export: {error.strerror}"
            raise ConfigError("export.path", folder.parent, rule, "Give a folder on a larger disk") from error
        finally:
            file.unlink(missing_ok=True)
        found[lookup.weight] = flat.view(like.shape)
    return found


# -- our own format ----------------------------------------------------------------------------------------------------


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
        named: for a model that a function has made, the function: `{"model.factory": "package.module:function"}`; for a
            run with plugins, `{"plugins": ["package.module"]}`. The folder does not choose them.

    Raises:
        ConfigError: the folder is incomplete, or names code that is not in `named`.
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
