"""One recorded forward -> dataflow; the regions that are needed -> GraphModules."""

from moecompile.capture.record import Example, ModuleCall, Recording, call_with, in_mode, record
from moecompile.capture.regions import trace_region

__all__ = ["Example", "ModuleCall", "Recording", "call_with", "in_mode", "record", "trace_region"]
