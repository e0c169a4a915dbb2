"""Every recipe's plan, and the first graph that it rewrites and lowers, as text: read the diff before you bless it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from moecompile.compose import compose_config, conf_dir
from moecompile.models.build import build_model, example_inputs
from moecompile.pipeline import Compilation, compile_with_report
from moecompile.plan import from_yaml, to_yaml
from moecompile.report.graphs import graph_summary
from tests.models.packaged import REAL

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml") if path.stem not in REAL)


@cache
def compiled(recipe: str) -> Compilation:
    config = compose_config([f"recipe={recipe}"])
    model = build_model(config.model, config.seed)
    return compile_with_report(model, config, example=example_inputs(model, config.data.seq_len))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plan(recipe: str, bless: Callable[[str, str], None]) -> None:
    text = to_yaml(compiled(recipe).plan)
    bless(f"plans/{recipe}.yaml", text)
    assert from_yaml(text) == compiled(recipe).plan


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", ["rewritten", "lowered"])
def test_the_first_graph(recipe: str, stage: str, bless: Callable[[str, str], None]) -> None:
    fqn, graph = next(iter(compiled(recipe).graphs[stage].items()))
    bless(f"graphs/{recipe}.{stage}.txt", f"# {fqn}\n{graph_summary(graph)}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_0_is_the_dense_model(recipe: str) -> None:
    result = compiled(recipe)
    assert result.step0.max_abs_diff is None if result.step0.reason else result.step0.max_abs_diff <= 1e-4
