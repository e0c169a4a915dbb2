"""A routing option is declared in the schema and in `RouterConfig`, computed with in the router, and copied nowhere.

Every file of the package is read, and those that mention an option are added up: as a field, an attribute of a router's
noun, a keyword of one that is made, a dotted key, or a name in a list of options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from moecompile.schema import RoutingConfig

PACKAGE = Path(__file__).parents[2] / "moecompile"
OPTIONS = [field.name for field in fields(RoutingConfig)]
MOST = 4
NOUNS = {"RoutingConfig", "RouterConfig", "RoutingPlan", "Router"}
CALLED = {"routing", "router"}  # names that hold such a noun

# These do not hand an option on: it decides what they compute, refuse or say, and there is no other place for that.
READERS = {
    "nn/chosen.py": "groups that are open to a token, and the router in one line",
    "passes/rewrite.py": "whether a router needs token ids",
    "planner/traffic.py": "rows and bytes follow from choice, top-k, groups and capacity",
    "planner/memory.py": "rows that are kept follow from top-k",
    "planner/params.py": "parameters that a token uses, and the router's bias",
    "planner/lending.py": "rows that a loan may move follow from top-k",
    "planner/existing.py": "holds a config against experts and a router that a model has already",
    "match/sites.py": "the score of a router that a model has already, as it was found",
    "passes/rewrite_experts.py": "the capacity behind a router that a model has already",
    "passes/receipt.py": "whether step 0 equals the model with its own experts",
    "passes/agreement.py": "how many roundings a token sees, and the factor of scaled copies",
    "plan/layers.py": "what is known of a router that a model has already, and what experts without weights do not go with",
    "passes/scaling.py": "what the weights of a token sum to",
    "passes/upcycle.py": "whether step 0 equals the dense model",
    "export/families.py": "a model in the terms of transformers' families, keys of their configs, and which compute the same",
    "checkpoint/fingerprint.py": "what a checkpoint compares, and what may differ: every key is in one of the lists",
    "checkpoint/resume.py": "groups are the model's, not the new mesh's",
    "schema/validation.py": "what a shared expert that the router weighs needs",
    "tasks/verify.py": "a smaller mesh for the same recipe",
    "bench/layers.py": "sizes of a layer that is timed",
    "plan/plan.py": "a layer in one line",
    "report/plan_tables.py": "a layer in a table",
    "report/warnings.py": "what could even the load of a layer",
    "planner/build_plan.py": "expert choice in a causal model",
    "planner/context_parallel.py": "what counts, or draws numbers for, the tokens of a micro-batch is refused",
    "planner/given.py": "holds a config against a plan that is given",
    "planner/placement.py": "groups of experts stay on one node",
    "planner/search/axes.py": "what would change the model is not searched",
    "planner/search/run.py": "sets the axis of node limits",
    "runtime/rehearsal.py": "rows that a rank has follow from choice, capacity and identities",
    "plan/sites.py": "a site that has experts already, as it was found",
    "runtime/training.py": "whether dropped tokens are shown",
    "verify/job.py": "runs without jitter",
    "ops/__init__.py": "names of its modules",
}


@cache
def mentions() -> dict[str, set[str]]:
    """Option -> files."""
    found: dict[str, set[str]] = {name: set() for name in OPTIONS}
    for path in PACKAGE.rglob("*.py"):
        for name in _mentioned(ast.parse(path.read_text(encoding="utf-8"))):
            if name in found:
                found[name].add(str(path.relative_to(PACKAGE)))
    return found


def _mentioned(tree: ast.Module) -> Iterator[str]:
    held = CALLED | set(_aliases(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _last(node.value) in held:
            yield node.attr
        elif isinstance(node, ast.ClassDef) and node.name in NOUNS:
            yield from _declared(node)
        elif isinstance(node, ast.Call) and (_last(node.func) in NOUNS or _is_replaced(node, held)):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("routing."):
            yield node.value.removeprefix("routing.")
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            names = [part.value for part in _parts(node) if isinstance(part, ast.Constant) and part.value in OPTIONS]
            yield from names if len(names) > 1 else ()


def _is_replaced(node: ast.Call, held: set[str]) -> bool:
    return _last(node.func) == "replace" and bool(node.args) and _last(node.args[0]) in held


def _parts(node: ast.Tuple | ast.List | ast.Set | ast.Dict) -> list[ast.expr | None]:
    return list(node.keys) if isinstance(node, ast.Dict) else list(node.elts)


def _declared(node: ast.ClassDef) -> Iterator[str]:
    """Fields, parameters of the constructor, and what a method reads of the class itself or of its `config`."""
    for part in ast.walk(node):
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id
        elif isinstance(part, ast.arg):
            yield part.arg
        elif isinstance(part, ast.Attribute) and _last(part.value) in ("self", "config"):
            yield part.attr


def _aliases(tree: ast.Module) -> Iterator[str]:
    """Names that are annotated as a noun, or assigned from an attribute that is called like one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and _last(node.annotation) in NOUNS:
            yield node.arg
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            targets, values = ([p.elts if isinstance(p, ast.Tuple) else [p]][0] for p in (node.targets[0], node.value))
            for target, value in zip(targets, values, strict=False):
                if isinstance(target, ast.Name) and isinstance(value, ast.Attribute) and value.attr in CALLED:
                    yield target.id


def _last(node: ast.expr | None) -> str:
    """`c` of `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_crosses_few_files(option: str) -> None:
    files = mentions()[option]
    assert "schema/config.py" in files
    assert len(files - READERS.keys()) <= MOST, f"{option}: {sorted(files - READERS.keys())}"


def test_every_reader_reads() -> None:
    assert READERS.keys() <= set().union(*mentions().values())
