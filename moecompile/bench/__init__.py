"""Measures a compiled model: each distinct MoE layer against a dense FFN, and whole optimizer steps on all ranks."""

from moecompile.bench.layers import LayerCost, measure_layers
from moecompile.bench.measure import Times, kept_bytes
from moecompile.bench.steps import StepCost, measure_steps

__all__ = ["LayerCost", "StepCost", "Times", "kept_bytes", "measure_layers", "measure_steps"]
