"""One recorded forward -> dataflow; the regions that are needed -> GraphModules."""

from moecompile.capture.record import Example, ModuleCall, Recording, call_with, record
from moecompile.capture.regions import trace_region

__all__ = ["Example", "ModuleCall", "Recording", "call_with", "record", "trace_region"]
