"""Exports a trained model as the Hugging Face family that computes the same function, or in our own format."""

from moecompile.export.adapters import load_adapters, with_adapters
from moecompile.export.beside import carry, compare
from moecompile.export.families import FAMILIES, pairs, refuse_drops
from moecompile.export.huggingface import find_target, reload, write, write_tokenizer
from moecompile.export.run import PLAN, Run, averaged, find_run, load_exported, load_run, reload_by_rows, write_native

__all__ = [
    "FAMILIES",
    "PLAN",
    "Run",
    "averaged",
    "carry",
    "compare",
    "find_run",
    "find_target",
    "load_adapters",
    "load_exported",
    "load_run",
    "pairs",
    "refuse_drops",
    "reload",
    "reload_by_rows",
    "with_adapters",
    "write",
    "write_native",
    "write_tokenizer",
]
