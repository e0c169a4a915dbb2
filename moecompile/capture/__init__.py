"""Records one forward as a dataflow graph, and traces regions of the model to GraphModules."""

from moecompile.capture.keep import attributes_of, layers_of, replace_regions, shell_of, stand_in
from moecompile.capture.record import (
    Example,
    ModuleCall,
    Recording,
    call_with,
    calls_with_caches,
    in_mode,
    is_meta,
    record,
    seed_generators,
    undisturbed,
)
from moecompile.capture.regions import broken_rule, fresh_arguments, outputs_of, trace_again, trace_region

__all__ = [
    "Example",
    "ModuleCall",
    "Recording",
    "attributes_of",
    "broken_rule",
    "call_with",
    "calls_with_caches",
    "fresh_arguments",
    "in_mode",
    "is_meta",
    "layers_of",
    "outputs_of",
    "record",
    "replace_regions",
    "seed_generators",
    "shell_of",
    "stand_in",
    "trace_again",
    "trace_region",
    "undisturbed",
]
