"""One recorded forward -> dataflow; the regions that are needed -> GraphModules."""

from moecompile.capture.record import Example, ModuleCall, Recording, call_with, in_mode, is_meta, record
from moecompile.capture.regions import trace_again, trace_region

__all__ = [
    "Example",
    "ModuleCall",
    "Recording",
    "call_with",
    "in_mode",
    "is_meta",
    "record",
    "trace_again",
    "trace_region",
]
