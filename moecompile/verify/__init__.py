"""Verifies that N ranks compute the same as one process."""

from moecompile.verify.certify import certify
from moecompile.verify.checks import Check, compare, relative_error, worst

__all__ = ["Check", "certify", "compare", "relative_error", "worst"]
