"""Proof that ranks compute what one process computes."""

from moecompile.verify.compare import relative_error, worst

__all__ = ["relative_error", "worst"]
