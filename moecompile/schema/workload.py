"""The training step that task=plan plans: `workload` instead of `data`, where it says so."""

from __future__ import annotations

from dataclasses import replace

from moecompile.schema.config import Config, WorkloadConfig
from moecompile.schema.validation import SEARCHED, mesh_spec

_DATA = ("seq_len", "global_batch_size", "micro_batch_size")
FSDP = 3  # `workload.zero` of what this package runs
_DESCRIBED = ("tp", "pp", "cp", "etp", "vpp")


def with_workload(config: Config) -> tuple[Config, list[str]]:
    """The config whose `data` and `trainer.precision` are those of `workload`, and notes about it.

    Values of `data` and `trainer` that the caller gave win. Where a published batch is not a whole number of
    micro-batches on every rank, it is rounded up.
    """
    workload = config.workload
    values = {
        name: value
        for name in _DATA
        if (value := getattr(workload, name)) is not None and f"data.{name}" not in config.given
    }
    data, trainer, notes = replace(config.data, **values), config.trainer, list[str]()
    if workload.precision is not None and "trainer.precision" not in config.given:
        trainer = replace(trainer, precision=workload.precision)
    if values and not is_described(workload):
        step = (
            data.micro_batch_size * mesh_spec(replace(config.mesh, ep=SEARCHED)).num_batches
        )  # any EP size has as many
        whole = -(-data.global_batch_size // step) * step
        if whole != data.global_batch_size:
            notes.append(
                f"{data.global_batch_size:,} sequences are not a whole number of micro-batches on each rank; "
                f"{whole:,} are planned"
            )
            data = replace(data, global_batch_size=whole)
    return replace(config, data=data, trainer=trainer), notes


def is_described(workload: WorkloadConfig) -> bool:
    """Whether the step has axes, or layers, that this package's runtime does not run."""
    return workload.zero != FSDP or workload.mtp > 0 or any(getattr(workload, name) > 1 for name in _DESCRIBED)
