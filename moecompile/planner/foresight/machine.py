"""A machine and a software stack from the config groups `hardware` and `stack`."""

from __future__ import annotations

from typing import TypeVar

from moecompile.errors import ConfigError
from moecompile.planner.foresight.layout import Host, Machine, Software
from moecompile.schema import (
    NUMBERS,
    ContentionConfig,
    FigureConfig,
    HardwareConfig,
    HostConfig,
    MessageConfig,
    RateConfig,
    StackConfig,
)

GIB = 2**30
Row = TypeVar("Row", RateConfig, ContentionConfig, MessageConfig)


def machine_of(hardware: HardwareConfig) -> Machine:
    """The machine.

    Raises:
        ConfigError: a figure is missing, not positive, or above the data sheet's.
    """
    figures = hardware.figures

    def figure(name: str) -> float:
        return number(f"hardware.figures.{name}", getattr(figures, name))

    for effective, sheet in (
        ("memory_effective_tb_s", "memory_tb_s"),
        ("intra_node_effective_gb_s", "intra_node_gb_s"),
        ("inter_node_effective_gb_s", "inter_node_gb_s"),
    ):
        if figure(effective) > figure(sheet):
            raise ConfigError(
                f"hardware.figures.{effective}.value", figure(effective),
                f"is above the data sheet's hardware.figures.{sheet}.value={figure(sheet):g}", "Correct one of them",
            )  # fmt: skip
    return Machine(
        name=hardware.name,
        peak={bits: figure(name) * 1e12 for bits, name in PEAKS.items()},
        watts=figure("watts"),
        memory=figure("memory_tb_s") * 1e12,
        passes=figure("memory_effective_tb_s") * 1e12,
        intra=hardware.intra_node_gb_s * 1e9,
        inter=hardware.inter_node_gb_s * 1e9,
        latency=figure("latency_us") * 1e-6,
        domain=round(figure("link_domain")),
        units=round(figure("compute_units")),
        capacity=hardware.memory_gib * GIB,
        host=None if hardware.host.cores is None else host_of(hardware.host),
    )


def host_of(host: HostConfig) -> Host:
    """The ranks of a CPU.

    Raises:
        ConfigError: a figure is missing, or a table is not one of positive numbers with rising first ones.
    """
    figures = {name: number(f"hardware.host.{name}", getattr(host, name)) for name in _HOST_FIGURES}
    return Host(
        cores=host.cores or 1,
        products=tuple((each.rows, 1e9 * each.gflops) for each in _rows("products", host.products)),
        grouped=tuple((each.rows, 1e9 * each.gflops) for each in _rows("grouped", host.grouped)),
        contention=tuple((each.ranks, each.factor) for each in _rows("contention", host.contention)),
        messages=tuple(
            (each.ranks, 1e-6 * each.fixed_us, 1e-9 * each.byte_ns)
            for each in _rows("messages", host.messages, least=0)
        ),
        attention=1e9 * figures["attention_gflops"],
        passes=1e9 * figures["pass_gb_s"],
        node=1e-6 * figures["node_us"],
        optimizer=1e-9 * figures["optimizer_ns"],
    )


_HOST_FIGURES = ("attention_gflops", "pass_gb_s", "node_us", "optimizer_ns")


def _rows(name: str, rows: list[Row], least: int = 1) -> list[Row]:
    """A table, checked."""
    values = [list(vars(row).values()) for row in rows]
    first = [row[0] for row in values]
    if len(rows) < least or any(min(row) <= 0 for row in values) or first != sorted(set(first)):
        raise ConfigError(
            f"hardware.host.{name}", values, "needs rows of positive numbers, with rising first ones",
            "Measure it with task=bench",
        )  # fmt: skip
    return rows


PEAKS = {32: "fp32_tflops", 16: "bf16_tflops", 8: "fp8_tflops", 4: "fp4_tflops"}


def number(path: str, figure: FigureConfig) -> float:
    """The value of a figure.

    Raises:
        ConfigError: it is missing or out of range.
    """
    if figure.value is None:
        raise ConfigError(
            f"{path}.value", None, "is needed to predict the time of a step", "Give the number and its source"
        )
    NUMBERS[f"{path}.value"].check(f"{path}.value", figure.value)
    return float(figure.value)


def software_of(
    stack: StackConfig, *, bits: int = 16, dispatcher: str = "alltoall", recompute: tuple[str, ...] = ()
) -> Software:
    """The software.

    Args:
        bits, dispatcher, recompute: what holds where the stack leaves it open.

    Raises:
        ConfigError: a word is not known, or a share is out of range.
    """
    return Software(
        bits=stack.bits or bits,
        dispatcher=stack.dispatcher or dispatcher,
        overlap=stack.overlap,
        schedule=stack.schedule.value,
        graph=tuple(stack.graph),
        fused=stack.fused,
        recompute=recompute if stack.recompute is None else tuple(stack.recompute),
        comm_units=round(stack.comm_units.value or 0),
        row_bits=stack.row_bits,
        grad_bits=stack.grad_bits,
        moment_bits=stack.moment_bits,
        wire_share=number("stack.wire_share", stack.wire_share),
    )
