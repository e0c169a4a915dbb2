"""task=export: exports a trained model, loads the export again, and compares their logits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from moecompile.errors import ConfigError, VerificationFailed
from moecompile.export import (
    Run,
    carry,
    compare,
    find_run,
    find_target,
    load_exported,
    load_run,
    reload,
    write,
    write_native,
    write_tokenizer,
)
from moecompile.models.build import example_inputs, pretrained_folder
from moecompile.report.result import write_result
from moecompile.rundir import accept
from moecompile.schema import Config, ExportFormat, TokenizerSource


def run(config: Config, run_dir: Path) -> None:
    """Writes the folder `export.path` and `result.json`; if the comparison fails, the folder is removed.

    Raises:
        ConfigError: there is nothing to export, or no transformers family computes the same function.
        VerificationFailed: the logits of the exported model differ.
    """
    export = config.export
    trained = find_run(export.run, export.checkpoint)
    path = Path(export.path) if export.path else run_dir / "model"
    with _new_folder(path) as folder:
        architecture, diff = _export(trained, config, folder)
    accept(run_dir)
    fields = {
        "path": str(path), "architecture": architecture, "format": export.format.value, "max_abs_diff": diff,
        "checkpoint": str(trained.checkpoint), "plan_hash": trained.plan.hash,
    }  # fmt: skip
    write_result(run_dir, "export", trained.config.name, fields)
    console = Console(soft_wrap=True)
    console.print(f"{trained.config.name}  {trained.checkpoint} -> {path}")
    console.print(f"{architecture}, loaded again: logits equal those of the trained model within {diff:.1e}")


def _export(trained: Run, config: Config, folder: Path) -> tuple[str, float]:
    """Returns class name and largest difference of logits."""
    model = load_run(trained)
    if config.export.format is ExportFormat.native:
        write_native(model, trained, folder)
        architecture = type(model).__name__
    else:
        architecture = write(model, find_target(model, trained.plan, config.export.family), folder)
    original, is_own = pretrained_folder(trained.config.model), trained.config.data.tokenizer is TokenizerSource.model
    if trained.tokenizer is not None:
        write_tokenizer(trained.tokenizer, folder, original if is_own else None)
    if original is not None:
        carry(original, folder, tokenizer=is_own)
        if config.export.format is ExportFormat.huggingface:
            compare(original, folder, tokenizer=is_own)
    example = example_inputs(model, trained.config.data.seq_len)
    expected = _logits(model.float(), example)
    del model  # before the second one is loaded
    again = load_exported(folder) if config.export.format is ExportFormat.native else reload(folder)
    diff = float((_logits(again.float(), example) - expected).abs().max())
    if not diff <= config.export.tolerance:  # NaN fails too
        check = f"logits differ by {diff:.1e}, more than export.tolerance={config.export.tolerance:.0e}"
        raise VerificationFailed(f"{architecture}, exported from {trained.checkpoint} and loaded again,", [check])
    return architecture, diff


@torch.no_grad()
def _logits(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model.eval()(**example, use_cache=False).logits
    return logits


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` at the end; after an error it is removed.

    Raises:
        ConfigError: `path` exists.
    """
    if path.exists():
        raise ConfigError("export.path", path, "is there already", "Give a new folder, or remove it")
    tmp = path.with_name(path.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        tmp.rename(path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
