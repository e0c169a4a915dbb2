"""Verifies that N ranks compute the same as one process."""

from moecompile.verify.certificate import Certificate, Finding, Parallel, certify
from moecompile.verify.checks import Check, compare, relative_error, worst
from moecompile.verify.whole_run import certify_config

__all__ = [
    "Certificate",
    "Check",
    "Finding",
    "Parallel",
    "certify",
    "certify_config",
    "compare",
    "relative_error",
    "worst",
]
