"""placement.yaml: made from loads, read into a plan, and refused in words where it does not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.load_history import LoadHistory
from moecompile.plan import Plan, from_yaml, save, to_yaml
from moecompile.planner.build_plan import build_plan
from moecompile.planner.cost_model.forecast import measured
from moecompile.planner.given import with_plan
from moecompile.planner.loads import _metrics, loads_of
from moecompile.planner.placement import make_placement, place_experts, read_placement, with_placement, write_placement
from moecompile.tasks import place
from tests.placements import random_placement
from tests.planner.test_given import FACTS, SITES

RECIPE = ["recipe=mixtral_ep", "mesh.ranks_per_node=2", "mesh.ep=2"]  # 8 experts in 2 layers
LOADS = [[8, 7, 6, 5, 1, 1, 1, 1], [1, 1, 1, 1, 5, 6, 7, 8]]


def planned(*overrides: str) -> Plan:
    return build_plan(SITES, with_placement(compose_config([*RECIPE, *overrides])), FACTS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a plan and two logged steps."""
    save(planned(), tmp_path / "plan.yaml")
    history = LoadHistory()
    names = [f"model.layers.{i}.mlp.router" for i in range(2)]
    for step, factor in ((1, 1), (2, 3)):
        loads = LOADS if step == 1 else LOADS[::-1]
        history.add(step, {n: [factor * x for x in row] for n, row in zip(names, loads, strict=True)})
    history.save(tmp_path / "load.npz")
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"load/{name}/{i}" for name in names for i in range(8)), "val_loss"])
        for loads in history.loads:
            writer.writerow([*loads.ravel().tolist(), ""])
        writer.writerow([*[""] * 16, 1.0])
    return tmp_path


def test_columns_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    """As one who writes the file may call them: 2 is before 10."""
    ids = [11, 2, 10, *range(2), *range(3, 10)]
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([[f"load/a.router/{i}" for i in ids], [100 + i for i in ids]])
    assert [rows.tolist() for rows in _metrics(tmp_path / "metrics.csv")["a.router"]] == [[*range(100, 112)]]


def test_loads_are_means_over_the_logged_steps(run: Path) -> None:
    plan = planned()
    means = [[(a + 3 * b) / 2 for a, b in zip(*pair, strict=True)] for pair in (LOADS, LOADS[::-1])]
    for path in (run, run / "load.npz", run / "metrics.csv"):
        assert loads_of(path, plan) == means
        assert loads_of(path, plan, last=1) == [[3 * x for x in row] for row in LOADS[::-1]]
    (run / "load.npz").unlink()
    assert loads_of(run, plan) == means


def test_the_task_writes_what_the_mesh_names(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    place.run(compose_config(["task=place", f"place.run={run}", "place.steps=1"]), out)
    result = json.loads((out / "result.json").read_text())
    assert [row["site"] for row in result["placement"]] == [site.fqn for site in SITES]
    assert [(row["before"], row["after"]) for row in result["placement"]] == [(26 / 15, 1.0)] * 2
    assert "1.733" in capsys.readouterr().out
    plan = planned(f"mesh.placement={out}")
    for layer, load in zip(plan.layers, LOADS[::-1], strict=True):
        rows = [sum(load[expert] for expert in layer.placement.experts_of(rank)) for rank in range(2)]
        assert rows == [15, 15] and layer.placement.order
    assert plan.hash != planned().hash and from_yaml(to_yaml(plan)) == plan

    other = tmp_path / "four"
    other.mkdir()
    place.run(compose_config(["task=place", f"place.run={run}", "mesh.ranks_per_node=4"]), other)
    assert len(read_placement(other / "placement.yaml")[0].ranks) == 4

    experts = [8, 8]
    by_id = measured(run / "load.npz", experts, 2)
    orders = [layer.placement.order for layer in plan.layers]
    assert by_id.p50 == 26 / 15  # at the first step, the two layers have each other's loads
    assert measured(run / "load.npz", experts, 2, orders=orders).p99 <= 16 / 15 + 1e-9


def test_one_rank_and_the_order_of_ids_need_no_order(tmp_path: Path) -> None:
    plan = planned()
    write_placement(tmp_path / "one.yaml", make_placement(planned(), LOADS, 1, 1))
    config = compose_config(["recipe=mixtral_ep", "mesh.ep=1", f"mesh.placement={tmp_path}/one.yaml"])
    assert [layer.placement.order for layer in build_plan(SITES, config, FACTS).layers] == [(), ()]
    write_placement(tmp_path / "same.yaml", make_placement(plan, [[0] * 8] * 2, 2, 1))
    assert planned(f"mesh.placement={tmp_path}/same.yaml") == plan


def test_ranks_that_are_even_already_stay() -> None:
    """Ranks that hold whole groups, of which a token takes equally many: other ranks would be so on average only."""
    groups = [[9, 1], [7, 3], [6, 4], [8, 2], [5, 5], [10, 0], [4, 6], [3, 7]]
    (placed,) = make_placement(planned_16(), [[rows for group in groups for rows in group]], 4, 1)
    assert placed.order == () and placed.after == 1
    even = [
        "recipe=mixtral_ep",
        "experts.num_routed=16",
        "routing.top_k=4",
        "routing.groups=4",
        "routing.even_groups=true",
    ]
    plan = build_plan(SITES[:1], compose_config(even), FACTS)
    # Means over three steps of 64 tokens, rounded: another order looks lighter by a thousandth.
    rounded = [
        16.667, 6.667, 39.333, 1.333, 12.0, 6.333, 33.333, 12.333, 18.0, 6.667, 8.0, 31.333, 8.667, 17.667, 31.0, 6.667
    ]  # fmt: skip
    assert place_experts(rounded, 4) != tuple(range(16))
    assert make_placement(plan, [rounded], 4, 1)[0].order == ()


def planned_16() -> Plan:
    return build_plan(SITES[:1], compose_config(["recipe=mixtral_ep", "experts.num_routed=16"]), FACTS)


def test_groups_stay_on_a_node(tmp_path: Path) -> None:
    mesh = ["recipe=mixtral_ep", "mesh=cpu_2x2", "routing.groups=4", "routing.top_groups=2"]
    plan = build_plan(SITES, compose_config(mesh), FACTS)
    (placed, _) = make_placement(plan, LOADS, 4, 2)
    for group in range(4):
        held = {rank // 2 for rank, experts in enumerate(placed.ranks) for e in experts if e // 2 == group}
        assert len(held) == 1
    assert placed.after == pytest.approx(9 / 7.5) and placed.before == pytest.approx(2.0)

    body = [{"site": site.fqn, "ranks": [[0, 2], [4, 6], [1, 3], [5, 7]], "load": [1] * 8} for site in SITES]
    file = tmp_path / "split.yaml"
    file.write_text(yaml.safe_dump({"format": 1, "ep": 4, "layers": body}))
    with pytest.raises(ConfigError) as caught:
        build_plan(SITES, compose_config([*mesh, f"mesh.placement={file}"]), FACTS)
    assert str(caught.value) == (
        f"mesh.placement={file}: layers.0.mlp: splits the experts of group 0 over nodes, so tokens would reach more "
        "nodes than planned. Make it again with task=place."
    )


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides)
    return str(caught.value)


def test_what_does_not_fit_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "placement.yaml"
    name = f"mesh.placement={file}"
    assert message(name) == (f"{name}: is neither a placement.yaml nor a run directory with one. Give the path of one.")
    random_placement(planned().layers, file, 0)
    assert message(name, "mesh.ep=1") == f"{name}: is for mesh.ep=2, this mesh has ep=1. Make it again with task=place."
    assert message(name, "experts.num_routed=4") == (
        f"{name}: is of another model: it has 8 experts at layers.0.mlp, the plan has 4 experts. "
        "Give a placement of this model."
    )
    assert message(name, "experts.layers=1:") == (
        f"{name}: is of another model: it has 8 experts at layers.0.mlp, the plan has none. "
        "Give a placement of this model."
    )
    assert message(name, "task=search").startswith(f"{name}: task=search looks for another one.")
    body = yaml.safe_load(file.read_text())
    body["layers"][1]["ranks"][0][0] = body["layers"][1]["ranks"][1][0]
    file.write_text(yaml.safe_dump(body))
    assert message(name) == (
        f"{name}: must place the 8 experts of layers.1.mlp once, equally many on each of 2 ranks. "
        "Make it again with task=place."
    )
    for text in ("[", "format: 2\nep: 2\nlayers: []", "ep: 2", "format: 1\nep: 2\nlayers: 3"):
        file.write_text(text)
        assert message(name).startswith(f"{name}: is not a placement: ")


def test_a_given_plan_has_a_placement_of_its_own(tmp_path: Path) -> None:
    save(planned(), tmp_path / "plan.yaml")
    random_placement(planned().layers, tmp_path / "placement.yaml", 0)
    config = compose_config([*RECIPE, f"plan={tmp_path}", f"mesh.placement={tmp_path}"])
    with pytest.raises(ConfigError, match=r"mesh.placement=.*: the plan of .* decides that"):
        with_plan(with_placement(config))


def test_loads_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"place.run=.*: is of another model: layers.0.mlp has 8 experts in it, 4 here"
    ):
        loads_of(run, planned("experts.num_routed=4"))
    with pytest.raises(ConfigError, match=r"has loads of 2 MoE layers, the plan has 1"):
        loads_of(run, planned("experts.layers=1:"))
    whole = (run / "load.npz").read_bytes()
    for cut in (b"no", b"", whole[: len(whole) // 2]):
        (run / "load.npz").write_bytes(cut)
        with pytest.raises(ConfigError, match=r"place.run=.*load.npz: cannot be read"):
            loads_of(run, planned())
    (run / "cut.csv").write_text("step,load/a/0,load/a/1\n1,3")  # as the run was killed
    with pytest.raises(ConfigError, match=r"place.run=.*cut.csv: has no loads of experts"):
        loads_of(run / "cut.csv", planned())
    with pytest.raises(ConfigError, match=r"is neither a run directory with load.npz or metrics.csv"):
        loads_of(tmp_path / "nowhere", planned())
    with pytest.raises(ConfigError, match=r"place.run=null: names no run"):
        place.run(compose_config(["task=place"]), tmp_path)
    with pytest.raises(ConfigError, match=r"mesh.ep=3: must divide the 8 experts of layers.0.mlp"):
        make_placement(planned(), np.array(LOADS).tolist(), 3, 1)
