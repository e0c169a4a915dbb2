"""task=export: exports a trained model, loads the export again, and compares their logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor, nn

from moecompile.atomic import UNWRITABLE, creating
from moecompile.errors import ConfigError, VerificationFailed
from moecompile.export import (
    Run,
    averaged,
    carry,
    compare,
    find_run,
    find_target,
    load_adapters,
    load_run,
    refuse_drops,
    reload,
    reload_by_rows,
    with_adapters,
    write,
    write_native,
    write_tokenizer,
)
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.models.source import source_model
from moecompile.named_code import named_in
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.schema import AdapterExport, Config, ExportFormat, TokenizerSource


def run(config: Config, run_dir: Path) -> None:
    """Writes the folder `export.path` and `result.json`; if the comparison fails, the folder is removed.

    Raises:
        ConfigError: there is nothing to export, no transformers family computes the same, or `export.path` exists.
        VerificationFailed: the logits of the exported model differ.
    """
    export = config.export
    trained = averaged(find_run(export.run, export.checkpoint, named=named_in(config)), export.average)
    path = Path(export.path) if export.path else run_dir / "model"
    if path.exists():
        raise ConfigError("export.path", path, "is there already", "Give a new folder, or remove it")
    with _new_folder(path) as folder:
        architecture, diff = _export(trained, config, folder)
    accept(run_dir)
    fields = {
        "path": str(path), "architecture": architecture, "format": export.format.value, "max_abs_diff": diff,
        "checkpoint": str(trained.checkpoint), "averaged_with": [str(each) for each in trained.before],
        "plan_hash": trained.plan.hash,
    }  # fmt: skip
    write_result(run_dir, "export", trained.config.name, fields)
    console = Console(soft_wrap=True)
    mean = f"mean of {', '.join(each.name for each in trained.before)} and " if trained.before else ""
    console.print(f"{trained.config.name}  {mean}{trained.checkpoint} -> {path}")
    what = "the mean" if trained.before else "the trained model"
    console.print(f"{architecture}, loaded again: logits equal those of {what} within {diff:.1e}")


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """`atomic.creating`, in which an error of the file system is one of `export.path`.

    Raises:
        ConfigError: nothing, or not all of it, can be written there.
    """
    try:
        with creating(path) as folder:
            yield folder
    except (OSError, SafetensorError) as error:  # the latter has no errno, and says the same
        if isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            "export.path", path, f"cannot be written: {reason}", "Give a folder that can, on a disk with room for it"
        ) from error


def _export(trained: Run, config: Config, folder: Path) -> tuple[str, float]:
    """Returns class name and largest difference of logits."""
    model = load_run(trained, tables=folder)
    _check_adapters(trained, config)
    if trained.plan.adapters is not None and config.export.format is ExportFormat.huggingface:
        return _export_adapters(model, trained, config, folder)
    if config.export.format is ExportFormat.native:
        write_native(model, trained, folder)
        architecture = type(model).__name__
    else:
        architecture = write(model, find_target(model, trained.plan, config.export.family), folder)
    _write_beside(trained, folder, is_compared=config.export.format is ExportFormat.huggingface)
    example = example_inputs(model, trained.config.data.seq_len)
    expected = _logits(model.float(), example)
    del model  # before the second one is loaded
    is_native = config.export.format is ExportFormat.native
    if is_native:
        again = load_run(find_run(str(folder), None, named=named_in(trained.config)), tables=folder)
    else:
        again = reload_by_rows(trained, folder) if trained.plan.lookups else reload(folder)
    return architecture, _difference(architecture, again, example, expected, trained, config)


def _difference(
    what: str, again: nn.Module, example: dict[str, Tensor], expected: Tensor, trained: Run, config: Config
) -> float:
    """Largest difference between the logits of the model that was loaded again and the expected ones.

    Raises:
        VerificationFailed: it is too large.
    """
    diff = float((_logits(again.float(), example) - expected).abs().max())
    if not diff <= config.export.tolerance:  # NaN fails too
        check = f"logits differ by {diff:.1e}, more than export.tolerance={config.export.tolerance:.0e}"
        raise VerificationFailed(f"{what}, exported from {trained.checkpoint} and loaded again,", [check])
    return diff


def _export_adapters(model: nn.Module, trained: Run, config: Config, folder: Path) -> tuple[str, float]:
    """The adapters of a run in peft's format, or merged into the model."""
    refuse_drops(trained.plan, config.export.family)
    example = example_inputs(model, trained.config.data.seq_len)
    is_merged = config.export.adapters is AdapterExport.merged
    adapted = with_adapters(source_model(trained.config), model, trained.plan, alone=not is_merged)
    expected = _logits(model.float(), example)
    if is_merged:
        merged = adapted.merge_and_unload()
        target = find_target(merged, trained.plan, config.export.family)
        architecture = f"{write(merged, target, folder)} with merged adapters"
        del model, adapted, merged
        _write_beside(trained, folder, is_compared=True)
        again = reload(folder)
    else:
        architecture = f"adapters of {type(adapted.get_base_model()).__name__}, in the format of peft"
        adapted.save_pretrained(str(folder))
        del model, adapted
        _write_beside(trained, folder, is_compared=False)  # there is no model of which a config could be compared
        again = load_adapters(source_model(trained.config), folder)
    return architecture, _difference(architecture, again, example, expected, trained, config)


def _check_adapters(trained: Run, config: Config) -> None:
    export, has_adapters = config.export, trained.plan.adapters is not None
    separate = export.adapters is AdapterExport.separate
    if not has_adapters and not separate:
        raise ConfigError("export.adapters", "merged", "the run was trained without adapters", "Leave it out")
    if export.format is ExportFormat.native and not separate:
        rule = "is for export.format=huggingface; the native format keeps adapters as they were trained"
        raise ConfigError("export.adapters", "merged", rule, "Leave one of them out")
    if has_adapters and separate and export.family is not None:
        rule = "has no meaning for adapters alone, which are those of the model that was trained"
        raise ConfigError("export.family", export.family, rule, "Leave it out, or use export.adapters=merged")


def _write_beside(trained: Run, folder: Path, *, is_compared: bool) -> None:
    """Writes the tokenizer, and what the folder of the pretrained model holds besides weights."""
    original, is_own = pretrained_folder(trained.config.model), trained.config.data.tokenizer is TokenizerSource.model
    if trained.tokenizer is not None:
        write_tokenizer(trained.tokenizer, folder, original if is_own else None)
    if original is not None:
        carry(original, folder, tokenizer=is_own)
        if is_compared:
            compare(original, folder, tokenizer=is_own)


@torch.no_grad()
def _logits(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model.eval()(**example, use_cache=False).logits
    return logits
