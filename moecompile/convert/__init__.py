"""A trained model as the Hugging Face family that computes the same, or as it is."""

from moecompile.convert.beside import carry, compare
from moecompile.convert.families import FAMILIES, pairs
from moecompile.convert.huggingface import find_target, reload, write, write_tokenizer
from moecompile.convert.native import load_exported, write_native
from moecompile.convert.run import Run, find_run, load_run
from moecompile.convert.sharded import ShardedImport, loads_sharded

__all__ = [
    "FAMILIES",
    "Run",
    "ShardedImport",
    "carry",
    "compare",
    "find_run",
    "find_target",
    "load_exported",
    "load_run",
    "loads_sharded",
    "pairs",
    "reload",
    "write",
    "write_native",
    "write_tokenizer",
]
