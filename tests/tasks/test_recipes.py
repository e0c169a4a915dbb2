"""Every shipped recipe: what it says of itself, and a few steps of training on the embedded text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.compose import compose_config, conf_dir
from tests.forked import python
from tests.models.packaged import REAL
from tests.tiny import SHORT

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml") if path.stem not in REAL)
NUM_LAYERS = {
    "deepseek_ep": 5, "deepseek_v2": 5, "gpt_oss": 4, "mixtral_ep": 4, "olmoe": 4, "qwen3_moe": 4, "switch_ep": 4,
    "kimi_k3": 5, "nemotron3": 4, "longcat": 6, "deepseek_v4": 6, "qwen4": 2,
}  # fmt: skip
# Two ranks, so that each recipe has an exchange; what a recipe is (experts, routing, balance, dispatch) stays.
SMALL = [
    "mesh=cpu_1x2", "data.vocab_size=300", "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=4",
    "data.val_batches=2", "data.val_fraction=0.01", "trainer.max_steps=3", "trainer.log_interval=1",
    "trainer.progress_bar=false", "trainer.save_checkpoint=false", SHORT,
]  # fmt: skip
EXPECTED_LOSS = r"expected loss: validation (\d\.\d+(?: to \d\.\d+)?)"


def header(recipe: str) -> str:
    """The comment at the top of a recipe, as one line."""
    lines = (conf_dir() / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def test_the_table_below_knows_every_recipe() -> None:
    assert sorted(NUM_LAYERS) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_says_what_was_measured(recipe: str) -> None:
    """Hardware, minutes, and a validation loss after the steps that the recipe asks for."""
    text = header(recipe)
    config = compose_config([f"recipe={recipe}"])
    assert re.search(r"hardware: two cores, \d+ GiB, (one|two|four) CPU process(es)?\b", text)
    assert re.search(r"time: (about )?\d+( to \d+)? minutes", text)
    found = re.search(EXPECTED_LOSS + r" nats per token after (\d+) steps, from (\d\.\d+)", text)
    assert found, text
    assert int(found[2]) == config.trainer.max_steps
    assert float(found[1].split()[-1]) < float(found[3]) - 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_page_of_recipes_says_the_same(recipe: str) -> None:
    loss = re.search(EXPECTED_LOSS, header(recipe))
    assert loss is not None
    page = (REPOSITORY / "docs" / "use" / "recipes.md").read_text(encoding="utf-8")
    row = next(
        line for line in page.splitlines() if line.startswith((f"| `{recipe}` | dense", f"| `{recipe}` | Qwen4"))
    )
    assert f"| {loss[1]} |" in row


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_selects_every_group_that_decides_what_is_computed(recipe: str) -> None:
    content = yaml.safe_load((conf_dir() / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    selected = {key.removeprefix("override /") for item in content["defaults"] for key in item}
    own = recipe == "qwen4"  # its model has experts and routers already
    assert selected >= {"model", "balance", "mesh", "dispatch"} | ({"experts", "routing"} if not own else set())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One multirun over all recipes."""
    folder = tmp_path_factory.mktemp("recipes")
    arguments = ["-m", f"recipe={','.join(RECIPES)}", *SMALL, "hydra.sweep.dir=swept"]
    run = python("-m", "moecompile", *arguments, cwd=folder, timeout_s=1500)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "swept"


def result_of(sweep: Path, recipe: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sweep / str(RECIPES.index(recipe)) / "result.json").read_text())
    assert found["recipe"] == recipe
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_on_real_text(sweep: Path, recipe: str) -> None:
    result = result_of(sweep, recipe)
    assert (result["status"], result["steps"], result["world_size"]) == ("ok", 3, 2)
    assert result["num_rewritten"] == NUM_LAYERS[recipe]
    assert all(math.isfinite(result[key]) for key in ("loss_first", "loss_last", "val_loss"))
    assert result["val_loss"] < result["val_loss_first"]
    assert result["bytes_per_token_per_layer"]["intra_node"] > 0
    promised = recipe in ("deepseek_ep", "gpt_oss", "mixtral_ep", "qwen3_moe", "qwen4")
    assert (result["step0_max_abs_diff"] is not None) == promised, result["step0_reason"]


@pytest.mark.slow
def test_what_a_recipe_is_known_for_happens(sweep: Path) -> None:
    assert result_of(sweep, "switch_ep")["drop_rate_last"] > 0
    assert all(result_of(sweep, recipe)["drop_rate_last"] == 0 for recipe in RECIPES if recipe != "switch_ep")
    columns = {
        recipe: (sweep / str(RECIPES.index(recipe)) / "metrics.csv").read_text().splitlines()[0] for recipe in RECIPES
    }
    losses = {recipe: set(re.findall(r"\baux/(\w+)", found)) for recipe, found in columns.items()}
    assert losses == {
        "deepseek_ep": {"sequence"}, "deepseek_v2": {"sequence"}, "gpt_oss": {"micro_batch"}, "mixtral_ep": {"micro_batch"},
        "olmoe": {"micro_batch", "z"}, "qwen3_moe": {"global_batch"}, "switch_ep": {"micro_batch"},
        "kimi_k3": set(), "nemotron3": {"sequence"}, "longcat": {"sequence"}, "deepseek_v4": {"sequence"}, "qwen4": {"micro_batch"},
    }  # fmt: skip


@pytest.mark.slow
def test_the_recipes_are_compared_in_one_picture(sweep: Path) -> None:
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
