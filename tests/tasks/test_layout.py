"""`mesh=auto`: no layout that trains the same is predicted to be faster, and what was chosen is what runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from torch import nn

from moecompile.compose import compose_config, load_resolved
from moecompile.errors import ConfigError, MoecompileError
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.pipeline import make_plan
from moecompile.pipeline.shape import shape_of_model
from moecompile.planner.cost_model.forecast import forecast_plan
from moecompile.schema import Config, DispatchKind
from moecompile.tasks.layout import with_layout
from tests.forked import python

RECIPE = ["recipe=mixtral_ep", "model.config.num_hidden_layers=1"]
SLOW_LINKS = ["hardware.inter_node_gb_s=0.001"]


def predicted(model: nn.Module, config: Config, **settings: object) -> tuple[float, bool]:
    """Seconds and whether it fits, of the plan that task=plan makes; infinite where there is none."""
    mesh = {key: value for key, value in settings.items() if key in vars(config.mesh)}
    dispatch = {key: value for key, value in settings.items() if key in vars(config.dispatch)}
    config = replace(config, mesh=replace(config.mesh, **mesh), dispatch=replace(config.dispatch, **dispatch))
    try:
        plan = make_plan(model, config, example=example_inputs(model, 8))
        seconds = forecast_plan(shape_of_model(model, plan), plan, config).seconds
    except MoecompileError:
        return math.inf, False
    assert plan.estimate is not None
    return seconds, plan.estimate.fits == "yes"


@pytest.mark.parametrize(
    "given",
    [
        ["mesh.ranks_per_node=4"],
        pytest.param(
            ["mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch=auto", "dispatch.overlap=auto", *SLOW_LINKS],
            marks=pytest.mark.slow,
        ),
        pytest.param(  # 8 does not divide 6
            ["experts.num_routed=6", "mesh.ranks_per_node=8", "dispatch=auto"], marks=pytest.mark.slow
        ),
        ["mesh.dp_replicate=2"],
    ],
)
def test_no_other_layout_is_predicted_to_be_faster(given: list[str]) -> None:
    base = [*RECIPE, "mesh=auto", *given]
    config = compose_config([*base, "task=plan"])
    model, chosen = source_model(config), with_layout(config)
    mesh, dispatch, sizes = chosen.mesh, chosen.dispatch, (1, 2, 4, 8)
    replicas = sizes if "mesh.dp_replicate=2" not in given else (2,)
    kinds = [each for each in DispatchKind if each.value not in ("auto", "local")]
    others = [
        predicted(model, config, ep=ep, dp_replicate=number, kind=kind)
        for ep, number, kind in product(sizes, replicas, kinds if "dispatch=auto" in given else [config.dispatch.kind])
    ]
    assert sum(math.isfinite(seconds) for seconds, _ in others) > 1
    seconds, fits = predicted(
        model, config, ep=mesh.ep, dp_replicate=mesh.dp_replicate, kind=dispatch.kind, overlap=dispatch.overlap,
        chunks=dispatch.chunks,
    )  # fmt: skip
    assert fits and seconds <= min(seconds for seconds, _ in others)
    if "mesh.dp_replicate=2" in given:
        assert mesh.dp_replicate == 2


def test_experts_stay_within_a_node_where_tokens_are_more_than_weights() -> None:
    """Over slow links, few tokens travel rather than gradients of replicated experts, and many stay at home."""
    base = [*RECIPE, "task=plan", "mesh=auto", "mesh.num_nodes=2", "mesh.ranks_per_node=2", *SLOW_LINKS]
    many = ["data.micro_batch_size=256", "data.global_batch_size=1024", "hardware.memory_gib=64"]
    assert with_layout(compose_config(base)).mesh.ep == 4
    assert with_layout(compose_config([*base, *many])).mesh.ep in (1, 2)


def test_python_callers_get_the_same_plan() -> None:
    config = with_layout(compose_config([*RECIPE, "mesh=auto"]))
    model = source_model(config)
    example = example_inputs(model, config.data.seq_len)
    plan = make_plan(model, [*RECIPE, "mesh=auto"], example=example)
    assert (plan.mesh.ep, plan.mesh.dp_replicate) == (config.mesh.ep, config.mesh.dp_replicate)
    named = make_plan(model, [*RECIPE, "mesh=auto", f"mesh.ep={config.mesh.ep}"], example=example)
    assert plan.hash == named.hash


def test_a_plan_where_none_fits_is_that_of_the_least_memory(capsys: pytest.CaptureFixture[str]) -> None:
    config = with_layout(compose_config([*RECIPE, "task=plan", "mesh=auto", "hardware.memory_gib=0.001"]))
    assert config.mesh.ep == 4
    assert capsys.readouterr().out == (
        "mesh.ep=search: mesh.ep=4 mesh.dp_replicate=1  (needs the least memory, none fits)\n"
    )


def test_a_preset_says_the_ep_size_of_its_own_ranks() -> None:
    for preset, ep in (("h100_2x8", 16), ("h100_8", 8), ("h800_256x8", 64), ("gb200_1x64", 64)):
        assert compose_config([f"mesh={preset}"]).mesh.ep == ep
        assert compose_config([f"mesh={preset}", "mesh.num_nodes=16"]).mesh.ep == "search"
        assert compose_config([f"mesh={preset}", "mesh.num_nodes=16", "mesh.ep=4"]).mesh.ep == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["hardware.memory_gib=0.001", "task=train"], r"mesh.ep=search: the smallest layout needs 0\.0\d+ GiB a rank, and hardware.memory_gib=0.001\. Give what a rank really has if it is more, hardware\.memory_gib=1,"),
        (["hardware.figures.latency_us.value=null"], r"mesh.ep=search: no layout can be planned: hardware.figures.latency_us.value"),
        (["experts.granularity=5"], r"experts.granularity=5"),
        (["mesh.ranks_per_node=16", "task=train"], r"data.global_batch_size=16: must be a multiple"),
        (["mesh.ep=some"], r"mesh.ep=some: must be a number, auto or search"),
        (["routing.max_nodes=2"], r"routing.max_nodes=2: the mesh has 1 node"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_one_message(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_layout(compose_config([*RECIPE, "task=plan", "mesh=auto", *given]))


def test_ranks_are_those_that_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vars(compose_config(["mesh=auto"]).mesh).items() >= {"num_nodes": 1, "ranks_per_node": 4}.items()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert vars(compose_config(["mesh=auto"]).mesh).items() >= {"num_nodes": 3, "ranks_per_node": 2}.items()


@pytest.mark.slow
def test_torchrun_trains_what_was_chosen(tmp_path: Path) -> None:
    done = python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "moecompile", *RECIPE, "mesh=auto",
        "trainer.max_steps=1", "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("mesh.ep=search: mesh.ep=") == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    mesh = load_resolved(tmp_path / "out" / "resolved.yaml").mesh
    assert result["world_size"] == 2 and f"mesh.ep={mesh.ep} " in done.stdout
