"""Measures a compiled model: each distinct MoE layer against a dense FFN, and whole optimizer steps on all ranks."""

from moecompile.bench.layers import LayerCost, measure_layers
from moecompile.bench.machine import (
    NAME,
    SHORT,
    MachineCost,
    Sizes,
    calibrated,
    cpu_parts,
    hardware_config,
    hardware_of,
    host_before,
    measure_machine,
    sharded_seconds,
    with_messages,
    write_hardware,
)
from moecompile.bench.measure import Times, kept_bytes
from moecompile.bench.steps import StepCost, measure_steps

__all__ = [
    "NAME",
    "SHORT",
    "LayerCost",
    "MachineCost",
    "Sizes",
    "StepCost",
    "Times",
    "calibrated",
    "cpu_parts",
    "hardware_config",
    "hardware_of",
    "host_before",
    "kept_bytes",
    "measure_layers",
    "measure_machine",
    "measure_steps",
    "sharded_seconds",
    "with_messages",
    "write_hardware",
]
