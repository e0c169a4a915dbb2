"""Checkpoints: whole or not there."""

from moecompile.checkpoint.atomic import whole_folder

__all__ = ["whole_folder"]
